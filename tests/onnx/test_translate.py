"""Parts of ONNX graphs as torch modules, against onnxruntime and the exported torch modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx_genai import genai_inputs, genai_llama  # noqa: E402
from onnx_models import exported_llama, mlp_model, tiny_causal_lm  # noqa: E402

from aimet_ext.errors import TransformRefused  # noqa: E402
from aimet_ext.onnx.graph import OnnxGraph  # noqa: E402
from aimet_ext.onnx.layers import find_layers  # noqa: E402
from aimet_ext.onnx.ops import translate as onnx_ops  # noqa: E402
from aimet_ext.onnx.ops.translate import TranslatedGraph, check_translation  # noqa: E402

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 4},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt_neox": {},
}


def tokens(batch: int = 2, seq: int = 10) -> tuple[Tensor, Tensor]:
    """Ids and a mask with padding on the right."""
    ids = torch.randint(3, 128, (batch, seq), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[-1, seq - 3 :] = 0
    return ids, mask


def whole(model: Any, output: str = "logits") -> tuple[OnnxGraph, TranslatedGraph]:
    """A model's graph and all of it in torch, linear layers by their own names."""
    graph = OnnxGraph(model)
    layers = {name: x for name, x in find_layers(graph).items() if x.kind == "linear"}
    inputs = list(graph.inputs)
    nodes = graph.subgraph(inputs, [output])
    roles = {f"linears.{i}": layer for i, layer in enumerate(layers.values())}
    return graph, TranslatedGraph(graph, nodes, inputs, [output], roles)


def feeds(graph: OnnxGraph, *inputs: Tensor) -> list[dict[str, np.ndarray[Any, Any]]]:
    return [{name: x.numpy() for name, x in zip(graph.inputs, inputs, strict=True)}]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_onnxruntime_and_torch(family: str) -> None:
    exported = exported_llama(family=family, **FAMILIES[family])
    graph, module = whole(exported.model)
    ids, mask = tokens()
    assert check_translation(graph, module, feeds(graph, ids, mask), 1e-5) < 1e-5
    with torch.no_grad():
        expected = exported.module(ids, mask)[mask.bool()]
        found = module(ids, mask)[mask.bool()]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_builders_graph_equals_onnxruntime_and_torch(family: str) -> None:
    model, causal_lm = genai_llama(tiny_causal_lm(family))
    graph, module = whole(model)
    ids, mask = tokens()
    given = genai_inputs(model, ids, mask)
    assert check_translation(graph, module, [given], 1e-5) < 1e-5
    with torch.no_grad():
        expected = causal_lm(ids, attention_mask=mask).logits[mask.bool()]
        inputs = [torch.from_numpy(given[name]) for name in graph.inputs]
        found = module(*inputs)[mask.bool()]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_gradients_are_those_of_the_exported_module() -> None:
    exported = exported_llama(bias=True)
    _, module = whole(exported.model)
    ids, mask = tokens()
    names = {node: name for name, node in exported.names.items()}
    layers = [
        layer for layer in find_layers(OnnxGraph(exported.model)).values() if layer.kind == "linear"
    ]
    module(ids, mask)[mask.bool()].square().mean().backward()
    exported.module.zero_grad()
    exported.module(ids, mask)[mask.bool()].square().mean().backward()
    assert len(layers) == 15
    for i, layer in enumerate(layers):
        linear = module.get_submodule(f"linears.{i}")
        reference = exported.module.get_submodule(names[layer.name])
        for key, parameter in reference.named_parameters():
            expected = parameter.grad
            assert expected is not None
            found = linear.get_parameter(key).grad
            torch.testing.assert_close(
                found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
            )


def test_in_float64_everything_is() -> None:
    ids, mask = tokens()
    model, _ = genai_llama()
    _, module = whole(exported_llama(family="gemma2", sliding_window=4).model)
    _, builders = whole(model)
    prompt = [torch.from_numpy(x) for x in genai_inputs(model, ids, mask).values()]
    for function, inputs in ((module, [ids, mask]), (builders, prompt)):
        single = function(*inputs)
        found = function.double()(*inputs)
        assert found.dtype == torch.float64
        assert 0 < (found - single).abs().max().item() < 1e-5 * single.abs().max().item()


def rescaled_model() -> Any:
    """``y = Cast(W (Cast(x) · g))``, casts to float32 in between."""
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    gain = np.array([0.5, 3.0, 7.0, 0.1], np.float32)
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], "in", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["a", "gain"], ["b"], "scale"),
        helper.make_node("Cast", ["b"], ["c"], "again", to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["c", "weight"], ["d"], "product"),
        helper.make_node("Add", ["bias", "d"], ["y"], "add"),
    ]
    graph = helper.make_graph(
        nodes,
        "rescaled",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(gain, "gain"),
            numpy_helper.from_array(np.ones(3, np.float32), "bias"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def small(**changes: Any) -> tuple[OnnxGraph, TranslatedGraph]:
    graph = OnnxGraph(rescaled_model())
    layer = find_layers(graph)["product"]
    arguments: dict[str, Any] = {
        "nodes": graph.subgraph(["x"], ["y"]),
        "inputs": ["x"],
        "outputs": ["y"],
        "linears": {"mlp.down": layer},
        "parameters": {"norm.weight": "gain"},
        **changes,
    }
    return graph, TranslatedGraph(graph, **arguments)


def test_a_rescaling_is_exact_in_float64_through_casts() -> None:
    """(x · g / s) (W s)ᵀ = (x · g) Wᵀ"""
    _, module = small()
    module = module.double()
    x = torch.randn(5, 4, dtype=torch.float64)
    scale = torch.tensor([0.3, 1.7, 2.9, 0.7], dtype=torch.float64)
    changed = {
        "norm.weight": module.get_parameter("norm.weight") / scale,
        "mlp.down.weight": module.get_parameter("mlp.down.weight") * scale,
    }
    found = torch.func.functional_call(module, changed, (x,))
    torch.testing.assert_close(found, module(x), rtol=1e-14, atol=1e-14)


def test_layers_and_parameters_by_the_names_given() -> None:
    graph, module = small()
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "mlp.down.weight": (3, 4),
        "mlp.down.bias": (3,),
        "norm.weight": (4,),
    }
    assert isinstance(module.get_submodule("mlp.down"), torch.nn.Linear)
    x = torch.randn(5, 4)
    expected = (x * graph.tensor("gain")) @ graph.tensor("weight") + 1
    torch.testing.assert_close(module(x), expected)


def test_the_model_is_not_written_to() -> None:
    graph, module = small()
    before = graph.proto.SerializeToString(deterministic=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        assert not module(torch.randn(2, 4)).any()
    assert graph.proto.SerializeToString(deterministic=True) == before


def test_parts_and_several_outputs() -> None:
    graph, module = small(
        nodes=range(5), inputs=["b"], outputs=["y", "c"], parameters={}, linears={}
    )
    x = torch.randn(5, 4)
    y, c = module(x)
    assert torch.equal(c, x)
    torch.testing.assert_close(y, x @ graph.tensor("weight") + 1)
    assert not list(module.parameters())


def test_shared_weights_are_one_submodule() -> None:
    model = mlp_model([8, 8, 8], bias=None, seed=0)
    first, second = (node for node in model.graph.node if node.op_type in ("MatMul", "Gemm"))
    second.input[1] = first.input[1]
    graph = OnnxGraph(model)
    (layer,) = find_layers(graph).values()
    assert len(layer.uses) == 2
    (source,), target = graph.inputs, graph.outputs[0]
    module = TranslatedGraph(
        graph, graph.subgraph([source], [target]), [source], [target], {"shared": layer}
    )
    assert [name for name, _ in module.named_parameters()] == ["shared.weight"]
    x = torch.randn(3, 8)
    assert check_translation(graph, module, [{source: x.numpy()}]) < 1e-6


def test_constants_are_computed_once() -> None:
    exported = exported_llama()
    _, module = whole(exported.model)
    left = [step.node.op_type for step in module._steps]
    assert "Constant" not in left
    assert len(left) < 0.7 * len(exported.model.graph.node)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="'d' is made by none of the nodes given, or lies between"):
        small(outputs=["d"])
    with pytest.raises(ValueError, match=r"must follow from \['y'\].*but 'x' is needed too"):
        small(inputs=["y"], outputs=["b"], linears={}, nodes=range(5))
    with pytest.raises(ValueError, match=r"layer 'product' \(mlp.down\) has no use among the nod"):
        small(nodes=[0, 1], outputs=["b"])
    with pytest.raises(ValueError, match="the name 'norm' is taken"):
        small(parameters={"norm.weight": "gain", "norm": "bias"})
    _, module = small()
    with pytest.raises(ValueError, match=r"1 inputs \['x'\] are required, got 2"):
        module(torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"Mul 'scale' on inputs of shapes \[\(2, 5\), \(4,\)\]"):
        module(torch.zeros(2, 5))


def test_one_initializer_by_two_names_is_one_parameter() -> None:
    _, module = small(parameters={"norm.weight": "gain", "other.weight": "gain"})
    assert module.get_parameter("other.weight") is module.get_parameter("norm.weight")
    assert "norm.weight" in dict(module.named_parameters())


def test_all_operators_without_a_torch_form_are_listed() -> None:
    model = rescaled_model()
    model.graph.node[0].op_type = "Hardmax"
    model.graph.node[1].op_type = "Xor2"
    graph = OnnxGraph(model)
    with pytest.raises(TransformRefused, match=r"ai.onnx::Hardmax \(in\); ai.onnx::Xor2 \(scale\)"):
        TranslatedGraph(graph, range(5), ["x"], ["y"])


def test_an_old_opset_is_refused() -> None:
    model = rescaled_model()
    model.opset_import[0].version = 6
    with pytest.raises(
        TransformRefused, match="opset of 9 or later is translated, the model has 6"
    ):
        TranslatedGraph(OnnxGraph(model), range(5), ["x"], ["y"])


def test_the_node_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    exported = exported_llama()
    ids, mask = tokens()
    graph, module = whole(exported.model)
    wrong = dict(onnx_ops.OPERATORS)
    wrong["", "Sigmoid"] = lambda attributes, inputs, opset: torch.sigmoid(1.01 * inputs[0])
    monkeypatch.setattr(onnx_ops, "OPERATORS", wrong)
    with pytest.raises(TransformRefused, match=r"first node that differs is Sigmoid .*mlp/act_fn"):
        check_translation(graph, module, feeds(graph, ids, mask), 1e-5)


def test_weights_that_differ_are_told_from_nodes_that_do() -> None:
    graph, module = small()
    with torch.no_grad():
        module.get_parameter("norm.weight").mul_(1.5)
    x = np.ones((2, 4), np.float32)
    with pytest.raises(TransformRefused, match=r"no node differs alone: .* or weights are not"):
        check_translation(graph, module, [{"x": x}])
    with pytest.raises(ValueError, match="at least one feed is required"):
        check_translation(graph, module, [])


@pytest.mark.parametrize("family", ["llama", "gpt2", "builder"])
def test_on_a_device_shapes_stay_on_the_host(family: str) -> None:
    """The meta device has no values: reading a shape from it would fail."""
    ids, mask = tokens()
    if family == "builder":
        model, _ = genai_llama()
        _, module = whole(model)
        inputs = [torch.from_numpy(x) for x in genai_inputs(model, ids, mask).values()]
    else:
        _, module = whole(exported_llama(family=family, **FAMILIES[family]).model)
        inputs = [ids, mask]
    found = module.to("meta")(*(x.to("meta") for x in inputs))
    assert found.device.type == "meta"
    assert found.shape == (2, 10, 128)
