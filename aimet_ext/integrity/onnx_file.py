"""An ONNX file on disk: its constants, those that are missing, and the tensors that are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from aimet_ext.errors import CorruptFileError
from aimet_ext.onnx.index import GraphIndex, attribute, elements

__all__ = ["StoredGraph", "hash_values"]

Array = np.ndarray[Any, Any]


def hash_values(values: Array) -> str:
    """Return the SHA-256 of the dtype, the shape and the values of an array."""
    digest = hashlib.sha256(json.dumps([str(values.dtype), list(values.shape)]).encode())
    flat = np.ascontiguousarray(values)
    digest.update(flat.tobytes() if flat.dtype.kind == "V" else flat.view(np.uint8).data)
    return digest.hexdigest()


class StoredGraph:
    """The graph of an ONNX file, without its external data, which is read tensor by tensor.

    :param path: path of the file.
    :raises CorruptFileError: it is no ONNX file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        try:
            self.index = GraphIndex(onnx.load(str(path), load_external_data=False).graph)
        except Exception as error:  # protobuf's own DecodeError, which is not to be imported
            if type(error).__name__ != "DecodeError":
                raise
            raise CorruptFileError(f"{path.name} is no ONNX file: {error}") from error
        self.constants = self.index.stored
        self._hashes: dict[str, str | None] = {}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a constant, None if there is none of that name."""
        constant = self.constants.get(self.index.source(name))
        return None if constant is None else tuple(constant.dims)

    def value(self, name: str) -> Array | None:
        """Return the values of a constant, or of constants that are dequantized.

        None if there is no such constant, or some of it is missing on disk.
        """
        if name in self.constants:
            folder = str(self.path.parent)
            if name in self.incomplete:
                return None
            return np.asarray(onnx.numpy_helper.to_array(self.constants[name], base_dir=folder))
        node = self.index.node(name)
        if node is None or node.op_type not in ("Identity", "DequantizeLinear"):
            return None
        inputs = [self.value(item) for item in node.input if item]
        values = [value for value in inputs if value is not None]
        if len(values) < len(inputs):
            return None
        return values[0] if node.op_type == "Identity" else _dequantized(node, values)

    def hash(self, name: str) -> str | None:
        """Return the hash of :meth:`value`, see :func:`hash_values`."""
        if name not in self._hashes:
            value = self.value(name)
            self._hashes[name] = None if value is None else hash_values(value)
        return self._hashes[name]

    def nodes(self) -> Iterator[tuple[str, str]]:
        """Yield ``(first output, hash of the node)`` of all nodes but constants."""
        for node in self.index.nodes:
            if node.output[0] in self.constants:
                continue
            names = (node.op_type, node.domain, *node.input, "", *node.output)
            digest = hashlib.sha256("\0".join(names).encode())
            for each in sorted(node.attribute, key=lambda item: item.name):
                digest.update(each.SerializeToString(deterministic=True))
            yield node.output[0], digest.hexdigest()

    def origin(self, name: str) -> str:
        """Return the constant that a name stands for, through Identity or DequantizeLinear."""
        while name not in self.constants and (node := self.index.node(name)) is not None:
            name = node.input[0]
        return name

    @cached_property
    def read(self) -> set[str]:
        """Names of all tensors that some output of the graph is computed from."""
        return set(self.index.behind(self.index.outputs))

    @cached_property
    def incomplete(self) -> dict[str, str]:
        """Constants whose values are not all on disk, and what is there instead."""
        outside = [n for n, p in self.constants.items() if p.data_location == TensorProto.EXTERNAL]
        faults = {name: self._fault(self.constants[name]) for name in outside}
        return {name: fault for name, fault in faults.items() if fault}

    def _fault(self, proto: TensorProto) -> str | None:
        fields = {entry.key: entry.value for entry in proto.external_data}
        location = fields.get("location", "")
        place = self.path.parent / location
        if Path(location).name != location or not place.is_file():
            return f"its file {location!r} is absent"
        size = place.stat().st_size
        start, length = int(fields.get("offset", 0)), int(fields.get("length", 0))
        needed = _bytes(proto)
        if length not in (0, needed):
            return f"{needed} bytes are required in {location}, got {length}"
        if start + needed > size:
            return (
                f"bytes {start} to {start + needed} of {location} are required, "
                f"which ends after {size}"
            )
        return None


def _bytes(proto: TensorProto) -> int:
    if proto.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return (elements(proto) + 1) // 2
    return int(elements(proto) * onnx.helper.tensor_dtype_to_np_dtype(proto.data_type).itemsize)


def _dequantized(node: NodeProto, values: list[Array]) -> Array:
    """Return the output of DequantizeLinear for integers, a scale and perhaps a zero point."""
    axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
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
