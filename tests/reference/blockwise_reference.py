"""Losses of decoder blocks, seen in runs of whole models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def block_losses(sim: Any, model: nn.Module, batches: Sequence[Tensor]) -> list[float]:
    """Mean squared differences of the outputs of ``blocks`` in a simulation and in its model."""
    outputs = [_outputs(each, batches) for each in (sim.model, model)]
    return [float((one - two).square().mean()) for one, two in zip(*outputs, strict=True)]


def _outputs(model: Any, batches: Sequence[Tensor]) -> list[Tensor]:
    found: list[list[Tensor]] = [[] for _ in model.blocks]
    hooks = [
        block.register_forward_hook(lambda *call, kept=kept: kept.append(call[2]))
        for block, kept in zip(model.blocks, found, strict=True)
    ]
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat(each) for each in found]
