"""Factors of weights as they are checked and stored; a matrix of many modules is stored once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from aimet_ext.core.factors import Factor, Product, is_stack, singular, unique_blocks
from aimet_ext.files.numbers import number_fault
from aimet_ext.files.tensors import copy_to_cpu

# The kind of pair that moves a norm's gains into the layers behind it, zeros and signs included.
NORM_GAIN = "norm_gain"

# Where a factor of a product is: the name of its tensor, and how many blocks its matrix stands for.
Place = tuple[str, int]


class SharedMatrices:
    """Matrices of a ledger, each of them kept once, however many modules it was folded into."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self._known = list(known)

    def copy(self) -> SharedMatrices:
        """Return another list of the same matrices."""
        return SharedMatrices(self._known)

    def keep(self, name: str, stack: Tensor) -> Tensor:
        """Return an equal stack ``[n, d, d]`` that is known, or a copy that is from now on.

        :param name: What it belongs to, for an error.
        :raises ValueError: it is new, and singular.
        """
        blocks = unique_blocks(stack.detach().cpu())  # [n or 1, d, d]
        for known in self._known:
            alike = (known.dtype, known.shape) == (blocks.dtype, blocks.shape)
            if alike and torch.equal(known, blocks):
                return known.expand(stack.shape)
        if singular(blocks):
            raise ValueError(
                f"{name}: a non-singular matrix is required, which an adapter can follow, got "
                f"one of shape {tuple(stack.shape)} without an inverse"
            )
        self._known.append(copy_to_cpu(blocks))
        return self._known[-1].expand(stack.shape)


class MatrixNames:
    """Names under which the different matrices of a file are stored."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[int, tuple[int, ...]], str] = {}

    def place(self, stack: Tensor) -> Place:
        """Return where a stack is stored; one that shares its memory is at the same place."""
        blocks = unique_blocks(stack)
        key = blocks.data_ptr(), tuple(blocks.shape)
        if key not in self._names:
            self._names[key] = f"matrix.{len(self._names)}"
            self.tensors[self._names[key]] = blocks
        return self._names[key], len(stack)


def stored_stack(tensors: Mapping[str, Tensor], place: Place) -> Tensor:
    """Return the stack ``[n, d, d]`` that is stored at a place.

    :raises KeyError: there is no such tensor.
    :raises ValueError: it cannot stand for so many blocks.
    """
    name, count = place
    blocks = tensors[name]
    if not is_stack(blocks) or len(blocks) not in (1, count) or count < 1:
        raise ValueError(f"{name}: {count} blocks [d, d] are required, got {tuple(blocks.shape)}")
    return blocks.expand(count, -1, -1)


def pack(named: Mapping[str, Factor]) -> tuple[dict[str, Tensor], dict[str, list[Place]]]:
    """Return factors as tensors, vectors by their own names, and the places of products' factors.

    :param named: By name; a product's vectors are stored as ``{name}.0`` and so on.
    """
    tensors: dict[str, Tensor] = {}
    products: dict[str, list[Place]] = {}
    matrices = MatrixNames()
    for name, factor in named.items():
        if isinstance(factor, Tensor):
            tensors[name] = factor
            continue
        products[name] = []
        for number, one in enumerate(factor.factors):
            place = (f"{name}.{number}", 1) if one.dim() == 1 else matrices.place(one)
            products[name].append(place)
            if one.dim() == 1:
                tensors[place[0]] = one
    return {**tensors, **matrices.tensors}, products


def unpack(
    tensors: Mapping[str, Tensor], products: Mapping[str, Iterable[Place]]
) -> dict[str, Factor]:
    """Return the factors that :func:`pack` took apart.

    :raises KeyError: a tensor is absent.
    :raises ValueError: factors do not go together.
    """
    used: set[str] = set()
    found: dict[str, Factor] = {}
    for name, places in products.items():
        places = list(places)
        factors = [
            stored_stack(tensors, place) if tensors[place[0]].dim() == 3 else tensors[place[0]]
            for place in places
        ]
        found[name] = Product(tuple(factors))
        used.update(place[0] for place in places)
    rest = {name: tensor for name, tensor in tensors.items() if name not in used}
    return {**rest, **found}


def check_factor(name: str, values: Tensor, *, signed: bool = False) -> None:
    """Refuse what no rows or columns can be multiplied by.

    :param signed: True for a vector that may hold zeros and numbers below, as gains of norms do.
    :raises ValueError: It is no vector of finite numbers above zero, and no stack of matrices of
        finite numbers.
    """
    positive = values.ndim == 1 and not signed
    fits = values.ndim == 1 or is_stack(values)
    if not fits or not values.is_floating_point() or number_fault(values, positive=positive):
        above = "" if signed else " above 0"
        raise ValueError(
            f"{name}: a vector of finite multipliers{above}, or a stack [n, d, d] of finite "
            f"matrices, is required, got {values.dtype} of shape {tuple(values.shape)}"
            + (f" in [{values.min():.3g}, {values.max():.3g}]" if values.numel() else "")
        )
