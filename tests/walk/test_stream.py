"""Streams of the same batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aimet_ext.walk.stream import BlockStream, capture_block_inputs

BLOCK = "model.layers.0"
IDS = torch.arange(60).reshape(3, 20) % 100 + 3


def captured(model: Any, batches: list[Any]) -> BlockStream:
    return capture_block_inputs(model, BLOCK, batches)


def test_streams_share_arguments_of_the_same_batches_alone(tiny_llama: Any) -> None:
    block = tiny_llama.get_submodule(BLOCK)
    one = captured(tiny_llama, [IDS, IDS[:2]])
    two = captured(tiny_llama, [IDS + 1, IDS[:2]])
    expected = two.call(block, 0)
    two.share_arguments(one)
    assert torch.equal(two.call(block, 0), expected)
    with pytest.raises(ValueError, match="same batches"):
        captured(tiny_llama, [IDS]).share_arguments(one)
