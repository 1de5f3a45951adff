"""Tiny encoder-decoders of transformers with random weights, and batches for them."""

from __future__ import annotations

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

_LAYERS = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def encoder_decoder(family: str) -> torch.nn.Module:
    """A ``t5``, ``bart`` or ``whisper``, in evaluation mode."""
    torch.manual_seed(0)
    if family == "t5":
        sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64}
        layers = {"num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
        config = T5Config(
            **sizes, **layers, feed_forward_proj="gated-gelu", decoder_start_token_id=0
        )
        return T5ForConditionalGeneration(config).eval()
    if family == "bart":
        config = BartConfig(**_LAYERS, vocab_size=64, max_position_embeddings=32, init_std=0.15)
        return BartForConditionalGeneration(config).eval()
    config = WhisperConfig(
        **_LAYERS,
        vocab_size=64,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        init_std=0.15,
    )
    return WhisperForConditionalGeneration(config).eval()


def batch_of(family: str, seed: int, *, rows: int = 4, target: int = 7, padded: bool = True):
    """Keyword arguments of a prepared model; 12 tokens of source text, some of them padding."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(3, 64, (rows, length), generator=generator)

    mask = torch.ones(rows, target, dtype=torch.long)
    if padded:
        mask[0, target - 2 :] = 0
    batch = {"decoder_input_ids": ids(target), "decoder_attention_mask": mask}
    if family == "whisper":
        # Neighbouring frames resemble each other.
        sound = torch.randn(rows, 8, 32, generator=generator).cumsum(-1) / 3
        return {"input_features": sound, **batch}
    mask = torch.ones(rows, 12, dtype=torch.long)
    if padded:
        mask[0, 8:] = 0
        mask[1, 5:] = 0
    return {"input_ids": ids(12), "attention_mask": mask, **batch}
