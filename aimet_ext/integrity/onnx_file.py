"""An ONNX file on disk: its constants, those that are missing, and the tensors that are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from aimet_ext.errors import CorruptFileError, require

__all__ = ["OnnxGraph"]

Array = np.ndarray[Any, Any]


class OnnxGraph:
    """The graph of an ONNX file, without its external data, which is read tensor by tensor.

    :param path: the file.
    :raises CorruptFileError: it is no ONNX file.
    """

    def __init__(self, path: Path) -> None:
        self._onnx = require("onnx", "onnx")
        self.path, self.name = path, path.name
        try:
            self.graph = self._onnx.load(str(path), load_external_data=False).graph
        except Exception as error:  # protobuf's own DecodeError, which is not to be imported
            if type(error).__name__ != "DecodeError":
                raise
            raise CorruptFileError(f"{path.name} is no ONNX file: {error}") from error
        self.constants = {proto.name: proto for proto in self.graph.initializer}
        self.producers: dict[str, Any] = {}
        for node in self.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
            else:
                self.producers.update(dict.fromkeys(node.output, node))

    def __contains__(self, name: str) -> bool:
        return name in self.constants or name in self.producers

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a constant, None if there is none of that name."""
        node = self.producers.get(name)
        if node is not None and node.op_type == "Identity":
            return self.shape(node.input[0])
        return tuple(self.constants[name].dims) if name in self.constants else None

    def value(self, name: str) -> Array | None:
        """Return the values of a constant, or of constants that are dequantized.

        None if there is no such constant, or some of it is missing on disk.
        """
        proto = self.constants.get(name)
        if proto is not None:
            if name in self.missing:
                return None
            return np.asarray(
                self._onnx.numpy_helper.to_array(proto, base_dir=str(self.path.parent))
            )
        node = self.producers.get(name)
        if node is None or node.op_type not in ("Identity", "DequantizeLinear"):
            return None
        inputs = [self.value(item) for item in node.input if item]
        values = [value for value in inputs if value is not None]
        if len(values) < len(inputs):
            return None
        return values[0] if node.op_type == "Identity" else _dequantized(node, values)

    def nodes(self) -> Iterator[tuple[str, str]]:
        """Yield ``(first output, hash of the node)`` of all nodes but constants."""
        for node in self.graph.node:
            if node.output[0] in self.constants:
                continue
            digest = hashlib.sha256()
            names = (node.op_type, node.domain, *node.input, "", *node.output)
            digest.update("\0".join(names).encode())
            for attribute in sorted(node.attribute, key=lambda item: item.name):
                digest.update(attribute.SerializeToString(deterministic=True))
            yield node.output[0], digest.hexdigest()

    def origin(self, name: str) -> str:
        """Return the constant that a name stands for, through Identity or DequantizeLinear."""
        while name not in self.constants and name in self.producers:
            name = self.producers[name].input[0]
        return name

    @cached_property
    def missing(self) -> dict[str, str]:
        """Constants whose values are not all on disk, and what is there instead."""
        return dict(self._missing())

    def _missing(self) -> Iterator[tuple[str, str]]:
        external = self._onnx.TensorProto.EXTERNAL
        for name, proto in self.constants.items():
            if proto.data_location != external:
                continue
            fields = {entry.key: entry.value for entry in proto.external_data}
            location = fields.get("location", "")
            place = self.path.parent / location
            if Path(location).name != location or not place.is_file():
                yield name, f"its file {location!r} is absent"
                continue
            size = place.stat().st_size
            start, length = int(fields.get("offset", 0)), int(fields.get("length", 0))
            needed = self._bytes(proto)
            if length not in (0, needed):
                yield name, f"{needed} bytes are required in {location}, got {length}"
            elif start + needed > size:
                yield (
                    name,
                    f"bytes {start} to {start + needed} of {location} are required, "
                    f"which ends after {size}",
                )

    def _bytes(self, proto: Any) -> int:
        count = int(np.prod(proto.dims, dtype=np.int64))
        four = (self._onnx.TensorProto.INT4, self._onnx.TensorProto.UINT4)
        if proto.data_type in four:
            return (count + 1) // 2
        kind = self._onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
        return int(count * kind.itemsize)

    @cached_property
    def read(self) -> set[str]:
        """Names of all tensors that some output of the graph is computed from."""
        wanted = [value.name for value in self.graph.output]
        found: set[str] = set()
        while wanted:
            name = wanted.pop()
            if name in found:
                continue
            found.add(name)
            node = self.producers.get(name)
            if node is not None:
                wanted += _inputs(node)
        return found


def _inputs(node: Any) -> list[str]:
    """Return the names of all that a node reads, inside its subgraphs too."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            names += [name for inner in graph.node for name in _inputs(inner)]
            names += [value.name for value in graph.output]
    return names


def _dequantized(node: Any, values: list[Array]) -> Array:
    """Return the output of DequantizeLinear for integers, a scale and perhaps a zero point."""
    attributes = {item.name: item.i for item in node.attribute}
    axis, block = attributes.get("axis", 1), attributes.get("block_size", 0)
    integers = values[0].astype(np.float64)

    def spread(cells: Array) -> Array:
        cells = cells.astype(np.float64)
        if block:
            return np.repeat(cells, block, axis=axis)
        if cells.ndim == 1 and integers.ndim > 0 and cells.size > 1:
            shape = [1] * integers.ndim
            shape[axis] = -1
            return cells.reshape(shape)
        return cells

    if len(values) > 2:
        integers = integers - spread(values[2])
    return (integers * spread(values[1])).astype(np.float32)
