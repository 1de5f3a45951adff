"""Ranges for weights that are going to be rounded by second moments, not to nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from aimet_ext.core.affine import dequantize
from aimet_ext.core.clipping import GridLayout
from aimet_ext.core.objective import row_errors
from aimet_ext.core.range_search import best_ranges
from aimet_ext.core.rounding import gptq

__all__ = ["rounding_ranges"]

_SMALLEST = {2: 0.3, 3: 0.4}  # multiple of a row's full range that is tried, by bits
_LARGEST = 1.25  # multiple of a searched range


@torch.no_grad()
def rounding_ranges(
    weight: Tensor,
    layout: GridLayout,
    second: Tensor,
    pull: Tensor | None = None,
    *,
    candidates: int = 12,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """For every row the multiple of its ranges on which GPTQ's rounding has the lowest error.

    A rounding in which columns make up for each other wants wider ranges than the nearest one.
    Multiples are taken of the full range where a row has a single symmetric cell, else of the
    ranges that :func:`~aimet_ext.core.range_search.best_ranges` finds.

    :param weight: ``[out, in]``.
    :param layout: no two rows share a cell.
    :param second: ``H [in, in]`` or ``[groups, in, in]``.
    :param pull: ``[out, in]`` or None, see :class:`~aimet_ext.core.objective.SecondMoment`.
    :param candidates: multiples to try.
    :param damping: see :func:`~aimet_ext.core.gptq.gptq`.
    :returns: ``(scale, offset)`` of the grid's shape; the scale is the raw one for LPBQ.
    """
    if layout.shape[1] == 1 and layout.symmetric:
        scale, offset = layout.raw(*layout.bounds(weight))
        smallest = _SMALLEST.get((layout.qmax - layout.qmin).bit_length(), 0.5)
        multiples = torch.linspace(1.0, smallest, candidates)
    else:
        scale, offset = best_ranges(weight, layout, second, pull)
        multiples = torch.linspace(1.0, _LARGEST, candidates)
    best, lowest = scale, torch.full_like(weight[:, 0], torch.inf)
    for multiple in multiples.tolist():
        candidate = scale * multiple
        grid = layout.with_scale(candidate, offset)
        codes = gptq(weight, grid, second, pull, damping=damping)
        error = row_errors(dequantize(codes, grid) - weight, second, pull)
        best = torch.where((error < lowest)[:, None], candidate, best)
        lowest = torch.minimum(error, lowest)
    return best, offset
