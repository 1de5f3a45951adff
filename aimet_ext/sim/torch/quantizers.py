"""AIMET's weight quantizers of PyTorch models, read and written."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from aimet_torch.quantization.affine import AffineQuantizerBase, GroupedBlockQuantizeDequantize
from torch import Tensor, nn

from aimet_ext.core.affine import Grid, symmetric_offset
from aimet_ext.core.clipping import GridLayout
from aimet_ext.core.transposed import as_convolution
from aimet_ext.data.geometry import TRANSPOSED
from aimet_ext.sim.protocol import WeightQuantizer
from aimet_ext.sim.torch.state import uninitialize


class TorchWeightQuantizer(WeightQuantizer):
    """See :class:`aimet_ext.sim.protocol.WeightQuantizer`.

    Both of AIMET's parametrisations are known, ``min`` and ``max`` and ``scale`` and ``offset``.

    :param name: name of the layer, for messages.
    :param module: AIMET's quantized layer.
    """

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.module = module
        if not isinstance(self.quantizer, AffineQuantizerBase):
            raise TypeError(
                f"{name}: an integer weight quantizer is required, "
                f"got {type(self.quantizer).__name__}; set it to a QuantizeDequantize"
            )

    @property
    def quantizer(self) -> Any:
        """AIMET's own object."""
        return self.module.param_quantizers["weight"]

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight

    def is_of(self, other: WeightQuantizer) -> bool:
        return (
            isinstance(other, TorchWeightQuantizer)
            and self.quantizer is other.quantizer
            and self.module.weight is other.module.weight
        )

    @torch.no_grad()
    def set_weight(self, values: Tensor) -> None:
        self.weight.copy_(values)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.quantizer.shape)

    @cached_property
    def layout(self) -> GridLayout:
        own, qmin, qmax = self.quantizer, int(self.quantizer.qmin), int(self.quantizer.qmax)
        lpbq = isinstance(own, GroupedBlockQuantizeDequantize)
        size = own.block_size
        return GridLayout(
            shape=((1,) * (2 - len(self.shape)) + self.shape)[:2],
            qmin=qmin,
            qmax=qmax,
            symmetric=own.symmetric,
            zero_point_shift=own.zero_point_shift,
            block_size=None if size is None else tuple(int(n) for n in size),
            block_grouping=tuple(own.block_grouping)[:2] if lpbq else None,
            scale_bits=own.decompressed_bw - (qmax - qmin).bit_length() if lpbq else None,
        )

    @property
    def frozen(self) -> bool:
        return not self.quantizer.is_overwrite_allowed()

    @property
    def initialized(self) -> bool:
        return self.quantizer.is_initialized()

    @torch.no_grad()
    def grid(self) -> Grid:
        if not self.initialized:
            raise self.no_range()
        return Grid(
            scale=self.quantizer.get_scale(dtype=torch.float32).clone(),
            offset=self.quantizer.get_offset(dtype=torch.float32).clone(),
            qmin=self.layout.qmin,
            qmax=self.layout.qmax,
            block_size=self.layout.block_size,
            zero_point_shift=self.layout.zero_point_shift,
        )

    def free_grid(self) -> Grid:
        """Return the grid with LPBQ's raw float scale for every block, without its integers.

        :raises ValueError: the quantizer has no range yet.
        """
        grid = self.grid()
        if self.layout.scale_bits is None:
            return grid
        low, high = self.quantizer.min.detach().float(), self.quantizer.max.detach().float()
        return replace(grid, scale=(high - low) / (grid.qmax - grid.qmin))

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Write the range of each cell.

        :raises ValueError: a bound is not finite.
        """
        if not (low.isfinite().all() and high.isfinite().all()):
            raise ValueError(f"{self.name}: a finite range is required, got NaN or infinity")
        self.quantizer.set_range(self.shaped(low), self.shaped(high))

    @torch.no_grad()
    def set_scale(self, scale: Tensor, offset: Tensor | None = None) -> None:
        """Write a scale, so that :meth:`grid` reads back the same one.

        AIMET keeps ``min`` and ``max`` in float32 and divides their difference again, so the last
        bit of the scale may differ: use what is read back.
        """
        quantizer, layout = self.quantizer, self.layout
        steps = layout.qmax - layout.qmin
        if offset is None:
            offset = torch.full_like(scale, symmetric_offset(layout.qmin, layout.qmax))
        if "scale" in dict(quantizer.named_parameters(recurse=False)):
            quantizer.scale.copy_(self.shaped(scale))
            if not layout.symmetric:
                quantizer.offset.copy_(self.shaped(offset))
            return
        if layout.scale_bits is not None:
            # AIMET's exporter makes a range of the scale and a scale of that again, in float32:
            # one that comes out as it went in is needed for encodings that are the sim's.
            scale = scale.float()
            scale = (scale * layout.qmax - scale * layout.qmin) / steps
        scale = scale.double()
        low = (scale * (offset.double() + layout.qmin)).float()
        high = (low.double() + scale * steps).float()
        best = high
        for candidate in _neighbours(high):
            error = ((candidate - low) / steps - scale).abs()
            best = torch.where(error < ((best - low) / steps - scale).abs(), candidate, best)
        self.set_range(low, best)

    def calibrate(self) -> None:
        self.module.compute_param_encodings()

    def freeze(self, frozen: bool = True) -> None:
        self.quantizer.allow_overwrite(not frozen)

    def reset(self) -> None:
        if self.initialized:
            uninitialize(self.quantizer)
            self.quantizer.allow_overwrite(True)


class TransposedQuantizer(TorchWeightQuantizer):
    """The quantizer of a transposed convolution's weight, seen as that of a convolution.

    See :func:`~aimet_ext.core.transposed.as_convolution`. Groups share the ranges of their output
    channels, so that a grid by channels has rows of its own without groups only.
    """

    @property
    def weight(self) -> Any:
        return as_convolution(self.module.weight, self.module.groups)

    @torch.no_grad()
    def set_weight(self, values: Tensor) -> None:
        self.module.weight.copy_(self.stored(values))

    def stored(self, values: Tensor) -> Tensor:
        return as_convolution(values, self.module.groups)

    @property
    def shape(self) -> tuple[int, ...]:
        return _swapped(tuple(self.quantizer.shape))

    @torch.no_grad()
    def grid(self) -> Grid:
        grid = super().grid()
        shape = self.shape
        return replace(grid, scale=grid.scale.reshape(shape), offset=grid.offset.reshape(shape))

    def shaped(self, values: Tensor) -> Tensor:
        own = super().shaped(values)  # [out, 1, …]
        return own.reshape(tuple(self.quantizer.shape))


def weight_quantizer_of(name: str, module: Any) -> TorchWeightQuantizer:
    """Return the weight quantizer of AIMET's quantized layer.

    :param name: name of the layer, for messages.
    """
    shape = tuple(module.param_quantizers["weight"].shape)
    is_row_wise = module.param_quantizers["weight"].block_size is None and (
        math.prod(shape) == 1 or getattr(module, "groups", 1) == 1
    )
    if isinstance(module, TRANSPOSED) and is_row_wise:
        return TransposedQuantizer(name, module)
    return TorchWeightQuantizer(name, module)


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[1], shape[0], *shape[2:]) if len(shape) > 1 else shape


def _neighbours(x: Tensor) -> list[Tensor]:
    """Return the float32 numbers next to ``x``, two on either side."""
    up, down = torch.full_like(x, torch.inf), torch.full_like(x, -torch.inf)
    above, below = torch.nextafter(x, up), torch.nextafter(x, down)
    return [above, below, torch.nextafter(above, up), torch.nextafter(below, down)]
