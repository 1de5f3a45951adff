"""Static ranges of activations, chosen by the error of a block's output."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aimet_ext.core.objective import squared_error
from aimet_ext.data.cache import TensorCache
from aimet_ext.sim.points import Point, Range
from aimet_ext.sim.protocol import SimAdaptor
from aimet_ext.walk.stream import BlockStream
from aimet_ext.walk.streamed import StreamedBlock

PERCENTILES = (99.99, 99.9, 99.0)  # of a tensor's values, that a range starts from
FACTORS = (0.8, 0.95)  # of a bound, each as often as it pays
LEAST_GAIN = 1e-4  # relative, of a step
_SAMPLES = 2**18  # of a tensor's values, about, that percentiles are taken of


def steps(point: Point) -> Iterator[tuple[float, float]]:
    """Yield factors of both bounds; of a symmetric range they are equal."""
    for factor in FACTORS:
        if point.symmetric:
            yield factor, factor
        else:
            yield factor, 1.0
            yield 1.0, factor


def search_range(
    point: Point,
    start: Range,
    loss: float,
    judge: Callable[[Range], float],
    others: Sequence[Range] = (),
) -> tuple[Range, float]:
    """Return the range with the lowest loss that is found from some starts, and its loss.

    :param start: Range whose loss is known.
    :param judge: Function from a range to its loss.
    :param others: Further starts; search goes on from the best one.
    """
    best = start
    for other in others:
        if (found := judge(other)) < loss * (1 - LEAST_GAIN):
            best, loss = other, found
    for factors in steps(point):
        while True:
            tried = (best[0] * factors[0], best[1] * factors[1])
            if tried == best or not tried[0] < tried[1]:
                break
            if not (found := judge(tried)) < loss * (1 - LEAST_GAIN):
                break
            best, loss = tried, found
    return best, loss


@dataclass(eq=False)
class BlockRanges:
    """The ranges of a block's activations while they are chosen.

    :param data: Inputs of the block in the float model, and in the quantized one so far.
    :param targets: Outputs of the float block on the float stream.
    :param points: Quantizers in the block that have a range, by place.
    :param ranges: Their ranges, by place.
    """

    adaptor: SimAdaptor
    data: StreamedBlock
    targets: TensorCache
    points: Mapping[str, Point]
    ranges: dict[str, Range] = field(default_factory=dict)

    @property
    def stream(self) -> BlockStream:
        """Inputs of the block in the model quantized so far."""
        return self.data.flows["quantized"]

    def _quantize(self, ranges: Mapping[str, Range]) -> Callable[[str, Tensor], Tensor]:
        def see(place: str, tensor: Tensor) -> Tensor:
            point = self.points.get(place)
            if point is None or place not in ranges:
                return tensor
            return point.quantize(tensor, *ranges[place])

        return see

    @torch.no_grad()
    def loss(self, ranges: Mapping[str, Range]) -> float:
        """Return the mean squared error of the output over the tokens that count."""
        total, count = 0.0, 0
        with self.adaptor.seeing(self.data.name, self._quantize(ranges)):
            for index in range(len(self.stream)):
                call = self.stream.select(index)
                target = self.targets.read(index, self.stream.device)
                error, elements = squared_error(call(self.data.module), target, call.mask)
                total, count = total + error, count + elements
        return total / max(count, 1)

    @torch.no_grad()
    def places(self) -> set[str]:
        """Return the quantizers in the block, by place."""
        found: set[str] = set()

        def see(place: str, tensor: Tensor) -> Tensor:
            found.add(place)
            return tensor

        with self.adaptor.seeing(self.data.name, see):
            self.stream.select(0)(self.data.module)
        return found & set(self.points)

    @torch.no_grad()
    def advance(self) -> None:
        """Move both streams past the block."""
        with self.adaptor.seeing(self.data.name, self._quantize(self.ranges)):
            self.data.advance("quantized")
        for index, target in enumerate(self.targets):
            self.data.flows["float"].hidden[index] = target

    @torch.no_grad()
    def starts(self, places: Collection[str]) -> dict[str, list[Range]]:
        """Return ranges that hold some percentage of a tensor's values, by place."""
        values: dict[str, list[Tensor]] = {}
        most = max(1, _SAMPLES // len(self.stream))
        mask: Tensor | None = None

        def see(place: str, tensor: Tensor) -> Tensor:
            if place in places and tensor.is_floating_point() and tensor.numel():
                kept = tensor.detach().as_subclass(Tensor)
                if mask is not None and kept.shape[: mask.dim()] == mask.shape:
                    kept = kept[mask]
                kept = kept.flatten().float()
                values.setdefault(place, []).append(kept[:: max(1, len(kept) // most)].cpu())
            return tensor

        with self.adaptor.seeing(self.data.name, see):
            for index in range(len(self.stream)):
                call = self.stream.select(index)
                mask = call.mask
                call(self.data.module)
        return {place: self._percentiles(place, torch.cat(seen)) for place, seen in values.items()}

    def _percentiles(self, place: str, values: Tensor) -> list[Range]:
        low, high = self.ranges[place]
        found = []
        for percentile in PERCENTILES:
            tail = (1 - percentile / 100) / 2
            ends = torch.quantile(values, torch.tensor([tail, 1 - tail]))
            one, other = self.points[place].covering((float(ends[0]), float(ends[1])))
            bounds = max(one, low), min(other, high)
            if low <= bounds[0] < bounds[1] <= high and bounds != (low, high):
                found.append(bounds)
        return list(dict.fromkeys(found))

    def worth(self, groups: Sequence[Sequence[Point]], least: float) -> list[Sequence[Point]]:
        """Return the groups without which the loss falls by a share of it at least."""
        whole = self.loss(self.ranges)

        def without(group: Sequence[Point]) -> float:
            out = {point.place for point in group}
            return self.loss({p: bounds for p, bounds in self.ranges.items() if p not in out})

        return [group for group in groups if whole - without(group) >= least * whole]

    def search(
        self, group: Sequence[Point], loss: float, starts: Sequence[Range]
    ) -> tuple[Range, float]:
        """Choose one range for some quantizers, which have it afterwards; return its loss too.

        :param loss: Loss with the ranges as they are.
        """
        first = group[0]

        def judge(bounds: Range) -> float:
            return self.loss({**self.ranges, **{point.place: bounds for point in group}})

        best, loss = search_range(first, self.ranges[first.place], loss, judge, starts)
        self.ranges.update({point.place: best for point in group})
        return best, loss
