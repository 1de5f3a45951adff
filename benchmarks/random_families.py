"""Small random models of every family, and what random scales do to their float function."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from aimet_ext.core.equivalence import transform
from aimet_ext.models.proof import Float64Casts, random_scale
from aimet_ext.models.topology import find_blocks

BIASES = {"attention_bias": True, "mlp_bias": True}
FAMILIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {}),
    ("llama", BIASES),
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True}),
    ("mistral", {}),
    ("phi3", {}),
    ("gemma", {"attention_bias": True}),
    ("gemma2", {}),
    ("gemma3_text", {}),
)


def random_model(family: str, **changes: Any) -> nn.Module:
    """A small causal LM of a family; gains and biases away from 1 and 0, so that they show."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings, **changes)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model.eval()


@torch.no_grad()
def change_by_folding(model: nn.Module, dtype: torch.dtype) -> float:
    """max|Δ|/max|logits|; in float64 the model's own float32 casts are made float64 too."""
    values = {name: value.to(dtype) for name, value in model.named_parameters()}
    changed = {}
    for number, block in enumerate(find_blocks(model)):
        prefix = f"{block.name}."
        params = {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}
        scales = [
            (pair, random_scale(pair.size, 10 * number + place).to(dtype))
            for place, pair in enumerate(block.pairs)
        ]
        changed |= {prefix + name: value for name, value in transform(params, scales).items()}
    ids = torch.randint(3, 128, (2, 32), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 24:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with Float64Casts() if dtype is torch.float64 else nullcontext():
        before, after = (
            torch.func.functional_call(model, state, (), inputs).logits
            for state in (values, {**values, **changed})
        )
    return float((after - before).abs().max() / before.abs().max())
