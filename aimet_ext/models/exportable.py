"""Operators that exporters lack, in terms of ones that they have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PRODUCTS = (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
_MARK = "_holds_pairs"


def as_pairs(real: Tensor, imaginary: Tensor) -> Tensor:
    """Return complex numbers ``[…]`` as real ones ``[…, 2]``, for code in :class:`Exportable`."""
    return _marked(torch.stack([real, imaginary], -1))


class Exportable(TorchFunctionMode):
    """Computes in other operators what exporters cannot write.

    * Complex numbers, of which some rotary embeddings are made: ``polar`` and ``view_as_complex``
      give pairs ``[…, 2]`` of real ones, the product of two of them is that of complex numbers,
      and ``view_as_real`` ends it. Indexing and reshaping of the axes before the last work on pairs
      as they do on numbers.
    * Triangular systems with a diagonal of ones, of which linear attention with a delta rule has
      one in each chunk: matrix products.
    * Axes of a permutation that are counted from the end, which are written as they are.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func``, on pairs if it is one of them."""
        further = kwargs or {}
        if func is torch.polar:
            size, angle = args
            return as_pairs(size * angle.cos(), size * angle.sin())
        if func is torch.view_as_complex:
            return _marked(args[0].view(args[0].shape))
        if func is torch.linalg.solve_triangular and further.get("unitriangular"):
            return _unit_inverse(args[0], upper=further["upper"]) @ args[1]
        if func in (torch.permute, torch.Tensor.permute):
            tensor, *axes = args
            order = axes[0] if len(axes) == 1 else axes
            args = (tensor, tuple(axis % tensor.dim() for axis in order))
        if not any(getattr(value, _MARK, False) for value in args if isinstance(value, Tensor)):
            return func(*args, **further)
        if func is torch.view_as_real:
            return args[0].view(args[0].shape)
        if func in _PRODUCTS and all(getattr(value, _MARK, False) for value in args):
            return as_pairs(*_product(*args))
        result = func(*args, **further)
        return _marked(result) if isinstance(result, Tensor) else result


def _product(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    (a, b), (c, d) = one.unbind(-1), other.unbind(-1)
    return a * c - b * d, a * d + b * c


def _unit_inverse(matrix: Tensor, *, upper: bool) -> Tensor:
    """Return the inverse of ``I - N``, N strictly triangular: the finite sum of its powers."""
    size = matrix.shape[-1]
    power = -(matrix.triu(1) if upper else matrix.tril(-1))
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    total, terms = identity + power, 2
    while terms < size:  # (I + N)(I + N²)(I + N⁴)…
        power = power @ power
        total, terms = total @ (identity + power), 2 * terms
    return total


def _marked(tensor: Tensor) -> Tensor:
    setattr(tensor, _MARK, True)
    return tensor
