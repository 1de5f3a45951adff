"""Ranges of a weight's grid by a search on second moments: AIMET's own, and a better one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aimet_ext.core.affine import fake_quantize, minmax_range
from aimet_ext.core.clipping import GridLayout, search_ranges
from aimet_ext.core.lpbq import channel_scale
from aimet_ext.core.objective import quadratic, row_errors

__all__ = ["best_ranges", "compatible_ranges", "free_layout"]

_FINE = 5  # steps of a fine sweep to a coarse one
_ROWS = 256  # that are searched at a time: what a candidate needs beside them stays small
_LEAST_GAIN = 1e-4  # relative, of a sweep, to go on
_TOPS = torch.linspace(1.0, 0.4, 13)  # of the largest block scale, for LPBQ
_STRETCHES = torch.linspace(0.88, 1.12, 13)  # of all scales of a row at once, for LPBQ


def free_layout(layout: GridLayout) -> GridLayout:
    """The same blocks, each with a float scale of its own: how AIMET's search sees LPBQ."""
    return replace(layout, scale_bits=None, block_grouping=None)


@torch.no_grad()
def best_ranges(
    weight: Tensor,
    layout: GridLayout,
    second: Tensor,
    pull: Tensor | None = None,
    *,
    num_candidates: int = 20,
    sweeps: int = 3,
) -> tuple[Tensor, Tensor]:
    """Scale and offset of every cell by coordinate descent on ``E H Eᵀ − 2 E · pull``.

    A first sweep tries evenly spaced shares of each cell's full range, and of either side of it
    where the grid is asymmetric; later sweeps try steps around what was found, with all other
    cells as they are by then. LPBQ is searched on the grid that is deployed: the scale of the
    channel and the integers of its blocks in turn, the largest block at the top integer, as AIMET
    derives the channel's scale from it. No step raises the error of a row.

    :param weight: ``[out, in]``.
    :param second: ``H [in, in]`` or ``[groups, in, in]``.
    :param pull: ``[out, in]`` or None, see :class:`~aimet_ext.core.objective.SecondMoment`.
    :param num_candidates: shares in the first sweep.
    :param sweeps: at most.
    :returns: ``(scale, offset)`` of the grid's shape; the scale is the raw one for LPBQ.
    """
    if second.dim() == 2 and layout.is_row_wise(weight) and len(weight) > _ROWS:
        parts = [
            best_ranges(
                weight[at : at + _ROWS],
                replace(layout, shape=(len(weight[at : at + _ROWS]), *layout.shape[1:])),
                second,
                None if pull is None else pull[at : at + _ROWS],
                num_candidates=num_candidates,
                sweeps=sweeps,
            )
            for at in range(0, len(weight), _ROWS)
        ]
        scales, offsets = zip(*parts, strict=True)
        return torch.cat(scales), torch.cat(offsets)
    count = torch.arange(num_candidates, 0, -1, device=weight.device, dtype=weight.dtype)
    shares = count / num_candidates
    free = None
    if layout.scale_bits is not None:
        # The best float scales; which integers are nearest to them is to be seen.
        free, offset = best_ranges(
            weight,
            free_layout(layout),
            second,
            pull,
            num_candidates=num_candidates,
            sweeps=sweeps,
        )
        state = _best_top(weight, layout, second, pull, free, offset)
    else:
        state = search_ranges(weight, layout, second, pull, shares=shares)
    error = _total(weight, layout, second, pull, state)
    unit = 1.0 / (num_candidates * _FINE)
    for sweep in range(1, sweeps):
        if layout.scale_bits is not None:
            state = search_ranges(weight, layout, second, pull, start=state)
            state = _best_stretch(weight, layout, second, pull, *state)
        else:
            step = unit if sweep == 1 else unit / 2
            moves = torch.arange(-_FINE + 1, _FINE, dtype=weight.dtype) * step
            state = search_ranges(
                weight, layout, second, pull, start=state, shares=shares[:1], steps=moves
            )
        before, error = error, _total(weight, layout, second, pull, state)
        if before - error <= _LEAST_GAIN * abs(before):
            break
    return state


@torch.no_grad()
def compatible_ranges(
    weight: Tensor, layout: GridLayout, second: Tensor, cross: Tensor | None, num_candidates: int
) -> tuple[Tensor, Tensor]:
    """Ranges as AIMET's SeqMSE chooses them, from second moments in place of tokens.

    Candidates are ``i / num_candidates`` of the calibrated range; each cell is judged on its own
    columns alone, LPBQ's blocks as if each had a float scale of its own, a per-tensor range on the
    widest choice of all rows. The first of equal candidates wins.

    :param second: ``H [in, in]`` or ``[groups, in, in]``.
    :param cross: ``C`` of the same shape or None, see
        :class:`~aimet_ext.core.objective.SecondMoment`. A cell sees its own columns' part alone.
    :returns: ``(min, max)`` of the grid's shape.
    """
    free = free_layout(layout)
    low, high = layout.bounds(weight)
    cells = layout.shape[1]
    columns = weight.shape[1] // cells
    groups = second.shape[0] if second.dim() == 3 else 1

    def inside(moment: Tensor) -> Tensor:
        blocks = moment.view(groups, cells, columns, cells, columns)
        return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # [groups, cells, columns, columns]

    def parts(rows: Tensor) -> Tensor:
        return rows.view(groups, -1, cells, columns).transpose(1, 2)

    own = inside(second)
    pull = None if cross is None else parts(weight) @ inside(cross).mT
    costs, ranges = [], []
    for number in range(num_candidates):
        ranges.append(_candidate(free, low, high, number, num_candidates))
        error = fake_quantize(weight, free.with_scale(*free.raw(*ranges[-1]))) - weight
        part = parts(error)  # [groups, cells, out / groups, columns]
        cost = quadratic(part, own)
        if pull is not None:
            cost = cost - 2 * (pull * part).sum(-1)
        costs.append(cost.transpose(1, 2).flatten(0, 1))  # [out, cells]
    cost = torch.stack(costs)
    winner = cost.min(0).indices  # [out, cells]
    if layout.shape[0] == 1:
        winner = winner.amax(0, keepdim=True)
    lows, highs = (torch.stack(bounds) for bounds in zip(*ranges, strict=True))
    return lows.gather(0, winner[None])[0], highs.gather(0, winner[None])[0]


def _candidate(
    layout: GridLayout, low: Tensor, high: Tensor, number: int, count: int
) -> tuple[Tensor, Tensor]:
    """The range that AIMET's calibration makes of a share of a range, to the bit."""
    ends = torch.stack([low / count * (number + 1), high / count * (number + 1)], -1)
    shape = layout.shape
    return minmax_range(
        ends.flatten(1), shape, layout.qmin, layout.qmax, layout.symmetric, layout.zero_point_shift
    )


def _total(
    weight: Tensor,
    layout: GridLayout,
    second: Tensor,
    pull: Tensor | None,
    state: tuple[Tensor, Tensor],
) -> float:
    return float(_errors(weight, layout, second, pull, *state).sum(dtype=torch.float64))


def _errors(
    weight: Tensor,
    layout: GridLayout,
    second: Tensor,
    pull: Tensor | None,
    scale: Tensor,
    offset: Tensor,
) -> Tensor:
    error = fake_quantize(weight, layout.with_scale(scale, offset)) - weight
    return row_errors(error, second, pull)  # [out]


def _best_top(
    weight: Tensor,
    layout: GridLayout,
    second: Tensor,
    pull: Tensor | None,
    free: Tensor,
    offset: Tensor,
) -> tuple[Tensor, Tensor]:
    """Cut the largest block scales of each channel: finer integers for all the others."""
    grouping, bits = layout.block_grouping or (), layout.scale_bits or 0
    largest = channel_scale(free, grouping, bits) * 2**bits  # [out, groups]
    largest = largest.repeat_interleave(free.shape[1] // largest.shape[1], 1)  # [out, blocks]
    candidates = [torch.minimum(free, largest * top) for top in _TOPS.tolist()]
    return _best_of(weight, layout, second, pull, candidates, offset)


def _best_stretch(
    weight: Tensor,
    layout: GridLayout,
    second: Tensor,
    pull: Tensor | None,
    scale: Tensor,
    offset: Tensor,
) -> tuple[Tensor, Tensor]:
    """Move the channel's scale with all integers as they are."""
    candidates = [scale] + [scale * stretch for stretch in _STRETCHES.tolist()]
    return _best_of(weight, layout, second, pull, candidates, offset)


def _best_of(
    weight: Tensor,
    layout: GridLayout,
    second: Tensor,
    pull: Tensor | None,
    candidates: list[Tensor],
    offset: Tensor,
) -> tuple[Tensor, Tensor]:
    """For every row the scales with the lowest error; LPBQ's rows share no cell."""
    best = candidates[0]
    lowest = _errors(weight, layout, second, pull, best, offset)
    for candidate in candidates[1:]:
        errors = _errors(weight, layout, second, pull, candidate, offset)
        better = errors < lowest
        best = torch.where(better[:, None], candidate, best)
        lowest = torch.where(better, errors, lowest)
    return best, offset
