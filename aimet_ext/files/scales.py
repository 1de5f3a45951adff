"""The cumulative scales of all transforms of a sim as one file that fits the original model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Json
from safetensors.torch import save
from torch import Tensor

from aimet_ext.files.folders import replace_file, versions
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.tensors import read_sealed, write_sealed

__all__ = [
    "AIMET_FILE",
    "SCALES_FILE",
    "ModuleScales",
    "Scales",
    "aimet_tensors",
    "cumulative_tensors",
    "load_scales",
    "write_scales",
]

SCALES_FILE = "scales.safetensors"
AIMET_FILE = "aimet_omniquant_metadata.safetensor"
_SCHEMA = "aimet_ext.scales/1"


@dataclass(frozen=True, eq=False)
class ModuleScales:
    """Scales of one module: ``W' = diag(output) W diag(input)``.

    :param input: ``[in]``, one factor for each input column, or None where there was none.
    :param output: ``[out]``, one factor for each output row, or None where there was none.
    """

    input: Tensor | None = None
    output: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Scales(Mapping[str, ModuleScales]):
    """Scales by the original name of a module, relative to the original checkpoint.

    An adapter ``B A`` of a module fits the transformed model as ``diag(output) B A diag(input)``.

    :param modules: :class:`ModuleScales` by module name.
    :param techniques: techniques that made the scales, in order.
    :param pairs: ``technique``, ``block``, ``pair``, ``kind``, ``source`` layer, number ``size`` of
        independent scales and ``sides`` as ``[module, axis, width]`` of each scale pair.
    :param origin: SHA-256 of the original checkpoint's weights, if known.
    :param version: version of aimet_ext that wrote the file.
    """

    modules: Mapping[str, ModuleScales]
    techniques: tuple[str, ...]
    pairs: tuple[Mapping[str, Any], ...]
    origin: str | None
    version: str

    def __getitem__(self, name: str) -> ModuleScales:
        return self.modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)


def load_scales(path: str | Path) -> Scales:
    """Read the cumulative scales of a sim.

    :param path: the file, or the folder of a technique or an export that holds it.
    :raises FileNotFoundError: there is no such file.
    :raises CorruptFileError: the file was changed, cut short, or was not written by aimet_ext.
    """
    path = Path(path)
    file = path / SCALES_FILE if path.is_dir() else path
    tensors, fields = read_sealed(file, _SCHEMA, _Fields)
    axes: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, axis = key.rpartition(".")
        axes.setdefault(module, {})[axis] = tensor
    return Scales(
        modules={module: ModuleScales(**axes[module]) for module in sorted(axes)},
        techniques=fields.techniques,
        pairs=fields.pairs,
        origin=fields.origin or None,
        version=fields.version,
    )


def write_scales(
    folder: Path,
    ledger: Ledger,
    *,
    rename: Callable[[str], str] = lambda name: name,
    aimet_keys: bool = False,
) -> None:
    """Write the cumulative scales of a ledger to ``scales.safetensors`` in a folder.

    The tensors are ``{module}.input`` and ``{module}.output``; the metadata holds the schema
    version, the techniques, each pair with its source layer and group layout, the hash of the
    original weights, and a hash of the file itself.

    :param rename: function that returns the name of a module in the original checkpoint.
    :param aimet_keys: write AIMET's own file too, ``aimet_omniquant_metadata.safetensor`` with
        ``{module}.prev`` (divides the output rows) and ``{module}.foll`` (multiplies the input
        columns). Its vectors are expanded, one entry for each row or column, so that AIMET never
        repeats them. AIMET does not divide biases by ``prev``; whoever applies it must.
    """
    tensors = cumulative_tensors(ledger, rename)
    pairs = [
        {
            "technique": entry.technique,
            "block": rename(entry.block),
            "pair": entry.pair,
            "kind": entry.kind,
            "source": rename(entry.source) if entry.source else "",
            "size": entry.size,
            "sides": [[rename(s.module), s.axis, len(s.multiplier)] for s in entry.sides],
        }
        for entry in ledger.entries
    ]
    fields = {
        "techniques": list(ledger.techniques),
        "pairs": pairs,
        "origin": ledger.origin or "",
        "version": versions()["aimet-ext"],
    }
    write_sealed(folder / SCALES_FILE, _SCHEMA, tensors, fields)
    if aimet_keys:
        replace_file(folder / AIMET_FILE, save(aimet_tensors(tensors)))


class _Fields(BaseModel):
    techniques: Json[tuple[str, ...]]
    pairs: Json[tuple[dict[str, Any], ...]]
    origin: str
    version: str


def cumulative_tensors(ledger: Ledger, rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Return products of a ledger's multipliers as ``{module}.input`` and ``{module}.output``."""
    return {
        f"{module}.{axis}": vector
        for module, axes in ledger.cumulative(rename).items()
        for axis, vector in axes.items()
    }


def aimet_tensors(cumulative: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return cumulative scales in AIMET's convention: ``prev`` divides, ``output`` multiplies."""
    tensors = {}
    for name, vector in cumulative.items():
        module, _, axis = name.rpartition(".")
        if axis == "output":
            tensors[f"{module}.prev"] = vector.reciprocal()
        else:
            tensors[f"{module}.foll"] = vector
    return tensors
