"""The quantizers of an ONNX simulation one by one, in its session or in the graph as PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aimet_ext.core.affine import fake_quantize
from aimet_ext.data.batches import ForwardFn
from aimet_ext.models.topology import BlockTopology
from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.layers import OnnxLayer
from aimet_ext.onnx.ops.translate import Operation, TranslatedGraph
from aimet_ext.onnx.rewrite.rotate import check_shifts, queries_and_keys
from aimet_ext.sim.onnx.quantizers import (
    is_integer,
    load_scale,
    read_encodings,
    switched_off,
    uninitialize,
)
from aimet_ext.sim.points import Kind, Look, NormGain, Point, Points, Range, Run

_LOGITS = "logits"


class OnnxPoints(Points):
    """See :class:`aimet_ext.sim.points.Points`.

    A point is named after its tensor, the first one of those that share its quantizer.
    """

    sim: Any

    @property
    def _whole(self) -> Any:
        """The adaptor of which this is a part."""
        return self

    def points(self, places: Collection[str] | None = None) -> dict[str, Point]:
        every = self.sim.qc_quantize_op_dict
        names = [name for name in (every if places is None else places) if is_integer(every[name])]
        if len(names) > 1:
            made = [name for node in self._whole.graph.nodes for name in node.output]
            order = {name: place for place, name in enumerate(made)}
            names.sort(key=lambda name: order.get(name, -1))  # stable: what is stored comes first
        found: dict[int, Point] = {}
        for name in names:
            if id(every[name]) not in found:
                found[id(every[name])] = self._point(name, every[name])
        return {point.name: point for point in found.values()}

    @contextmanager
    def looking(self, look: Look, forward_fn: ForwardFn | None = None) -> Iterator[Run]:
        points = self.points()
        quantize = {name: _quantize(point) for name, point in points.items()}
        by_quantizer = {id(point.own): name for name, point in points.items()}
        every = self.sim.qc_quantize_op_dict
        first = {name: by_quantizer[id(q)] for name, q in every.items() if id(q) in by_quantizer}

        def see(name: str, tensor: Tensor) -> Tensor:
            if name not in first or not tensor.is_floating_point():
                return tensor
            return look(first[name], tensor, quantize[first[name]])

        yield self._run_watched(see)

    @contextmanager
    def seeing_keys(
        self, see: Callable[[int, Tensor], Tensor], forward_fn: ForwardFn | None = None
    ) -> Iterator[Run]:
        graph = self._whole.graph
        keys = [key for _, key in queries_and_keys(graph)]
        check_shifts(graph)
        numbers = {name: number for number, name in enumerate(keys)}

        def own(name: str, tensor: Tensor) -> Tensor:
            return see(numbers[name], tensor) if name in numbers else tensor

        yield self._run_watched(own)

    @contextmanager
    def seeing_outputs(
        self,
        layers: Sequence[str],
        see: Callable[[str, int, Tensor], Tensor],
        forward_fn: ForwardFn | None = None,
    ) -> Iterator[Run]:
        places = {
            use.output: (name, number)
            for name in layers
            for number, use in enumerate(self._whole.layers[name].uses)
        }

        def own(name: str, tensor: Tensor) -> Tensor:
            return see(*places[name], tensor) if name in places else tensor

        yield self._run_watched(own)

    def _run_watched(self, see: Callable[[str, Tensor], Tensor]) -> Run:
        model = _Watched(self._whole.graph, self._output, see)

        def run(batch: Mapping[str, Tensor]) -> Tensor:
            output: Tensor = model(*(batch[name] for name in model.inputs))
            return output

        return run

    @contextmanager
    def running(self, names: Collection[str], forward_fn: ForwardFn | None = None) -> Iterator[Run]:
        place = list(self._whole.graph.outputs).index(
            self._output
        )  # the session's names are AIMET's own
        off = [point.own for name, point in self.points().items() if name not in names]
        self._whole.refresh()

        def run(batch: Mapping[str, Tensor]) -> Tensor:
            return torch.from_numpy(self.sim.session.run(None, self._feed(batch))[place])

        with switched_off(off):
            yield run

    @contextmanager
    def substituting(
        self,
        weights: Mapping[str, Callable[[], Tensor]],
        gains: Mapping[str, Callable[[], Tensor]],
        forward_fn: ForwardFn | None = None,
    ) -> Iterator[Run]:
        values = {
            layer.weight: partial(_as_stored, compute, layer)
            for name, compute in weights.items()
            for layer in [self._whole.layers[name]]
        }
        every = self.sim.qc_quantize_op_dict
        on = {
            name: _quantize(self._point(name, quantizer))
            for name, quantizer in every.items()
            if is_integer(quantizer) and quantizer.is_initialized()
            if self._whole.graph.is_stored(name)
        }
        model = _Substituted(self._whole.graph, self._output, {**values, **gains}, on)

        def run(batch: Mapping[str, Tensor]) -> Tensor:
            output: Tensor = model(*(batch[name] for name in model.inputs))
            return output

        yield run

    def norm_gains(self, blocks: Sequence[BlockTopology]) -> list[NormGain]:
        from aimet_ext.sim.onnx.blocks import norm_gains

        return norm_gains(self._whole, blocks)

    def read_gain(self, name: str) -> Tensor:
        found: Tensor = self._whole.graph.tensor(name)
        return found

    def write_gain(self, name: str, values: Tensor) -> None:
        self._whole.graph.set_tensor(name, values)
        self._whole.touch()

    def score_ranges(self, names: Collection[str], batches: Sequence[Any]) -> dict[str, Range]:
        from aimet_ext.sim.onnx.scores import score_ranges

        taken = [point for name, point in self.points().items() if name in names]
        return score_ranges(self._whole.graph, taken, batches[0])

    @contextmanager
    def seeing(self, module: str, see: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        from aimet_ext.onnx.blocks.module import observed

        with observed(self._whole.model.get_submodule(module), see):
            yield

    @contextmanager
    def with_ranges(self, module: str, ranges: Mapping[str, Range]) -> Iterator[None]:
        every = self._whole.activation_quantizers(module)
        points = {name: self._point(name, every[name]) for name in ranges if name in every}

        def see(name: str, tensor: Tensor) -> Tensor:
            point = points.get(name)
            return tensor if point is None else point.quantize(tensor, *ranges[name])

        with self.seeing(module, see):
            yield

    def calibrate_all(self, batches: Sequence[Any], forward_fn: ForwardFn | None = None) -> None:
        self._whole.refresh()
        self.sim.compute_encodings([self._feed(batch) for batch in batches])

    def _feed(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
        return {
            name: np.ascontiguousarray(batch[name].numpy()) for name in self._whole.graph.inputs
        }

    def write_range(self, point: Point, low: float, high: float, *, freeze: bool = True) -> None:
        grid, steps = point.grid(low, high), point.qmax - point.qmin
        uninitialize(point.own, parameter=False)
        first = float(grid.offset) + point.qmin
        load_scale(point.own, [float(grid.scale)], [first], steps)
        point.own._is_encoding_frozen = freeze

    @property
    def _output(self) -> str:
        names = list(self._whole.graph.outputs)
        return _LOGITS if _LOGITS in names else names[0]

    def _point(self, name: str, own: Any) -> Point:
        kind: Kind = "activation"
        if self._whole.graph.is_stored(name):
            kind = "weight"
        elif name in self._whole.graph.inputs:
            kind = "input"
        bits, symmetric = int(own.bitwidth), bool(own.use_symmetric_encodings)
        found = own.get_encodings() if own.is_initialized() else None
        low, high = own._encoding_min_max_fixed_vals or (None, None)
        fixed = low is not None and high is not None  # a Relu has its lower end alone
        if found:
            low, high = min(e.min for e in found), max(e.max for e in found)
        return Point(
            name=name,
            kind=kind,
            qmin=int(own.use_strict_symmetric) - (1 << (bits - 1)) if symmetric else 0,
            qmax=(1 << (bits - int(symmetric))) - 1,
            symmetric=symmetric,
            low=low if found or fixed else None,
            high=high if found or fixed else None,
            frozen=bool(own.is_encoding_frozen()) or fixed,
            single=not own.quant_info.usePerChannelMode,
            half_up=True,
            place=name,
            own=own,
        )


def _quantize(point: Point) -> Callable[[Tensor], Tensor]:
    """Return a function that computes what AIMET's quantizer does."""
    own = point.own
    if point.kind != "weight" and own.is_initialized() and not own.quant_info.usePerChannelMode:
        (scale,), (first,) = read_encodings(own)
        grid = point.grid(point.low or 0.0, point.high or 0.0)
        grid = type(grid)(
            scale[None].float(),
            (first[None] - point.qmin).float(),
            point.qmin,
            point.qmax,
            half_up=True,
        )
        return partial(fake_quantize, grid=grid)

    def quantize(tensor: Tensor) -> Tensor:
        values = np.ascontiguousarray(tensor.detach().cpu().float().numpy())
        return torch.from_numpy(own.quantize_dequantize(values)).to(tensor)

    return quantize


class _Watched(TranslatedGraph):
    """A whole graph as PyTorch computes it, each tensor of which goes through a function.

    :param see: Function from a tensor's name and value to what takes its place.
    """

    def __init__(self, graph: OnnxGraph, output: str, see: Callable[[str, Tensor], Tensor]) -> None:
        inputs = list(graph.inputs)
        super().__init__(graph, graph.subgraph(inputs, [output]), inputs, [output])
        self._see = see

    def _folded(self, steps: Sequence[Operation]) -> tuple[Operation, ...]:
        return tuple(steps)  # between constants there may be quantizers too

    def _start(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        values = super()._start(inputs)
        return {name: self._see(name, value) for name, value in values.items()}

    def _run(self, i: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = super()._run(i, values)
        return {name: self._see(name, value) for name, value in found.items()}


_SEGMENT = 100  # steps whose results are kept for the way back


def _as_stored(compute: Callable[[], Tensor], layer: OnnxLayer) -> Tensor:
    weight = compute()
    return weight.transpose(0, 1) if layer.transposed else weight


class _Substituted(TranslatedGraph):
    """A whole graph as PyTorch computes it, with other stored values in place of some.

    For gradients, some steps at a time are computed again on the way back.

    :param values: Functions that compute what takes a stored value's place, by its name.
    :param quantizers: Functions that quantize other stored values, by their names.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        output: str,
        values: Mapping[str, Callable[[], Tensor]],
        quantizers: Mapping[str, Callable[[Tensor], Tensor]],
    ) -> None:
        inputs = list(graph.inputs)
        super().__init__(graph, graph.subgraph(inputs, [output]), inputs, [output])
        self._values = values
        with torch.no_grad():
            for name, place in self._stored.items():
                if name in quantizers and name not in values:
                    self._read(place).copy_(quantizers[name](self._read(place)))

    def _folded(self, steps: Sequence[Operation]) -> tuple[Operation, ...]:
        return tuple(steps)  # between constants there may be values that change

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the output."""
        values = self._start(inputs)
        for first in range(0, len(self._steps), _SEGMENT):
            if torch.is_grad_enabled():
                values = checkpoint(self._segment, first, values, use_reentrant=False)
            else:
                values = self._segment(first, values)
        return values[self.outputs[0]]

    def _segment(self, first: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the values behind some steps that later ones read."""
        found = dict(values)
        for i in range(first, min(first + _SEGMENT, len(self._steps))):
            found.update(self._run(i, found))
            for name in self._dead[i]:
                found.pop(name, None)
        return found

    def _run(self, i: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        now = {name: self._values[name]() for name in self._steps[i].read() if name in self._values}
        if now:
            values = {**values, **{name: v.to(values[name].dtype) for name, v in now.items()}}
        return super()._run(i, values)
