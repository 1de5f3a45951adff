"""AIMET's quantizers of PyTorch models made to compute something else for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from aimet_ext.core.affine import Grid, fake_quantize, minmax_range, scale_offset
from aimet_ext.sim.protocol import Range

__all__ = ["forwards", "live", "observer", "widen"]


@contextmanager
def forwards(replacements: Mapping[Any, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Context in which quantizers compute something else."""
    try:
        for quantizer, forward in replacements.items():
            quantizer.forward = forward
        yield
    finally:
        for quantizer in replacements:
            vars(quantizer).pop("forward", None)


def live(quantizer: Any) -> Callable[[Tensor], Tensor]:
    """What quantizes a tensor as a quantizer does, on the range of the tensor itself."""

    def quantize(tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor
        integers = (quantizer.qmin, quantizer.qmax, quantizer.symmetric)
        low, high = minmax_range(tensor.detach(), tuple(quantizer.shape), *integers)
        scale, offset = scale_offset(low.float(), high.float(), *integers)
        return fake_quantize(tensor, Grid(scale, offset, *integers[:2], quantizer.block_size))

    return quantize


def observer(ranges: dict[str, Range], name: str) -> Callable[[Tensor], Tensor]:
    """What returns a tensor as it is, and notes its range under a name."""

    def observe(tensor: Tensor) -> Tensor:
        widen(ranges, name, tensor)
        return tensor

    return observe


def widen(ranges: dict[str, Range], name: str, tensor: Tensor) -> None:
    """Make a range hold all of a tensor."""
    if tensor.numel():
        low, high = ranges.get(name, (float("inf"), -float("inf")))
        ranges[name] = (min(low, float(tensor.min())), max(high, float(tensor.max())))
