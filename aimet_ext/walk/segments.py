"""Running a traced model in parts, with other weights than its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from aimet_ext.data.batches import map_tensors
from aimet_ext.walk.trace import GIVEN, Trace, batch_tensors

__all__ = ["Executor", "Segment", "Values", "Weights", "equal", "renewed", "tensor_versions"]

_ROUNDING = 1e-3  # of the largest output: convolutions need not be computed alike twice

# By module in the graph, by name within it.
Weights: TypeAlias = dict[str, dict[str, Tensor]]
Values: TypeAlias = dict[fx.Node, Any]


class Segment:
    """A part of a graph: its operations, and which values and inputs it reads.

    :param start: position of the first operation.
    :param stop: position behind the last one.
    :param end: what is read from this position on is not kept.
    :param kept: what to keep, by default all that is read between ``stop`` and ``end``.
    """

    def __init__(
        self,
        trace: Trace,
        start: int,
        stop: int,
        end: int,
        *,
        kept: Sequence[fx.Node] | None = None,
    ) -> None:
        self.read = trace.live(start, end)
        self.kept = trace.live(stop, end) if kept is None else kept
        self.nodes = [node for node in trace.nodes[start:stop] if node.op not in GIVEN]
        last = {node: node for node in self.nodes}
        for node in self.nodes:
            last.update(dict.fromkeys(node.all_input_nodes, node))
        self.inputs = [node for node in last if node.op == "placeholder"]
        for node in self.kept:
            last.pop(node, None)
        self.dying: dict[fx.Node, list[fx.Node]] = {}
        for node, reader in last.items():
            self.dying.setdefault(reader, []).append(node)


class Executor(fx.Interpreter):
    """Runs parts of a graph, with other weights than the modules' own."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace.root, garbage_collect_values=False, graph=trace.graph)
        self._constants = [node for node in trace.nodes if node.op == "get_attr"]
        self._weights: Weights = {}

    @torch.no_grad()
    def run_segment(self, segment: Segment, values: Values, weights: Weights) -> Values:
        """The values that a segment keeps, of those given and of its own."""
        self._weights = weights
        self.env = {**{node: self.run_node(node) for node in self._constants}, **values}
        try:
            for node in segment.nodes:
                self.env[node] = self.run_node(node)
                for dead in segment.dying.get(node, ()):
                    del self.env[dead]
            return {node: self.env[node] for node in segment.kept}
        finally:
            self.env = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a module computes with the weight decided for it."""
        if target not in self._weights:
            return super().call_module(target, args, kwargs)
        module, own = self.fetch_attr(target), self._weights[target]
        return torch.func.functional_call(module, own, args, kwargs, tie_weights=False)


def renewed(values: Values, versions: Mapping[fx.Node, Any]) -> Values:
    """The values that are not stored yet as they are, with all that share a tensor with them."""
    found = {node: tensor_versions(value) for node, value in values.items()}
    new = {node for node in values if found[node] != versions.get(node)}
    tensors = {tensor for node in new for tensor, _ in found[node]}
    return {
        node: value
        for node, value in values.items()
        if node in new or any(tensor in tensors for tensor, _ in found[node])
    }


def tensor_versions(value: Any) -> list[tuple[int, int]]:
    """Which tensors a value holds, and how often each was changed in place."""
    found: list[tuple[int, int]] = []
    map_tensors(lambda tensor: found.append((id(tensor), tensor._version)), value)
    return found


def equal(came: Any, expected: Any) -> bool:
    """Whether two outputs are of the same form and their tensors equal but for rounding."""
    ours, theirs = batch_tensors(came), batch_tensors(expected)
    return len(ours) == len(theirs) and all(map(_close, ours, theirs))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or not a.is_floating_point():
        return torch.equal(a, b)
    size = float(b.abs().nan_to_num(0, 0, 0).amax()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=_ROUNDING * size, equal_nan=True)
