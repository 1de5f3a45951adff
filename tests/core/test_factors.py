"""Factors of weights: multiplying by them is multiplying by the matrices that they stand for."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from aimet_ext.core.factors import Product, multiply, singular, unique_blocks, width_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


DIAGONAL, WHOLE, HEADS = normal(12), normal(1, 12, 12), normal(3, 4, 4)
SHARED = normal(1, 4, 4, seed=1).expand(3, 4, 4)


def dense(factor: Tensor) -> Tensor:
    """The matrix ``[width, width]``, written out."""
    return torch.diag(factor) if factor.dim() == 1 else torch.block_diag(*factor)


FACTORS = [DIAGONAL, WHOLE, HEADS, SHARED, Product((DIAGONAL, WHOLE, HEADS, DIAGONAL, SHARED))]


@pytest.mark.parametrize("factor", FACTORS, ids=["vector", "whole", "heads", "shared", "product"])
def test_both_sides_and_any_dimension(factor: Tensor | Product) -> None:
    """``M F`` from the right and ``F M`` from the left, of matrices, biases and kernels."""
    factors = factor.factors if isinstance(factor, Product) else (factor,)
    matrix = functools.reduce(torch.matmul, map(dense, factors))
    assert width_of(factor) == 12
    if isinstance(factor, Product):
        torch.testing.assert_close(factor.matrix(), matrix, rtol=1e-12, atol=1e-12)
    rows, kernel = normal(5, 12), normal(5, 12, 3, 3)
    close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-10)
    close(multiply(rows, factor, 1, "right"), rows @ matrix)
    close(multiply(rows.T, factor, 0, "left"), matrix @ rows.T)
    close(multiply(rows[0], factor, 0, "left"), matrix @ rows[0])
    close(multiply(kernel, factor, 1, "right"), torch.einsum("oiyx,ij->ojyx", kernel, matrix))
    assert multiply(rows.float(), factor, 1, "right").dtype is torch.float32


def test_products_grow_on_both_ends() -> None:
    """``OUT`` from the left and ``IN`` from the right, with neighbouring vectors joined."""
    product = Product((DIAGONAL,)).then(DIAGONAL).then(WHOLE).behind(HEADS).behind(DIAGONAL)
    expected = (DIAGONAL, HEADS, DIAGONAL * DIAGONAL, WHOLE)
    assert all(map(torch.equal, product.factors, expected))
    with pytest.raises(ValueError, match=r"one width .* \[12, 8\]"):
        Product((DIAGONAL, normal(2, 4, 4)))


def test_a_dimension_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a width of 12 is required.*\(5, 12\)"):
        multiply(normal(5, 12), HEADS, 0, "left")


def test_repeated_blocks_are_one() -> None:
    assert unique_blocks(SHARED).shape == unique_blocks(SHARED.contiguous()).shape == (1, 4, 4)
    assert unique_blocks(HEADS) is HEADS


def test_singular_is_without_an_inverse() -> None:
    assert not singular(HEADS)
    flat = HEADS.clone()
    flat[1, 3] = flat[1, 0] - 2 * flat[1, 2]
    assert singular(flat) and singular(torch.zeros(1, 2, 2)) and singular(torch.ones(1, 2, 2))
