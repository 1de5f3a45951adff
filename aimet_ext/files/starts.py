"""Scales and clipping that a technique left in files, as starts of another one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from aimet_ext.errors import CorruptFileError
from aimet_ext.files.numbers import number_fault
from aimet_ext.files.reading import check_regular, naming
from aimet_ext.files.scales import SCALES_FILE, load_scales
from aimet_ext.files.tensors import hash_tensors, read_sealed, write_sealed

CLIPS_FILE = "clips.safetensors"
_SCHEMA = "aimet_ext.clips/1"
# Files of LLMC: multipliers of input columns by layer, and logits of shares by block and layer.
_LLMC = ("scales.pth", "clips.pth")
_SHARES = {
    "upbound_factor": "high",
    "lowbound_factor": "low",
    "up_factor": "high",
    "low_factor": "low",
}


@dataclass(frozen=True, eq=False)
class Starts:
    """Scales and shares by the name of a layer in the original checkpoint.

    :param columns: Multiplier of every input column, shape [in].
    :param shares: Shares of each cell's full range that are kept, below and above zero, one number
        a cell; equal on a symmetric grid.
    :param origin: SHA-256 of the original checkpoint's weights, None if it is not known.
    """

    columns: Mapping[str, Tensor] = field(default_factory=dict)
    shares: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    origin: str | None = None

    def digest(self) -> str:
        """Return the SHA-256 of names and values."""
        named = dict(self.columns)
        named |= {
            f"{name} {n}": s for name, pair in self.shares.items() for n, s in enumerate(pair)
        }
        return hash_tensors(sorted(named.items(), key=lambda item: item[0]))


def write_clips(
    folder: Path, shares: Mapping[str, tuple[Tensor, Tensor]], *, origin: str | None
) -> None:
    """Write shares of ranges to ``clips.safetensors`` in a folder.

    :param shares: As :class:`Starts` has them.
    :param origin: SHA-256 of the original checkpoint's weights, if known.
    """
    tensors = {
        f"{name}.{side}": share.float()
        for name, pair in shares.items()
        for side, share in zip(("low", "high"), pair, strict=True)
    }
    write_sealed(folder / CLIPS_FILE, _SCHEMA, tensors, {"origin": origin or ""})


def load_starts(path: str | Path) -> Starts:
    """Read what a technique or LLMC wrote: scales, shares, or both.

    :param path: Folder with ``scales.safetensors``, ``clips.safetensors``, or LLMC's ``scales.pth``
        and ``clips.pth``, one at least; or one such file.
    :raises FileNotFoundError: There is no such file.
    :raises CorruptFileError: A file was changed, cut short or is of another kind.
    """
    path = Path(path)
    if not path.is_dir():
        found = [check_regular(path)]
    else:
        names = (SCALES_FILE, CLIPS_FILE, *_LLMC)
        found = [path / name for name in names if (path / name).exists()]
        if not found:
            raise FileNotFoundError(
                f"{path}: one of {', '.join(names)} is required in the folder and none is there"
            )
    parts = [_read(file) for file in found]
    origins = {part.origin for part in parts if part.origin}
    if len(origins) > 1:
        raise CorruptFileError(f"{path}: scales and clips of one model are required")
    return Starts(
        {name: value for part in parts for name, value in part.columns.items()},
        {name: value for part in parts for name, value in part.shares.items()},
        next(iter(origins), None),
    )


def _read(file: Path) -> Starts:
    if file.suffix in (".pth", ".pt"):
        return _read_llmc(file)
    if file.name == CLIPS_FILE:
        return _read_clips(file)
    scales = load_scales(file)
    columns = {}
    for name, each in scales.items():
        if isinstance(each.input, Tensor):
            columns[name] = each.input
        elif each.input is not None:
            raise ValueError(
                f"{file}: {name}: scales alone are required as a start, and these hold a rotation; "
                "apply it to the simulation first, and start from what was written without it"
            )
    return Starts(columns, {}, scales.origin)


class _ClipsFields(BaseModel):
    origin: str


def _read_clips(file: Path) -> Starts:
    tensors, fields = read_sealed(file, _SCHEMA, _ClipsFields)
    with naming(file):
        sides: dict[str, dict[str, Tensor]] = {}
        for key, share in tensors.items():
            name, _, side = key.rpartition(".")
            sides.setdefault(name, {})[side] = _share(key, share)
        shares = {name: (each["low"], each["high"]) for name, each in sides.items()}
    return Starts({}, shares, fields.origin or None)


def _share(key: str, share: Tensor) -> Tensor:
    """Return shares, which are numbers of at least 0: integer scales can round one above 1.

    :raises ValueError: They are none.
    """
    if fault := number_fault(share, positive=False):
        raise ValueError(f"{key}: {fault}")
    if bool((share < 0).any()):
        raise ValueError(f"{key}: shares of at least 0 are required, got {float(share.min()):g}")
    return share.float()


# ---- LLMC ---------------------------------------------------------------------------------------


def _read_llmc(file: Path) -> Starts:
    """Read a file of LLMC, which pickles: tensors, dicts and plain values are let in, nothing else.

    :raises CorruptFileError: It holds objects of other kinds, or is of another layout.
    """
    problem = "plain tensors by name are required, and what it holds could run code: not loaded"
    with naming(file, problem=problem):
        # Tensors and plain values alone are let in, and nothing is run.
        content = torch.load(check_regular(file), "cpu", weights_only=True)  # noqa: TID251
    with naming(file, problem="it is not laid out as LLMC's scales or clips"):
        if not isinstance(content, dict) or not content:
            raise ValueError("a dict of tensors is required")
        if all(isinstance(value, Tensor) for value in content.values()):
            return Starts({str(name): _vector(name, value) for name, value in content.items()})
        return Starts({}, dict(_clips(content)))


def _vector(name: Any, values: Tensor) -> Tensor:
    if values.numel() != max(values.shape, default=0) or number_fault(values, positive=True):
        raise ValueError(f"{name}: a vector of finite multipliers above 0 is required")
    return values.float().flatten()


def _clips(content: Mapping[Any, Any]) -> Iterable[tuple[str, tuple[Tensor, Tensor]]]:
    """Yield shares by ``<block's number>.<layer>``, or by the layer's full name."""
    logits: dict[str, dict[str, Tensor]] = {}
    for outer, parts in content.items():
        for key, value in parts.items():
            layer, _, bound = str(key).replace(".weight_quantizer.", ".").rpartition(".")
            name = f"{outer}.{layer}" if layer else str(outer)
            if value is not None:
                logits.setdefault(name, {})[_SHARES[bound]] = torch.sigmoid(value.float())
    for name, found in logits.items():
        high = _share(name, found["high"])
        yield name, (_share(name, found["low"]) if "low" in found else high, high)
