"""Second moments that lean on others: what few tokens do not tell, those of all experts do."""

from __future__ import annotations

import pytest
import torch
from leaning_reference import leaned_by_lstsq
from torch import Tensor

from aimet_ext.core.objective import SecondMoment
from aimet_ext.data.moments import MomentSum

WIDTH, ALL = 24, 4096


def rows(count: int, seed: int, angle: float = 0.0) -> Tensor:
    """Correlated rows ``[1, count, WIDTH]``, of another kind the larger the angle."""
    generator = torch.Generator().manual_seed(7)
    one, other = torch.randn(2, WIDTH, WIDTH, generator=generator, dtype=torch.float64) / 5
    base = torch.diag(torch.logspace(0, -1.5, WIDTH).double()) @ (one + angle * other)
    drawn = torch.randn(
        count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return (drawn @ base)[None]


def moment(*parts: Tensor, errors: bool = False) -> SecondMoment:
    total = MomentSum(WIDTH, dtype=torch.float64, cross=errors)
    for part in parts:
        total.add(part, part.sin() if errors else None)
    return total.result(torch.float64)


@pytest.mark.parametrize("count", [24, 400, 1500])
def test_against_least_squares_in_entries(count: int) -> None:
    own, pool = rows(count, 1, 0.3), rows(ALL, 2)
    few, every = moment(own), moment(own, pool)
    found = few.leaning(every, count + ALL)
    share, noise = leaned_by_lstsq(
        few.second, every.second, float(few.noise.products), count / (count + ALL)
    )
    assert found.leaned == pytest.approx(share, rel=1e-9) and 0 < share <= 1
    mixed = (1 - share) * few.noise.products + share * every.noise.products
    assert float(found.noise.products) == pytest.approx(max(noise, float(mixed)), rel=1e-9)
    mean = (1 - share) * few.second + share * every.second
    torch.testing.assert_close(found.second, mean, rtol=1e-12, atol=0)
    assert found.tokens == count and found.effective_tokens > count


def test_it_is_nearer_to_the_truth() -> None:
    """With few tokens, and hardly farther with more; with many nothing changes."""
    truth, pool = moment(rows(60_000, 3, 0.3)).second, rows(ALL, 2)
    shares = []
    for count in (3, 12, 48, 200, 1000, 20_000):
        own = rows(count, 1, 0.3)
        few = moment(own)
        found = few.leaning(moment(own, pool), count + ALL)
        before, after = ((m.second - truth).norm() for m in (few, found))
        assert after <= (0.8 if count < 100 else 1.2) * before
        shares.append(found.leaned)
    assert shares == sorted(shares, reverse=True) and shares[-1] < 0.02


def test_without_tokens_the_others_decide() -> None:
    every = moment(rows(ALL, 2), errors=True)
    none = SecondMoment.of_none(WIDTH, torch.float64, every.second)
    assert not none.is_known and none.is_noisy
    found = none.leaning(every, ALL)
    assert (found.leaned, found.tokens, found.is_known) == (1.0, 0, True)
    assert torch.equal(found.second, every.second) and torch.equal(found.cross, every.cross)
    assert (found.effective_tokens, found.peak) == (ALL, every.peak)


def test_errors_of_earlier_layers_lean_alike() -> None:
    own, pool = rows(48, 1, 0.3), rows(ALL, 2)
    few, every = moment(own, errors=True), moment(own, pool, errors=True)
    found = few.leaning(every, 48 + ALL)
    share = found.leaned
    torch.testing.assert_close(found.cross, (1 - share) * few.cross + share * every.cross)
    again = found.shrunk(0.5)
    assert bool((torch.linalg.eigvalsh(again.second) > 0).all())
