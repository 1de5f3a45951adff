"""R3: queries and keys are turned behind the rotary embedding, and scores stay as they are."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from aimet_ext.core.key_maps import KeyMap
from aimet_ext.onnx.index import GraphIndex
from aimet_ext.onnx.rewrite.kv import keep_keys_and_values
from aimet_ext.onnx.rewrite.rotate import (
    is_rotated,
    rotate_queries_and_keys,
    turned_tensors,
)
from aimet_ext.onnx.session import open_session

HEADS, GROUPS, TOKENS, DIM = 4, 2, 6, 8
HALF = DIM // 2


class Attention:
    """A float64 graph of grouped-query attention, node by node, as exporters write it."""

    def __init__(
        self, *, cache: bool, rotated: int = DIM, rotary: bool = True, bounded: bool = False
    ) -> None:
        self.nodes: list[Any] = []
        self.stored: dict[str, np.ndarray[Any, Any]] = {}
        self.number = itertools.count()
        self.rotated, self.rotary = rotated, rotary
        double = TensorProto.DOUBLE
        sizes = {"q": HEADS, "k": GROUPS, "v": GROUPS}
        shapes = {name: [1, TOKENS, size * DIM] for name, size in sizes.items()}
        shapes |= {"past_key": [1, GROUPS, 3, DIM]} if cache else {}
        q, k, v = (self.heads(name, size) for name, size in sizes.items())
        q, k = self.turned(q, "query"), self.turned(k, "present_key")
        if cache:
            k = self("Concat", "past_key", k, axis=2)
            v = self("Concat", self.constant(np.ones((1, GROUPS, 3, DIM))), v, axis=2)
        k, v = self.repeated(k), self.repeated(v)
        k = self("Transpose", k, perm=[0, 1, 3, 2])
        scale = self.constant(DIM**-0.25)
        scores = self("MatMul", self("Mul", q, scale), self("Mul", k, scale))
        scores = self("Tanh", scores) if bounded else scores
        weights = self("Softmax", self("Add", scores, self.constant(0.1)), axis=-1)
        self("MatMul", weights, v, output="out")
        outputs = ["out", "present_key"] if cache else ["out"]
        graph = helper.make_graph(
            self.nodes,
            "attention",
            [helper.make_tensor_value_info(name, double, shape) for name, shape in shapes.items()],
            [helper.make_tensor_value_info(name, double, [None] * 4) for name in outputs],
            [numpy_helper.from_array(value, name) for name, value in self.stored.items()],
        )
        opset = [helper.make_opsetid("", 17)]
        self.model = helper.make_model(graph, opset_imports=opset, ir_version=8)
        draw = np.random.default_rng(0)
        self.feed = {name: draw.standard_normal(shape) for name, shape in shapes.items()}

    def __call__(self, kind: str, *inputs: str, output: str = "", **given: Any) -> str:
        name = f"/attention/{kind}_{next(self.number)}"
        output = output or f"{name}_output_0"
        self.nodes.append(helper.make_node(kind, inputs, [output], name, **given))
        return output

    def constant(self, value: Any) -> str:
        name = f"constant_{next(self.number)}"
        self.stored[name] = np.asarray(value)
        return name

    def heads(self, name: str, heads: int) -> str:
        shape = self.constant(np.array([1, TOKENS, heads, DIM]))
        return self("Transpose", self("Reshape", name, shape), perm=[0, 2, 1, 3])

    def part(self, x: str, start: int, end: int) -> str:
        where = (self.constant(np.array([each])) for each in (start, end, 3))
        return self("Slice", x, *where)

    def turned(self, x: str, output: str) -> str:
        """The rotary embedding, of the first channels alone where it is partial."""
        if not self.rotary:
            return self("Mul", x, self.constant(1.5), output=output)
        rest, partial = "", self.rotated < DIM
        if partial:
            x, rest = self.part(x, 0, self.rotated), self.part(x, self.rotated, DIM)
        angles = np.arange(TOKENS)[:, None] * 0.5 ** np.arange(self.rotated // 2)
        angles = np.concatenate([angles, angles], -1)
        low, high = (0, self.rotated // 2), (self.rotated // 2, self.rotated)
        back = self("Concat", self("Neg", self.part(x, *high)), self.part(x, *low), axis=-1)
        parts = (
            self("Mul", each, self.constant(table(angles)))
            for each, table in ((x, np.cos), (back, np.sin))
        )
        found = self("Add", *parts, output="" if partial else output)
        return self("Concat", found, rest, axis=-1, output=output) if partial else found

    def repeated(self, x: str) -> str:
        x = self("Unsqueeze", x, self.constant(np.array([2])))
        shape = np.array([1, GROUPS, HEADS // GROUPS, 1, DIM])
        x = self("Expand", x, self.constant(shape))
        return self("Reshape", x, self.constant(np.array([1, HEADS, -1, DIM])))

    def run(self) -> list[np.ndarray[Any, Any]]:
        onnx.checker.check_model(self.model, full_check=True)
        return open_session(self.model, optimize="none").run(None, self.feed)


@pytest.mark.parametrize("rotated", [DIM, HALF], ids=["rotary", "partial rotary"])
@pytest.mark.parametrize("cache", [False, True], ids=["plain", "cache"])
def test_scores_stay_and_keys_are_turned(cache: bool, rotated: int) -> None:
    """``(q H) (k H)ᵀ = q kᵀ``, in float64; what is kept of a token is ``k H``."""
    attention = Attention(cache=cache, rotated=rotated)
    hadamard = hadamard_of(attention)
    assert np.abs(hadamard @ hadamard.T - np.eye(DIM)).max() <= 1e-12
    before = attention.run()
    names = rotate_queries_and_keys(attention.model)
    assert names == ["query_r3", "present_key" if cache else "present_key_r3"]
    assert is_rotated(attention.model)
    if cache:  # keys of earlier calls came out of the same graph, turned
        attention.feed["past_key"] = attention.feed["past_key"] @ hadamard
    after = attention.run()
    assert np.abs(after[0] - before[0]).max() <= 1e-10
    if cache:
        assert np.abs(after[1] - before[1] @ hadamard).max() <= 1e-10
        assert np.abs(after[1] - before[1]).max() > 0.1


@pytest.mark.parametrize("cache", [False, True], ids=["plain", "cache"])
def test_maps_of_each_head_leave_the_output_as_it_was(cache: bool) -> None:
    """softmax((q M⁻ᵀ)(k M + b)ᵀ) = softmax(q kᵀ) in float64; what is kept is ``k M + b``."""
    draw = torch.Generator().manual_seed(0)
    own = KeyMap(
        torch.randn(GROUPS, DIM, DIM, generator=draw, dtype=torch.float64),
        torch.randn(GROUPS, DIM, generator=draw, dtype=torch.float64),
    )
    attention = Attention(cache=cache)
    before = attention.run()
    names = rotate_queries_and_keys(attention.model, [own])
    assert names == ["query_r3", "present_key" if cache else "present_key_r3"]

    def mapped(keys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return keys @ own.matrix.numpy() + own.shift.numpy()[:, None]

    if cache:
        attention.feed["past_key"] = mapped(attention.feed["past_key"])
    after = attention.run()
    assert np.abs(after[0] - before[0]).max() <= 1e-10
    assert turned_tensors(attention.model) >= set(names)
    if cache:
        assert np.abs(after[1] - mapped(before[1])).max() <= 1e-10
    else:
        assert keep_keys_and_values(attention.model) == ["present_key_r3_kept"]


def test_maps_that_do_not_fit_are_refused() -> None:
    whole = KeyMap(torch.eye(DIM).expand(HEADS - 1, DIM, DIM), torch.zeros(HEADS - 1, DIM))
    with pytest.raises(ValueError, match=r"keys \[batch, 3, tokens, 8\] .* are required"):
        rotate_queries_and_keys(Attention(cache=False).model, [whole])
    with pytest.raises(ValueError, match="2 attentions with keys of their own are required"):
        rotate_queries_and_keys(Attention(cache=False).model, [whole, whole])
    with pytest.raises(ValueError, match=r"r3=\"fitted\".*bounds them; pass r3=True"):
        rotate_queries_and_keys(Attention(cache=False, bounded=True).model, [whole])


def hadamard_of(attention: Attention) -> np.ndarray[Any, Any]:
    """The matrix that a graph of the same widths gets."""
    copy = onnx.ModelProto()
    copy.CopyFrom(attention.model)
    rotate_queries_and_keys(copy)
    return numpy_helper.to_array(GraphIndex(copy.graph).stored[f"hadamard_{DIM}_r3"])


def test_the_keys_that_are_kept_are_the_turned_ones() -> None:
    attention = Attention(cache=False)
    rotate_queries_and_keys(attention.model)
    kept = keep_keys_and_values(attention.model)
    assert kept == ["present_key_r3_kept"]


def test_attention_without_a_rotary_embedding_is_refused() -> None:
    attention = Attention(cache=False, rotary=False)
    content = attention.model.SerializeToString()
    with pytest.raises(ValueError, match=r"r3: .*rotary embedding.*leave r3 out"):
        rotate_queries_and_keys(attention.model)
    assert attention.model.SerializeToString() == content


def test_a_graph_without_attention_is_refused() -> None:
    node = helper.make_node("Relu", ["x"], ["y"], "relu")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", values[:1], values[1:]))
    with pytest.raises(ValueError, match="no scores were found"):
        rotate_queries_and_keys(model)
