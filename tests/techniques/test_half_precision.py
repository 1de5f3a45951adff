"""Transforms of models in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aimet_ext
from aimet_ext.sim.protocol import adapt

pytest.importorskip("aimet_torch")
IDS = torch.arange(64).reshape(4, 16) * 5 % 125 + 3


@torch.no_grad()
def block_output(model: nn.Module) -> Tensor:
    """What the only block makes of the ids."""
    (block,) = (m for n, m in model.named_modules() if n.endswith("layers.0"))
    seen: list[Tensor] = []
    hook = block.register_forward_hook(lambda _, args, output: seen.append(output))
    try:
        model(IDS)
    finally:
        hook.remove()
    return seen[0].float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_a_block_is_the_same_to_16_units_in_the_last_place(
    family: str, dtype: torch.dtype, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(family, num_hidden_layers=1).to(dtype)
    before = block_output(model)
    sim = aimet_ext.create_sim(model, IDS)
    report = aimet_ext.apply_omniquant(
        sim, [IDS], num_iterations=5, search_sweeps=1, progress=False
    )
    assert any(block.kept != "nearest" for block in report.blocks)
    with adapt(sim).disabled_quantizers():
        change = (block_output(sim.model) - before).abs().max() / before.abs().max()
    assert change <= 16 * torch.finfo(dtype).eps
