"""Steps over orthogonal matrices: they stay orthogonal, and go downhill as far as is asked."""

import pytest
import torch

from aimet_ext.core.cayley import CayleySGD, cayley, skew_part
from aimet_ext.core.hadamard import random_orthogonal, rotation


def orthogonal(size, seed):
    return random_orthogonal(size, torch.Generator().manual_seed(seed))


def test_the_transform_is_the_first_order_of_a_turn():
    """Its series begins as that of the exponential: 1 + W + W² / 2."""
    matrix, direction = orthogonal(6, 0), torch.randn(6, 6, dtype=torch.float64)
    skew = skew_part(matrix, direction)
    assert torch.equal(skew, -skew.T)
    step = 1e-4 / float(skew.norm())
    expected = torch.linalg.matrix_exp(step * skew) @ matrix
    assert torch.allclose(cayley(matrix, skew, step), expected, atol=1e-12, rtol=0)


def test_a_direction_along_the_manifold_is_its_own_part():
    matrix, skew = orthogonal(5, 1), torch.randn(5, 5, dtype=torch.float64)
    skew = skew - skew.T
    assert torch.allclose(skew_part(matrix, skew @ matrix), skew, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_step_turns_as_far_whatever_the_size_of_the_loss(scale):
    matrix = orthogonal(16, 2)
    descent = CayleySGD([matrix], learning_rate=0.01, momentum=0.0)
    descent.step([scale * torch.randn(16, 16, generator=torch.Generator().manual_seed(0))])
    turned = descent.matrices[0] @ matrix.T
    angle = torch.linalg.matrix_norm(turned - torch.eye(16).double()) / 16**0.5
    assert float(angle) == pytest.approx(0.01, rel=1e-3)


def test_it_finds_a_rotation_and_stays_orthogonal():
    target, start = rotation(12).matrix, orthogonal(12, 3)
    if torch.linalg.det(target) * torch.linalg.det(start) < 0:
        start[:, 0] *= -1
    descent = CayleySGD([start], learning_rate=0.05, momentum=0.5)
    before = float((start - target).square().sum())
    for step in range(200):
        descent.step([2 * (descent.matrices[0] - target)], share=1 - step / 200)
    (found,) = descent.restored()
    assert float((found - target).square().sum()) < 1e-2 * before
    assert torch.allclose(found @ found.T, torch.eye(12).double(), atol=1e-13)


def test_what_has_no_gradient_stays():
    matrix = orthogonal(4, 5)
    descent = CayleySGD([matrix, matrix, matrix], learning_rate=0.1)
    descent.step([None, torch.full((4, 4), torch.nan), torch.zeros(4, 4)])
    assert all(torch.allclose(found, matrix, atol=1e-14) for found in descent.matrices)
