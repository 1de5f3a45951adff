"""Function-preserving rescaling of weights: applied exactly, and the choice of its scales.

Two neighbouring layers compute ``R diag(s) diag(1/s) P = R P`` for every ``s`` without zeros: what
the producer ``P`` loses in its output rows, every reader ``R`` gains in its input columns. A
:class:`ScalePair` says where one vector ``s`` goes, as names; :func:`transform` puts it there. The
inverse of a transform is the transform with ``1/s``.

Convention: norms and producers carry ``s**-1``, readers ``s**+1``; of a query-key pair the query
rows carry ``s**+1`` and the key rows ``s**-1``.

The scales (LET, arXiv 2308.13137) come from SmoothQuant's formula (arXiv 2211.10438), or from
coordinate descent on the output error that second moments give exactly. Both choose a multiplier
for each input column of the readers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aimet_ext.config import PairKindName as PairKind
from aimet_ext.core.affine import Grid, fake_quantize, spread


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """One place where a scale vector is multiplied in.

    :param module: name relative to the block, for example ``"self_attn.v_proj"``.
    :param axis: ``"out"`` for output rows (weight rows and bias; of a norm its gain and bias),
        ``"in"`` for input columns.
    :param power: the multiplier is ``scale**power``.
    :param index: long ``[covered]``: the scale entry of each covered row or column, -1 for one that
        stays as it is; None for the identity.
    :param rows: start and stop of the covered rows or columns; None for all of them.
    :param gain_offset: 1.0 for a norm that multiplies by ``1 + weight``, else 0.
    """

    module: str
    axis: Literal["out", "in"]
    power: Literal[1, -1]
    index: Tensor | None = None
    rows: tuple[int, int] | None = None
    gain_offset: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class ScalePair:
    """All places where one scale vector ``[size]`` is multiplied in and cancels.

    :param name: name for messages, for example ``"input_layernorm->q_proj,k_proj,v_proj"``.
    """

    name: str
    kind: PairKind
    size: int
    sides: tuple[Side, ...]


def expand(side: Side, scale: Tensor, width: int) -> Tensor:
    """Return the multiplier of every row or column of a side's module, 1 outside its slice.

    :param scale: ``[size]``, the scale vector of the pair.
    :param width: rows (``axis="out"``) or columns (``axis="in"``) of the module's weight.
    :returns: ``[width]``, differentiable in ``scale``.
    :raises ValueError: the side does not cover what it says it covers.
    """
    start, stop = side.rows or (0, width)
    values = scale
    if side.index is not None:
        index = side.index.to(scale.device)
        values = torch.where(index < 0, 1, scale[index.clamp_min(0)])
    if not 0 <= start <= stop <= width or len(values) != stop - start:
        raise ValueError(
            f"{side.module}: one multiplier for each of rows {start} to {stop} of {width} "
            f"({side.axis}) is required, got {len(values)}"
        )
    if side.power == -1:
        values = values.reciprocal()
    if stop - start == width:
        return values
    return torch.cat([values.new_ones(start), values, values.new_ones(width - stop)])


def transform(
    params: Mapping[str, Tensor], pairs_and_scales: Sequence[tuple[ScalePair, Tensor]]
) -> dict[str, Tensor]:
    """Return the parameters of a block after its scale pairs were multiplied in, in order.

    With ``m`` the expanded multiplier, rows become ``diag(m) W`` and ``m * b``, columns
    ``W diag(m)``, and the gain of a norm ``(w + gain_offset) * m - gain_offset``.

    :param params: the block's parameters, keyed ``"self_attn.q_proj.weight"``; linear weights
        ``[out, in]`` or ``[out, in, 1, 1]``, norm gains ``[width]``. Never changed.
    :param pairs_and_scales: pairs with their scales ``[pair.size]``.
    :returns: the changed entries only, in their own dtype, differentiable in scales and parameters.
    :raises ValueError: a weight is missing, or a scale or a side does not fit.
    """
    changed: dict[str, Tensor] = {}
    for pair, scale in pairs_and_scales:
        if scale.shape != (pair.size,):
            raise ValueError(
                f"{pair.name}: a scale of shape ({pair.size},) is required, "
                f"got {tuple(scale.shape)}"
            )
        for side in pair.sides:
            for name, value in _apply(side, scale, {**params, **changed}).items():
                changed[name] = value.to(params[name].dtype)
    return changed


def stored_scales(
    params: Mapping[str, Tensor],
    pairs_and_scales: Sequence[tuple[ScalePair, Tensor]],
    dtypes: Mapping[str, torch.dtype],
) -> list[Tensor]:
    """Return the scales of pairs as the gains of norms carry them once they are stored.

    A gain ``g / s`` is rounded when it is stored, most of all where a norm multiplies by
    ``1 + weight`` and ``g / s`` is small, and what follows may amplify that. The columns of the
    readers take any multiplier: ``g / g'`` in place of ``s``, of the gain ``g'`` that was stored.

    :param params: see :func:`transform`.
    :param pairs_and_scales: pairs in the order they are multiplied in, with their scales.
    :param dtypes: types that the parameters are stored in.
    :returns: the scales ``[pair.size]``, float64; of a pair without a norm as they were.
    """
    current, found = dict(params), []
    for pair, scale in pairs_and_scales:
        exact = scale.double()
        producers = [side for side in pair.sides if side.power == -1]
        if len(producers) == 1 and _is_norm(producers[0], params):
            side, name = producers[0], f"{producers[0].module}.weight"
            gain = current[name]
            stored = _apply(side, exact, current)[name].to(dtypes[name]).to(gain.dtype)
            ratio = (gain + side.gain_offset).double() / (stored + side.gain_offset).double()
            exact = torch.where(ratio.isfinite() & (ratio > 0), ratio, exact)
            current[name] = stored
        found.append(exact)
    return found


def powers_of_two(scale: Tensor) -> Tensor:
    """Return the nearest powers of two, which multiply a weight exactly; gradients pass."""
    return scale * (scale.detach().log2().round().exp2() / scale.detach())


def _is_norm(side: Side, params: Mapping[str, Tensor]) -> bool:
    """Return True for a side that is a vector of gains, one for each entry of the scale."""
    gains = params[f"{side.module}.weight"].dim() == 1
    return gains and side.index is None and side.rows is None


def _apply(side: Side, scale: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weight, and the bias if it has one, of a side's module after multiplication."""
    weight_name, bias_name = f"{side.module}.weight", f"{side.module}.bias"
    if weight_name not in params:
        raise ValueError(f"{weight_name} is required by a scale pair and is not in params")
    weight = params[weight_name]
    if side.axis == "in":
        multiplier = expand(side, scale, weight.shape[1])
        return {weight_name: weight * multiplier.view(1, -1, *[1] * (weight.ndim - 2))}
    multiplier = expand(side, scale, weight.shape[0])
    gain = weight + side.gain_offset if side.gain_offset else weight
    gain = gain * multiplier.view(-1, *[1] * (weight.ndim - 1))
    result = {weight_name: gain - side.gain_offset if side.gain_offset else gain}
    bias = params.get(bias_name)
    if bias is not None:
        result[bias_name] = bias * multiplier
    return result


# ---- the choice of scales ------------------------------------------------------------------------

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
