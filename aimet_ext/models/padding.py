"""Zero-padding of the inner width of MLPs, which leaves what they compute as it was.

A zero row in the gate and up projections makes the new inner channel ``act(0) · 0 = 0``, and the
zero column it meets in the down projection ignores it anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.models.topology import BlockTopology


def mlp_layers(model: nn.Module, block: BlockTopology) -> tuple[dict[str, int], nn.Linear]:
    """Return the layers of a block that the inner width of its MLP is a dimension of.

    :param model: holds the block.
    :param block: its topology.
    :returns: by full name of a layer that leads in, how many projections are fused in its rows;
        and the layer that leads out.
    :raises ValueError: the block does not have one MLP.
    :raises TypeError: a layer is no linear layer.
    """
    if block.mlp is None:
        raise ValueError(
            f"{block.name}: one MLP is required whose layers hold their inner channels in order, "
            'to be padded; use on_indivisible="per_channel" or a block size that divides'
        )
    inner, outer = block.mlp
    down = _linear(model, block, outer)
    fused = {}
    for name in inner:
        layer = _linear(model, block, name)
        fused[f"{block.name}.{name}"] = layer.out_features // down.in_features
    return fused, down


@torch.no_grad()
def pad_mlp(model: nn.Module, block: BlockTopology, multiple: int) -> int:
    """Widen the MLP of a block, in place, to the next multiple of a block size.

    :param model: holds the block.
    :param block: its topology.
    :param multiple: the inner width becomes the smallest multiple of this that holds it.
    :returns: the new inner width.
    :raises TypeError: a layer is no linear layer; nothing is changed.
    """
    inputs, down = mlp_layers(model, block)
    extra = -down.in_features % multiple
    if not extra:
        return down.in_features
    for name, fused in inputs.items():
        layer: Any = model.get_submodule(name)
        layer.weight = _like(layer.weight, pad_rows(layer.weight, fused, extra))
        if layer.bias is not None:
            layer.bias = _like(layer.bias, pad_rows(layer.bias, fused, extra))
        layer.out_features += fused * extra
    down.weight = _like(down.weight, nn.functional.pad(down.weight, (0, extra)))
    down.in_features += extra
    return down.in_features


def pad_rows(tensor: Tensor, fused: int, extra: int) -> Tensor:
    """Add ``extra`` zero rows after each of ``fused`` equal slices of the rows."""
    slices = tensor.chunk(fused)  # [width, in] each
    zeros = tensor.new_zeros(extra, *tensor.shape[1:])
    return torch.cat([piece for part in slices for piece in (part, zeros)])


def _linear(model: nn.Module, block: BlockTopology, name: str) -> nn.Linear:
    layer = model.get_submodule(f"{block.name}.{name}")
    if not isinstance(layer, nn.Linear):
        raise TypeError(
            f"{block.name}.{name}: a torch.nn.Linear is required to pad an MLP, "
            f'got {type(layer).__name__}; use on_indivisible="per_channel"'
        )
    return layer


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new, requires_grad=old.requires_grad)
