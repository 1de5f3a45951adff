"""Inputs of the shape that an exported graph was made for, from batches of any length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from aimet_ext.errors import require

__all__ = [
    "Feed",
    "exported_length",
    "graph_inputs",
    "random_feeds",
    "token_ids",
    "token_weights",
    "window_feeds",
]

Feed: TypeAlias = dict[str, np.ndarray[Any, Any]]

_IDS, _MASK, _POSITIONS = "input_ids", "attention_mask", "position_ids"


def graph_inputs(path: Path) -> dict[str, Any]:
    """Inputs of an ONNX file that must be fed, by name; its weights are not read."""
    onnx = require("onnx", "onnx")
    graph = onnx.load(str(path), load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    return {value.name: value for value in graph.input if value.name not in stored}


def exported_length(path: Path) -> int:
    """Tokens of a window of the language model in an ONNX file.

    :raises ValueError: it takes no ids ``[batch, seq]`` of a fixed length.
    """
    shapes = [_shape(value) for value in graph_inputs(path).values()]
    length = next((shape[1] for shape in shapes if len(shape) == 2), None)
    if length is None:
        raise ValueError(
            f"{path.name} must take token ids [batch, seq] of a fixed length to be run on text, "
            f"but its inputs have the shapes {shapes}; export it without dynamic axes"
        )
    return length


def window_feeds(dataloader: Any, inputs: Mapping[str, Any]) -> list[Feed]:
    """The batches of a dataloader as inputs by name, each of the graph's shape.

    Ids, and what comes with them in the same shape ``[batch, seq]``, are cut into windows of the
    graph's length that do not overlap, in the order in which they come; a rest is left out. What
    has another number of dimensions must fit as it is.

    :param dataloader: see :func:`aimet_ext.data.onnx_batches.onnx_batches`.
    :param inputs: see :func:`graph_inputs`.
    :raises TypeError: a batch is of no known form.
    :raises ValueError: a batch does not fit, or no window is complete.
    """
    from aimet_ext.data.onnx_batches import onnx_batches

    shapes = {name: _shape(value) for name, value in inputs.items()}
    lengths = {shape[1] for shape in shapes.values() if len(shape) == 2 and shape[1]}
    rows = {shape[0] for shape in shapes.values() if len(shape) == 2 and shape[0]}
    if len(lengths) > 1 or len(rows) > 1:
        cut = dataloader
    else:
        length, count = next(iter(lengths), None), next(iter(rows), None)
        cut = list(_windows(_named(dataloader, list(inputs)), length, count))
        if not cut:
            raise ValueError(
                f"dataloader must give at least {count or 1} x {length} tokens, the shape that the "
                "model was exported with; give more text"
            )
    return [
        {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in batch.items()}
        for batch in onnx_batches(cut, inputs)
    ]


def random_feeds(inputs: Mapping[str, Any], count: int, vocabulary: int) -> list[Feed]:
    """Inputs made up: ids of a fixed seed, masks of ones, positions in order, else noise.

    :raises ValueError: a dimension of an input is not fixed.
    """
    generator = np.random.default_rng(0)
    feeds = []
    for _ in range(count):
        feed: Feed = {}
        for name, value in inputs.items():
            shape = _shape(value)
            if None in shape:
                raise ValueError(
                    f"input {name!r} must have a fixed shape to make up data for it, got {shape}; "
                    "pass a dataloader"
                )
            feed[name] = _made_up(name, value, [size or 1 for size in shape], vocabulary, generator)
        feeds.append(feed)
    return feeds


def token_ids(feed: Feed) -> Tensor | None:
    """Token ids ``[batch, seq]`` of a language model's inputs, None for any other model."""
    ids = feed.get(_IDS)
    if ids is None and len(feed) == 1:
        ids = next(iter(feed.values()))
    if ids is None or ids.ndim != 2 or ids.dtype.kind != "i":
        return None
    return torch.from_numpy(ids).long()


def token_weights(feed: Feed, shape: Sequence[int]) -> Tensor:
    """Which tokens count, bool ``[batch, seq]``: all, but those that the feed's mask hides."""
    mask = feed.get(_MASK)
    if mask is None or mask.ndim != 2:
        return torch.ones(tuple(shape[:2]), dtype=torch.bool)
    return torch.from_numpy(mask != 0)


def _made_up(
    name: str, value: Any, shape: list[int], vocabulary: int, generator: np.random.Generator
) -> np.ndarray[Any, Any]:
    onnx = require("onnx", "onnx")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    if name == _MASK or dtype.kind == "b":
        return np.ones(shape, dtype)
    if name == _POSITIONS:
        return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
    if dtype.kind in "iu":
        return generator.integers(0, vocabulary, shape).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)


def _shape(value: Any) -> tuple[int | None, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.dim_value > 0 else None for dim in dims)


def _named(dataloader: Any, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Batches with their tensors by name, mask and positions made where there are none."""
    from aimet_ext.data.batches import iterate_batches
    from aimet_ext.data.onnx_batches import filled_values

    for number, batch in enumerate(iterate_batches(dataloader)):
        yield filled_values(batch, names, number)


def _windows(
    batches: Iterator[dict[str, Tensor]], length: int | None, count: int | None
) -> Iterator[dict[str, Tensor]]:
    """Batches of ``count`` windows of ``length`` tokens; all other batches as they are."""
    held: list[dict[str, Tensor]] = []
    for batch in batches:
        flat = all(tensor.dim() == 2 for tensor in batch.values())
        width = min((tensor.shape[1] for tensor in batch.values()), default=0) if flat else 0
        if not flat or length is None or count is None or width < length:
            yield batch  # refused later if it does not fit
            continue
        rows = range(next(iter(batch.values())).shape[0])
        held += [
            {n: t[row : row + 1, start : start + length] for n, t in batch.items()}
            for row in rows
            for start in range(0, width - length + 1, length)
        ]
        while len(held) >= count:
            group, held = held[:count], held[count:]
            yield {name: torch.cat([part[name] for part in group]) for name in group[0]}
