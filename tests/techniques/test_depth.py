"""A block costs the same however many blocks a model has."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

import aimet_ext
from aimet_ext import QSpec

IDS = torch.arange(32).reshape(2, 16)
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {},
    "seq_mse": {},
    "hqq": {},
    "awq": {},
    "omniquant": {"num_iterations": 2, "search_sweeps": 1},
    "autoround": {"num_iterations": 2},
}


def calls_of(job: Callable[[], object]) -> int:
    """Number of calls of Python functions: work as it is, whatever else the machine does."""
    count = 0

    def note(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        # AIMET's graph of a model that is gone may be taken apart meanwhile.
        count += event == "call" and "connected_graph" not in frame.f_code.co_filename

    sys.setprofile(note)
    try:
        job()
    finally:
        sys.setprofile(None)
    return count


def cost_a_block(cost: Callable[[int], int]) -> tuple[float, float]:
    """Return what a block costs in a small model and in one that is twice as deep."""
    cost(1)  # what is imported and cached comes first
    costs = [cost(blocks) for blocks in (2, 4, 8)]
    return (costs[1] - costs[0]) / 2, (costs[2] - costs[1]) / 4


@pytest.mark.parametrize("name", SETTINGS)
def test_a_block_costs_the_same_in_a_deeper_model(
    name: str, tiny_model: Callable[..., Any]
) -> None:
    apply = getattr(aimet_ext, f"apply_{name}")

    def cost(blocks: int) -> int:
        sim = aimet_ext.create_sim(tiny_model("llama", num_hidden_layers=blocks), IDS)
        data = () if name == "hqq" else ([IDS],)
        return calls_of(lambda: apply(sim, *data, progress=False, **SETTINGS[name]))

    first, later = cost_a_block(cost)
    assert later <= 1.02 * first


def test_a_block_costs_dwq_the_same_in_a_deeper_model(tiny_model: Callable[..., Any]) -> None:
    def cost(blocks: int) -> int:
        model = tiny_model("llama", num_hidden_layers=blocks)
        sim = aimet_ext.create_sim(model, IDS, activations=None)
        aimet_ext.apply_rtn(sim, progress=False)
        settings: dict[str, Any] = {"num_iterations": 2, "reference": model, "progress": False}
        return calls_of(lambda: aimet_ext.apply_dwq(sim, [IDS], **settings))

    first, later = cost_a_block(cost)
    assert later <= 1.02 * first


@pytest.mark.parametrize("name", ["omniquant", "autoround"])
def test_a_block_costs_the_same_in_a_deeper_graph(name: str) -> None:
    pytest.importorskip("aimet_onnx")
    from onnx_models import exported_llama
    from onnx_sims import build_sim

    data = [{"input_ids": IDS.numpy(), "attention_mask": torch.ones_like(IDS).numpy()}]
    apply = getattr(aimet_ext, f"apply_{name}")

    def cost(blocks: int) -> int:
        sim = build_sim(exported_llama(blocks).model, QSpec(bitwidth=4), QSpec(bitwidth=16))
        sim.compute_encodings(data)
        return calls_of(lambda: apply(sim, data, progress=False, **SETTINGS[name]))

    first, later = cost_a_block(cost)
    assert later <= 1.02 * first
