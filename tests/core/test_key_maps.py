"""Maps of keys: scores stay as they are, and a grid of 8 bits costs the least."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aimet_ext.core.hadamard import hadamard
from aimet_ext.core.key_maps import KeyMap, balanced_map, fit_key_map

HEADS, TOKENS, DIM = 2, 512, 8


@pytest.fixture(scope="module")
def keys() -> Tensor:
    """Keys with a mean, two large channels, and one head larger than the other."""
    draw = torch.randn(HEADS, TOKENS, DIM, generator=torch.Generator().manual_seed(0))
    size = torch.tensor([1.0, 1, 9, 1, 1, 1, 6, 1])
    return (draw * size + torch.linspace(-6, 8, DIM)).double() * torch.tensor([[[1.0]], [[4.0]]])


@pytest.fixture(scope="module")
def fisher() -> Tensor:
    """What an error costs, most of all along one direction of the second head."""
    draw = torch.randn(HEADS, 64, DIM, generator=torch.Generator().manual_seed(1)).double()
    draw[1, :, 2] *= 20
    return draw.mT @ draw / 64


def _rounded(keys: Tensor, found: KeyMap, phase: float) -> Tensor:
    """Return keys mapped, rounded to 8 bits with one step for all, and mapped back.

    :param phase: Place of the grid's points, in steps.
    """
    mapped = keys @ found.matrix + found.shift[:, None]
    step = (mapped.max() - mapped.min()) / 255
    back = ((mapped / step + phase).round() - phase) * step - found.shift[:, None]
    return back @ torch.linalg.inv(found.matrix)


def test_scores_shift_by_a_number_for_each_query(keys: Tensor, fisher: Tensor) -> None:
    """q' k'ᵀ = q kᵀ + q' bᵀ in float64, which a softmax does not see."""
    found = fit_key_map(keys, fisher, steps=5)
    queries = torch.randn(HEADS, 7, DIM, dtype=torch.float64)
    mapped = keys @ found.matrix + found.shift[:, None]
    scores = (queries @ found.of_queries) @ mapped.mT - queries @ keys.mT
    assert float(scores.std(-1).max()) <= 1e-10 * float((queries @ keys.mT).abs().max())
    assert float(scores.abs().max()) > 1


def test_the_noise_is_that_of_rounded_keys(keys: Tensor, fisher: Tensor) -> None:
    """½ E[e F eᵀ] of errors as they are, against the formula."""
    found = balanced_map(keys, fisher)
    errors = [_rounded(keys, found, n / 16) - keys for n in range(16)]
    seen = sum(torch.einsum("htd,hde,hte->", e, fisher, e) for e in errors) / 32 / TOKENS
    assert found.noise(keys, fisher) == pytest.approx(float(seen), rel=0.05)


def test_the_start_is_the_best_map_for_keys_of_one_shape(keys: Tensor, fisher: Tensor) -> None:
    """Σ k'² · tr(M⁻¹ F M⁻ᵀ) of a head reaches its lower bound (tr (F^½ S F^½)^½)²."""
    found = balanced_map(keys, fisher)
    centred = keys - keys.mean(1, keepdim=True)
    inverse = torch.linalg.inv(found.matrix)
    size = (centred @ found.matrix).square().mean(1).sum(-1)
    spread = (inverse @ fisher @ inverse.mT).diagonal(dim1=1, dim2=2).sum(-1)
    covariance = centred.mT @ centred / TOKENS
    bound = torch.linalg.eigvals(fisher @ covariance).real.sqrt().sum(-1).square()
    torch.testing.assert_close(size * spread, bound, rtol=1e-4, atol=0)


def test_descent_gains_on_the_start_and_that_on_a_hadamard_matrix(
    keys: Tensor, fisher: Tensor
) -> None:
    turning = hadamard(DIM)
    assert turning is not None
    plain = KeyMap.alike(turning, HEADS)
    start, found = balanced_map(keys, fisher), fit_key_map(keys, fisher, steps=100)
    noises = [each.noise(keys, fisher) for each in (plain, start, found)]
    assert noises[0] > 2 * noises[1] and noises[1] > 1.1 * noises[2], noises
    mapped = keys @ found.matrix + found.shift[:, None]
    assert float(mapped.max()) == pytest.approx(1) and float(mapped.min()) == pytest.approx(-1)
    again = fit_key_map(keys, fisher, steps=100)
    assert torch.equal(again.matrix, found.matrix) and torch.equal(again.shift, found.shift)


def test_channels_that_cost_nothing_are_no_trouble(keys: Tensor) -> None:
    """A Fisher information of one direction alone, and one of none, give finite maps."""
    lone = torch.zeros(HEADS, DIM, DIM, dtype=torch.float64)
    for fisher in (lone, lone.index_fill(1, torch.tensor(0), 1.0) * torch.eye(DIM)):
        found = fit_key_map(keys, fisher, steps=3)
        assert bool(torch.isfinite(found.of_queries).all()) and bool(
            torch.isfinite(found.shift).all()
        )
