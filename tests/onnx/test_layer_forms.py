"""What is done to ONNX graphs for an NPU leaves what they compute as it is."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper  # noqa: E402

from aimet_ext.onnx.rewrite.compilable import bound_masks, drop_casts, float_weights, fold_constants  # noqa: E402
from aimet_ext.onnx.rewrite.htp import fuse_rms_norms, sign_second_operands  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from onnx_models import finish, float_nodes, run_onnx  # noqa: E402

OPSETS = (("", 21),)
X = np.random.default_rng(0).standard_normal((1, 4, 8)).astype(np.float32)
FLOAT = (TensorProto.FLOAT, [1, 4, 8])


def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs, [output], name=f"make_{output}", **attributes)


def rounded(name: str, scale: float = 1e-4, zero: int = 32768) -> tuple[list[Any], dict[str, Any]]:
    """Quantize and dequantize a tensor to ``{name}_d``."""
    grid = [f"{name}_s", f"{name}_z"]
    nodes = [
        node("QuantizeLinear", [name, *grid], f"{name}_q"),
        node("DequantizeLinear", [f"{name}_q", *grid], f"{name}_d"),
    ]
    return nodes, {grid[0]: np.float32(scale), grid[1]: np.uint16(zero)}


def test_what_depends_on_constants_alone_is_stored() -> None:
    weights = {"start": np.int64(0), "end": np.int64(8), "step": np.int64(1)}
    nodes = [
        node("Range", ["start", "end", "step"], "order"),
        node("Cast", ["order"], "angle", to=TensorProto.FLOAT),
        node("Cos", ["angle"], "cosine"),
        node("Mul", ["x", "cosine"], "y"),
    ]
    model = finish(nodes, {"x": FLOAT}, {"y": FLOAT}, weights)
    folded = fold_constants(model)
    assert [each.op_type for each in folded.graph.node] == ["Mul"]
    assert [proto.name for proto in folded.graph.initializer] == ["cosine"]
    assert np.array_equal(run_onnx(folded, {"x": X})[0], run_onnx(model, {"x": X})[0])
    assert len(model.graph.node) == 4


def test_encoded_constants_are_not_computed_away_but_copied() -> None:
    weights = {"w": np.eye(8, dtype=np.float32)}
    nodes = [
        node("Identity", ["w"], "alias"),
        node("Transpose", ["w"], "turned", perm=[1, 0]),
        node("MatMul", ["x", "alias"], "middle"),
        node("MatMul", ["middle", "turned"], "y"),
    ]
    folded = fold_constants(finish(nodes, {"x": FLOAT}, {"y": FLOAT}, weights), keep=("w",))
    assert [each.op_type for each in folded.graph.node] == ["Transpose", "MatMul", "MatMul"]
    assert {proto.name for proto in folded.graph.initializer} == {"w", "alias"}


def test_only_what_stands_for_infinity_is_raised() -> None:
    mask = np.array([0, -5, -1e4, np.finfo(np.float32).min, -np.inf, 0, 0, 0], np.float32)
    model = finish([node("Add", ["x", "mask"], "y")], {"x": FLOAT}, {"y": FLOAT}, {"mask": mask})
    assert bound_masks(model) == ["mask"]
    (proto,) = model.graph.initializer
    expected = np.array([0, -5, -1e4, -100, -100, 0, 0, 0], np.float32)
    assert np.array_equal(onnx.numpy_helper.to_array(proto), expected)
    assert bound_masks(model) == []


def norm(kind: str) -> Any:
    """A QDQ graph of an RMS norm, or of what looks like one."""
    source, grids = rounded("x")
    gain = {"g_q": np.arange(8, dtype=np.uint16), "g_s": np.float32(0.5), "g_z": np.uint16(3)}
    quantized, more = rounded("normed")
    nodes = [
        *source,
        node("DequantizeLinear", ["g_q", "g_s", "g_z"], "g_d"),
        node("Cast", ["x_d"], "x_c", to=TensorProto.FLOAT),
        node("Pow", ["x_c", "two"], "squares"),
        node("ReduceMean", ["squares", "axis"], "mean"),
        node("Add", ["mean", "epsilon"], "shifted"),
        node("Sqrt", ["shifted"], "root"),
        node("Div", ["one", "root"], "inverse"),
        node("Mul", ["x_c", "inverse"], "scaled"),
        node("Mul", ["g_d", "scaled"], "normed"),
        *quantized,
        node("Identity", ["normed_d"], "y"),
    ]
    numbers = {"two": 2.0, "epsilon": 1e-5, "one": 1.0}
    if kind == "cubes":
        numbers["two"] = 3.0
    axis = np.array([1]) if kind == "another axis" else np.array([-1])
    weights = {
        **grids,
        **gain,
        **more,
        "axis": axis,
        **{name: np.float32(value) for name, value in numbers.items()},
    }
    return finish(nodes, {"x": FLOAT}, {"y": FLOAT}, weights, opsets=OPSETS)


def test_a_norm_becomes_one_node() -> None:
    model = norm("rms")
    expected = run_onnx(model, {"x": X})[0]
    assert fuse_rms_norms(model) == ["normed"]
    drop_casts(model)
    kinds = [each.op_type for each in model.graph.node]
    assert kinds.count("SimplifiedLayerNormalization") == 1 and "Pow" not in kinds
    (fused,) = [each for each in model.graph.node if "Norm" in each.op_type]
    assert {a.name: a.f for a in fused.attribute}["epsilon"] == pytest.approx(1e-5)
    assert np.abs(run_onnx(model, {"x": X})[0] - expected).max() <= 1.1e-4  # a step


@pytest.mark.parametrize("kind", ["cubes", "another axis"])
def test_what_is_no_norm_stays(kind: str) -> None:
    model = norm(kind)
    assert fuse_rms_norms(model) == []
    assert "ReduceMean" in [each.op_type for each in model.graph.node]


def product(dtype: Any, scale: float, zero: int) -> Any:
    left, grids = rounded("x")
    right, more = rounded("z", scale, zero)
    result, last = rounded("p")
    grids |= {**more, "z_z": dtype(zero), **last}
    nodes = [*left, *right, node("MatMul", ["x_d", "z_d"], "p"), *result]
    nodes.append(node("Identity", ["p_d"], "y"))
    inputs = {"x": FLOAT, "z": (TensorProto.FLOAT, [1, 8, 8])}
    return finish(nodes, inputs, {"y": (TensorProto.FLOAT, [1, 4, 8])}, grids, opsets=OPSETS)


@pytest.mark.parametrize(
    ("dtype", "zero", "exact"),
    [(np.uint16, 32768, True), (np.uint8, 128, True), (np.uint8, 0, True), (np.uint16, 9, False)],
)
def test_second_operands_are_signed(dtype: Any, zero: int, exact: bool) -> None:
    """A symmetric or narrow grid is part of the signed one: the same numbers, to the last bit."""
    z = np.random.default_rng(1).standard_normal((1, 8, 8)).astype(np.float32)
    scale = 4 / np.iinfo(dtype).max
    model = product(dtype, scale, zero)
    before = run_onnx(model, {"x": X, "z": z}, ["z_d"])[0]
    assert sign_second_operands(model) == ["z_d"]
    onnx.checker.check_model(model)
    after = run_onnx(model, {"x": X, "z": z}, ["z_d_signed"])[0]
    assert np.array_equal(before, after) == exact
    assert np.abs(before - after).max() <= scale
    assert sign_second_operands(model) == []


def test_what_is_float_is_named() -> None:
    model = norm("rms")
    assert "make_squares" in float_nodes(model)
    assert float_weights(product(np.uint16, 1e-4, 1)) == []
    weight = {"w": np.eye(8, dtype=np.float32)}
    plain = finish([node("MatMul", ["x", "w"], "y")], {"x": FLOAT}, {"y": FLOAT}, weight)
    assert float_weights(plain) == ["w"] and float_nodes(plain) == ["make_y"]
