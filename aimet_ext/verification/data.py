"""Inputs of an exported graph: what it requires, and data that is made up for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aimet_ext.data.feeds import Feed, InputSpec
from aimet_ext.errors import require

__all__ = ["exported_length", "graph_inputs", "random_feeds"]


def graph_inputs(path: Path) -> dict[str, InputSpec]:
    """Return the inputs of an ONNX file that must be fed; its weights are not read."""
    onnx = require("onnx", "onnx")
    from aimet_ext.onnx.index import GraphIndex
    from aimet_ext.onnx.values import input_specs

    graph = onnx.load(str(path), load_external_data=False).graph
    return input_specs(GraphIndex(graph).inputs)


def exported_length(path: Path) -> int:
    """Return the tokens of a window of the language model in an ONNX file.

    :raises ValueError: it takes no ids ``[batch, seq]`` of a fixed length.
    """
    shapes = [spec.sizes for spec in graph_inputs(path).values()]
    length = next((shape[1] for shape in shapes if len(shape) == 2), None)
    if length is None:
        raise ValueError(
            f"{path.name} must take token ids [batch, seq] of a fixed length to be run on text, "
            f"but its inputs have the shapes {shapes}; export it without dynamic axes"
        )
    return length


def random_feeds(inputs: Mapping[str, InputSpec], count: int, vocabulary: int) -> list[Feed]:
    """Return made-up inputs: ids of a fixed seed, masks of ones, positions in order, else noise.

    :raises ValueError: a dimension of an input is not fixed.
    """
    generator = np.random.default_rng(0)
    return [
        {name: _made_up(name, spec, vocabulary, generator) for name, spec in inputs.items()}
        for _ in range(count)
    ]


def _made_up(
    name: str, spec: InputSpec, vocabulary: int, generator: np.random.Generator
) -> np.ndarray[Any, Any]:
    shape = [size or 0 for size in spec.sizes]
    if not all(shape):
        raise ValueError(
            f"input {name!r} must have a fixed shape to make up data for it, got {spec.sizes}; "
            "pass a dataloader"
        )
    dtype = torch.empty(0, dtype=spec.dtype).numpy().dtype
    if name == "attention_mask" or dtype.kind == "b":
        return np.ones(shape, dtype)
    if name == "position_ids":
        return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
    if dtype.kind in "iu":
        return generator.integers(0, vocabulary, shape).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)
