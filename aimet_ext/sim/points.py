"""The places where a simulation quantizes a tensor, each by name: looked through, and switched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from aimet_ext.core.affine import Grid, fake_quantize, minmax_range, scale_offset
from aimet_ext.data.batches import ForwardFn
from aimet_ext.models.topology import BlockTopology

Kind = Literal["weight", "activation", "input"]

#: From a point's name, the tensor there and the quantizer to what takes the tensor's place.
Look: TypeAlias = Callable[[str, Tensor, Callable[[Tensor], Tensor]], Tensor]
Range: TypeAlias = tuple[float, float]
#: From a batch to the model's first output.
Run: TypeAlias = Callable[[Any], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """A quantizer in use, of integers.

    :param name: Name of the layer's parameter, of the module whose output it is, or of the tensor.
    :param kind: ``"weight"`` for what the model stores, ``"input"`` for what a module of a torch
        model reads or an ONNX graph is given, ``"activation"`` for what is computed.
    :param qmin: Smallest integer.
    :param qmax: Largest integer.
    :param low: Smallest value over all cells; None without a range.
    :param high: Largest value.
    :param frozen: True if ``compute_encodings`` leaves the range alone.
    :param single: True if it has one range for the whole tensor.
    :param half_up: Way in which AIMET rounds, see :class:`~aimet_ext.core.affine.Grid`.
    :param place: Name of the quantizer in the simulation.
    :param own: AIMET's quantizer.
    """

    name: str
    kind: Kind
    qmin: int
    qmax: int
    symmetric: bool
    low: float | None
    high: float | None
    frozen: bool
    single: bool
    half_up: bool
    place: str
    own: Any

    @property
    def bitwidth(self) -> int:
        """Bits of a value."""
        return (self.qmax - self.qmin).bit_length()

    def grid(self, low: float, high: float) -> Grid:
        """Return the grid of a range for the whole tensor, as AIMET makes it."""
        bounds = (torch.tensor([low]), torch.tensor([high]))
        scale, offset = scale_offset(*bounds, self.qmin, self.qmax, self.symmetric)
        return Grid(scale, offset, self.qmin, self.qmax, half_up=self.half_up)

    def covering(self, bounds: Range) -> Range:
        """Return the smallest range with zero and all from one bound to the other."""
        values = torch.tensor(bounds)
        low, high = minmax_range(values, (1,), self.qmin, self.qmax, self.symmetric)
        return float(low), float(high)

    def quantize(self, tensor: Tensor, low: float, high: float) -> Tensor:
        """Return a tensor quantized with a range; gradients pass straight through rounding."""
        if not tensor.numel() or not tensor.is_floating_point():
            return tensor
        grid, device = self.grid(low, high), tensor.device
        return fake_quantize(
            tensor, replace(grid, scale=grid.scale.to(device), offset=grid.offset.to(device))
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class NormGain:
    """The gain of a norm, and its bias.

    :param module: Name of the norm.
    :param part: Name of the part of the simulation that holds it, see
        :meth:`~aimet_ext.sim.protocol.Snapshots.snapshot`.
    :param names: Names of its parameters for :meth:`Points.substituting`, by ``"weight"`` and
        ``"bias"``.
    :param offset: 1.0 for a norm that multiplies by ``1 + weight``, else 0.
    :param readers: Names of the layers that read it alone, as far as they are known.
    """

    module: str
    part: str
    names: Mapping[str, str]
    offset: float = 0.0
    readers: tuple[str, ...] = ()


class Points(Protocol):
    """The quantizers of a simulation one by one, in the order in which data flows."""

    def points(self, places: Collection[str] | None = None) -> dict[str, Point]:
        """Return the integer quantizers in use by name, in order.

        :param places: Those to look at, at a cost of these alone; None for all.
        """

    def looking(
        self, look: Look, forward_fn: ForwardFn | None = None
    ) -> AbstractContextManager[Run]:
        """Open a context with a function that runs the model, differentiable.

        Each quantizer's tensor goes through a function in place of the quantizer.

        :raises TransformRefused: An ONNX graph has operators that PyTorch cannot compute.
        """

    def seeing_keys(
        self, see: Callable[[int, Tensor], Tensor], forward_fn: ForwardFn | None = None
    ) -> AbstractContextManager[Run]:
        """Open a context with a function that runs the float model, differentiable.

        Keys of each attention ``[batch, key heads, tokens, width]``, behind the rotary embedding,
        go through a function of the attention's number and the keys.

        :raises ValueError: The keys are not found.
        :raises TransformRefused: An ONNX graph has operators that PyTorch cannot compute.
        """

    def seeing_outputs(
        self,
        layers: Sequence[str],
        see: Callable[[str, int, Tensor], Tensor],
        forward_fn: ForwardFn | None = None,
    ) -> AbstractContextManager[Run]:
        """Open a context with a function that runs the float model, differentiable.

        Outputs of layers go through a function of the layer's name, the number of the operation of
        those that apply its weight, and the output. A repeated block of a torch model is computed
        again on the way back, and the function called again with it.

        :raises TransformRefused: An ONNX graph has operators that PyTorch cannot compute.
        """

    def running(
        self, names: Collection[str], forward_fn: ForwardFn | None = None
    ) -> AbstractContextManager[Run]:
        """Open a context with a function that runs the model with these quantizers alone."""

    def substituting(
        self,
        weights: Mapping[str, Callable[[], Tensor]],
        gains: Mapping[str, Callable[[], Tensor]],
        forward_fn: ForwardFn | None = None,
    ) -> AbstractContextManager[Run]:
        """Open a context with a function that runs the model with other parameters, differentiable.

        Quantizers of what is replaced are off, those of activations and those without a range too;
        others are on. Where
        gradients are asked for, a part of the model is computed again on the way back, so that
        memory holds what one part computes, whatever the depth.

        :param weights: By layer, function that computes its weight ``[out, in, …]``; called each
            time that the layer is computed.
        :param gains: By a name of a :class:`NormGain`, function that computes the parameter.
        :raises TransformRefused: An ONNX graph has operators that PyTorch cannot compute.
        """

    def norm_gains(self, blocks: Sequence[BlockTopology]) -> list[NormGain]:
        """Return the gains of the model's norms.

        :param blocks: Decoder blocks; none where the model has no known ones.
        """

    def read_gain(self, name: str) -> Tensor:
        """Return a parameter that a :class:`NormGain` names, read only."""

    def write_gain(self, name: str, values: Tensor) -> None:
        """Replace a parameter that a :class:`NormGain` names."""

    def calibrate_all(self, batches: Sequence[Any], forward_fn: ForwardFn | None = None) -> None:
        """Set all ranges that are not frozen, as ``sim.compute_encodings`` does."""

    def write_range(self, point: Point, low: float, high: float, *, freeze: bool = True) -> None:
        """Give a quantizer of a whole tensor a range."""

    def score_ranges(self, names: Collection[str], batches: Sequence[Any]) -> dict[str, Range]:
        """Return shorter ranges of attention scores, where a Softmax gains by them.

        :param names: Names of the quantizers whose ranges may change.
        """
        return {}  # a torch simulation quantizes no scores

    def seeing(
        self, module: str, see: Callable[[str, Tensor], Tensor]
    ) -> AbstractContextManager[None]:
        """Open a context in which a function takes the place of a module's activation quantizers.

        :param see: Function from the place of a quantizer and its tensor to what goes on. Of an
            ONNX graph it may be given other tensors too.
        """

    def with_ranges(self, module: str, ranges: Mapping[str, Range]) -> AbstractContextManager[None]:
        """Open a context in which a module's activations are quantized with ranges given here.

        :param ranges: ``(min, max)`` by places of quantizers; those of others do nothing.
        """

    def renew_encodings(self, ranges: Mapping[str, Range]) -> list[str]:
        """Calibrate quantizers anew that have ranges, frozen or not; they are not frozen then.

        :param ranges: ``(min, max)`` of what each one quantizes, by its place.
        :returns: Those that had a range. One for several cells or of a float type has none now:
            ``compute_encodings`` fills it.
        """
        had = self.reset_encodings(ranges)
        for point in self.points(had).values():
            if point.single:
                self.write_range(point, *point.covering(ranges[point.place]), freeze=False)
        return had

    def reset_encodings(self, names: Iterable[str]) -> list[str]:
        """Drop the ranges of these quantizers, frozen or not; return those that had one."""


def first_output(output: Any) -> Tensor:
    """Return the logits, or the first tensor, of what a model returns."""
    found = getattr(output, "logits", output)
    while not isinstance(found, Tensor):
        found = found[0] if isinstance(found, tuple | list) else next(iter(found.values()))
    return found.as_subclass(Tensor)
