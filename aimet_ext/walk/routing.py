"""Layers of experts: each of them reads the tokens that a router sends to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class PackedLayers(nn.ModuleList):
    """One layer for each expert, whose matrices the checkpoint holds in one parameter.

    :param layers: Layers in the order of the experts.
    :param transposed: True if the checkpoint stores their weights as ``[in, out]``.
    :param packed: Name of that parameter beside the list, None if it is the list's own.
    :param stacked: False if the matrices follow each other in it.
    :param idle: Number of experts behind these whose matrix nothing computes with.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        transposed: bool,
        packed: str | None = None,
        stacked: bool = True,
        idle: int = 0,
    ) -> None:
        super().__init__(layers)
        self.transposed = transposed
        self.packed = packed
        self.stacked = stacked
        self.idle = idle


class StackedLayers(PackedLayers):
    """One layer for each matrix ``[in, out]`` of a stack that a module multiplies by itself.

    It stands in the place of the parameter ``[stack, in, out]``, and its products with inputs
    ``[stack, rows, in]`` are what its layers return.

    :param layers: Layers in the order of the matrices, without biases.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__(layers, transposed=True)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute ``inputs @ stack``, and ``added + inputs @ stack``.

        :raises NotImplementedError: Another function reads the stack.
        """
        *before, stack = args
        known = _PRODUCTS.get(func) == len(before) and not kwargs
        if not known or not isinstance(stack, cls) or any(isinstance(x, cls) for x in before):
            raise NotImplementedError(f"{func} reads a stack of layers")
        product = torch.stack([layer(x) for layer, x in zip(stack, before[-1], strict=True)])
        return product if len(before) == 1 else before[0] + product


# Functions that multiply by a stack, and the number of tensors before it.
_PRODUCTS = {
    torch.bmm: 1,
    torch.matmul: 1,
    Tensor.bmm: 1,
    Tensor.matmul: 1,
    Tensor.__matmul__: 1,
    torch.baddbmm: 2,
    Tensor.baddbmm: 2,
}


class RoutedLayers(PackedLayers):
    """Layers of experts whose module is told which tokens each of them reads.

    The module that holds it is called as ``module(hidden, chosen, weights)``: hidden states
    ``[tokens, width]``, the experts of each token ``[tokens, k]``, and the weights of what these
    return. An expert reads its tokens in the order of :func:`tokens_of`. A number in ``chosen``
    that is no expert's stands for none.

    A module that is called with the tokens of each expert, one group behind the other and zeros for
    those of others, has a method ``routing`` from that to the call above; see :func:`is_grouped`.
    """


def tokens_of(expert: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places of an expert in ``chosen [tokens, k]``: columns and tokens, by column."""
    columns, tokens = torch.where((chosen == expert).T)
    return columns, tokens


def is_routed(root: nn.Module, layer: str) -> bool:
    """Return True if a layer of a module is an expert's."""
    return isinstance(root.get_submodule(layer.rpartition(".")[0]), RoutedLayers)


def is_grouped(module: nn.Module) -> bool:
    """Return True if a module of experts is called with hidden states once for each expert."""
    return callable(getattr(module, "routing", None))


def is_sent_to(root: nn.Module, layer: str) -> bool:
    """Return True if a router sends tokens to a layer of a module, as far as structure tells."""
    return is_routed(root, layer) or listed(root, layer) is not None


def listed(root: nn.Module, layer: str) -> tuple[int, tuple[str, ...]] | None:
    """Return a layer's place in a list of modules of one kind that has a router beside it.

    A router is what has a matrix with a row for each of them, in the module nearest to the list.

    :returns: number in the list, and names of the routers; None if there is no such list.
    """
    parts = layer.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        held = ".".join(parts[:depth])
        if (count := _siblings(root, layer, held)) < 2:
            continue
        for up in range(depth - 1, -1, -1):
            holder = ".".join(parts[:up])
            within = root.get_submodule(holder).named_modules(prefix=holder)
            outside = [(n, m) for n, m in within if not n.startswith(f"{held}.")]
            if found := tuple(n for n, module in outside if _outputs(module) == count):
                return int(parts[depth]), found
    return None


def _outputs(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.dim() == 2 else 0


def _siblings(root: nn.Module, layer: str, held: str) -> int:
    """Return how many modules like a layer's stand in a list with it, 0 if that is no list.

    :param held: Name of the list, with which the layer's begins.
    """
    modules = root.get_submodule(held)
    apart = RoutedLayers | StackedLayers
    if not isinstance(modules, nn.ModuleList) or isinstance(modules, apart):
        return 0
    own: Any = root.get_submodule(layer)
    rest = layer.removeprefix(f"{held}.").partition(".")[2]
    for module in modules:
        try:
            other: Any = module.get_submodule(rest)
        except AttributeError:
            return 0
        if type(other) is not type(own) or other.weight.shape != own.weight.shape:
            return 0
    return len(modules) if len({type(module) for module in modules}) == 1 else 0
