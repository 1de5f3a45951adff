"""Tensors of two graphs of one model are matched by what they are, and not by their names."""

from __future__ import annotations

from typing import Any

import pytest

onnx = pytest.importorskip("onnx")

from aimet_ext.onnx.rewrite.kv import moved_from, same_tensors  # noqa: E402

VALUE = onnx.helper.make_tensor_value_info
FLOAT = onnx.TensorProto.FLOAT


def node(kind: str, name: str, *inputs: str, **attributes: Any) -> Any:
    """A node that is named like the tensor it makes: ``/layer/Mul_1``."""
    return onnx.helper.make_node(kind, inputs, [name], name=name, **attributes)


def graph(*nodes: Any) -> Any:
    half = onnx.helper.make_tensor("half", FLOAT, [1], [0.5])
    return onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes, "g", [VALUE("x", FLOAT, [4])], [VALUE(nodes[-1].output[0], FLOAT, [4])], [half]
        )
    )


def test_operators_that_compute_shapes_do_not_count() -> None:
    many = graph(
        node("Mul", "/a/Mul", "half", "half"),  # a constant
        node("Reshape", "/a/Reshape", "x", "shape"),
        node("Mul", "/a/Mul_1", "/a/Reshape", "half"),
        node("Mul", "/a/Mul_2", "/a/Mul_1", "half"),
        node("Mul", "/b/Mul", "/a/Mul_2", "half"),
    )
    one = graph(
        node("Mul", "/a/Mul", "x", "half"),
        node("Mul", "/a/Mul_1", "/a/Mul", "half"),
        node("Mul", "/b/Mul", "/a/Mul_1", "half"),
    )
    assert same_tensors(many, one) == {
        "/a/Mul": "/a/Mul_1",
        "/a/Mul_1": "/a/Mul_2",
        "/b/Mul": "/b/Mul",
    }


def test_what_only_one_graph_has_is_left_out_if_named() -> None:
    plain = graph(node("Concat", "/a/Concat", "x", "x", axis=0))
    cached = graph(
        node("Concat", "/a/Concat", "past", "x", axis=0),
        node("Concat", "/a/Concat_1", "x", "x", axis=0),
    )
    assert same_tensors(plain, cached, frozenset({"/a/Concat"})) == {"/a/Concat_1": "/a/Concat"}
    with pytest.raises(ValueError, match=r"no counterpart: /a \(Concat\)"):
        same_tensors(plain, cached)


def test_values_are_followed_through_moves() -> None:
    model = graph(
        node("Add", "sum", "x", "half"),
        node("Reshape", "r", "sum", "shape"),
        node("Transpose", "t", "r"),
        node("Mul", "m", "t", "half"),
    )
    assert moved_from(model) == {"r": "sum", "t": "sum"}
