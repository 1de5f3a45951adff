"""Zero-padding of the inner width of MLPs, which leaves what they compute as it was.

A zero row in the gate and up projections makes the new inner channel ``act(0) · 0 = 0``, and the
zero column it meets in the down projection ignores it anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aimet_ext.model.topology import BlockTopology

__all__ = ["pad_mlp"]


@torch.no_grad()
def pad_mlp(model: nn.Module, block: BlockTopology, multiple: int) -> int:
    """Widen the MLP of a block, in place, to the next multiple of a block size.

    :param model: holds the block.
    :param block: its topology; the last two stages are what goes in and out of the MLP.
    :param multiple: the inner width becomes the smallest multiple of this that holds it.
    :returns: the new inner width.
    :raises TypeError: a layer is no linear layer.
    """
    down = _linear(model, block, block.stages[-1][0])
    width = down.in_features
    extra = -width % multiple
    for name in block.stages[-2]:
        layer = _linear(model, block, name)
        if layer.out_features % width:
            continue  # a router: it reads the same input, and is no part of the inner width
        fused = layer.out_features // width
        layer.weight = _like(layer.weight, _pad_rows(layer.weight, fused, extra))
        if layer.bias is not None:
            layer.bias = _like(layer.bias, _pad_rows(layer.bias, fused, extra))
        layer.out_features += fused * extra
    down.weight = _like(down.weight, nn.functional.pad(down.weight, (0, extra)))
    down.in_features += extra
    return width + extra


def _linear(model: nn.Module, block: BlockTopology, name: str) -> nn.Linear:
    layer = model.get_submodule(f"{block.name}.{name}")
    if not isinstance(layer, nn.Linear):
        raise TypeError(
            f"{block.name}.{name}: a torch.nn.Linear is required to pad an MLP, "
            f'got {type(layer).__name__}; use on_indivisible="per_channel"'
        )
    return layer


def _pad_rows(tensor: Tensor, fused: int, extra: int) -> Tensor:
    """``extra`` zero rows after each of ``fused`` equal slices of the rows."""
    slices = tensor.chunk(fused)  # [width, in] each
    zeros = tensor.new_zeros(extra, *tensor.shape[1:])
    return torch.cat([piece for part in slices for piece in (part, zeros)])


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new, requires_grad=old.requires_grad)
