"""Factors that weights are multiplied by: diagonals, stacks of blocks, and products of both.

A factor is a vector ``[width]``, a diagonal matrix, or a stack ``[n, d, d]``, a block-diagonal
matrix of width ``n · d``: a rotation of the hidden width is ``[1, width, width]``, one of each head
``[heads, d, d]``. A product is kept as its factors, since its matrix ``[width, width]`` would be
made for every module of a model, and is not needed to multiply by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

# A matrix is called singular where a pivot of its LU decomposition is so much below the largest.
_PIVOT = 1e-10


@dataclass(frozen=True, eq=False)
class Product:
    """A product of matrices of one width, ``factors[0] @ factors[1] @ …``; not multiplied out.

    :param factors: Vectors ``[width]`` and stacks ``[n, d, d]``, at least one.
    :raises ValueError: The factors differ in width.
    """

    factors: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        widths = [width_of(factor) for factor in self.factors]
        if len(set(widths)) != 1:
            raise ValueError(f"factors of one width are required, got {widths}")

    @property
    def width(self) -> int:
        """Number of rows, and of columns."""
        return width_of(self.factors[0])

    def matrix(self) -> Tensor:
        """Return the product as one matrix ``[width, width]``, float64."""
        whole = torch.eye(self.width, dtype=torch.float64, device=self.factors[0].device)
        return multiply(whole, self, 1, "right")

    def then(self, factor: Tensor) -> Product:
        """Return ``self @ factor``; neighbouring vectors become one."""
        return Product(_joined([*self.factors, factor]))

    def behind(self, factor: Tensor) -> Product:
        """Return ``factor @ self``; neighbouring vectors become one."""
        return Product(_joined([factor, *self.factors]))


Factor: TypeAlias = Tensor | Product


def width_of(factor: Factor) -> int:
    """Return the number of rows of a factor."""
    if isinstance(factor, Product):
        return factor.width
    return factor.shape[0] * factor.shape[-1] if factor.dim() == 3 else len(factor)


def multiply(values: Tensor, factor: Factor, dim: int, side: Literal["left", "right"]) -> Tensor:
    """Multiply one dimension of a tensor by a factor ``F``, in float64.

    :param values: ``[…, width, …]``; for a matrix ``M``, ``F @ M`` is dimension 0 from the left,
        and ``M @ F`` dimension 1 from the right.
    :param dim: Dimension of the width.
    :param side: ``"left"`` for ``F x`` of every vector ``x`` along it, ``"right"`` for ``xᵀ F``.
    :returns: the same shape, dtype and device.
    :raises ValueError: the dimension has another width.
    """
    width = width_of(factor)
    if values.dim() <= dim or values.shape[dim] != width:
        raise ValueError(
            f"a width of {width} is required, as the scales have, got shape {tuple(values.shape)}"
        )
    if isinstance(factor, Tensor) and factor.dim() == 1:
        shape = [1] * values.dim()
        shape[dim] = -1
        return (values.double() * factor.to(values.device).double().view(shape)).to(values.dtype)
    factors = factor.factors if isinstance(factor, Product) else (factor,)
    rows = values.double().movedim(dim, -1)  # […, width]
    for one in factors if side == "right" else reversed(factors):
        rows = _rows_times(rows, one.to(rows.device), transposed=side == "left")
    return rows.movedim(-1, dim).to(values.dtype)


def _rows_times(rows: Tensor, factor: Tensor, *, transposed: bool) -> Tensor:
    """Return ``rows @ factor``, or ``rows @ factorᵀ``, of rows ``[…, width]``."""
    if factor.dim() == 1:
        return rows * factor.double()
    shared = unique_blocks(factor).double()  # [n or 1, d, d]
    shared = shared.mT if transposed else shared
    blocks = rows.unflatten(-1, (len(factor), -1))  # […, n, d]
    if len(shared) == 1:
        return (blocks @ shared[0]).flatten(-2)
    return torch.einsum("...nd,nde->...ne", blocks, shared).flatten(-2)


def unique_blocks(stack: Tensor) -> Tensor:
    """Return a stack ``[1, d, d]`` where all blocks of ``[n, d, d]`` are one, else the stack."""
    if len(stack) > 1 and (stack.stride(0) == 0 or bool((stack == stack[:1]).all())):
        return stack[:1]
    return stack


def singular(stack: Tensor) -> bool:
    """Return True if a block of a stack ``[n, d, d]`` has no inverse, in float64's precision."""
    pivots = torch.linalg.lu_factor_ex(unique_blocks(stack).double())[0]
    sizes = pivots.diagonal(dim1=-2, dim2=-1).abs()  # [n, d]
    return bool((sizes.amin(1) <= _PIVOT * sizes.amax(1)).any())


def is_stack(values: Tensor) -> bool:
    """Return True for the shape ``[n, d, d]`` with nothing empty."""
    return values.dim() == 3 and values.shape[1] == values.shape[2] and math.prod(values.shape) > 0


def _joined(factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    joined: list[Tensor] = []
    for factor in factors:
        if joined and factor.dim() == 1 and joined[-1].dim() == 1:
            joined[-1] = joined[-1] * factor
        else:
            joined.append(factor)
    return tuple(joined)
