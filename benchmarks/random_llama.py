"""Llama-shaped models with random weights, for figures of time and memory."""

from __future__ import annotations

from typing import Any

import torch
from common import quiet
from torch import Tensor, nn

import aimet_ext
from aimet_ext import QSpec

VOCABULARY = 1000


def random_llama(*, blocks: int, hidden: int, ffn: int, length: int = 512) -> nn.Module:
    """8 query heads over 4 key-value heads, always the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=length,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def random_batches(windows: int, length: int, batch_size: int = 4) -> list[Tensor]:
    """Ids ``[batch_size, length]`` each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (windows, length), generator=generator)
    return list(ids.split(batch_size))


def weights_only_sim(model: nn.Module, spec: QSpec = QSpec(bitwidth=4)) -> Any:  # noqa: B008
    """Block linears quantized and nothing else."""
    with quiet():
        return aimet_ext.create_sim(
            model,
            torch.zeros(1, 16, dtype=torch.long),
            weights=spec,
            lm_head=None,
            embedding=None,
            activations=None,
        )
