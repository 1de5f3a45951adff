"""The searches with the whole objective recomputed for every candidate, element by element."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aimet_ext.core.affine import Grid
from aimet_ext.core.clipping import GridLayout
from aimet_ext.core.equivalence import Reader


def quantized_by_loop(
    weight: Tensor, scale: Tensor, offset: Tensor, qmin: int, qmax: int, shift: float
) -> Tensor:
    """Every weight moved to the nearest value of its cell."""
    values, scales, offsets = weight.tolist(), scale.tolist(), offset.tolist()
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            i = row * scale.shape[0] // weight.shape[0]
            j = column * scale.shape[1] // weight.shape[1]
            step, zero = scales[i][j], offsets[i][j]
            code = round(values[row][column] / step - shift) - zero
            code = min(max(code, qmin), qmax)
            values[row][column] = (code + zero + shift) * step
    return torch.tensor(values, dtype=weight.dtype)


def objective_by_loop(
    error: Tensor, second: Tensor, pull: Tensor | None, row_weight: Tensor | None
) -> float:
    """``Σ_r row_weight[r] · (Σ_ij e_i H_ij e_j − 2 Σ_i e_i pull_i)`` over the rows ``e`` of E."""
    total = 0.0
    moments = second.tolist()
    for row, values in enumerate(error.tolist()):
        cost = 0.0
        for i, first in enumerate(values):
            for j, other in enumerate(values):
                cost += first * moments[i][j] * other
            if pull is not None:
                cost -= 2 * first * float(pull[row, i])
        total += cost if row_weight is None else cost * float(row_weight[row])
    return total


def search_ranges_by_loop(
    weight: Tensor,
    layout: GridLayout,
    second: Tensor,
    pull: Tensor | None,
    smooth: Tensor,
    row_weight: Tensor | None,
    shares: Sequence[float],
    start: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """One sweep over all cells; each takes the candidate with the lowest objective."""
    scale, offset = start[0].clone(), start[1].clone()
    low, high = layout.bounds(weight * smooth)
    rows = weight.shape[0] // layout.shape[0]  # that share a cell

    def objective(part: slice) -> float:
        values = quantized_by_loop(
            weight * smooth, scale, offset, layout.qmin, layout.qmax, layout.zero_point_shift
        )
        error = values / smooth - weight
        return objective_by_loop(
            error[part],
            second,
            None if pull is None else pull[part],
            None if row_weight is None or rows == 1 else row_weight[part],
        )

    for j in range(layout.shape[1]):
        for i in range(layout.shape[0]):
            part = slice(i * rows, (i + 1) * rows)
            best = (objective(part), scale[i, j].clone(), offset[i, j].clone())
            for share in shares:
                for left, right in _sides(share, layout.symmetric):
                    candidate = layout.raw(low[i, j] * left, high[i, j] * right)
                    scale[i, j], offset[i, j] = candidate
                    cost = objective(part)
                    if cost < best[0]:
                        best = (cost, *candidate)
            scale[i, j], offset[i, j] = best[1], best[2]
    return scale, offset


def search_integers_by_loop(
    weight: Tensor,
    layout: GridLayout,
    second: Tensor,
    pull: Tensor | None,
    smooth: Tensor,
    unit: Tensor,
    integers: Tensor,
) -> Tensor:
    """LPBQ: one sweep over the integers of all blocks, the float scales of the channels held.

    :param unit: ``[out, 1]``.
    :param integers: ``[out, blocks]``.
    :returns: the new integers. Where one block alone has the top integer, it keeps it.
    """
    integers = integers.clone()
    top = 2 ** (layout.scale_bits or 0)
    offset = torch.zeros_like(integers)

    def objective(row: int) -> float:
        values = quantized_by_loop(
            weight * smooth, unit * integers, offset, layout.qmin, layout.qmax, 0.0
        )
        error = values / smooth - weight
        part = slice(row, row + 1)
        return objective_by_loop(error[part], second, None if pull is None else pull[part], None)

    for j in range(integers.shape[1]):
        for row in range(integers.shape[0]):
            if integers[row, j] == top and int((integers[row] == top).sum()) == 1:
                continue
            best = (objective(row), float(integers[row, j]))
            for integer in range(1, top + 1):
                integers[row, j] = integer
                best = min(best, (objective(row), float(integer)), key=lambda pair: pair[0])
            integers[row, j] = best[1]
    return integers


def search_smoothing_by_loop(
    readers: Sequence[Reader],
    second: Tensor,
    smooth: Tensor,
    groups: Sequence[Tensor],
    multipliers: Sequence[float],
) -> Tensor:
    """One sweep over all groups; each takes the factor with the lowest objective."""
    smooth = smooth.clone()

    def objective() -> float:
        total = 0.0
        for reader in readers:
            error = reader_error_by_loop(reader.weight, reader.grid, smooth)
            total += objective_by_loop(error, second, reader.pull, reader.row_weight)
        return total

    for group in groups:
        before = smooth[group].clone()
        best = (objective(), before)
        for multiplier in multipliers:
            smooth[group] = before * multiplier
            cost = objective()
            if cost < best[0]:
                best = (cost, smooth[group].clone())
        smooth[group] = best[1]
    return smooth


def reader_error_by_loop(weight: Tensor, grid: Grid, smooth: Tensor) -> Tensor:
    """Quantized minus float weight, as the unsmoothed input sees it."""
    values = quantized_by_loop(
        weight * smooth, grid.scale, grid.offset, grid.qmin, grid.qmax, grid.zero_point_shift
    )
    return values / smooth - weight


def _sides(share: float, symmetric: bool) -> list[tuple[float, float]]:
    both = [(share, share)]
    return both if symmetric or share >= 1 else [*both, (share, 1.0), (1.0, share)]
