"""HQQ written from its formulas, cell by cell and element by element."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aimet_ext.core.clipping import GridLayout

PATIENCE = 5  # iterations


def short(scale: float) -> float:
    """16 significant bits."""
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(round(mantissa * 2**16) / 2**16, exponent)


def shrunk(x: float, beta: float, p: float) -> float:
    """Generalized soft-thresholding."""
    if x == 0:
        return 0.0
    return math.copysign(max(0.0, abs(x) - abs(x) ** (p - 1) / beta), x)


class Cell:
    """Weights that share a range, and the range."""

    def __init__(self, weights: Sequence[float], layout: GridLayout) -> None:
        self.w, self.layout = list(weights), layout
        one = torch.tensor([self.w], dtype=torch.float64)
        low, high = (b.reshape(1, 1) for b in _whole(layout).bounds(one))
        scale, offset = _whole(layout).raw(low, high)
        self.raw = self.unit = float(scale)
        self.offset = float(offset)

    def deploy(self, scale: float) -> None:
        """Codes and errors on the grid of a scale."""
        lay, shift = self.layout, self.layout.zero_point_shift
        self.scale = scale
        codes = [round(w / scale - shift) - self.offset for w in self.w]
        self.q = [min(max(code, lay.qmin), lay.qmax) for code in codes]
        self.c = [q + self.offset + shift for q in self.q]
        self.error = [w - scale * c for w, c in zip(self.w, self.c, strict=True)]

    def step(self, beta: float, p: float) -> None:
        """The two least-squares problems of one iteration."""
        lay, shift = self.layout, self.layout.zero_point_shift
        e = [self.unit * shrunk(error / self.unit, beta, p) for error in self.error]
        target = [w - each for w, each in zip(self.w, e, strict=True)]
        if not lay.symmetric:
            z = [t / self.scale - q for t, q in zip(target, self.q, strict=True)]
            self.offset = float(round(sum(z) / len(z) - shift))
            self.offset = min(max(self.offset, -lay.qmax), -lay.qmin)
        c = [q + self.offset + shift for q in self.q]
        squares = sum(each**2 for each in c)
        scale = sum(t * each for t, each in zip(target, c, strict=True)) / squares if squares else 0
        self.raw = scale if scale > 0 else self.scale

    def loss(self, p: float) -> float:
        return sum(abs(error) ** p for error in self.error)


def _whole(layout: GridLayout) -> GridLayout:
    return GridLayout(
        shape=(1, 1),
        qmin=layout.qmin,
        qmax=layout.qmax,
        symmetric=layout.symmetric,
        zero_point_shift=layout.zero_point_shift,
    )


def hqq_by_loop(
    weight: Tensor,
    layout: GridLayout,
    *,
    num_iterations: int,
    lp_norm: float,
    beta: float,
    kappa: float,
) -> tuple[Tensor, Tensor]:
    """Best ``(scale, offset)`` of every cell; LPBQ's rows together, their scales as deployed."""
    rows, columns = layout.shape
    height, width = weight.shape[0] // rows, weight.shape[1] // columns
    scales, offsets = torch.zeros(layout.shape), torch.zeros(layout.shape)
    for row in range(rows):
        cells = [
            Cell(
                weight[row * height : (row + 1) * height, j * width : (j + 1) * width]
                .flatten()
                .tolist(),
                layout,
            )
            for j in range(columns)
        ]
        together = [cells] if layout.scale_bits is not None else [[each] for each in cells]
        for group in together:
            best = _solve(group, layout, num_iterations, lp_norm, beta, kappa)
            for cell, (scale, offset) in zip(group, best, strict=True):
                scales[row, cells.index(cell)] = scale
                offsets[row, cells.index(cell)] = offset
    return scales, offsets


def _solve(
    group: list[Cell], layout: GridLayout, count: int, p: float, beta: float, kappa: float
) -> list[tuple[float, float]]:
    best, lowest, idle = [], math.inf, 0
    for _ in range(count + 1):
        for cell, scale in zip(group, _deployed(group, layout), strict=True):
            cell.deploy(scale)
        loss = sum(cell.loss(p) for cell in group)
        idle += 1
        if loss < lowest:
            best, lowest, idle = [(cell.scale, cell.offset) for cell in group], loss, 0
        if idle == PATIENCE:
            return best
        for cell in group:
            cell.step(beta, p)
        beta *= kappa
    return best


def _deployed(group: list[Cell], layout: GridLayout) -> list[float]:
    scales = [short(cell.raw) for cell in group]
    if layout.scale_bits is None:
        return scales
    top = 2**layout.scale_bits
    channel = max(scales) / top
    return [min(max(round(scale / channel), 1), top) * channel for scale in scales]
