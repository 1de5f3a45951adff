"""Stages of a walk over an ONNX graph: what they join, how inputs and masks are handed out."""

import numpy as np
import pytest
import torch
from torch.nn import functional

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_models
import onnx_walk_reference as reference
from onnx import TensorProto, helper


@pytest.mark.parametrize("kind", ["llama", "genai"])
def test_stages_of_a_decoder(kind):
    """Projections that read one tensor share a stage."""
    model, batches = reference.MODELS[kind]()
    walk, _, _, shells = reference.walk_of(model, batches)
    found = [
        tuple(name.split("/")[-2] for name in stage.layers)
        for stage in reference.through(walk, shells)
    ]
    block = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert [tuple(sorted(stage)) for stage in found] == [
        *(tuple(sorted(stage)) for stage in block * 2),
        ("lm_head",),
    ]


def test_stages_and_activations_of_convolutions():
    """Branches of one geometry share a stage; ReLUs count only if they alone read the output."""
    walk, _, _, shells = reference.walk_of(onnx_models.conv_model(), reference.images(1))
    stages = reference.through(walk, shells)
    assert [stage.layers for stage in stages] == [
        ("stem",),
        ("conv1",),
        ("conv2",),
        ("down",),
        ("shortcut",),
        ("left", "right"),
        ("depthwise",),
        ("head",),
    ]
    found = {name: relu for stage in stages for name, relu in stage.activations.items()}
    relus = {"stem", "conv1", "down"}
    assert found == {**dict.fromkeys(relus, functional.relu), "depthwise": functional.relu6}


@pytest.mark.parametrize("bias", ["gemm", "add", None])
def test_a_relu_behind_the_bias_counts(bias):
    """It reads what the Add makes, and nobody else does."""
    model, batches = reference.linear_model(bias=bias)
    walk, _, _, shells = reference.walk_of(model, batches)
    relus = [[*stage.activations] for stage in reference.through(walk, shells)]
    assert relus == [["fc0"], ["fc1"], []]


def test_an_output_of_the_graph_has_a_second_reader():
    model, batches = reference.linear_model()
    model.graph.output.append(
        helper.make_tensor_value_info("fc0_out", TensorProto.FLOAT, ["n", 16])
    )
    walk, _, _, shells = reference.walk_of(model, batches)
    assert [[*stage.activations] for stage in reference.through(walk, shells)] == [[], ["fc1"], []]


def test_padded_inputs_give_the_convolution_with_the_shell():
    """shell(x) = Conv node, whatever the pads: ``w * pad(x)``."""
    model, batches = onnx_models.conv_model(), reference.images(1)
    walk, _, layers, shells = reference.walk_of(model, batches)
    for stage in walk.stages():
        x = next(stage.batches())[0]
        for name in stage.layers:
            shell = shells[name]
            if layers[name].kind == "conv":
                settings = shell.stride, shell.padding, shell.dilation, shell.groups
                y = functional.conv2d(x, shell.weight, shell.bias, *settings)
                expected = reference.layer_inputs(model, [f"{name}_out"], batches[0], {})
                torch.testing.assert_close(y, expected[f"{name}_out"], rtol=1e-4, atol=1e-4)
            walk.decide(name, shell.weight)
    walk.close()


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(("size", "stride"), [(8, 2), (9, 2), (7, 3), (8, 1)])
def test_automatic_padding(auto_pad, size, stride):
    """As onnxruntime pads: the odd one at the end or at the beginning."""
    random = np.random.default_rng(0)
    settings = {"auto_pad": auto_pad, "strides": [stride] * 2}
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", **settings)
    weight = random.standard_normal((4, 3, 4, 3)).astype(np.float32)
    model = onnx_models.finish(
        [node],
        {"x": (TensorProto.FLOAT, ["n", 3, size, size])},
        {"y": (TensorProto.FLOAT, ["n", 4, "h", "w"])},
        {"w": weight},
    )
    x = torch.from_numpy(random.standard_normal((2, 3, size, size)).astype(np.float32))
    expected = onnx_models.run_onnx(model, {"x": x})[0]
    walk, _, _, shells = reference.walk_of(model, [{"x": x}])
    padded = next(next(walk.stages()).batches())[0]
    y = functional.conv2d(padded, torch.from_numpy(weight), None, stride, shells["conv"].padding)
    torch.testing.assert_close(y, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_convolutions_padded_differently_are_no_stage():
    """Their shells are alike, what they read is not."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "one", pads=[0, 1, 1, 0]),
        helper.make_node("Conv", ["x", "v"], ["b"], "two", pads=[1, 0, 0, 1]),
        helper.make_node("Add", ["a", "b"], ["y"], "add"),
    ]
    weights = {name: np.ones((2, 3, 2, 2), np.float32) for name in "wv"}
    info = (TensorProto.FLOAT, ["n", 3, 8, 8])
    output = (TensorProto.FLOAT, ["n", 2, 8, 8])
    model = onnx_models.finish(nodes, {"x": info}, {"y": output}, weights)
    walk, _, _, shells = reference.walk_of(model, reference.images(1))
    assert [stage.layers for stage in reference.through(walk, shells)] == [("one",), ("two",)]


def test_a_batch_norm_must_be_folded_first():
    with pytest.raises(ValueError, match=r"'norm' after layer 'stem' must be folded.*fold_all"):
        reference.walk_of(onnx_models.conv_model(batch_norm=True), reference.images(1))


@pytest.mark.parametrize("kind", ["llama", "genai"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_masked_tokens_are_marked(kind, dtype):
    """Whatever the mask's type."""
    model, _ = reference.MODELS[kind]()
    batches = reference.prompts(model, reference.padded_mask())
    (info,) = (value for value in model.graph.input if value.name == "attention_mask")
    if dtype != torch.int64:
        info.type.tensor_type.elem_type = {torch.bool: 9, torch.float32: 1}[dtype]
        cast = helper.make_node("Cast", ["attention_mask"], ["mask_as_int"], "to_int", to=7)
        for node in model.graph.node:
            node.input[:] = ["mask_as_int" if n == "attention_mask" else n for n in node.input]
        model.graph.node.insert(0, cast)
        batches = [{**b, "attention_mask": b["attention_mask"].to(dtype)} for b in batches]
    walk, _, _, shells = reference.walk_of(model, batches)
    for stage in walk.stages():
        for _, _, mask in stage.batches():
            assert torch.equal(mask, reference.padded_mask().bool())
        for layer in stage.layers:
            walk.decide(layer, shells[layer].weight)
    walk.close()


def test_a_mask_that_covers_past_tokens_is_cut():
    """The last ones are those of the ids."""
    model, _ = reference.genai()
    ids = torch.tensor(reference.IDS)
    mask = torch.ones(2, 11, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": mask}
    past = torch.zeros(2, 2, 3, 16)
    batch |= {v.name: past for v in model.graph.input if v.name.startswith("past")}
    walk, *_ = reference.walk_of(model, [batch])
    _, _, found = next(next(walk.stages()).batches())
    assert found.shape == (2, 8)
    walk.close()


def test_layers_without_a_place_for_tokens_have_no_mask():
    """A mask of other leading dimensions than the input's is not applied."""
    model, batches = reference.linear_model()
    info = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["n", "s"])
    model.graph.input.append(info)
    batches = [{**b, "attention_mask": torch.ones(5, 3, dtype=torch.long)} for b in batches]
    walk, *_ = reference.walk_of(model, batches)
    assert next(next(walk.stages()).batches())[2] is None
    walk.close()
