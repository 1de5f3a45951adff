"""AIMET's encodings files, versions 1.0.0 and 2.0.0: to grids, and from the newer to the older.

This is the one place where the sign of an offset changes. With ``b`` bits, ``shift`` the
``zero_point_shift`` and ``offset`` that of :class:`aimet_ext.core.affine.Grid`:

====================  ======================================================================
2.0.0                 ``y_zero_point = -(offset + shift)``, integers signed or not by dtype
1.0.0                 ``offset - 2**(b-1)`` if the integers are signed, else ``offset``; the
                      shift has a field of its own
====================  ======================================================================

1.0.0 names neither axes nor shapes, so a :class:`Layout` must say how the tensor lies. Its
blockwise scales run channel by channel, also where the channels of a weight are its columns: so
aimet_onnx and QNN's tools read them. ``aimet_torch``'s ``sim.onnx.export`` (2.42) writes them block
by block there, which is read back as another grid; :func:`to_version_1` does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aimet_ext.core.affine import Grid
from aimet_ext.errors import CorruptFileError
from aimet_ext.files.numbers import grid_faults, refuse_faults
from aimet_ext.files.reading import read_json

_VERSIONS = ("1.0.0", "2.0.0")
_INTEGER = re.compile(r"(u?)int(\d+)")


@dataclass(frozen=True)
class Layout:
    """Layout of a tensor in the ONNX file.

    :param shape: dimensions.
    :param channel_axis: dimension of the output channels; blocks lie along the other one of the
        first two.
    :param scale_bits: bits of the integer block scales if the grid is LPBQ. AIMET writes 2.0.0
        as if they were as many as those of the weight: with fewer the integers are multiples, with
        more the scales are plain floats. In 1.0.0 they can be said as they are.
    """

    shape: tuple[int, ...]
    channel_axis: int
    scale_bits: int | None = None

    @property
    def block_axis(self) -> int:
        """The dimension along which blocks lie."""
        return 1 - self.channel_axis


def load_encodings(path: str | Path) -> dict[str, Any]:
    """Read an encodings file as it is.

    :raises CorruptFileError: it is not JSON, or no encodings file of version 1.0.0 or 2.0.0, or a
        scale is not finite and above 0.
    """
    document = read_json(Path(path), Any)
    version = document.get("version") if isinstance(document, dict) else None
    if version not in _VERSIONS:
        raise CorruptFileError(
            f"{path}: encodings of a version in {_VERSIONS} are required, got {version!r}"
        )
    try:
        integer = {n: entry for n, entry in entries(document).items() if not is_float(entry)}
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{path} lists no encodings ({error})") from error
    faults = ((name, fault) for name, entry in integer.items() for fault in grid_faults(entry))
    refuse_faults(path, faults)
    return document


def entries(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the encodings of a document of either version, by the tensor's name in the file."""
    if document["version"] == "2.0.0":
        found = document["encodings"]
    else:
        found = [*document["param_encodings"], *document["activation_encodings"]]
    return {entry["name"]: entry for entry in found}


def is_float(entry: Mapping[str, Any]) -> bool:
    """Return True for the encoding of a cast, which has no grid of integers."""
    return entry.get("dtype") == "FLOAT" or "float" in str(entry.get("output_dtype", ""))


def to_grid(entry: Mapping[str, Any], layout: Layout) -> Grid:
    """Return the grid of a tensor, in the shape that fits its layout in the ONNX file.

    :param entry: one encoding, of either version.
    :raises ValueError: the encoding is no integer grid, or does not fit the layout.
    """
    try:
        return _grid_1(entry, layout) if "bw" in entry else _grid_2(entry, layout)
    except (KeyError, RuntimeError, TypeError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"{entry.get('name')}: an encoding that fits a tensor of shape {layout.shape} is "
            f"required, got {_summary(entry)} ({error})"
        ) from error


def to_version_1(
    document: Mapping[str, Any],
    params: Mapping[str, Layout],
    *,
    excluded_layers: list[str] | None = None,
    quantizer_args: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Convert encodings to version 1.0.0.

    :param document: encodings of version 2.0.0.
    :param params: layout of each weight; all other tensors count as activations.
    :raises ValueError: a tensor is quantized in a way that 1.0.0 cannot hold.
    """
    found = entries(document)
    downgraded = {name: _downgrade(entry, params.get(name)) for name, entry in found.items()}
    return {
        "version": "1.0.0",
        "producer": document.get("producer", {}),
        "activation_encodings": [e for name, e in downgraded.items() if name not in params],
        "param_encodings": [e for name, e in downgraded.items() if name in params],
        "excluded_layers": list(excluded_layers or ()),
        **({"quantizer_args": dict(quantizer_args)} if quantizer_args else {}),
    }


def _grid_2(entry: Mapping[str, Any], layout: Layout) -> Grid:
    signed, bits = _integer(entry)
    if "per_block_int_scale" in entry:
        channel = _floats(entry["per_channel_float_scale"])
        scale = _floats(entry["per_block_int_scale"]) * channel
    else:
        scale = _floats(entry["y_scale"])
    offset, shift = _offset_and_shift(entry, scale)
    block_size = None
    if "block_size" in entry:
        block_size = _block_size(layout.shape, scale.shape)
    elif "axis" in entry:
        shape = [1] * len(layout.shape)
        shape[entry["axis"]] = -1
        scale, offset = scale.reshape(shape), offset.reshape(shape)
    low = -(1 << bits - 1) if signed else 0
    return Grid(scale, offset, low, low + (1 << bits) - 1, block_size, shift)


def _grid_1(entry: Mapping[str, Any], layout: Layout) -> Grid:
    if entry["dtype"] != "INT":
        raise ValueError(f"{entry['name']}: an integer grid is required, got {_summary(entry)}")
    kind, signed = entry["enc_type"], bool(entry["is_sym"])
    bits = entry["compressed_bw"] if kind == "LPBQ" else entry["bw"]
    scale = _floats(entry["scale"])
    channels, block_size = [1] * len(layout.shape), None
    if kind != "PER_TENSOR":
        channels[layout.channel_axis] = layout.shape[layout.channel_axis]
    if kind in ("PER_BLOCK", "LPBQ"):
        cells = list(channels)
        cells[layout.block_axis] = layout.shape[layout.block_axis] // entry["block_size"]
        block_size = _block_size(layout.shape, cells)
        if kind == "LPBQ":
            integers = _unflatten(_floats(entry["per_block_int_scale"]), cells, layout)
            scale, offset = integers * scale.reshape(channels), torch.zeros_like(integers)
        else:
            scale = _unflatten(scale, cells, layout)
            offset = _unflatten(_floats(entry["offset"]), cells, layout)
    else:
        scale, offset = scale.reshape(channels), _floats(entry["offset"]).reshape(channels)
    if signed and kind != "LPBQ":
        offset = offset + (1 << bits - 1)
    shift = entry.get("zero_point_shift", [0.0])[0]
    low = -(1 << bits - 1) if signed else 0
    return Grid(scale, offset, low, low + (1 << bits) - 1, block_size, shift)


def _downgrade(entry: Mapping[str, Any], layout: Layout | None) -> dict[str, Any]:
    signed, bits = _integer(entry)
    half = 1 << bits - 1
    common = {"name": entry["name"], "dtype": "INT"}
    scale_bits = layout.scale_bits if layout is not None else None
    if "per_block_int_scale" in entry and scale_bits is None:
        scale_bits = bits
    if layout is not None and scale_bits is not None:
        return {**common, **_lpbq(to_grid(entry, layout).scale, entry, layout, scale_bits)}
    scale = torch.tensor(entry["y_scale"], dtype=torch.float64)
    offset, shift = _offset_and_shift(entry, scale)
    kind = "PER_CHANNEL" if "axis" in entry else "PER_TENSOR"
    kind = "PER_BLOCK" if "block_size" in entry else kind
    symmetric = bool((offset == (0 if signed else -half)).all())
    stored = (offset - half if signed else offset).long()
    if kind == "PER_BLOCK" and layout is not None:
        scale, stored = _flatten(scale, layout), _flatten(stored, layout)
    result = {
        **common,
        "bw": bits,
        "is_sym": symmetric,
        "scale": scale.flatten().tolist(),
        "offset": stored.flatten().tolist(),
        "enc_type": kind,
    }
    if kind == "PER_BLOCK":
        result["block_size"] = entry["block_size"]
    if shift:
        result["zero_point_shift"] = [shift] * stored.numel()
    return result


def _lpbq(
    scale: Tensor, entry: Mapping[str, Any], layout: Layout, scale_bits: int
) -> dict[str, Any]:
    """Return LPBQ in 1.0.0: a channel's largest block scale is the integer ``2**scale_bits``."""
    _, bits = _integer(entry)
    channels = scale.double().amax(layout.block_axis, keepdim=True) / (1 << scale_bits)
    integers = (scale.double() / channels).round().long()
    return {
        "bw": bits + scale_bits,
        "is_sym": True,
        "scale": channels.flatten().tolist(),
        "offset": [-(1 << bits + scale_bits - 1)] * channels.numel(),
        "enc_type": "LPBQ",
        "block_size": entry["block_size"],
        "compressed_bw": bits,
        "per_block_int_scale": _flatten(integers, layout).tolist(),
    }


def _integer(entry: Mapping[str, Any]) -> tuple[bool, int]:
    """Return True if the integers of a 2.0.0 encoding are signed, and their bits."""
    match = _INTEGER.fullmatch(entry["output_dtype"])
    if match is None:
        raise ValueError(f"{entry['name']}: an integer grid is required, got {_summary(entry)}")
    return not match[1], int(match[2])


def _offset_and_shift(entry: Mapping[str, Any], scale: Tensor) -> tuple[Tensor, float]:
    zero_point = torch.as_tensor(entry.get("y_zero_point", 0.0), dtype=scale.dtype)
    offset = (-zero_point).floor().expand_as(scale)
    return offset, float((-zero_point - (-zero_point).floor()).max())


def _flatten(values: Tensor, layout: Layout) -> Tensor:
    """Return values of cells in the order of 1.0.0, channel by channel."""
    return (values.T if values.dim() == 2 and layout.channel_axis == 1 else values).flatten()


def _unflatten(values: Tensor, cells: list[int], layout: Layout) -> Tensor:
    """Undo :func:`_flatten`: from the order of 1.0.0 to the shape of the cells."""
    if len(cells) == 2 and layout.channel_axis == 1:
        return values.reshape(cells[::-1]).T
    return values.reshape(cells)


def _block_size(shape: tuple[int, ...], cells: Any) -> tuple[int, ...]:
    return tuple(d // g for d, g in zip(shape, cells, strict=True))


def _floats(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _summary(entry: Mapping[str, Any]) -> str:
    keys = ("output_dtype", "dtype", "bw", "enc_type", "axis", "block_size")
    return ", ".join(f"{key}={entry[key]}" for key in keys if key in entry)
