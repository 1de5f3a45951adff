"""Moments of all experts' tokens, on which those of an expert that few reach lean."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from aimet_ext.core.objective import POOLED_AN_INPUT, SecondMoment
from aimet_ext.data.moments import NoteRows, sum_moments
from aimet_ext.walk.experts import Pool


def pooled_moment(
    pool: Pool,
    layer: Any,
    *,
    dtype: torch.dtype,
    mapped_dir: str | Path | None = None,
    also: Iterable[NoteRows] = (),
) -> tuple[SecondMoment | None, int]:
    """Return the moment of what a layer would see of all tokens, and the number of these.

    :param layer: Layer of an expert.
    :param dtype: Type of the result.
    :param mapped_dir: Folder for sums that do not fit in memory.
    :param also: Functions that are given the rows of both streams too.
    :returns: None in place of the moment if no token counts.
    :raises ValueError: an input holds NaN or infinity.
    """
    count, inputs = pool.inputs(POOLED_AN_INPUT * layer.weight.shape[1])
    total = sum_moments(
        inputs,
        layer,
        dtype=torch.promote_types(layer.weight.dtype, torch.float32),
        mapped_dir=mapped_dir,
        also=also,
    )
    if total is None or not total.tokens:
        return None, count
    return total.result(dtype), max(count, total.tokens)
