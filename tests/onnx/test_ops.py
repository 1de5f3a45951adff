"""Torch versions of ONNX operators against onnxruntime, one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper
from onnx_cases import CASES, CONTRIB, Case, grouped

from aimet_ext.errors import TransformRefused
from aimet_ext.onnx.ops.operator import attributes_of
from aimet_ext.onnx.ops.translate import OPERATORS, evaluate, unsupported


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_onnxruntime(case: Case) -> None:
    expected = case.expected()
    values = case.values()
    before = {name: value.clone() for name, value in values.items()}
    found = evaluate(case.node(), values, case.opset)
    for name, value in values.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    for name, reference in zip(case.node().output, expected, strict=True):
        value = found[name].detach().numpy()
        assert value.dtype == reference.dtype, name
        assert value.shape == reference.shape, name
        scale = np.abs(reference).max(initial=0) if reference.dtype.kind == "f" else 0
        np.testing.assert_allclose(value, reference, rtol=0, atol=case.tolerance * max(scale, 1))


def test_every_translated_operator_has_a_case() -> None:
    assert {(case.domain, case.op) for case in CASES} == set(OPERATORS)


DIFFERENTIABLE = [
    case
    for case in CASES
    if str(case)
    in {
        "Gemm-turned-18",
        "LayerNormalization-plain-17",
        "RMSNormalization-plain-23",
        "Pow-plain-18",
        "ScatterND-plain-18",
        "ReduceL2-plain-17",
        "SkipSimplifiedLayerNormalization-bias-18",
        "GroupQueryAttention-rotary-18",
        "GroupQueryAttention-smooth-18",
        "GroupQueryAttention-softcap-18",
        "RotaryEmbedding-interleaved-18",
        "Attention-bool mask-23",
        "QuickGelu-plain-18",
    }
]


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_gradients_in_float64(case: Case) -> None:
    values = case.values()
    names = [name for name, value in values.items() if value.is_floating_point()]
    doubles = [values[name].double() for name in names]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        given = {**values, **dict(zip(names, tensors, strict=True))}
        return evaluate(case.node(), given, case.opset, wide=True)["out0"]

    inputs = tuple(value.requires_grad_(value.numel() > 0) for value in doubles)
    assert function(*inputs).dtype == torch.float64
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_gradients_where_a_row_sees_nothing_are_finite() -> None:
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    mask = torch.zeros(3, 3, dtype=torch.bool).index_fill(0, torch.tensor([1, 2]), True)
    node = helper.make_node("Attention", ["q", "k", "v", "mask"], ["y"])
    y = evaluate(node, {"q": q, "k": k, "v": v, "mask": mask}, 23)["y"]
    assert torch.equal(y[:, :, 0], torch.zeros(1, 2, 4))
    gradients = torch.autograd.grad(y.square().sum(), (q, k, v))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_rows_of_a_prompt_may_be_padded_on_the_right() -> None:
    case = grouped("padded", [5, 3], do_rotary=1)
    found = evaluate(case.node(), case.values(), 18)["out0"].numpy()
    np.testing.assert_allclose(found, case.expected()[0], atol=1e-5)
    case.inputs[2][1, 3:] = 100.0  # values of padding
    again = evaluate(case.node(), case.values(), 18)["out0"].numpy()
    np.testing.assert_array_equal(again[1, :3], found[1, :3])


def test_rows_of_different_lengths_behind_a_past_are_refused() -> None:
    case = grouped("ragged", [7, 5], seq=1, past=6)
    with pytest.raises(ValueError, match=r"each row has 6 past and 1 new keys.*\[7, 5\]"):
        evaluate(case.node(), case.values(), 18)


def test_wide_takes_casts_and_constants_to_float64() -> None:
    cast = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    x = torch.tensor([1 / 3], dtype=torch.float64)
    assert evaluate(cast, {"x": x}, 18)["y"].dtype == torch.float32
    assert torch.equal(evaluate(cast, {"x": x}, 18, wide=True)["y"], x)
    constant = helper.make_node("Constant", [], ["y"], value_float=0.5)
    assert evaluate(constant, {}, 18, wide=True)["y"].dtype == torch.float64


def test_norms_of_half_precision_compute_in_float32() -> None:
    x = torch.full((1, 8), 300.0, dtype=torch.float16)  # its square overflows float16
    node = helper.make_node("SimplifiedLayerNormalization", ["x", "g"], ["y"], stash_type=1)
    y = evaluate(node, {"x": x, "g": torch.ones(8, dtype=torch.float16)}, 18)["y"]
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, torch.ones_like(x))


def test_bfloat16_constants() -> None:
    tensor = helper.make_tensor("c", TensorProto.BFLOAT16, [2], [0.5, -3.0])
    node = helper.make_node("Constant", [], ["y"], value=tensor)
    expected = torch.tensor([0.5, -3.0], dtype=torch.bfloat16)
    assert torch.equal(attributes_of(node)["value"], expected)


REFUSED = [
    (helper.make_node("Loop", ["a"], ["y"], "loop"), "ai.onnx::Loop (loop)"),
    (
        helper.make_node("MatMulNBits", ["a", "b"], ["y"], domain=CONTRIB),
        "com.microsoft::MatMulNBits (y)",
    ),
    (
        helper.make_node("Pad", ["a", "b"], ["y"], "pad", mode="reflect"),
        "ai.onnx::Pad (pad): mode='reflect' is not translated",
    ),
    (
        helper.make_node("Cast", ["a"], ["y"], "cast", to=TensorProto.STRING),
        "ai.onnx::Cast (cast): data type 8 is not translated",
    ),
    (
        helper.make_node("Constant", [], ["y"], "text", value_string="a"),
        "ai.onnx::Constant (text): strings, sparse tensors and other than plain numbers are not "
        "translated",
    ),
    (
        helper.make_node(
            "GroupQueryAttention", ["q", "k", "v"], ["y"], "attn", domain=CONTRIB,
            k_quant_type="PER_TENSOR",
        ),
        "com.microsoft::GroupQueryAttention (attn): a quantized cache (k_quant_type='PER_TENSOR') "
        "is not translated",
    ),
    (
        helper.make_node("MultiHeadAttention", ["qkv"], ["y"], "mha", domain=CONTRIB, num_heads=2),
        "com.microsoft::MultiHeadAttention (mha): packed queries, keys and values are not "
        "translated",
    ),
    (
        helper.make_node("RotaryEmbedding", ["x"], ["y"], "rope", domain=CONTRIB, scale=2.0),
        "com.microsoft::RotaryEmbedding (rope): a scale is not translated",
    ),
    (
        helper.make_node("BatchNormalization", ["x"], ["y"], "bn", training_mode=1),
        "ai.onnx::BatchNormalization (bn): training_mode=1 is not translated",
    ),
    (
        helper.make_node("Attention", ["q", "k", "v"], ["y"], "sdpa", left_window_size=3),
        "ai.onnx::Attention (sdpa): left_window_size=3 is not translated",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("node", "expected"), REFUSED, ids=[node.op_type for node, _ in REFUSED])
def test_what_is_not_translated_is_named(node: Any, expected: str) -> None:
    relu = helper.make_node("Relu", ["y"], ["z"])
    assert unsupported([node, relu]) == [expected]
    with pytest.raises(TransformRefused, match="no differentiable form of") as caught:
        evaluate(node, {}, 18)
    assert expected in str(caught.value)


def test_onnx_names_its_own_domain_in_two_ways() -> None:
    node = helper.make_node("Relu", ["x"], ["y"], domain="ai.onnx")
    assert not unsupported([node])
    assert evaluate(node, {"x": torch.tensor([-1.0])}, 18)["y"].item() == 0
