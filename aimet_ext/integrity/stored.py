"""Values and grids that the files of an export hold, read into one form and compared."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto
from torch import Tensor

from aimet_ext.core.affine import Grid, lpbq_scale, scale_offset, to_blocks
from aimet_ext.files.encodings import Layout, is_float, to_grid
from aimet_ext.onnx.index import GraphIndex, attribute, elements
from aimet_ext.onnx.reading import read_outline

Array = np.ndarray[Any, Any]
_RELATIVE = 1e-6
_PACKED = {  # bits of types of which a byte holds several
    getattr(TensorProto, name): bits
    for name, bits in (("INT4", 4), ("UINT4", 4), ("FLOAT4E2M1", 4), ("INT2", 2), ("UINT2", 2))
    if hasattr(TensorProto, name)
}
# A grid that leaves more than this part of the values of most cells outside was made for another
# tensor. A range too wide shows nothing: AIMET widens some so that 32 bits hold a layer's bias.
_OUTSIDE = 0.4


def hash_values(values: Array) -> str:
    """Return the SHA-256 of the dtype, the shape and the values of an array."""
    digest = hashlib.sha256(json.dumps([str(values.dtype), list(values.shape)]).encode())
    flat = np.ascontiguousarray(values)
    digest.update(flat.tobytes() if flat.dtype.kind == "V" else flat.view(np.uint8).data)
    return digest.hexdigest()


def as_in_graph(tensor: Tensor) -> Array:
    """Return a tensor of ``model.safetensors`` as the ONNX file holds it: float64 in float32."""
    return (tensor.float() if tensor.dtype is torch.float64 else tensor).numpy()


class StoredGraph:
    """The graph of an ONNX file, without its large values, which are read tensor by tensor.

    :param path: path of the file.
    :raises CorruptFileError: it is no ONNX file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.index = GraphIndex(read_outline(path).graph)
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
            return None if name in self.incomplete else self._stored(self.constants[name])
        node = self.index.node(name)
        if node is None or node.op_type not in ("Identity", "DequantizeLinear"):
            return None
        inputs = [self.value(item) for item in node.input if item]
        values = [value for value in inputs if value is not None]
        if len(values) < len(inputs):
            return None
        return values[0] if node.op_type == "Identity" else _dequantized(node, values)

    def _stored(self, proto: TensorProto) -> Array:
        if proto.data_location == TensorProto.EXTERNAL and proto.data_type not in _PACKED:
            fields = {entry.key: entry.value for entry in proto.external_data}
            kind = onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
            path, start = self.path.parent / fields["location"], int(fields.get("offset", 0))
            values = np.fromfile(path, np.uint8, _bytes(proto), offset=start)  # in memory once
            return values.view(kind).reshape(tuple(proto.dims))
        own = TensorProto()
        own.CopyFrom(proto)  # onnx leaves what it reads in the one that it is given
        return np.asarray(onnx.numpy_helper.to_array(own, base_dir=str(self.path.parent)))

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
        faults = {name: self._fault(proto) for name, proto in self.constants.items()}
        return {name: fault for name, fault in faults.items() if fault}

    def _fault(self, proto: TensorProto) -> str | None:
        try:
            needed = _bytes(proto)
            if proto.data_location != TensorProto.EXTERNAL:
                held = len(proto.raw_data)
                short = held not in (0, needed)
                return f"{needed} bytes are required, got {held}" if short else None
            return self._outside(proto, needed)
        except (KeyError, TypeError, ValueError) as error:
            return f"its description is damaged ({type(error).__name__}: {error})"

    def _outside(self, proto: TensorProto, needed: int) -> str | None:
        fields = {entry.key: entry.value for entry in proto.external_data}
        location = fields.get("location", "")
        place = self.path.parent / location
        if Path(location).name != location or not place.is_file():
            return f"its file {location!r} is absent"
        if place.is_symlink():
            return f"its file {location!r} is a link, which onnx does not read"
        size = place.stat().st_size
        start, length = int(fields.get("offset", 0)), int(fields.get("length", 0))
        if length not in (0, needed):
            return f"{needed} bytes are required in {location}, got {length}"
        if start + needed > size:
            return (
                f"bytes {start} to {start + needed} of {location} are required, "
                f"which ends after {size}"
            )
        return None


def _bytes(proto: TensorProto) -> int:
    if bits := _PACKED.get(proto.data_type):
        return -(-elements(proto) * bits // 8)
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


@dataclass(frozen=True, eq=False)
class Cells:
    """Grid of ``steps + 1`` values for each cell, the smallest ``first · scale``.

    :param scale: step of every cell, in the layout of the tensor.
    :param first: smallest value of every cell in steps.
    """

    scale: Tensor
    first: Tensor
    steps: int

    @classmethod
    def of(cls, grid: Grid) -> Cells:
        """Return the cells of a grid."""
        first = grid.offset.double() + grid.qmin + grid.zero_point_shift
        scale = grid.scale.double()
        return cls(scale, first.expand_as(scale), grid.qmax - grid.qmin)

    def same(self, other: Cells) -> bool:
        """Return True if two grids have the same values; a weight may lie the other way round."""
        if self.steps != other.steps or self.scale.numel() != other.scale.numel():
            return False
        turned = [(other.scale.mT, other.first.mT)] if other.scale.dim() == 2 else []
        return any(
            torch.allclose(self.scale.flatten(), scale.flatten(), rtol=_RELATIVE, atol=0)
            and bool(((self.first.flatten() - first.flatten()).abs() < 0.25).all())
            for scale, first in [(other.scale, other.first), *turned]
        )

    def mirrored(self, other: Cells) -> bool:
        """Return True if the other one is this with a sign of its offsets changed.

        Offsets are counted from the integer 0, from the middle, or range from -max to -min.
        """
        half = (self.steps + 1) // 2
        signs = (-self.first, -self.first - self.steps, -(self.first + half) - half)
        return not self.same(other) and any(replace(self, first=s).same(other) for s in signs)

    def beside(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return values cut into cells ``[g0, b0, g1, b1, …]``, with lower, upper bound and step.

        :param values: values of the tensor, in the layout of the cells.
        """
        shape = (1,) * (values.dim() - self.scale.dim()) + tuple(self.scale.shape)
        spread = tuple(n for size in shape for n in (size, 1))
        low = self.first * self.scale
        bounds = (low, low + self.steps * self.scale, self.scale)
        first, last, step = (one.to(values.dtype).reshape(spread) for one in bounds)
        return to_blocks(values, shape), first, last, step

    def __str__(self) -> str:
        bits = (self.steps + 1).bit_length() - 1
        number = self.scale.numel()
        text = f"{bits} bits, scale {_shown(self.scale)}, first value {_shown(self.first)} steps"
        return text if number == 1 else f"{text}, {number} cells"


class GridIndex:
    """Names of grids, found by a grid's values in a time that does not depend on their number.

    :param cells: grids by name.
    """

    def __init__(self, cells: Mapping[str, Cells]) -> None:
        self._order = {name: number for number, name in enumerate(cells)}
        # Of each different grid the first name by each prefix, in a bucket of similar sizes.
        self._buckets: dict[tuple[int, int, int], list[tuple[Cells, dict[str, str]]]] = {}
        for name, grid in cells.items():
            bucket = self._buckets.setdefault(_bucket(grid), [])
            names = next((names for other, names in bucket if _equal(other, grid)), None)
            if names is None:
                names = {}
                bucket.append((grid, names))
            for length in range(len(name) + 1):
                names.setdefault(name[:length], name)

    def find(self, grid: Cells, name: str) -> str | None:
        """Return the name of the same grid that shares most of its start with a name, if any."""
        steps, number, size = _bucket(grid)
        near = [self._buckets.get((steps, number, size + n), ()) for n in (-1, 0, 1)]
        same = [names for bucket in near for other, names in bucket if other.same(grid)]
        for length in range(len(name), -1, -1):
            found = [names[name[:length]] for names in same if name[:length] in names]
            if found:
                return min(found, key=self._order.__getitem__)
        return None


def torch_cells(tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> dict[str, Cells]:
    """Return grids of a PyTorch sim's integer quantizers with a range, by the quantizers' names."""
    found: dict[str, Cells] = {}
    for name, static in described.items():
        if "qmin" not in static or not static["state"]["initialized"]:
            continue
        qmin, qmax, symmetric = static["qmin"], static["qmax"], static["symmetric"]
        if "scale" in static["parameters"]:
            scale, offset = tensors[f"{name}.scale"], tensors[f"{name}.offset"]
        else:
            low, high = tensors[f"{name}.min"].float(), tensors[f"{name}.max"].float()
            scale, offset = scale_offset(low, high, qmin, qmax, symmetric)
        bits = (qmax - qmin).bit_length()
        grouping = static.get("block_grouping")
        if grouping is not None:
            scale = lpbq_scale(scale, grouping, static["decompressed_bw"] - bits)
        shift = static.get("zero_point_shift") or 0.0
        block = None if static["block_size"] is None else tuple(static["block_size"])
        found[name] = Cells.of(Grid(scale, offset.round(), qmin, qmax, block, shift))
    for name, static in described.items():
        if static.get("same_as") in found:
            found[name] = found[static["same_as"]]
    return found


def onnx_cells(
    tensors: Mapping[str, Tensor],
    described: Mapping[str, Any],
    containers: Mapping[str, list[int]],
) -> dict[str, Cells]:
    """Return grids of an ONNX sim's integer quantizers in use, by tensor, as they are exported.

    :param tensors: tensors of ``quantizers.safetensors``.
    :param containers: bitwidth of the quantizer and exported bitwidth, by tensor.
    """
    found: dict[str, Cells] = {}
    for name, entry in described.items():
        static = described[entry["same_as"]] if "same_as" in entry else entry
        rows = tensors.get(f"range.{entry.get('same_as', name)}")
        if rows is None or static["dtype"] != "int" or not static["state"]["enabled"]:
            continue
        scale, first = rows[:, 0].float().double(), rows[:, 1]
        bits = int(static["bitwidth"])
        if name in containers:
            _, width = containers[name]
            if bool((first % 1 != 0).any()):  # half a step off the integers: odd ones of half steps
                scale, first = scale / 2, torch.full_like(first, -(1 << width - 1))
            elif static["symmetric"] and not static["unsigned_symmetric"]:
                first = first + (1 << bits - 1) - (1 << width - 1)
            bits = width
        found[name] = Cells(scale, first, (1 << bits) - 1)
    return found


def encoded_cells(
    entry: Mapping[str, Any], newer: Mapping[str, Any] | None, shape: tuple[int, ...] | None
) -> Cells | None:
    """Return the grid of one entry of an encodings file, None if it is no integer grid.

    :param newer: entry 2.0.0 of the same tensor, which alone names axes.
    :param shape: shape of a constant.
    :raises ValueError: the entry is damaged, or does not fit the tensor.
    """
    if is_float(entry):
        return None
    axes = newer or {}
    axis = int(axes.get("axis", 0))
    if "block_size" in axes:
        axis = 1 - axis
    sizes = shape if shape is not None else ()
    cells = Cells.of(to_grid(entry, Layout(sizes, axis)))
    if entry.get("enc_type") == "LPBQ":
        half = -(1 << entry["bw"] - 1)
        if any(offset != half for offset in entry["offset"]):  # which to_grid does not need
            return Cells(cells.scale, -cells.first, cells.steps)
    return cells


def misfit(values: Tensor, cells: Cells) -> str | None:
    """Return the evidence that a grid was made for other values, None if there is none.

    Techniques clip values too, but fewer of them.

    :param values: values of the tensor, in the layout of the cells.
    """
    blocks, low, high, step = cells.beside(values.float())
    inside = tuple(range(1, blocks.dim(), 2))
    if not inside:
        return None
    outside = ((blocks < low - step) | (blocks > high + step)).sum(inside)
    part = float(outside.median()) * outside.numel() / blocks.numel()
    return f"{part:.0%} of the values lie outside its range" if part > _OUTSIDE else None


def _bucket(cells: Cells) -> tuple[int, int, int]:
    """Return a key by which the same grids are in one bucket or in neighbouring ones."""
    size = cells.scale.sum().log() / (10 * _RELATIVE)
    return cells.steps, cells.scale.numel(), int(size.nan_to_num().floor())


def _equal(one: Cells, other: Cells) -> bool:
    return torch.equal(one.scale, other.scale) and torch.equal(one.first, other.first)


def _shown(values: Tensor) -> str:
    low, high = float(values.min()), float(values.max())
    if math.isclose(low, high, rel_tol=1e-6):
        return f"{low:.6g}"
    return f"{low:.6g} … {high:.6g}"
