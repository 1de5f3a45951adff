"""ONNX files as they are read back: whole and sound, or refused by their name."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from aimet_ext.errors import CorruptFileError
from aimet_ext.files.reading import check_regular

# Bytes of a value from which an outline leaves it on disk.
SMALLEST = 1 << 12
# Numbers of fields in onnx.proto, and wire types of protobuf: bytes, and numbers of fixed size.
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
_BYTES, _FIXED = 2, {1: 8, 5: 4}


def read_model(path: str | Path, *, external: bool = True) -> onnx.ModelProto:
    """Read an ONNX file.

    :param external: False to leave out the values that are stored in files beside it.
    :raises FileNotFoundError: there is no such file.
    :raises CorruptFileError: it is damaged, or values beside it are absent, cut short, or lie in
        another folder.
    """
    path = check_regular(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is no ONNX file, or damaged: {error}") from error
    if not model.HasField("graph") or not model.opset_import:
        raise CorruptFileError(f"{path} is no ONNX file: it holds no graph")
    if external:
        read_external(model, path)
    return model


def read_external(model: onnx.ModelProto, path: Path) -> None:
    """Read the values of a model that are stored in files beside it.

    :param path: File of the model.
    :raises CorruptFileError: see :func:`read_model`.
    """
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except (onnx.checker.ValidationError, OSError, ValueError) as error:
        raise CorruptFileError(f"{path}: values beside it cannot be read: {error}") from error


def read_outline(path: str | Path) -> onnx.ModelProto:
    """Read an ONNX file whose large initializers stay where they are.

    They are declared as external data at their places in the file itself, or beside it.

    :raises FileNotFoundError: there is no such file.
    :raises CorruptFileError: see :func:`.read_model`.
    """
    path = check_regular(path)
    # onnx reads no external data from files that have other names too.
    if path.stat().st_size < SMALLEST or path.is_symlink() or path.stat().st_nlink > 1:
        return read_model(path, external=False)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            model = onnx.ModelProto.FromString(_outline(data, path.name))
    except (DecodeError, IndexError, ValueError):
        return read_model(path, external=False)  # which says what is wrong
    if not model.HasField("graph") or not model.opset_import:
        return read_model(path, external=False)
    return model


def _outline(data: mmap.mmap, location: str) -> bytes:
    """Return a serialized model without its large values."""
    parts = []
    for field, begin, start, end in _fields(data, 0, len(data)):
        if field == GRAPH:
            graph = b"".join(_graph(data, start, end, location))
            parts += [head(GRAPH, len(graph)), graph]
        else:
            parts.append(data[begin:end])
    return b"".join(parts)


def _graph(data: mmap.mmap, start: int, end: int, location: str) -> Iterator[bytes]:
    for field, begin, first, last in _fields(data, start, end):
        if field != INITIALIZER or last - first < SMALLEST:
            yield data[begin:last]
            continue
        kept, place = [], None
        for inner, at, low, high in _fields(data, first, last):
            if inner == RAW_DATA and high - low >= SMALLEST:
                place = low, high - low
            else:
                kept.append(data[at:high])
        content = b"".join(kept)
        if place is not None:
            tensor = TensorProto.FromString(content)
            declare(tensor, location, *place)
            content = tensor.SerializeToString()
        yield head(INITIALIZER, len(content)) + content


def _fields(data: Any, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield ``(number, start of the field, start of its value, end)`` of a message's fields.

    :raises ValueError: it is no message.
    """
    place = start
    while place < end:
        tag, first = _varint(data, place)
        kind = tag & 7
        if kind == _BYTES:
            size, first = _varint(data, first)
            last = first + size
        elif kind == 0:
            last = _varint(data, first)[1]
        elif kind in _FIXED:
            last = first + _FIXED[kind]
        else:
            raise ValueError(f"no field of wire type {kind}")
        if last > end:
            raise ValueError("a field that ends behind its message")
        yield tag >> 3, place, first, last
        place = last


def _varint(data: Any, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def head(field: int, size: int) -> bytes:
    """Return what stands before the content of a field of bytes."""
    found = bytearray([field << 3 | _BYTES])
    while size > 127:
        found.append(size & 127 | 128)
        size >>= 7
    found.append(size)
    return bytes(found)


def declare(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Say where the value of a tensor lies."""
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
