"""A quantized base with scales in its weights, and a PEFT model of the same checkpoint."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

IDS = torch.arange(32).reshape(2, 16) * 3 % 128


@pytest.fixture(scope="session")
def lora_ids() -> torch.Tensor:
    """Return ids ``[2, 16]`` for the tiny models."""
    return IDS


@pytest.fixture(scope="session")
def lora_model(tiny_model: Callable[..., Any]) -> Any:
    """Return a tiny Qwen2: grouped-query attention, biases, tied embeddings."""
    return tiny_model("qwen2", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def lora_peft(lora_model: Any) -> Any:
    """Return a PEFT model with two adapters of different ranks, layers and scalings."""
    peft = pytest.importorskip("peft")
    first = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        init_lora_weights=False,
        target_modules=["q_proj", "v_proj", "down_proj"],
    )
    second = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        use_rslora=True,
        init_lora_weights=False,
        target_modules=["q_proj", "o_proj"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = peft.get_peft_model(copy.deepcopy(lora_model), first, adapter_name="one")
        model.add_adapter("two", second)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="session")
def lora_base(lora_model: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return the export of a base: W4 A16, scales and ranges of a short OmniQuant."""
    aimet_ext = pytest.importorskip("aimet_ext")
    pytest.importorskip("aimet_torch")
    pytest.importorskip("onnx")
    sim = aimet_ext.create_sim(lora_model, IDS)
    aimet_ext.apply_omniquant(sim, [IDS], 1, search_sweeps=0, progress=False)
    sim.compute_encodings(lambda module: module(IDS))
    folder = tmp_path_factory.mktemp("lora") / "base"
    aimet_ext.export(sim, folder, "base", IDS)
    return folder
