"""Weight clipping: learnable (LWC, arXiv 2308.13137, eq. 2) and by search over second moments.

Both choose the range of every cell of a grid as a share of the range that holds all of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from aimet_ext.core.affine import (
    Grid,
    channel_scale,
    fake_quantize,
    integer_scale,
    lpbq_scale,
    minmax_range,
    scale_offset,
    symmetric_offset,
)
from aimet_ext.core.objective import moment_product, row_errors

# Elements of errors that are judged at a time: small layers would spend more on calls than on sums.
_AT_ONCE = 2**16
# A share of exactly 1 has an infinite logit, whose gradient is 0 for ever: starts stay inside.
_LARGEST_START = 0.995
_SMALLEST_START = 0.02


@dataclass(frozen=True, kw_only=True)
class GridLayout:
    """All of a weight's grid but its ranges.

    :param shape: cells along each dimension of the weight.
    :param block_size: AIMET's block size, None unless blockwise.
    :param block_grouping: blocks that share a float scale, None unless LPBQ.
    :param scale_bits: bits of LPBQ's integer scales, None for any other grid.
    """

    shape: tuple[int, ...]
    qmin: int
    qmax: int
    symmetric: bool
    zero_point_shift: float = 0.0
    block_size: tuple[int, ...] | None = None
    block_grouping: tuple[int, ...] | None = None
    scale_bits: int | None = None

    def bounds(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return each cell's smallest range ``(min, max)`` with all weights; differentiable."""
        return minmax_range(
            weight, self.shape, self.qmin, self.qmax, self.symmetric, self.zero_point_shift
        )

    def raw(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and offset of ranges, before LPBQ makes integers of scales. Differentiable."""
        return scale_offset(low, high, self.qmin, self.qmax, self.symmetric)

    def with_scale(self, scale: Tensor, offset: Tensor | None = None) -> Grid:
        """Return the grid of these scales: raw ones, before LPBQ makes integers of them."""
        if offset is None:
            offset = torch.full_like(scale, symmetric_offset(self.qmin, self.qmax))
        if self.scale_bits is not None:
            scale = lpbq_scale(scale, self.block_grouping or (), self.scale_bits)
        return Grid(scale, offset, self.qmin, self.qmax, self.block_size, self.zero_point_shift)

    def is_row_wise(self, weight: Tensor) -> bool:
        """Return whether no two output rows share a cell: scaling a row then scales its ranges."""
        return len(self.shape) == weight.dim() and self.shape[0] == weight.shape[0]


def free_layout(layout: GridLayout) -> GridLayout:
    """Return the same blocks, each with a float scale of its own: how AIMET's search sees LPBQ."""
    return replace(layout, scale_bits=None, block_grouping=None)


def shares_of(
    layout: GridLayout, weight: Tensor, scale: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the shares of each cell's full range, below and above zero, that a scale keeps.

    :param weight: ``[out, in]``.
    :param scale: scale of the grid's shape, the raw one for LPBQ.
    :returns: ``(low, high)``, equal where the grid is symmetric.
    """
    low, high = layout.bounds(weight)
    if layout.symmetric:
        share = scale / layout.raw(low, high)[0]
        return share, share
    chosen_low = scale * (offset + layout.qmin)
    chosen_high = scale * (offset + layout.qmax)
    # Whole offsets leave half a step of play, which takes both ends inside the full range.
    move = torch.zeros_like(scale).clamp(low - chosen_low, high - chosen_high)
    return _share(chosen_low + move, low), _share(chosen_high + move, high)


class LearnableClipping(nn.Module):
    """Ranges of a weight's grid as learnable shares of its current range.

        low = sigmoid(γ_low) · min(W),   high = sigmoid(γ_high) · max(W)

    per cell, with one γ for both where the grid is symmetric. ``W`` is the weight as it is, after
    every transform: a share stays meaningful when the weight is rescaled.

    :param layout: the grid.
    :param low: start of the lower share of every cell, of the grid's shape.
    :param high: start of the upper share; ignored where the grid is symmetric.
    """

    def __init__(self, layout: GridLayout, low: Tensor, high: Tensor | None = None) -> None:
        super().__init__()
        self.layout = layout
        self.low = nn.Parameter(_logit(low))
        self.high = None if layout.symmetric or high is None else nn.Parameter(_logit(high))

    @classmethod
    def from_scale(
        cls, layout: GridLayout, weight: Tensor, scale: Tensor, offset: Tensor
    ) -> LearnableClipping:
        """Start at scales that were chosen for ``weight``, as near as shares of its range can be.

        :param scale: scale of the grid's shape, the raw one for LPBQ.
        """
        return cls(layout, *shares_of(layout, weight, scale, offset))

    def forward(self, weight: Tensor) -> Tensor:
        """Move the weight to its nearest values on the learnt grid; differentiable."""
        return fake_quantize(weight, self.layout.with_scale(*self.layout.raw(*self.ranges(weight))))

    def ranges(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the learnt range ``(min, max)`` of each cell of ``weight``."""
        low, high = self.layout.bounds(weight)
        upper = self.low if self.high is None else self.high
        return torch.sigmoid(self.low) * low, torch.sigmoid(upper) * high


def search_ranges(
    weight: Tensor,
    layout: GridLayout,
    second: Tensor,
    pull: Tensor | None = None,
    *,
    smooth: Tensor | None = None,
    row_weight: Tensor | None = None,
    shares: Tensor | None = None,
    start: tuple[Tensor, Tensor] | None = None,
    steps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and offset of every cell by coordinate descent on ``E H Eᵀ − 2 E · pull``.

    Cell after cell takes the candidate that lowers the error of its output rows most, all other
    cells as they are, so the error never rises. Exact for any grid: the whole ``H`` counts, not
    its diagonal. For LPBQ a cell's candidates are the integers times its channel's scale, and the
    cell that carries the top integer of its channel keeps it, as AIMET derives the scale from it.

    :param weight: ``[out, in]``.
    :param second: ``H [in, in]`` of the inputs of ``weight`` before smoothing, or
        ``[groups, in, in]``.
    :param pull: ``[out, in]`` or None, see :class:`~aimet_ext.core.objective.SecondMoment`.
    :param smooth: multiplier of every input column that the quantizer sees, ``[in]``; None for 1.
    :param row_weight: weight of an output row where rows share a cell, ``[out]``.
    :param shares: candidate shares of the full range, ``[candidates]``.
    :param start: scale and offset to improve; None to start at the full range.
    :param steps: shares of the full range by which either end of the current range is moved as
        well, ``[steps]``; None for none. LPBQ has its integers instead.
    :returns: ``(scale, offset)`` of the grid's shape; the scale is the raw one for LPBQ.
    """
    smooth = weight.new_ones(weight.shape[1]) if smooth is None else smooth
    shares = default_shares(weight) if shares is None else shares
    seen = weight * smooth
    full = layout.raw(*layout.bounds(seen))
    if start is not None:
        scale, offset = (tensor.clone() for tensor in start)
    elif layout.scale_bits is not None:
        scale, offset = _lpbq_start(seen, smooth, layout, second, shares), full[1].clone()
    else:
        scale, offset = (tensor.clone() for tensor in full)
    if layout.scale_bits is not None:  # once deployed, a block that moves leaves the others alone
        scale = lpbq_scale(scale, layout.block_grouping or (), layout.scale_bits)
    candidates = _candidates(seen, layout, shares, steps)
    error = fake_quantize(seen, layout.with_scale(scale, offset)) / smooth - weight
    columns = weight.shape[1] // layout.shape[1]
    rows = None if layout.is_row_wise(weight) else (row_weight, weight.shape[0])
    for cell in range(layout.shape[1]):
        at = slice(cell * columns, (cell + 1) * columns)
        gradient = moment_product(error, second[..., at])
        if pull is not None:
            gradient = gradient - pull[:, at]
        best = _best_candidate(
            candidates(cell, scale, offset),
            _Cell(
                seen[:, at], smooth[at], weight[:, at], error[:, at], second[..., at, at], gradient
            ),
            layout,
            rows,
        )
        scale[:, cell], offset[:, cell], error[:, at] = best
    return scale, offset


def default_shares(like: Tensor, count: int = 40, lowest: float = 0.3) -> Tensor:
    """Return evenly spaced shares from the full range down to ``lowest`` of it, ``[count]``."""
    return torch.linspace(1.0, lowest, count, device=like.device, dtype=like.dtype)


@dataclass(frozen=True, eq=False)
class _Cell:
    """A column of cells: weights as the quantizer sees them, and the error they are judged by."""

    seen: Tensor  # [out, columns]
    smooth: Tensor  # [columns]
    weight: Tensor  # [out, columns]
    error: Tensor  # [out, columns]
    second: Tensor  # [columns, columns] or [groups, columns, columns]
    gradient: Tensor  # [out, columns], E H − pull

    def quantized_errors(self, scale: Tensor, offset: Tensor, layout: GridLayout) -> Tensor:
        """Return ``[candidates, out, columns]`` of scales and offsets ``[candidates, rows, 1]``."""
        shift = layout.zero_point_shift
        codes = (self.seen / scale - shift).round() - offset
        codes = codes.clamp(layout.qmin, layout.qmax)
        return (codes + (offset + shift)) * scale / self.smooth - self.weight


def _best_candidate(
    candidates: tuple[Tensor, Tensor],
    cell: _Cell,
    layout: GridLayout,
    rows: tuple[Tensor | None, int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, offset and error of the candidate with the lowest cost; the first is the current."""
    scale, offset = (values[0] for values in candidates)
    error, lowest = cell.error, torch.zeros_like(cell.error[:, 0])
    every = torch.arange(len(error), device=error.device)
    number = max(1, _AT_ONCE // error.numel())
    for first in range(1, len(candidates[0]), number):
        scales, offsets = (values[first : first + number] for values in candidates)
        errors = cell.quantized_errors(scales[..., None], offsets[..., None], layout)
        costs = row_errors(errors - cell.error, cell.second, -cell.gradient)  # [candidates, out]
        if rows is not None:  # all rows share the cell
            costs = costs if rows[0] is None else costs * rows[0]
            costs = costs.sum(1, keepdim=True).expand_as(costs)
        cost, best = costs.min(0)  # [out]; of equal ones the first
        better = cost < lowest
        lowest = torch.where(better, cost, lowest)
        picked = errors[best, every] if len(errors) > 1 else errors[0]
        error = torch.where(better[:, None], picked, error)
        at, own = (every, better) if rows is None else (every[:1], better[:1])
        scale = torch.where(own, scales[best[at], at], scale)
        offset = torch.where(own, offsets[best[at], at], offset)
    return scale, offset, error


def _candidates(
    seen: Tensor, layout: GridLayout, shares: Tensor, steps: Tensor | None
) -> Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a function from a column of cells to its scales and offsets ``[candidates, rows]``.

    The first candidate is what the cells have now.
    """
    low, high = layout.bounds(seen)
    sides, moves = [], []
    for share in shares.tolist():
        sides.append((share, share))
        if not layout.symmetric and share < 1:
            sides += [(share, 1.0), (1.0, share)]
    for step in [] if steps is None else steps.tolist():
        moves.append((step, step))
        if not layout.symmetric:
            moves += [(step, 0.0), (0.0, step)]
    share_low, share_high = _columns(sides, seen)
    step_low, step_high = _columns(moves, seen)

    def by_share(cell: int, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        lows, highs = low[:, cell] * share_low, high[:, cell] * share_high
        if len(step_low):
            ends = [scale[:, cell] * (offset[:, cell] + end) for end in (layout.qmin, layout.qmax)]
            lows = torch.cat([lows, (ends[0] + low[:, cell] * step_low).clamp_max(0)])
            highs = torch.cat([highs, (ends[1] + high[:, cell] * step_high).clamp_min(0)])
        scales, offsets = layout.raw(lows, highs)
        now = scale[None, :, cell], offset[None, :, cell]
        return torch.cat([now[0], scales]), torch.cat([now[1], offsets])

    def by_integer(cell: int, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        bits, grouping = layout.scale_bits or 0, layout.block_grouping or ()
        integers = integer_scale(scale, grouping, bits)
        shared = channel_scale(scale, grouping, bits)  # [out, groups]
        unit = shared[:, cell * shared.shape[1] // scale.shape[1]]
        top = integers == 2**bits
        # AIMET derives the unit from the top integer of the channel: its only carrier stays.
        movable = ~top[:, cell] | (_in_group(top, layout) > 1)[:, cell]
        current = unit * integers[:, cell]
        every = torch.arange(1, 2**bits + 1, device=unit.device, dtype=unit.dtype)
        moved = torch.where(movable, unit * every[:, None], current)  # [integers, out]
        scales = torch.cat([current[None], moved])
        return scales, offset[:, cell].expand_as(scales)

    return by_share if layout.scale_bits is None else by_integer


def _columns(pairs: list[tuple[float, float]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the second numbers of pairs, each ``[pairs, 1]``."""
    first, second = like.new_tensor(pairs).view(-1, 2, 1).unbind(1)
    return first, second


def _in_group(top: Tensor, layout: GridLayout) -> Tensor:
    """Return how many cells of each LPBQ group carry the top integer, expanded to the cells."""
    grouping = (layout.block_grouping or (-1,))[-1]
    per_group = top.shape[1] if grouping == -1 else grouping
    counts = top.view(top.shape[0], -1, per_group).sum(-1, keepdim=True)  # [out, groups, 1]
    return counts.expand(-1, -1, per_group).reshape(top.shape)


def _lpbq_start(
    seen: Tensor, smooth: Tensor, layout: GridLayout, second: Tensor, shares: Tensor
) -> Tensor:
    """Search the raw scale of every block on its own part of ``H``, before scales are integers."""
    free = free_layout(layout)
    columns = seen.shape[1] // layout.shape[1]
    keep = torch.block_diag(*[second.new_ones(columns, columns)] * layout.shape[1])
    scale, _ = search_ranges(seen / smooth, free, second * keep, smooth=smooth, shares=shares)
    return scale


def _share(value: Tensor, bound: Tensor) -> Tensor:
    return torch.where(bound == 0, torch.ones_like(bound), value / bound.where(bound != 0, 1.0))


def _logit(share: Tensor) -> Tensor:
    return torch.logit(share.detach().clamp(_SMALLEST_START, _LARGEST_START))
