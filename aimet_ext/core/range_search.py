"""Ranges of a weight's grid by a search on second moments: AIMET's own, and better ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aimet_ext.core.affine import channel_scale, fake_quantize, minmax_range
from aimet_ext.core.clipping import GridLayout, free_layout, search_ranges
from aimet_ext.core.columns import Factor
from aimet_ext.core.gptq import candidate_errors
from aimet_ext.core.objective import best_rows, quadratic, row_errors

_FINE = 5  # steps of a fine sweep to a coarse one
_ROWS = 256  # that are searched at a time: what a candidate needs beside them stays small
_LEAST_GAIN = 1e-4  # relative, of a sweep, to go on
_TOPS = torch.linspace(1.0, 0.4, 13)  # of the largest block scale, for LPBQ
_STRETCHES = torch.linspace(0.88, 1.12, 13)  # of all scales of a row at once, for LPBQ
_SMALLEST = {2: 0.3, 3: 0.4}  # multiple of a row's full range that is tried, by bits
_LARGEST = 1.25  # multiple of a searched range


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
    judge = _Judge(weight, layout, second, pull)
    count = torch.arange(num_candidates, 0, -1, device=weight.device, dtype=weight.dtype)
    shares = count / num_candidates
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
        state = judge.best_of(_cut_tops(free, layout), offset)
    else:
        state = search_ranges(weight, layout, second, pull, shares=shares)
    error = judge.total(state)
    unit = 1.0 / (num_candidates * _FINE)
    for sweep in range(1, sweeps):
        if layout.scale_bits is not None:
            scale, offset = search_ranges(weight, layout, second, pull, start=state)
            # The channel's scale moves, with all integers as they are.
            state = judge.best_of([scale, *(scale * s for s in _STRETCHES.tolist())], offset)
        else:
            step = unit if sweep == 1 else unit / 2
            moves = torch.arange(-_FINE + 1, _FINE, dtype=weight.dtype) * step
            state = search_ranges(
                weight, layout, second, pull, start=state, shares=shares[:1], steps=moves
            )
        before, error = error, judge.total(state)
        if before - error <= _LEAST_GAIN * abs(before):
            break
    return state


@torch.no_grad()
def compatible_ranges(
    weight: Tensor, layout: GridLayout, second: Tensor, cross: Tensor | None, num_candidates: int
) -> tuple[Tensor, Tensor]:
    """Choose ranges as AIMET's SeqMSE does, from second moments in place of tokens.

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


@torch.no_grad()
def rounding_ranges(
    weight: Tensor,
    layout: GridLayout,
    second: Tensor,
    pull: Tensor | None = None,
    *,
    candidates: int = 12,
    factor: Factor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose for every row the multiple of its ranges that GPTQ rounds to with the lowest error.

    A rounding that compensates errors in other columns wants wider ranges than the nearest one.
    Multiples are taken of the full range where a row has a single symmetric cell, else of the
    ranges that :func:`best_ranges` finds.

    :param weight: ``[out, in]``.
    :param layout: no two rows share a cell.
    :param second: ``H [in, in]`` or ``[groups, in, in]``.
    :param pull: ``[out, in]`` or None, see :class:`~aimet_ext.core.objective.SecondMoment`.
    :param candidates: multiples to choose from: every other one is tried, then the two beside the
        best.
    :param factor: factor of ``H`` in the order of the weight, if it is known already.
    :param shift: :meth:`Factor.shift` of the pull, likewise.
    :returns: ``(scale, offset)`` of the grid's shape; the scale is the raw one for LPBQ.
    """
    if layout.shape[1] == 1 and layout.symmetric:
        scale, offset = layout.raw(*layout.bounds(weight))
        smallest = _SMALLEST.get((layout.qmax - layout.qmin).bit_length(), 0.5)
        multiples = torch.linspace(1.0, smallest, candidates)
    else:
        # Of their multiples one is chosen in float32 anyway.
        short = None if pull is None else pull.float()
        scale, offset = best_ranges(weight.float(), layout, second.float(), short)
        multiples = torch.linspace(1.0, _LARGEST, candidates)

    scales = torch.stack([scale * multiple for multiple in multiples.tolist()])
    factor = factor or Factor.of(second)
    if pull is not None and shift is None:
        shift = factor.shift(pull)

    errors_on = candidate_errors(weight, second, shift, factor)

    def errors(chosen: Tensor) -> Tensor:  # [n, out], numbers of multiples
        tried = scales.take_along_dim(chosen[:, :, None], 0)
        return errors_on([layout.with_scale(each, offset) for each in tried])

    # Errors of neighbours are alike.
    rough = torch.arange(0, candidates, 2, device=weight.device)[:, None].expand(-1, len(weight))
    cost, winner = errors(rough).min(0)
    beside = 2 * winner + torch.tensor([[-1], [1]], device=weight.device)
    beside = beside.clamp(0, candidates - 1)
    costs = torch.cat([cost[None], errors(beside)])  # [3, out]
    chosen = torch.cat([2 * winner[None], beside]).take_along_dim(costs.argmin(0)[None], 0)
    return scales.take_along_dim(chosen[:, :, None], 0)[0], offset


def _candidate(
    layout: GridLayout, low: Tensor, high: Tensor, number: int, count: int
) -> tuple[Tensor, Tensor]:
    """Return the range that AIMET's calibration makes of a share of a range, to the bit."""
    ends = torch.stack([low / count * (number + 1), high / count * (number + 1)], -1)
    shape = layout.shape
    return minmax_range(
        ends.flatten(1), shape, layout.qmin, layout.qmax, layout.symmetric, layout.zero_point_shift
    )


@dataclass(frozen=True, eq=False)
class _Judge:
    """Errors of a weight's rows by the scales of its grid."""

    weight: Tensor
    layout: GridLayout
    second: Tensor
    pull: Tensor | None

    def errors(self, scale: Tensor, offset: Tensor) -> Tensor:
        """Return the error of every row, ``[out]``."""
        error = fake_quantize(self.weight, self.layout.with_scale(scale, offset)) - self.weight
        return row_errors(error, self.second, self.pull)

    def total(self, state: tuple[Tensor, Tensor]) -> float:
        """Return the error of all rows."""
        return float(self.errors(*state).sum(dtype=torch.float64))

    def best_of(self, scales: Iterable[Tensor], offset: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scales with the lowest error for every row; LPBQ's rows share no cell."""
        return best_rows(scales, lambda scale: self.errors(scale, offset)), offset


def _cut_tops(free: Tensor, layout: GridLayout) -> Iterator[Tensor]:
    """Yield scales whose largest in each channel are cut: finer integers for all the others."""
    bits = layout.scale_bits or 0
    largest = channel_scale(free, layout.block_grouping or (), bits) * 2**bits  # [out, groups]
    largest = largest.repeat_interleave(free.shape[1] // largest.shape[1], 1)  # [out, blocks]
    return (torch.minimum(free, largest * top) for top in _TOPS.tolist())
