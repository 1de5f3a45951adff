"""Rotations are orthogonal, whatever the width; Hadamard matrices have entries of one size."""

import pytest
import torch

from aimet_ext.core.hadamard import (
    hadamard,
    nearest_orthogonal,
    rotation,
)

# Of heads and of models: powers of two, times orders of Paley's from 12 to 100.
WIDTHS = (1, 2, 4, 8, 12, 16, 20, 28, 36, 40, 44, 48, 52, 60, 64, 72, 76, 80, 96, 100, 108, 128)
MODELS = (576, 640, 896, 960, 1152, 1536, 1600, 2048, 2304)


def is_one(matrix):
    return torch.allclose(matrix, torch.eye(len(matrix), dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [*WIDTHS, *MODELS])
def test_hadamard_matrices(size):
    matrix = hadamard(size)
    assert matrix.dtype == torch.float64 and is_one(matrix @ matrix.T)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5), atol=1e-14)
    assert torch.allclose(matrix[:, 0], torch.full((size,), size**-0.5).double(), atol=1e-14)


@pytest.mark.parametrize("size", [0, 3, 6, 10, 92, 113])
def test_widths_without_a_construction(size):
    """Order 92 exists, by a construction that is not here."""
    assert hadamard(size) is None


def test_every_width_of_a_large_model_has_one():
    """Told from the factors, which cost nothing."""
    for size in (3072, 3584, 4096, 5120, 8192, 14336, 16384):
        assert rotation(size).how.startswith("Hadamard")


@pytest.mark.parametrize("mode", ["hadamard", "random"])
@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("size", [1, 2, 7, 48, 64, 92, 160])
def test_rotations_are_orthogonal(size, mode, keeps_mean):
    turn = rotation(size, mode=mode, keeps_mean=keeps_mean, seed=3)
    assert is_one(turn.matrix @ turn.matrix.T)
    x = torch.randn(5, 2, size, dtype=torch.float64)
    assert torch.allclose(turn.apply(x), x @ turn.matrix, atol=1e-12)
    assert torch.allclose(turn.apply(turn.apply(x), inverse=True), x, atol=1e-12)
    if keeps_mean:
        ones = torch.ones(size, dtype=torch.float64)
        assert torch.allclose(turn.matrix @ ones, ones, atol=1e-12)
        assert torch.allclose(turn.matrix.T @ ones, ones, atol=1e-12)


def test_the_seed_decides():
    one, same, other = (rotation(64, seed=seed).matrix for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_random_matrices_have_no_preferred_direction():
    """The mean over seeds of each entry is 0, its mean square 1 / size."""
    draws = torch.stack([rotation(4, mode="random", seed=seed).matrix for seed in range(2000)])
    assert draws.mean(0).abs().max() < 0.06
    assert (draws.square().mean(0) - 0.25).abs().max() < 0.03


def test_one_large_channel_is_spread_evenly():
    x = torch.zeros(1, 576, dtype=torch.float64)
    x[0, 17] = 24.0
    assert torch.allclose(rotation(576).apply(x).abs(), torch.ones(1, 576).double())


def test_the_nearest_orthogonal_matrix():
    turn = rotation(32).matrix
    near = nearest_orthogonal(turn + 1e-6 * torch.randn(32, 32, dtype=torch.float64))
    assert is_one(near @ near.T) and torch.allclose(near, turn, atol=1e-5)
