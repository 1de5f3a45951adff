"""Scale pairs multiplied in one element at a time: slow, and plain enough to be checked by eye."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aimet_ext.core.equivalence import ScalePair, Side


def transform_by_loop(
    params: dict[str, Tensor], pair: ScalePair, scale: Tensor
) -> dict[str, Tensor]:
    """All parameters after one pair was multiplied in."""
    result = {name: value.detach().clone() for name, value in params.items()}
    for side in pair.sides:
        weight, bias = f"{side.module}.weight", f"{side.module}.bias"
        width = result[weight].shape[0 if side.axis == "out" else 1]
        for position in range(width):
            factor = _factor(side, scale, position, width)
            if side.axis == "in":
                result[weight][:, position] *= factor
                continue
            gain = result[weight][position] + side.gain_offset
            result[weight][position] = gain * factor - side.gain_offset
            if bias in result:
                result[bias][position] *= factor
    return result


def _factor(side: Side, scale: Tensor, position: int, width: int) -> float:
    start, stop = side.rows or (0, width)
    if not start <= position < stop:
        return 1.0
    entry = position - start
    if side.index is not None:
        entry = int(side.index[entry])
    value = float(scale[entry])
    return value if side.power == 1 else 1.0 / value


def scale_of_entry(pair: ScalePair, entry: Any) -> Tensor:
    """The scale of a pair ``[size]`` in float64, from the multipliers that a ledger's entry has."""
    scale = torch.zeros(pair.size, dtype=torch.float64)
    for side, kept in zip(pair.sides, entry.sides, strict=True):
        if side.power == 1:
            start, stop = side.rows or (0, len(kept.factor))
            index = torch.arange(pair.size) if side.index is None else side.index
            scale[index] = kept.factor[start:stop].double()
    assert bool((scale > 0).all())
    return scale
