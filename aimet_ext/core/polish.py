"""Rounded weights whose scales are learnt, and whose integers may be."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aimet_ext.core.affine import (
    Grid,
    clamp_ste,
    dequantize,
    from_blocks,
    quantize,
    round_ste,
    to_blocks,
)
from aimet_ext.core.clipping import GridLayout


class RoundedWeight:
    """The integers of a weight, and its scales as multiples ``exp(log)`` of those at the start.

        ŵ = (clamp ⌊q + moves⌉ + offset + shift) · scale · exp(log)

    There is one ``log`` for every cell of the grid; of LPBQ's blocks one for every group, so that
    the integers between the scales of a group's blocks stay as well. ``moves`` are zero where the
    integers stay; gradients pass their rounding straight through.

    :param weight: Weight on the grid, ``[out, in, …]``.
    :param grid: Grid of it.
    """

    def __init__(self, weight: Tensor, grid: Grid, layout: GridLayout) -> None:
        codes = quantize(weight.detach(), grid)
        small = torch.int8 if grid.qmax < 128 else torch.int16
        self.codes = codes.to(small)
        self.grid = grid
        cells = tuple(grid.shape)
        grouping = (layout.block_grouping or ())[: len(cells)]
        grouped = zip(cells, (*grouping, *[1] * (len(cells) - len(grouping))), strict=True)
        #: Cells of independent scales along each dimension of the grid.
        self.groups = tuple(1 if size == -1 else cell // size for cell, size in grouped)

    def start(self) -> Tensor:
        """Return the logarithms at the start, zeros of the shape ``groups``."""
        return torch.zeros(self.groups, dtype=torch.float32, device=self.grid.scale.device)

    def scale(self, log: Tensor) -> Tensor:
        """Return the scale of every cell, differentiable in ``log``."""
        blocks = to_blocks(self.grid.scale, self.groups)  # [g0, b0, g1, b1, …]
        spread = log.exp().reshape([n for group in self.groups for n in (group, 1)])
        return from_blocks(blocks * spread).reshape(self.grid.shape)

    def start_moves(self) -> Tensor:
        """Return the moves of the integers at the start, zeros of the weight's shape."""
        return torch.zeros(self.codes.shape, dtype=torch.float32, device=self.codes.device)

    def moved(self, moves: Tensor | None) -> Tensor:
        """Return the integers in float32, differentiable in ``moves``."""
        codes = self.codes.float()
        if moves is None:
            return codes
        return clamp_ste(round_ste(codes + moves), self.grid.qmin, self.grid.qmax)

    def weight(self, log: Tensor, moves: Tensor | None = None) -> Tensor:
        """Return the weight in float32, differentiable in ``log`` and ``moves``."""
        return dequantize(self.moved(moves), replace(self.grid, scale=self.scale(log)))

    def written(self, grid: Grid, dtype: torch.dtype, moves: Tensor | None = None) -> Tensor | None:
        """Return the values of the integers on another grid, None where that reads others.

        :param grid: Grid with other scales.
        :param dtype: Type that the weight is stored in.
        """
        codes = self.moved(moves)
        values = dequantize(codes.to(dtype), grid).to(dtype)
        return values if torch.equal(quantize(values, grid).float(), codes) else None
