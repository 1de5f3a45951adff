"""Models of 4-bit LPBQ weights and 16-bit activations, exported, for the checks on the HTP."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from common import load, quiet
from torch import Tensor, nn

import aimet_ext
from aimet_ext import LPBQ, QSpec

# Random weights say nothing about perplexity, and all about operators and arithmetic.
_RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}
MODELS = (*_RANDOM, "stories260K")
_BLOCK = 32
LENGTH = 256
W4 = QSpec(bitwidth=4, granularity=LPBQ(_BLOCK), on_indivisible="pad")


def random_model(name: str) -> nn.Module:
    """Four blocks, biases and gains away from 0 and 1, logits far apart."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, changes = _RANDOM[name]
    config = AutoConfig.for_model(
        family,
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.03,
        tie_word_embeddings=False,
        **changes,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for each, parameter in model.named_parameters():
        if "norm" in each or each.endswith("bias"):
            nn.init.normal_(parameter, mean=float("norm" in each), std=0.2)
    return model.eval()


def windows_of(name: str, assets: Path, part: str, count: int) -> list[Tensor]:
    """Ids ``[1, 256]`` each."""
    if name in _RANDOM:
        generator = torch.Generator().manual_seed(len(part))
        return list(torch.randint(3, 512, (count, LENGTH), generator=generator).split(1))
    _, tokenizer = load(assets / "stories260K-hf")
    return aimet_ext.calibration_batches(
        tokenizer,
        assets / "tinystories" / f"{part}.jsonl",
        seq_length=LENGTH,
        num_batches=count,
        batch_size=1,
    )


def export_model(
    name: str, folder: Path, assets: Path, *, quick: bool = False
) -> tuple[nn.Module, list[Tensor]]:
    """Quantize and export a model; the float model, and the batches that it was calibrated on.

    A model of random weights is rounded to nearest, stories260K by SeqMSE's ranges and GPTQ.
    """
    data = windows_of(name, assets, "calib", 2 if quick else 16)
    source = random_model(name) if name in _RANDOM else load(assets / "stories260K-hf")[0]
    model = aimet_ext.prepare_model(copy.deepcopy(source), mask_value=-100.0)
    with quiet():
        sim = aimet_ext.create_sim(model, data[0], weights=W4, activations=16)
        if name not in _RANDOM:
            aimet_ext.apply_seq_mse(sim, data, progress=False)
            aimet_ext.apply_gptq(sim, data, progress=False)

        @torch.no_grad()
        def calibrate(quantized: nn.Module) -> None:
            for ids in data:
                quantized(ids)

        sim.compute_encodings(calibrate)
        aimet_ext.export(sim, folder, "model", data[0])
    return model, data


def held_out(name: str, assets: Path, count: int) -> list[Tensor]:
    """Windows that were not calibrated on."""
    return windows_of(name, assets, "eval", count)
