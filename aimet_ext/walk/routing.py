"""Layers of experts: each of them reads the tokens that a router sends to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class RoutedLayers(nn.ModuleList):
    """One layer for each expert.

    The module that holds it is called as ``module(hidden, chosen, weights)``: hidden states
    ``[tokens, width]``, the experts of each token ``[tokens, k]``, and the weights of what these
    return. An expert reads its tokens in the order of :func:`tokens_of`. A number in ``chosen``
    that is no expert's stands for none.

    A module that is called with the tokens of each expert, one group behind the other and zeros for
    those of others, has a method ``routing`` from that to the call above; see :func:`is_grouped`.

    :param layers: Layers in the order of the experts.
    :param transposed: True if the checkpoint stores their weights as ``[in, out]``.
    """

    def __init__(self, layers: Sequence[nn.Module], *, transposed: bool) -> None:
        super().__init__(layers)
        self.transposed = transposed


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
