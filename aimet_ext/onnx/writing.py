"""ONNX files written from tensors in memory, one piece of a value at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO

import onnx
from onnx import TensorProto
from torch import Tensor

from aimet_ext.onnx.reading import GRAPH, INITIALIZER, RAW_DATA, declare, head

# Bytes of weights from which they are written beside the model: protobuf ends at 2 GiB.
EXTERNAL_LIMIT = 2**31 - 2**27
# Bytes of a value that are written at a time.
_PIECE = 1 << 24


def write_with_values(model: onnx.ModelProto, path: Path, values: Mapping[str, Tensor]) -> None:
    """Write a model whose large initializers are tensors, none of which is copied whole.

    :param model: Model in which these initializers have a type and a shape alone; left as it is.
    :param path: File to write. Values of more than 2 GiB together go to ``{name}.data`` beside it.
    :param values: By name of initializer, in its type and shape; views too.
    """
    outline = onnx.ModelProto()
    outline.CopyFrom(model)
    sizes = {name: value.numel() * value.element_size() for name, value in values.items()}
    beside = sum(sizes.values()) > EXTERNAL_LIMIT
    inside: list[TensorProto] = []
    start = 0
    for tensor in outline.graph.initializer:
        if tensor.name in values:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            if beside:
                declare(tensor, f"{path.name}.data", start, sizes[tensor.name])
                start += sizes[tensor.name]
            else:
                inside.append(tensor)
    if beside:
        path.write_bytes(outline.SerializeToString())
        with path.with_name(f"{path.name}.data").open("wb") as file:
            for tensor in outline.graph.initializer:
                if tensor.name in values:
                    _write_values(file, values[tensor.name])
        return
    heads = [(tensor.name, tensor.SerializeToString()) for tensor in inside]
    names = {tensor.name for tensor in inside}
    kept = [tensor for tensor in outline.graph.initializer if tensor.name not in names]
    outline.graph.ClearField("initializer")
    outline.graph.initializer.extend(kept)
    # The parts of a message may follow each other in any order, initializers behind all the rest.
    graph = outline.graph.SerializeToString()
    outline.ClearField("graph")
    starts = [begin + head(RAW_DATA, sizes[name]) for name, begin in heads]
    tensors = [len(s) + sizes[name] for s, (name, _) in zip(starts, heads, strict=True)]
    framed = [head(INITIALIZER, size) for size in tensors]
    with path.open("wb") as file:
        file.write(outline.SerializeToString())
        file.write(head(GRAPH, len(graph) + sum(map(len, framed)) + sum(tensors)))
        file.write(graph)
        for (name, _), frame, begin in zip(heads, framed, starts, strict=True):
            file.write(frame + begin)
            _write_values(file, values[name])


def _write_values(file: IO[bytes], value: Tensor) -> None:
    rows = value if value.dim() else value[None]
    step = max(1, _PIECE * len(rows) // max(1, rows.numel() * rows.element_size()))
    for part in rows.split(step):
        file.write(part.detach().cpu().contiguous().numpy().data)
