"""ONNX models seen as float graphs: nodes, stored values, types, parts that run alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx_models import (  # noqa: E402
    conv_model,
    exported_llama,
    genai_inputs,
    genai_llama,
    mlp_model,
    run_onnx,
)

from aimet_ext.onnx.graph import OnnxGraph  # noqa: E402
from aimet_ext.onnx.layers import find_layers  # noqa: E402

FLOAT = TensorProto.FLOAT


def simulated(model, dummy_input=None):
    """The model with AIMET's quantizers and fusions in it."""
    aimet_onnx = pytest.importorskip("aimet_onnx")
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    sim = aimet_onnx.QuantizationSimModel(copied, param_type="int4", dummy_input=dummy_input)
    return sim.model.model


def genai_simulated(model):
    """AIMET has to run it: onnx does not infer the types behind its operators."""
    return simulated(model, genai_inputs(model, torch.ones(1, 3, dtype=torch.long)))


def weights_of(graph: OnnxGraph) -> set[str]:
    return {name for name, tensor in graph.initializers.items() if len(tensor.dims) > 1}


# ------------------------------------------------------------------------------ the graph


@pytest.mark.parametrize("bias", ["gemm", "add", None])
@pytest.mark.parametrize("transposed", [False, True])
def test_quantizers_and_fusions_are_seen_through(bias, transposed) -> None:
    model = mlp_model(bias=bias, transposed=transposed)
    plain, seen = OnnxGraph(model), OnnxGraph(simulated(model))
    assert [(n.op_type, n.name, list(n.output)) for n in seen.nodes] == [
        (n.op_type, n.name, list(n.output)) for n in plain.nodes
    ]
    assert [list(n.input) for n in seen.nodes] == [list(n.input) for n in plain.nodes]
    assert (seen.outputs, seen.opset) == (plain.outputs, plain.opset)
    assert set(seen.inputs) == set(plain.inputs) == {"x"}
    assert dict(find_layers(seen)) == dict(find_layers(plain))


@pytest.mark.parametrize("kind", ["conv", "llama", "genai"])
def test_a_simulation_of_any_model_is_the_model(kind) -> None:
    build = {"conv": conv_model, "llama": lambda: exported_llama().model}
    model = genai_llama()[0] if kind == "genai" else build[kind]()
    sim = genai_simulated(model) if kind == "genai" else simulated(model)
    plain, seen = OnnxGraph(model), OnnxGraph(sim)
    assert {n.name: list(n.input) for n in seen.nodes} == {
        n.name: list(n.input) for n in plain.nodes
    }
    assert dict(find_layers(seen)).keys() == dict(find_layers(plain)).keys()


def test_nodes_come_in_order_whatever_theirs_was() -> None:
    model = mlp_model()
    shuffled = onnx.ModelProto()
    shuffled.CopyFrom(model)
    nodes = list(shuffled.graph.node)[::-1]
    del shuffled.graph.node[:]
    shuffled.graph.node.extend(nodes)
    assert [n.name for n in OnnxGraph(shuffled).nodes] == [n.name for n in model.graph.node]


def test_a_cycle_and_a_tensor_from_nowhere_are_errors() -> None:
    model = mlp_model()
    model.graph.node[0].input[0] = "fc1_out"
    with pytest.raises(ValueError, match="must not form a cycle"):
        OnnxGraph(model)
    model.graph.node[0].input[0] = "nowhere"
    with pytest.raises(ValueError, match="Gemm 'fc0' reads 'nowhere'"):
        OnnxGraph(model)


def test_a_part_computes_what_the_whole_does() -> None:
    model = conv_model()
    graph = OnnxGraph(simulated(model))
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    middle, expected = run_onnx(model, feeds, ["residual_relu_out", "y"])
    nodes = graph.subgraph(["residual_relu_out"], ["y"])
    assert "stem" not in {graph.nodes[index].name for index in nodes}
    part = graph.model(nodes, ["residual_relu_out"], ["y"])
    assert not {t.name for t in part.graph.initializer} & {"stem.weight", "conv1.weight"}
    found = run_onnx(part, {"residual_relu_out": middle})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_part_without_its_weights_takes_them_from_outside() -> None:
    import onnxruntime as ort

    model = mlp_model()
    graph = OnnxGraph(model)
    feeds = {"x": np.ones((3, 8), np.float32)}
    nodes = graph.subgraph(["x"], ["y"])
    drop = weights_of(graph)
    given = {name: graph.array(name) for name in drop}
    external = graph.model(nodes, ["x"], ["y"], drop=drop)
    assert external.ByteSize() < sum(array.nbytes for array in given.values())
    options = ort.SessionOptions()
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in given.values()]
    options.add_external_initializers(list(given), values)
    session = ort.InferenceSession(external.SerializeToString(), options)
    np.testing.assert_allclose(
        session.run(None, feeds)[0], run_onnx(model, feeds)[0], rtol=1e-5, atol=1e-6
    )


def test_what_cannot_be_computed_is_named() -> None:
    graph = OnnxGraph(mlp_model())
    with pytest.raises(ValueError, match=r"'x' is needed too \(input of the graph\)"):
        graph.subgraph([], ["y"])
    with pytest.raises(ValueError, match=r"'other' is needed too \(tensor nobody makes\)"):
        graph.subgraph(["x"], ["other"])
    with pytest.raises(ValueError, match="not in it or whose type cannot be told"):
        graph.elem_type("other")
    with pytest.raises(ValueError, match="an initializer or the value of a Constant"):
        graph.array("fc0_out")


@pytest.mark.parametrize("kind", ["llama", "genai"])
def test_types_are_known_of_every_tensor(kind) -> None:
    """Behind contrib operators too, which shape inference does not know."""
    if kind == "genai":
        model = genai_llama()[0]
        feeds = genai_inputs(model, torch.ones(1, 3, dtype=torch.long))
        graph = OnnxGraph(genai_simulated(model))
    else:
        model = exported_llama().model
        feeds = {v.name: np.ones((1, 3), np.int64) for v in model.graph.input}
        graph = OnnxGraph(simulated(model))
    names = [name for name in graph.producer if graph.elem_type(name)]
    assert len(names) > 40
    for name, array in zip(names, run_onnx(model, feeds, names), strict=True):
        assert graph.elem_type(name) == helper.np_dtype_to_tensor_dtype(array.dtype), name


# ------------------------------------------------------------------------------ stored values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("typed", [False, True])
def test_values_are_read_and_written_in_their_own_type(dtype, typed) -> None:
    kinds = {
        torch.float32: FLOAT,
        torch.float16: TensorProto.FLOAT16,
        torch.bfloat16: TensorProto.BFLOAT16,
        torch.float64: TensorProto.DOUBLE,
    }
    values = torch.arange(6, dtype=dtype).view(2, 3) / 4
    kind = kinds[dtype]
    if typed:  # in the fields that have a type, not as bytes
        tensor = helper.make_tensor("w", kind, [2, 3], values.flatten().tolist())
    else:
        array = values.double().numpy().astype(helper.tensor_dtype_to_np_dtype(kind))
        tensor = numpy_helper.from_array(array, "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "m")]
    inputs = [helper.make_tensor_value_info("x", kind, [1, 2])]
    outputs = [helper.make_tensor_value_info("y", kind, [1, 3])]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, [tensor]))
    graph = OnnxGraph(model)
    assert graph.tensor("w").dtype is dtype and graph.tensor_dtype("w") is dtype
    torch.testing.assert_close(graph.tensor("w"), values, rtol=0, atol=0)
    graph.tensor("w").zero_()  # a copy
    graph.set_tensor("w", values.float() + 1)
    torch.testing.assert_close(OnnxGraph(model).tensor("w"), values + 1, rtol=0, atol=0)


def test_values_of_another_shape_or_type_are_refused() -> None:
    graph = OnnxGraph(mlp_model())
    with pytest.raises(ValueError, match=r"fc0.weight: values of shape \(16, 8\)"):
        graph.set_array("fc0.weight", np.zeros((8, 16), np.float32))
    with pytest.raises(ValueError, match="type float32 are required"):
        graph.set_array("fc0.weight", np.zeros((16, 8)))


def test_external_data_is_read_where_it_is(tmp_path) -> None:
    model = mlp_model()
    expected = OnnxGraph(model).array("fc1.weight")
    feeds = {"x": np.ones((1, 8), np.float32)}
    y = run_onnx(model, feeds)[0]
    onnx.save_model(
        model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    bare = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    graph = OnnxGraph(bare, base_dir=str(tmp_path))
    np.testing.assert_array_equal(graph.array("fc1.weight"), expected)
    part = graph.model(graph.subgraph(["x"], ["y"]), ["x"], ["y"])
    np.testing.assert_array_equal(run_onnx(part, feeds)[0], y)
    graph.set_array("fc1.weight", expected * 2)
    np.testing.assert_array_equal(graph.array("fc1.weight"), expected * 2)
