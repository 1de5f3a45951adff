"""A block costs the same however many blocks a model has."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

import aimet_ext

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


@pytest.mark.parametrize("name", SETTINGS)
def test_a_block_costs_the_same_in_a_deeper_model(
    name: str, tiny_model: Callable[..., Any]
) -> None:
    apply = getattr(aimet_ext, f"apply_{name}")

    def cost(blocks: int) -> int:
        sim = aimet_ext.create_sim(tiny_model("llama", num_hidden_layers=blocks), IDS)
        data = () if name == "hqq" else ([IDS],)
        return calls_of(lambda: apply(sim, *data, progress=False, **SETTINGS[name]))

    cost(1)  # what is imported and cached comes first
    costs = [cost(blocks) for blocks in (2, 4, 8)]
    assert (costs[2] - costs[1]) / 2 <= 1.05 * (costs[1] - costs[0])
