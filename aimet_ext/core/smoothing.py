"""Choice of the scales of a function-preserving transform (LET, arXiv 2308.13137).

By SmoothQuant's formula (arXiv 2211.10438), or by coordinate descent on the output error that
second moments give exactly. Both choose a multiplier for each input column of the readers; what
the producer loses is :mod:`aimet_ext.core.equivalence`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aimet_ext.core.affine import Grid, fake_quantize, spread

__all__ = ["Reader", "search_smoothing", "smoothquant_scale"]

# Entries whose columns are updated together before the rest of the gradient is refreshed.
_BLOCK = 64


def smoothquant_scale(activation: Tensor, weight: Tensor, alpha: float = 0.5) -> Tensor:
    """Return ``activation^alpha / weight^(1 − alpha)``, divided by its geometric mean.

    The mean is free, a common factor cancels. Channels that are zero throughout get 1.

    :param activation: largest magnitude of every input channel, ``[in]``.
    :param weight: largest magnitude of every weight column over all readers, ``[in]``.
    :param alpha: share of the difficulty that moves to the weights.
    """
    dead = (activation <= 0) | (weight <= 0)
    tiny = torch.finfo(activation.dtype).tiny
    log = alpha * activation.clamp_min(tiny).log() - (1 - alpha) * weight.clamp_min(tiny).log()
    live = ~dead
    mean = log[live].mean() if bool(live.any()) else log.new_zeros(())
    return torch.where(dead, torch.ones_like(log), (log - mean).exp())


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads the smoothed channels.

    :param weight: ``[out, in]``, before smoothing.
    :param grid: grid of its smoothed weight; scales as they are deployed.
    :param pull: linear term of its error ``[out, in]``, or None.
    :param row_weight: cost of an error of each output row, ``[out]``.
    """

    weight: Tensor
    grid: Grid
    pull: Tensor | None
    row_weight: Tensor


def search_smoothing(
    readers: Sequence[Reader],
    second: Tensor,
    smooth: Tensor,
    groups: Sequence[Tensor],
    multipliers: Tensor,
) -> Tensor:
    """Choose column multipliers by descent on ``Σ row_weight · (E H Eᵀ − 2 E · pull)``.

    With all grids held, a new multiplier of column j changes the rounding of that column alone, so
    the error of a candidate costs a rank-one update. One sweep over all groups; the error never
    rises.

    :param readers: all layers that read the channels.
    :param second: ``H [in, in]`` of the inputs before smoothing.
    :param smooth: current multipliers, ``[in]``. Not changed.
    :param groups: columns that share a multiplier, long tensors that partition ``0 … in − 1``.
    :param multipliers: candidate factors on the current multiplier, ``[candidates]``.
    :returns: the new multipliers, ``[in]``.
    """
    smooth = smooth.clone()
    rows = _stack(readers)
    error = torch.cat([_error(reader, smooth) for reader in readers])  # [rows, in]
    for first in range(0, len(groups), _BLOCK):
        block = groups[first : first + _BLOCK]
        columns = torch.cat(list(block))
        gradient = error @ second[:, columns]
        if rows.pull is not None:
            gradient = gradient - rows.pull[:, columns]
        inside = second[columns][:, columns]
        place = 0
        for group in block:
            at = slice(place, place + len(group))
            place += len(group)
            step, factor = _best_step(
                rows, group, smooth, error, gradient[:, at], inside[at, at], multipliers
            )
            if step is None:
                continue
            smooth[group] *= factor
            error[:, group] += step
            gradient += step @ inside[at]
    return smooth


def candidate_multipliers(like: Tensor, count: int, reach: float) -> Tensor:
    """Return factors from ``1/reach`` to ``reach``, evenly spaced on a log scale, ``[count]``."""
    steps = torch.linspace(-1, 1, count, device=like.device, dtype=like.dtype)
    return (steps * math.log(reach)).exp()


@dataclass(frozen=True, eq=False)
class _Rows:
    """All readers' rows one under the other; scales and offsets by element ``[rows, in]``."""

    weight: Tensor
    scale: Tensor
    offset: Tensor
    shift: Tensor  # [rows, 1], like the two bounds
    qmin: Tensor
    qmax: Tensor
    pull: Tensor | None
    cost: Tensor  # [rows]


def _stack(readers: Sequence[Reader]) -> _Rows:
    def by_row(values: Sequence[float]) -> Tensor:
        columns = [
            reader.weight.new_full((len(reader.weight), 1), value)
            for reader, value in zip(readers, values, strict=True)
        ]
        return torch.cat(columns)

    grids = [reader.grid for reader in readers]
    pulls = [reader.pull for reader in readers if reader.pull is not None]
    return _Rows(
        weight=torch.cat([reader.weight for reader in readers]),
        scale=torch.cat([spread(r.grid.scale, r.weight) for r in readers]),
        offset=torch.cat([spread(r.grid.offset, r.weight) for r in readers]),
        shift=by_row([grid.zero_point_shift for grid in grids]),
        qmin=by_row([grid.qmin for grid in grids]),
        qmax=by_row([grid.qmax for grid in grids]),
        pull=torch.cat(pulls) if pulls else None,
        cost=torch.cat([reader.row_weight for reader in readers]),
    )


def _error(reader: Reader, smooth: Tensor) -> Tensor:
    return fake_quantize(reader.weight * smooth, reader.grid) / smooth - reader.weight


def _best_step(
    rows: _Rows,
    group: Tensor,
    smooth: Tensor,
    error: Tensor,
    gradient: Tensor,
    second: Tensor,
    multipliers: Tensor,
) -> tuple[Tensor | None, Tensor]:
    """Change of the error's columns, and the factor it comes from; None if nothing is better."""
    trial = (smooth[group] * multipliers[:, None])[:, None, :]  # [candidates, 1, columns]
    scale = rows.scale[:, group]
    offset, shift = rows.offset[:, group], rows.shift
    codes = (rows.weight[:, group] * trial / scale - shift).round() - offset
    codes = codes.maximum(rows.qmin).minimum(rows.qmax)
    value = (codes + offset + shift) * scale / trial
    step = value - rows.weight[:, group] - error[:, group]  # [candidates, rows, columns]
    change = ((step @ second + 2 * gradient) * step).sum(-1) @ rows.cost  # [candidates]
    best = int(change.argmin())
    if not float(change[best]) < 0:
        return None, multipliers[best]
    return step[best], multipliers[best]
