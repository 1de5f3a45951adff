"""Ranges of attention scores, chosen by what a Softmax makes of them.

Scores far below the largest one of their row vanish in the Softmax, and those under the mask do so
anyway. A range from the mask, or from the lowest score, to the largest one has wide steps for
nothing: at 8 bits a rounding changes attention weights by half.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import NodeProto
from torch import Tensor

from aimet_ext.onnx.graph import OnnxGraph, Part
from aimet_ext.onnx.index import MOVES
from aimet_ext.sim.points import Point, Range
from aimet_ext.sim.protocol import adapt

_FINE = 0.02  # a step of scores, at which rounding changes a weight by 1 %
_SHRINK, _SHORTEST = 0.85, 1.0
_ROWS = 2048  # queries to judge by
_MASKED = -50.0  # of a term that is a mask


@dataclass(frozen=True, eq=False)
class _Scores:
    """The input of a Softmax.

    :param node: The Softmax.
    :param tensor: Tensor that it reads.
    :param terms: Tensors that are added to make it, none where that is another operator.
    """

    node: NodeProto
    tensor: str
    terms: tuple[str, ...]


def clip_scores(
    sim: Any, names: Collection[str], batches: Sequence[Mapping[str, np.ndarray[Any, Any]]]
) -> list[str]:
    """Shorten ranges of scores where that lowers the error of the Softmax behind them.

    :param sim: ``aimet_onnx.QuantizationSimModel`` with ranges.
    :param names: Tensors whose ranges may change; those that do are frozen.
    :param batches: Inputs by name; the first one is used.
    :returns: The tensors whose ranges changed.
    """
    adaptor: Any = adapt(sim)
    batch = {name: torch.from_numpy(np.array(array)) for name, array in batches[0].items()}
    points, chosen = adaptor.points(), adaptor.score_ranges(names, [batch])
    for name, bounds in chosen.items():
        adaptor.write_range(points[name], *bounds)
    return list(chosen)


def score_ranges(
    graph: OnnxGraph, points: Collection[Point], batch: Mapping[str, Tensor]
) -> dict[str, Range]:
    """Return shorter ranges of scores, where the error of the Softmax behind them falls.

    :param points: Quantizers whose ranges may change.
    :param batch: Inputs of the graph by name.
    """
    free = {p.name: p for p in points if p.kind == "activation" and p.low is not None}
    found: dict[str, Range] = {}
    for scores in _all_scores(graph):
        own = {name: free[name] for name in (scores.tensor, *scores.terms) if name in free}
        if own and max(map(_step, own.values())) > _FINE:
            found.update(_choose(scores, _values(graph, scores, batch), own))
    return found


def _all_scores(graph: OnnxGraph) -> Iterator[_Scores]:
    for node in graph.nodes:
        if node.op_type == "Softmax":
            tensor = graph.source(node.input[0], MOVES)
            adding = graph.node(tensor)
            added = adding is not None and adding.op_type == "Add"
            terms = tuple(adding.input) if adding is not None and added else ()
            yield _Scores(node, tensor, terms)


def _step(point: Point) -> float:
    return ((point.high or 0.0) - (point.low or 0.0)) / (point.qmax - point.qmin)


def _values(graph: OnnxGraph, scores: _Scores, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Return rows of the terms in the float model, or of the scores, ``[rows, keys]`` each."""
    wanted = scores.terms or (scores.tensor,)
    made = [name for name in wanted if not graph.is_stored(name)]
    part = Part(
        graph,
        graph.subgraph(graph.inputs, made),
        list(graph.inputs),
        made,
        layers={},
        weights={},
    )
    found = part.run(batch)
    tensors = [found[name] if name in found else graph.tensor(name) for name in wanted]
    tensors = list(torch.broadcast_tensors(*tensors))
    rows = [tensor.flatten(0, -2).float() for tensor in tensors]
    stride = max(1, -(-len(rows[0]) // _ROWS))
    # Every row of queries, of different heads, has its turn.
    return [tensor[torch.arange(0, len(tensor), stride | 1)] for tensor in rows]


def _choose(
    scores: _Scores, values: Sequence[Tensor], points: Mapping[str, Point]
) -> dict[str, Range]:
    """Return the ranges with the lowest error of the Softmax, none if those at hand have it."""
    total = torch.stack(list(values)).sum(0)
    target = total.softmax(-1)
    masks = [bool(value.min() < _MASKED and value.max() <= 0) for value in values]
    terms = dict(zip(scores.terms, values, strict=True)) if scores.terms else {}
    free = {name for name in points if name == scores.tensor or not masks[scores.terms.index(name)]}

    def error(ranges: Mapping[str, Range]) -> float:
        def through(name: str, value: Tensor) -> Tensor:
            point = points.get(name)
            if point is None:
                return value
            known = (point.low or 0.0, point.high or 0.0)
            return point.quantize(value, *ranges.get(name, known))

        made = total if not terms else sum(through(n, v) for n, v in terms.items())
        assert isinstance(made, Tensor)
        difference = through(scores.tensor, made).softmax(-1) - target
        return float(difference.double().square().mean())

    best: dict[str, Range] = {}
    lowest = error(best)
    low = min(float(total.min()), *(p.low or 0.0 for p in points.values()))
    high = float(total.max())
    while low < -_SHORTEST:
        ranges = {name: points[name].covering((low, high)) for name in free}
        found = error(ranges)
        if found < lowest:
            best, lowest = ranges, found
        low *= _SHRINK
    return best
