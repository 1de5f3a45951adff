"""Tokens with attention mask 0 enter nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def padded(ids: Tensor, fill: int, left: int = False, pad: int = 6) -> dict[str, Tensor]:
    extra = torch.full((len(ids), pad), fill)
    real = torch.ones_like(ids)
    parts = [(ids, real), (extra, torch.zeros_like(extra))]
    ordered = parts[::-1] if left else parts
    return {
        "input_ids": torch.cat([tokens for tokens, _ in ordered], 1),
        "attention_mask": torch.cat([mask for _, mask in ordered], 1),
    }


def test_what_stands_in_padding_is_not_seen(
    technique: Any, make_sim: Any, ids: Any, result_of: Any
) -> None:
    """Whatever it is, on the right of a batch or on the left, the result is the same to the bit."""
    one, other = make_sim(), make_sim()
    for sim, fill in ((one, 7), (other, 101)):
        technique.apply(sim, [padded(ids(2, 16, s), fill, left) for s, left in ((1, 0), (2, 1))])
    assert result_of(one) == result_of(other)


def test_padding_weighs_nothing(
    technique: Any, make_sim: Any, ids: Any, pair: list[Tensor], outcome: Any
) -> None:
    units = technique.units(outcome(technique, pair, 1)[1])
    again = technique.units(
        technique.apply(make_sim(layers=1), [padded(ids(2, 16, seed), 9) for seed in (1, 2)])
    )
    for (name, nearest, after), (same, nearest_too, after_too) in zip(units, again, strict=True):
        assert name == same
        assert nearest_too == pytest.approx(nearest, rel=1e-4)
        assert after_too == pytest.approx(after, rel=0.1)  # random probes differ in shape
