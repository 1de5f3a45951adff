"""Learnable rounding of a weight on its grid (AutoRound, arXiv 2309.05516)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from aimet_ext.core.affine import Grid, channel_scale, clamp_ste, dequantize, round_ste, spread
from aimet_ext.core.clipping import GridLayout

# Of a step of the grid: how far from its integer a sum may start, so that it stays that integer.
_REACH = 0.45


class LearnableRounding(nn.Module):
    """Offsets that are added to a weight before it is rounded, and scales of its grid.

        q = clamp(round(W / s − z + v), qmin, qmax),   ŵ = (q + z) · s,   s = exp(γ) · s₀

    with an offset ``v`` for each weight, the grid's offset and shift ``z``, and a ``γ`` for each
    float scale: of a cell, or with LPBQ of a channel, whose integer block scales stay. Gradients
    pass rounding straight through, and are zero for offsets of weights beyond the grid.

    Offsets start as the smallest with which the integers are given ones: a sum at the edge of its
    integer turns first.

    :param weight: ``[out, in]``, float32 or float64.
    :param layout: the grid but its ranges.
    :param grid: the grid to start from.
    :param codes: integers to start from, ``[out, in]``.
    :param scales: True to learn scales.
    """

    def __init__(
        self, weight: Tensor, layout: GridLayout, grid: Grid, codes: Tensor, *, scales: bool = True
    ) -> None:
        super().__init__()
        self.weight, self.grid = weight, grid
        self._zero = spread(grid.offset, weight) + grid.zero_point_shift
        units = grid.scale
        if layout.scale_bits is not None:
            units = channel_scale(units, layout.block_grouping or (), layout.scale_bits)
        self.stretch = nn.Parameter(torch.zeros_like(units), requires_grad=scales)
        ideal = weight / spread(grid.scale, weight) - self._zero
        codes = codes.to(weight.dtype)
        self.offsets = nn.Parameter(ideal.clamp(codes - _REACH, codes + _REACH) - ideal)

    def forward(self) -> Tensor:
        """Return the quantized weight ``[out, in]``; differentiable."""
        grid = replace(self.grid, scale=self.scale())
        return dequantize(self._codes(grid.scale), grid)

    def scale(self) -> Tensor:
        """Return the scale of each cell; differentiable."""
        return self.grid.scale * spread(self.stretch.exp(), self.grid.scale)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Return the integers ``[out, in]``."""
        return self._codes(self.scale())

    def _codes(self, scale: Tensor) -> Tensor:
        real = self.weight / spread(scale, self.weight) - self._zero + self.offsets
        return clamp_ste(round_ste(real), self.grid.qmin, self.grid.qmax)
