"""Complex numbers as pairs of real ones, and more that traces and exporters have no way for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PRODUCTS = (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
_INDEX_ADDS = (torch.index_add, torch.Tensor.index_add)
_MARK = "_holds_pairs"


def as_pairs(real: Tensor, imaginary: Tensor) -> Tensor:
    """Return complex numbers ``[…]`` as real ones ``[…, 2]``, for code in :class:`Exportable`."""
    return _marked(torch.stack([real, imaginary], -1))


class Exportable(TorchFunctionMode):
    """Computes in real numbers what models write with complex ones, as some rotary embeddings.

    ``polar`` and ``view_as_complex`` give pairs ``[…, 2]`` of real ones, the product of two of them
    is that of complex numbers, and ``view_as_real`` ends it. Indexing and reshaping of the axes
    before the last work on pairs as they do on numbers.

    ``index_add`` to one place from several is a ``scatter_add``.

    :param counts: True to keep as tensors the numbers that ``tolist`` takes out, which a trace
        would fix: of the rows of each expert, which
        :class:`~aimet_ext.models.experts.SortedExperts` reads.
    """

    def __init__(self, *, counts: bool = False) -> None:
        super().__init__()
        self.counts = counts

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
        if func in _INDEX_ADDS and len(args) == 4 and not further:
            return _added_at(*args)
        if self.counts and func is torch.Tensor.tolist:
            return args[0]
        if func is torch.view_as_complex:
            return _marked(args[0].view(args[0].shape))
        if not any(getattr(value, _MARK, False) for value in args if isinstance(value, Tensor)):
            return func(*args, **further)
        if func is torch.view_as_real:
            return args[0].view(args[0].shape)
        if func in _PRODUCTS and all(getattr(value, _MARK, False) for value in args):
            return as_pairs(*_product(*args))
        result = func(*args, **further)
        return _marked(result) if isinstance(result, Tensor) else result


def _added_at(tensor: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """Add rows at an index, some of them to the same place, which exporters can only scatter."""
    shape = [1] * source.dim()
    shape[dim] = -1
    return tensor.scatter_add(dim, index.view(shape).expand_as(source), source)


def _product(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    (a, b), (c, d) = one.unbind(-1), other.unbind(-1)
    return a * c - b * d, a * d + b * c


def _marked(tensor: Tensor) -> Tensor:
    setattr(tensor, _MARK, True)
    return tensor
