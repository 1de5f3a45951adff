"""Rounding written from the papers, element by element, the whole objective recomputed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aimet_ext.core.affine import Grid


def cell(values: Tensor, weight: Tensor, row: int, column: int) -> float:
    """The entry of a grid that a weight belongs to."""
    i = row * values.shape[0] // weight.shape[0]
    j = column * values.shape[1] // weight.shape[1]
    return float(values[i, j])


def nearest_code(value: float, scale: float, offset: float, grid: Grid) -> float:
    code = round(value / scale - grid.zero_point_shift - offset)
    return float(min(max(code, grid.qmin), grid.qmax))


def value_of(code: float, scale: float, offset: float, grid: Grid) -> float:
    return (code + offset + grid.zero_point_shift) * scale


def moment_of_row(second: Tensor, row: int, rows: int) -> Tensor:
    """The H of a row's group."""
    return second if second.dim() == 2 else second[row // (rows // second.shape[0])]


def gptq_by_loop(
    weight: Tensor, grid: Grid, second: Tensor, pull: Tensor | None, damping: float
) -> Tensor:
    """Algorithm of arXiv 2210.17323, row by row: rows of H⁻¹ removed by Gaussian elimination."""
    codes = torch.zeros_like(weight)
    for row in range(weight.shape[0]):
        moment = moment_of_row(second, row, weight.shape[0])
        damped = moment + damping * moment.diagonal().mean() * torch.eye(len(moment)).to(moment)
        inverse = torch.linalg.inv(damped)
        work = weight[row].clone()
        if pull is not None:
            work += pull[row] @ inverse
        for j in range(weight.shape[1]):
            scale, offset = cell(grid.scale, weight, row, j), cell(grid.offset, weight, row, j)
            codes[row, j] = nearest_code(float(work[j]), scale, offset, grid)
            error = work[j] - value_of(float(codes[row, j]), scale, offset, grid)
            work -= error / inverse[j, j] * inverse[j]
            inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
            inverse[j, :] = inverse[:, j] = 0
            inverse[j, j] = 1
    return codes


def objective_of_row(
    weight: Tensor, grid: Grid, second: Tensor, pull: Tensor | None, codes: Tensor, row: int
) -> float:
    """``E H Eᵀ − 2 E · pull`` of a row."""
    moment = moment_of_row(second, row, weight.shape[0])
    error = [
        value_of(
            float(codes[row, j]),
            cell(grid.scale, weight, row, j),
            cell(grid.offset, weight, row, j),
            grid,
        )
        - float(weight[row, j])
        for j in range(weight.shape[1])
    ]
    total = 0.0
    for i, first in enumerate(error):
        for j, other in enumerate(error):
            total += first * float(moment[i, j]) * other
        if pull is not None:
            total -= 2 * first * float(pull[row, i])
    return total


def descend_by_loop(
    weight: Tensor, grid: Grid, second: Tensor, pull: Tensor | None, codes: Tensor
) -> Tensor:
    """One sweep: each code of each row takes the best of all integers, others held."""
    codes = codes.clone()
    for row in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            best = (objective_of_row(weight, grid, second, pull, codes, row), float(codes[row, j]))
            for code in range(grid.qmin, grid.qmax + 1):
                codes[row, j] = code
                cost = objective_of_row(weight, grid, second, pull, codes, row)
                best = min(best, (cost + 1e-12, float(code)), key=lambda pair: pair[0])
            codes[row, j] = best[1]
    return codes


def tree_by_loop(weight: Tensor, grid: Grid, second: Tensor, pull: Tensor | None) -> Tensor:
    """Best leaf of the tree in which each column takes one of the two grid points nearest to the
    value that GPTQ would round, given the columns before."""
    best = torch.zeros_like(weight)
    rows, width = weight.shape
    for row in range(rows):
        inverse = torch.linalg.inv(moment_of_row(second, row, rows))
        start = weight[row].clone()
        if pull is not None:
            start += pull[row] @ inverse
        found = (math.inf, best[row])

        def visit(j: int, work: Tensor, left: Tensor, codes: Tensor, row: int = row) -> None:
            nonlocal found
            if j == width:
                whole = best.clone()
                whole[row] = codes
                cost = objective_of_row(weight, grid, second, pull, whole, row)
                found = min(found, (cost, codes), key=lambda pair: pair[0])
                return
            scale, offset = cell(grid.scale, weight, row, j), cell(grid.offset, weight, row, j)
            real = float(work[j]) / scale - grid.zero_point_shift - offset
            for code in {math.floor(real), math.ceil(real)}:
                chosen = codes.clone()
                chosen[j] = min(max(code, grid.qmin), grid.qmax)
                error = work[j] - value_of(float(chosen[j]), scale, offset, grid)
                after = left - torch.outer(left[:, j], left[j]) / left[j, j]
                after[j, :] = after[:, j] = 0
                after[j, j] = 1
                visit(j + 1, work - error / left[j, j] * left[j], after, chosen)

        visit(0, start, inverse, torch.zeros(width, dtype=weight.dtype))
        best[row] = found[1]
    return best


def anneal_by_loop(
    ideal: list[float],
    second: Tensor,
    start: list[float],
    limits: tuple[int, int],
    strengths: list[float],
    rate: float,
    momentum: float,
) -> list[float]:
    """Relaxed codes of one row whose scale is 1, without pull, as the rules are stated."""
    codes = [float(min(max(code, limits[0]), limits[1])) for code in start]
    velocity = [0.0] * len(codes)
    for strength in strengths:
        before = list(codes)
        for j, code in enumerate(before):
            slope = sum(
                float(second[j, i]) * (before[i] - ideal[i]) for i in range(len(codes))
            ) / float(second[j, j])
            floor = math.floor(code)
            if floor == code:  # on a grid point: rest, or leave by the slope that is too much
                low, high, velocity[j] = code - 1, code + 1, 0.0
                excess = max(abs(slope) - strength / 2, 0.0)
                slope = math.copysign(excess, slope)
            else:
                low, high = float(floor), floor + 1.0
                slope += strength * (0.5 - (code - floor))
            velocity[j] = momentum * velocity[j] - rate * slope
            codes[j] = float(min(max(code + velocity[j], low, limits[0]), high, limits[1]))
            velocity[j] = codes[j] - code
    return codes


def soften_by_loop(
    weight: Tensor, grid: Grid, second: Tensor, pull: Tensor, sweeps: int, momentum: float
) -> Tensor:
    """Codes of all rows, from the weight itself, as the rules of soft descent are stated.

    Eight columns move at once, by the gradient before any of them has moved.
    """
    rows, width = weight.shape
    result = torch.zeros_like(weight)
    for row in range(rows):
        cells = [[cell(v, weight, row, j) for j in range(width)] for v in (grid.scale, grid.offset)]
        scale, zero = cells[0], [offset + grid.zero_point_shift for offset in cells[1]]
        ideal = [float(weight[row, j]) / scale[j] - zero[j] for j in range(width)]
        codes = [min(max(code, grid.qmin), grid.qmax) for code in ideal]
        before = list(codes)
        for sweep in range(sweeps):
            ahead = [
                code + momentum * (code - old) for code, old in zip(codes, before, strict=True)
            ]
            before = codes
            codes = [
                min(max(new, math.floor(code)), math.ceil(code))
                for new, code in zip(ahead, codes, strict=True)
            ]
            for first in range(0, width, 8):
                few = range(first, min(first + 8, width))
                own = second[few.start : few.stop, few.start : few.stop]
                root = own.diagonal().sqrt()
                largest = float(torch.linalg.eigvalsh(own / root / root[:, None])[-1])
                rate = min(1.0, 1.4 / largest)
                keep = min(rate * (sweep + 1) / sweeps, 0.999)
                error = [(codes[i] - ideal[i]) * scale[i] for i in range(width)]
                for j in few:
                    slope = sum(float(second[j, i]) * error[i] for i in range(width))
                    slope = (slope - float(pull[row, j])) / float(second[j, j]) / scale[j]
                    wish = codes[j] - rate * slope
                    floor = math.floor(wish)
                    share = (wish - floor - keep / 2) / (1 - keep)
                    code = floor + min(max(share, 0.0), 1.0)
                    codes[j] = min(max(code, grid.qmin), grid.qmax)
        result[row] = torch.tensor([float(round(code)) for code in codes])
    return result


def nearest_by_loop(weight: Tensor, grid: Grid) -> Tensor:
    """Plain rounding of ``[out, in]``, element by element."""
    values = weight.clone()
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            own = [cell(each, weight, row, column) for each in (grid.scale, grid.offset)]
            code = nearest_code(float(weight[row, column]), *own, grid)
            values[row, column] = value_of(code, *own, grid)
    return values
