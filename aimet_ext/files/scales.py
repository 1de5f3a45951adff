"""The scales of all transforms of a sim, cumulated, as one file that fits the original model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from aimet_ext.files.folders import check_writable, replace_file, replace_folder
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.manifest import versions, write_manifest
from aimet_ext.files.sealed import is_sealed, read_sealed, write_sealed

__all__ = ["AIMET_FILE", "SCALES_FILE", "ModuleScales", "Scales", "load_scales", "save_scales"]

SCALES_FILE = "scales.safetensors"
AIMET_FILE = "aimet_omniquant_metadata.safetensor"
_SCHEMA = "aimet_ext.scales/1"


@dataclass(frozen=True, eq=False)
class ModuleScales:
    """What one module was multiplied by: ``W' = diag(output) W diag(input)``.

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
    :param techniques: what made the scales, in order.
    :param pairs: for each scale pair its ``technique``, ``block``, ``pair``, ``kind``, ``source``
        layer, number ``size`` of independent scales, and ``sides`` as ``[module, axis, width]``.
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


def save_scales(
    path: str | Path,
    ledger: Ledger,
    *,
    rename: Callable[[str], str] = lambda name: name,
    aimet_keys: bool = False,
) -> Path:
    """Write the cumulative scales of a ledger as safetensors.

    The tensors are ``{module}.input`` and ``{module}.output``; the metadata holds the schema
    version, the techniques, each pair with its source layer and group layout, the hash of the
    original weights, and a hash of the file itself.

    :param path: a ``.safetensors`` file, or a folder, which is replaced whole if it is ours.
    :param rename: from a module's name in the sim to its name in the original checkpoint.
    :param aimet_keys: write AIMET's own file too, ``aimet_omniquant_metadata.safetensor`` with
        ``{module}.prev`` (divides the output rows) and ``{module}.foll`` (multiplies the input
        columns). Its vectors are expanded, one entry for each row or column, so that AIMET never
        repeats them. AIMET does not divide biases by ``prev``; whoever applies it must.
    :returns: the file with the scales.
    :raises FileExistsError: a file or folder that is not ours is there.
    :raises PermissionError: nothing can be written there.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        with replace_folder(target) as folder:
            write_scales(folder, ledger, rename=rename, aimet_keys=aimet_keys)
            write_manifest(folder, "scales", techniques=list(ledger.techniques))
        return target / SCALES_FILE
    if target.exists() and not is_sealed(target, _SCHEMA):
        raise FileExistsError(
            f"{target}: a new file or a scales file of aimet_ext is required, but something else "
            "is there and is left as it is; choose another path or remove it"
        )
    check_writable(target)
    write_scales(target.parent, ledger, name=target.name, rename=rename, aimet_keys=aimet_keys)
    return target


def load_scales(path: str | Path) -> Scales:
    """Read what :func:`save_scales` wrote.

    :param path: the file, or the folder of a technique or an export that holds it.
    :raises FileNotFoundError: there is no such file.
    :raises CorruptFileError: the file was changed, cut short, or is not one of ours.
    """
    path = Path(path)
    tensors, fields = read_sealed(path / SCALES_FILE if path.is_dir() else path, _SCHEMA)
    axes: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, axis = key.rpartition(".")
        axes.setdefault(module, {})[axis] = tensor
    origin = fields["origin"]
    return Scales(
        modules={module: ModuleScales(**axes[module]) for module in sorted(axes)},
        techniques=tuple(json.loads(fields["techniques"])),
        pairs=tuple(json.loads(fields["pairs"])),
        origin=origin or None,
        version=fields["version"],
    )


def write_scales(
    folder: Path,
    ledger: Ledger,
    *,
    name: str = SCALES_FILE,
    rename: Callable[[str], str] = lambda name: name,
    aimet_keys: bool = False,
) -> None:
    """Write the files of :func:`save_scales` into a folder that the caller looks after."""
    cumulative = ledger.cumulative(rename)
    tensors = {
        f"{module}.{axis}": vector
        for module, axes in cumulative.items()
        for axis, vector in axes.items()
    }
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
    write_sealed(folder / name, _SCHEMA, tensors, fields)
    if aimet_keys:
        replace_file(folder / AIMET_FILE, save(_aimet_tensors(cumulative)))


def _aimet_tensors(cumulative: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """AIMET's convention: ``prev`` divides where ``output`` multiplies."""
    tensors = {}
    for module, axes in cumulative.items():
        if "output" in axes:
            tensors[f"{module}.prev"] = axes["output"].reciprocal()
        if "input" in axes:
            tensors[f"{module}.foll"] = axes["input"]
    return tensors
