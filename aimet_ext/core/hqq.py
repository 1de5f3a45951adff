r"""HQQ: ranges that minimise an lp norm of the weights' errors, without data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023),
https://dropbox.github.io/hqq_blog. For every cell of a grid

    min over s, z  Σ |W − Q(W)|^p,  p < 1,     Q(W) = s (q − z),  q = clamp(round(W / s + z)),

which outliers count less in than in a squared error. Half-quadratic splitting adds ``E``, which
stands for the error, and solves in turn, while ``β`` grows by a factor ``κ``,

    E    = argmin  Σ |E|^p + β/2 ‖E − (W − Q(W))‖²  ≈  shrink(W − Q(W), β)
    s, z = argmin  ‖(W − E) − s (q − z)‖²,  with the integers q as they are.

The second is least squares. Its solution in one variable, the other one held, is

    z = mean(q − (W − E) / s)
    s = ⟨W − E, c⟩ / ⟨c, c⟩,  c = q − z,   since  d/ds ‖W − E − s c‖² = 2 s ⟨c, c⟩ − 2 ⟨W − E, c⟩.

The paper keeps ``s`` and updates ``z``, a real number. AIMET's zero points are whole and its
symmetric grids have none: ``z`` is rounded, and ``s`` is updated as well.

Errors are measured in steps of the cell's first range, so that ``β`` has no unit and weights times
a factor have the same integers. (In the unit of the weights, as in the paper, the thresholds of its
``β = 10`` are above every error of a language model, and ``E`` is 0.)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aimet_ext.core.affine import Grid, quantize, short_scale, to_blocks
from aimet_ext.core.clipping import GridLayout

_IN_CACHE, _ON_DEVICE = 1 << 18, 1 << 24  # weights that are worked on at a time
_PATIENCE = 5  # iterations without a better range, after which a cell stops
_LEAST = 1e-30  # error in steps, in place of 0, which has no power below 0


@torch.no_grad()
def hqq_ranges(
    weight: Tensor,
    layout: GridLayout,
    floor: Tensor | None = None,
    *,
    num_iterations: int = 20,
    lp_norm: float = 0.7,
    beta: float = 2.0,
    kappa: float = 1.1,
) -> tuple[Tensor, Tensor]:
    """Choose scale and offset of every cell by half-quadratic splitting, see above.

    Each iteration is judged on the grid that is deployed: with scales of 16 significant bits, whole
    offsets, and LPBQ's integer block scales. A cell (of LPBQ a row) whose norm did not fall for
    five iterations stops, at its best range.

    :param weight: ``[out, in]``.
    :param floor: Smallest scales allowed, of the grid's shape; None for any.
    :param num_iterations: Iterations, at most.
    :param lp_norm: ``p``.
    :param beta: First ``β``.
    :param kappa: Growth of ``β`` in an iteration.
    :returns: ``(scale, offset)`` of the grid's shape; the scale is the raw one for LPBQ.
    """
    settings: dict[str, Any] = {
        "num_iterations": num_iterations,
        "lp_norm": lp_norm,
        "beta": beta,
        "kappa": kappa,
    }
    elements = _IN_CACHE if weight.device.type == "cpu" else _ON_DEVICE
    rows = max(1, elements // weight.shape[1])
    if layout.is_row_wise(weight) and len(weight) > rows:
        parts = [
            hqq_ranges(
                weight[at : at + rows],
                replace(layout, shape=(len(weight[at : at + rows]), *layout.shape[1:])),
                None if floor is None else floor[at : at + rows],
                **settings,
            )
            for at in range(0, len(weight), rows)
        ]
        scales, offsets = zip(*parts, strict=True)
        return torch.cat(scales), torch.cat(offsets)
    weight = weight.contiguous()  # sums come out alike, whatever the layout in memory
    scale, offset = layout.raw(*layout.bounds(weight))
    start, unit = scale, _cells(scale)
    blocks = to_blocks(weight, layout.shape)  # [g0, b0, g1, b1]
    best, lowest, idle = (scale, offset), None, None
    for _ in range(num_iterations + 1):
        grid = _deployed(layout, scale, offset, floor)
        codes = to_blocks(quantize(weight, grid), layout.shape)
        steps = codes + _cells(grid.offset + grid.zero_point_shift)
        error = blocks - steps * _cells(grid.scale)
        size = (error.abs() / unit).clamp_min(_LEAST)
        power = size.pow(lp_norm - 1)
        loss = (size * power).sum((1, 3)) * start.pow(lp_norm)
        if layout.scale_bits is not None:
            loss = loss.sum(1, keepdim=True)  # blocks share a scale
        if lowest is None or idle is None:
            lowest, idle = loss, torch.zeros_like(loss)
        else:
            better = (loss < lowest) & (idle < _PATIENCE)
            lowest = torch.where(better, loss, lowest)
            best = torch.where(better, scale, best[0]), torch.where(better, offset, best[1])
            idle = torch.where(better, 0, idle + 1)
            if bool((idle >= _PATIENCE).all()):
                break
        # The error that is taken out: shrink(error).
        taken = (size - power / beta).clamp_min_(0).mul_(unit).copysign_(error)
        scale, offset = _least_squares(blocks - taken, codes, steps, grid, layout)
        beta *= kappa
    return best


def lp_rows(error: Tensor, lp_norm: float) -> Tensor:
    """Return ``Σ |error|^p`` of every row ``[out]``."""
    return error.abs().pow(lp_norm).sum(1)


def _deployed(layout: GridLayout, scale: Tensor, offset: Tensor, floor: Tensor | None) -> Grid:
    allowed = scale if floor is None else torch.maximum(scale, floor.to(scale))
    return layout.with_scale(short_scale(allowed), offset)


def _least_squares(
    target: Tensor, codes: Tensor, steps: Tensor, grid: Grid, layout: GridLayout
) -> tuple[Tensor, Tensor]:
    """Return offset, if it may change, and scale that are nearest to a target with these codes.

    :param steps: Codes from zero, ``[g0, b0, g1, b1]`` as target and codes.
    """
    offset = grid.offset
    if not layout.symmetric:
        mean = (target / _cells(grid.scale) - codes).mean((1, 3))
        offset = (mean - grid.zero_point_shift).round().clamp(-grid.qmax, -grid.qmin)
        steps = codes + _cells(offset + grid.zero_point_shift)
    scale = (target * steps).sum((1, 3)) / steps.square().sum((1, 3))
    return torch.where(scale > 0, scale, grid.scale), offset  # all integers 0: NaN


def _cells(values: Tensor) -> Tensor:
    """View numbers of cells ``[g0, g1]`` as ``[g0, 1, g1, 1]``."""
    return values[:, None, :, None]
