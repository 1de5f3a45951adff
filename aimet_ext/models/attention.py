"""The projections that ``nn.MultiheadAttention`` keeps in one parameter, as layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_PARTS = ("q", "k", "v")


def projections(attention: nn.MultiheadAttention) -> dict[str, nn.Linear]:
    """Return the projections of an attention as linear layers, which view its parameters.

    AIMET's attention has layers of these names.

    :returns: ``q_proj``, ``k_proj`` and ``v_proj``.
    """
    packed, bias = attention.in_proj_weight, attention.in_proj_bias
    weights: Any = (
        [getattr(attention, f"{part}_proj_weight") for part in _PARTS]
        if packed is None
        else packed.chunk(3)
    )
    biases: Any = [None] * 3 if bias is None else bias.chunk(3)
    rows = zip(_PARTS, weights, biases, strict=True)
    return {f"{part}_proj": _view(weight, part_bias) for part, weight, part_bias in rows}


def own_projections(attention: nn.MultiheadAttention) -> None:
    """Give the projections of AIMET's attention weights of their own, and drop those they view."""
    for part in _PARTS:
        layer = attention.get_submodule(f"{part}_proj")
        for key, value in list(layer.named_parameters(recurse=False)):
            setattr(layer, key, nn.Parameter(value.detach().clone(), value.requires_grad))
        setattr(attention, f"{part}_proj_weight", None)
    # Without them, torch does not go around the layers on its fast path either.
    for key in ("in_proj_weight", "in_proj_bias"):
        setattr(attention, key, None)


def owns_projections(attention: nn.MultiheadAttention) -> bool:
    """Return True after :func:`own_projections`."""
    return attention.in_proj_weight is None and attention.q_proj_weight is None


@contextmanager
def every_module() -> Iterator[None]:
    """Return a context in which attention and encoder layers of torch call the modules in them.

    Their fast path reads the modules' weights instead, and a trace does not see the modules.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _view(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, width = weight.shape
    layer = nn.Linear(width, outputs, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), bias.requires_grad)
    return layer
