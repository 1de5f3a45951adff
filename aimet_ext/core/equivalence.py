"""Function-preserving rescaling of weights, applied exactly.

Two neighbouring layers compute ``R diag(s) diag(1/s) P = R P`` for every ``s`` without zeros: what
the producer ``P`` loses in its output rows, every reader ``R`` gains in its input columns. A
:class:`ScalePair` says where one vector ``s`` goes, as names; :func:`transform` puts it there. The
inverse of a transform is the transform with ``1/s``.

Convention: norms and producers carry ``s**-1``, readers ``s**+1``; of a query-key pair the query
rows carry ``s**+1`` and the key rows ``s**-1``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["PairKind", "ScalePair", "Side", "expand", "transform"]

PairKind = Literal["norm_qkv", "v_o", "norm_mlp", "up_down", "q_k"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """One place where a scale vector is multiplied in.

    :param module: name relative to the block, for example ``"self_attn.v_proj"``.
    :param axis: ``"out"`` for output rows (weight rows and bias; of a norm its gain and bias),
        ``"in"`` for input columns.
    :param power: the multiplier is ``scale**power``.
    :param index: long ``[covered]``: the scale entry of each covered row or column; None for the
        identity.
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
    values = scale if side.index is None else scale[side.index.to(scale.device)]
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
