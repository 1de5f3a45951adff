"""AWQ's grid of exponents and SmoothQuant's formula, element by element."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from search_reference import objective_by_loop, quantized_by_loop
from torch import Tensor

from aimet_ext.core.awq import ScaledReader


def candidates_by_loop(
    activation: Sequence[float], weight: Sequence[float] | None, num_grid: int
) -> list[list[float]]:
    """``x^a``, then ``x^a / w^(1 − a)``, for ``a = 0, 1/n, …``; of channels without zeros."""
    found = []
    for form in (1, 2) if weight is not None else (1,):
        for step in range(num_grid):
            a = step / num_grid
            scale = [x**a for x in activation]
            if form == 2 and weight is not None:
                scale = [s / w ** (1 - a) for s, w in zip(scale, weight, strict=True)]
            mean = 1.0
            for s in scale:
                mean *= s ** (1 / len(scale))
            found.append([s / mean for s in scale])
    return found


def relative_by_loop(reader: ScaledReader) -> list[float]:
    """Mean over rows of each weight's share of the largest one of its cell."""
    rows, width = reader.weight.shape
    cells, columns = reader.layout.shape
    values = reader.weight.abs().tolist()
    total = [0.0] * width
    for i in range(rows):
        for j in range(width):
            in_cell = [
                values[r][c]
                for r in range(rows)
                for c in range(width)
                if r * cells // rows == i * cells // rows
                and c * columns // width == j * columns // width
            ]
            total[j] += values[i][j] / max(in_cell) / rows
    return total


def best_by_loop(
    readers: Sequence[ScaledReader], second: Tensor, index: Tensor, candidates: Sequence[Sequence]
) -> tuple[int, list[float]]:
    """Number of the candidate with the lowest objective, and all objectives."""
    errors = []
    for scale in candidates:
        columns = torch.tensor([scale[k] for k in index.tolist()], dtype=second.dtype)
        total = 0.0
        for reader in readers:
            layout, scaled = reader.layout, reader.weight * columns
            grid = layout.with_scale(*layout.raw(*layout.bounds(scaled)))
            values = quantized_by_loop(
                scaled, grid.scale, grid.offset, grid.qmin, grid.qmax, grid.zero_point_shift
            )
            error = values / columns - reader.weight
            total += objective_by_loop(error, second, reader.pull, reader.row_weight)
        errors.append(total)
    return errors.index(min(errors)), errors
