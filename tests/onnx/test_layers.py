"""Layers found in ONNX graphs, and the torch modules that stand for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx_models import conv_model, mlp_model, run_onnx  # noqa: E402

from aimet_ext.core.transposed import as_convolution  # noqa: E402
from aimet_ext.data.geometry import Geometry  # noqa: E402
from aimet_ext.onnx.graph import OnnxGraph  # noqa: E402
from aimet_ext.onnx.layers import find_layers, node_names  # noqa: E402
from aimet_ext.onnx.shells import module_tree, shell  # noqa: E402

FLOAT = TensorProto.FLOAT


def test_every_way_to_store_a_linear_layer_is_the_same_layer() -> None:
    """The shell's weight is torch's, and with the bias it computes what the node does."""
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for bias in ("gemm", "add", None):
        for transposed in (False, True):
            model = mlp_model(bias=bias, transposed=transposed)
            graph = OnnxGraph(model)
            layers = find_layers(graph)
            assert list(layers) == ["fc0", "fc1", "fc2"]
            module = shell(graph, layers["fc0"])
            assert isinstance(module, nn.Linear)
            assert (module.in_features, module.out_features) == (8, 16) == module.weight.shape[::-1]
            assert (module.bias is None) == (bias is None)
            expected = run_onnx(model, {"x": x.numpy()}, [layers["fc0"].uses[0].output])[0]
            np.testing.assert_allclose(module(x).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_convolutions_are_torch_modules_with_their_geometry() -> None:
    model = conv_model()
    graph = OnnxGraph(model)
    layers = find_layers(graph)
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    for name, layer in layers.items():
        module = shell(graph, layer)
        Geometry.of(module)
        names = [layer.uses[0].input, layer.uses[0].output]
        x, y = (torch.from_numpy(a) for a in run_onnx(model, feeds, names)[-2:])
        if layer.padding is None:  # inputs come padded
            assert name in ("stem", "depthwise") and module.padding == (0, 0)
            x = nn.functional.pad(x, (1, 0, 0, 1) if name == "stem" else (1, 1, 1, 1))
        torch.testing.assert_close(module(x), y, rtol=1e-4, atol=1e-5)


TRANSPOSED = {
    "unequal pads": ((4, 6, 3, 3), {"strides": [2, 2], "pads": [1, 0, 0, 1]}),
    "output padding": ((4, 6, 2, 3), {"strides": [2, 3], "output_padding": [1, 2]}),
    "groups": ((4, 3, 3, 3), {"group": 2, "dilations": [2, 1], "pads": [1, 1, 1, 1]}),
}


@pytest.mark.parametrize(("shape", "settings"), TRANSPOSED.values(), ids=TRANSPOSED)
def test_a_transposed_convolution_is_a_product_with_its_rows(shape, settings) -> None:
    """Rows that its shell's geometry gives, times the weight seen as that of a convolution."""
    random = np.random.default_rng(0)
    bias = np.zeros(shape[1] * settings.get("group", 1))
    weights = {"w": random.standard_normal(shape), "b": bias}
    node = helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], "up", **settings)
    x = random.standard_normal((2, 4, 5, 6)).astype(np.float32)
    model = layer_model([node], weights)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", FLOAT, x.shape))
    graph = OnnxGraph(model)
    module = shell(graph, find_layers(graph)["up"])
    rows = Geometry.of(module).rows(torch.from_numpy(x))  # [groups, tokens, in]
    matrix = as_convolution(module.weight, module.groups).flatten(1)
    found = rows @ matrix.view(module.groups, -1, matrix.shape[1]).mT
    (y,) = (torch.from_numpy(a) for a in run_onnx(model, {"x": x}, ["y"]))
    expected = y.unflatten(1, (module.groups, -1)).movedim(2, -1).movedim(1, 0).flatten(1, -2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def layer_model(nodes, weights, *, outputs=("y",)):
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["n", 4])]
    results = [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs]
    stored = [numpy_helper.from_array(np.float32(array), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "layers", inputs, results, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    return model


def test_nodes_that_share_a_weight_are_one_layer() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "first"),
        helper.make_node("Add", ["a", "b1"], ["a1"], "add1"),
        helper.make_node("MatMul", ["a1", "w"], ["c"], "second"),
        helper.make_node("Add", ["c", "b2"], ["y"], "add2"),
    ]
    weights = {"w": np.eye(4), "b1": np.ones(4), "b2": np.ones(4)}
    layer = find_layers(OnnxGraph(layer_model(nodes, weights)))["first"]
    assert [(use.node, use.input, use.output) for use in layer.uses] == [
        (0, "x", "a"),
        (2, "a1", "c"),
    ]
    assert layer.bias is None  # theirs differ
    nodes[3] = helper.make_node("Add", ["c", "b1"], ["y"], "add2")
    layers = find_layers(OnnxGraph(layer_model(nodes, {"w": np.eye(4), "b1": np.ones(4)})))
    assert layers["first"].bias == "b1"
    assert [use.output for use in layers["first"].uses] == ["a1", "y"]


def test_an_add_that_does_not_read_alone_is_no_bias() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "m"),
        helper.make_node("Add", ["a", "b"], ["y"], "add"),
    ]
    weights = {"w": np.eye(4), "b": np.ones(4)}
    assert find_layers(OnnxGraph(layer_model(nodes, weights)))["m"].bias == "b"
    two = layer_model(nodes, weights, outputs=("y", "a"))
    assert find_layers(OnnxGraph(two))["m"].bias is None
    wide = layer_model(nodes, {"w": np.eye(4), "b": np.ones((1, 4))})
    assert find_layers(OnnxGraph(wide))["m"].bias is None


def test_tied_embedding_and_head_are_two_layers_of_one_weight() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["ids"], "cast", to=TensorProto.INT64),
        helper.make_node("Gather", ["w", "ids"], ["h"], "embed"),
        helper.make_node("Transpose", ["w"], ["wt"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["h", "wt"], ["y"], "head"),
    ]
    layers = find_layers(OnnxGraph(layer_model(nodes, {"w": np.ones((6, 4))})))
    assert {n: (x.kind, x.weight, x.transposed) for n, x in layers.items()} == {
        "embed": ("embedding", "w", False),
        "head": ("linear", "w", False),
    }
    assert isinstance(
        shell(OnnxGraph(layer_model(nodes, {"w": np.ones((6, 4))})), layers["embed"]), nn.Embedding
    )


def test_constant_nodes_hold_weights_too() -> None:
    value = numpy_helper.from_array(np.eye(4, dtype=np.float32))
    nodes = [
        helper.make_node("Constant", [], ["w"], "const", value=value),
        helper.make_node("Identity", ["w"], ["w2"], "same"),
        helper.make_node("MatMul", ["x", "w2"], ["y"], "m"),
    ]
    model = layer_model(nodes, {})
    graph = OnnxGraph(model)
    layer = find_layers(graph)["m"]
    assert layer.weight == "w"
    graph.set_tensor("w", 2 * torch.eye(4))
    assert run_onnx(model, {"x": np.ones((1, 4), np.float32)})[0].tolist() == [[2.0] * 4]


@pytest.mark.parametrize(
    ("node", "weight", "reason"),
    [
        (helper.make_node("MatMul", ["x", "w"], ["y"], "m"), np.ones((2, 4, 4)), "2 dimensions"),
        (helper.make_node("MatMul", ["w", "x"], ["y"], "m"), np.ones((2, 4)), "left factor"),
        (helper.make_node("Gemm", ["x", "w"], ["y"], "m", alpha=2.0), np.eye(4), "alpha=1"),
        (helper.make_node("Gemm", ["x", "w"], ["y"], "m", transA=1), np.eye(4), "transA=0"),
        (helper.make_node("Einsum", ["x", "w"], ["y"], "m", equation="ij,jk"), np.eye(4), "Einsum"),
    ],
)
def test_what_is_no_layer_is_named_with_the_reason(node, weight, reason) -> None:
    layers = find_layers(OnnxGraph(layer_model([node], {"w": weight})))
    assert not layers
    assert reason in layers.skipped["m"]


def test_a_weight_that_is_computed_is_named() -> None:
    nodes = [
        helper.make_node("Cast", ["w"], ["half"], "cast", to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["half", "s"], ["scaled"], "mul"),
        helper.make_node("MatMul", ["x", "scaled"], ["a"], "m"),
        helper.make_node("MatMul", ["a", "x"], ["y"], "scores"),
    ]
    layers = find_layers(OnnxGraph(layer_model(nodes, {"w": np.eye(4), "s": np.ones(1)})))
    assert not layers
    assert layers.skipped == {"m": "its weight 'w' goes through Cast, Mul, store the result"}


def test_layers_in_bodies_and_functions_are_named() -> None:
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["z"], "inner")],
        "body",
        [],
        [helper.make_tensor_value_info("z", FLOAT, None)],
    )
    nodes = [
        helper.make_node("If", ["yes"], ["a"], "choice", then_branch=body, else_branch=body),
        helper.make_node("Mine", ["a", "w"], ["y"], "call", domain="mine"),
    ]
    model = layer_model(nodes, {"w": np.eye(4), "yes": 1})
    inner = [helper.make_node("MatMul", ["p", "q"], ["r"], "m")]
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(
        helper.make_function("mine", "Mine", ["p", "q"], ["r"], inner, opset_imports=opsets)
    )
    graph = OnnxGraph(model)
    assert graph.consumers["w"] == [0, 1]  # the bodies read it
    layers = find_layers(graph)
    assert not layers
    assert "inside of its body" in layers.skipped["choice"]
    assert "inline functions first" in layers.skipped["call"]


def test_layers_are_named_so_that_modules_can_be() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], "model..layers.0/fc.weight"),
        helper.make_node("MatMul", ["a", "w2"], ["c"], "model"),
        helper.make_node("MatMul", ["c", "layer.w3"], ["y"]),
    ]
    weights = {name: np.eye(4) for name in ("w1", "w2", "layer.w3")}
    graph = OnnxGraph(layer_model(nodes, weights))
    layers = find_layers(graph)
    assert list(layers) == ["model._.layers.0/fc.weight_", "model", "layer.w3"]
    root = module_tree({name: shell(graph, layer) for name, layer in layers.items()})
    names = dict(root.named_modules())
    for name, layer in layers.items():
        assert names[name] is root.get_submodule(name)
        assert torch.equal(names[name].weight, torch.eye(4)), layer.name
    assert not list(root.parameters())


def test_two_layers_of_one_name_are_an_error() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], "m"),
        helper.make_node("MatMul", ["a", "w2"], ["y"], "m"),
    ]
    with pytest.raises(ValueError, match="two are 'm'; rename one"):
        find_layers(OnnxGraph(layer_model(nodes, {"w1": np.eye(4), "w2": np.eye(4)})))


def test_layers_are_found_by_the_names_of_all_their_nodes() -> None:
    model = mlp_model(bias="add")
    for number, node in enumerate(model.graph.node):
        node.name = f"/part{number // 3}/{node.op_type}"
    aimet_onnx = pytest.importorskip("aimet_onnx")
    graph = OnnxGraph(aimet_onnx.QuantizationSimModel(model).model.model)
    names = node_names(graph, find_layers(graph))
    assert names["/part0/MatMul"] == names["/part0/Add"] == "/part0/MatMul"
    assert names["/part0"] == "/part0/MatMul"  # as AIMET calls what it fuses
    assert "/part0/Relu" not in names


def test_equal_biases_that_an_exporter_merged_are_biases() -> None:
    """By an Identity of one stored bias, as torch's exporter writes them."""
    nodes = [
        helper.make_node("Identity", ["b"], ["b2"], "copy"),
        helper.make_node("Gemm", ["x", "w1", "b"], ["h"], "first"),
        helper.make_node("Gemm", ["h", "w2", "b2"], ["i"], "second"),
        helper.make_node("MatMul", ["i", "w3"], ["j"], "third"),
        helper.make_node("Add", ["j", "b2"], ["y"], "add"),
    ]
    weights = {name: np.eye(4) * i for i, name in enumerate(("w1", "w2", "w3"), 1)}
    layers = find_layers(OnnxGraph(layer_model(nodes, {**weights, "b": np.ones(4)})))
    assert {name: layer.bias for name, layer in layers.items()} == dict.fromkeys(
        ("first", "second", "third"), "b"
    )
    assert not layers.skipped
