"""AIMET's weight quantizers of PyTorch models, read and written."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from aimet_torch.quantization.affine import AffineQuantizerBase, GroupedBlockQuantizeDequantize
from torch import Tensor, nn

from aimet_ext.core.affine import Grid, symmetric_offset
from aimet_ext.core.clipping import GridLayout
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


def _neighbours(x: Tensor) -> list[Tensor]:
    """Return the float32 numbers next to ``x``, two on either side."""
    up, down = torch.full_like(x, torch.inf), torch.full_like(x, -torch.inf)
    above, below = torch.nextafter(x, up), torch.nextafter(x, down)
    return [above, below, torch.nextafter(above, up), torch.nextafter(below, down)]
