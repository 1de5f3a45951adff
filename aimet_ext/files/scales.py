"""The cumulative scales of a ledger, as a file and as what adapters are folded with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Json
from safetensors.torch import save
from torch import Tensor

from aimet_ext.core.factors import Factor, multiply, width_of
from aimet_ext.errors import some
from aimet_ext.files.factors import NORM_GAIN, Place, check_factor, pack, unpack
from aimet_ext.files.folders import replace_file
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.manifest import versions
from aimet_ext.files.reading import naming
from aimet_ext.files.tensors import read_sealed, write_sealed

SCALES_FILE = "scales.safetensors"
AIMET_FILE = "aimet_omniquant_metadata.safetensor"

# The first version holds positive vectors alone, and is what those are still written as.
_SCHEMAS = ("aimet_ext.scales/1", "aimet_ext.scales/2")


@dataclass(frozen=True, eq=False)
class ModuleScales:
    """Transform of one module's weight: ``W' = OUT W IN``.

    Each side is a vector ``[width]``, the diagonal of the matrix, where the module was only scaled,
    and an object with ``factors``, ``width`` and ``matrix()`` where it was rotated: a product of
    vectors and stacks of matrices ``[n, d, d]``, in order, that is not multiplied out.

    :param input: ``IN``, for the input columns, or None where nothing was done to them.
    :param output: ``OUT``, for the output rows, or None where nothing was done to them.
    """

    input: Factor | None = None
    output: Factor | None = None

    def fold_input(self, values: Tensor, dim: int = 1) -> Tensor:
        """Return ``values @ IN`` along a dimension of width ``in``, as ``A`` ``[rank, in]``.

        :raises ValueError: the dimension has another width.
        """
        return values if self.input is None else multiply(values, self.input, dim, "right")

    def fold_output(self, values: Tensor, dim: int = 0) -> Tensor:
        """Return ``OUT @ values`` along a dimension of width ``out``, as ``B`` ``[out, rank]``.

        :raises ValueError: the dimension has another width.
        """
        return values if self.output is None else multiply(values, self.output, dim, "left")


@dataclass(frozen=True, eq=False)
class Scales(Mapping[str, ModuleScales]):
    """Scales by the original name of a module, relative to the original checkpoint.

    An adapter ``B A`` of a module fits the transformed model as ``OUT B A IN``; see
    :class:`ModuleScales`.

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

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, list[Place]]]:
        """Return all factors as they are stored, each matrix once; and where those are."""
        return pack(
            {
                f"{module}.{axis}": factor
                for module, each in self.items()
                for axis, factor in (("input", each.input), ("output", each.output))
                if factor is not None
            }
        )


def load_scales(path: str | Path) -> Scales:
    """Read the cumulative scales of a sim.

    :param path: the file, or the folder of a technique or an export that holds it.
    :raises FileNotFoundError: there is no such file.
    :raises CorruptFileError: the file was changed, cut short, or was not written by aimet_ext.
    """
    path = Path(path)
    file = path / SCALES_FILE if path.is_dir() else path
    tensors, fields = read_sealed(file, _SCHEMAS, _ScalesFields)
    axes: dict[str, dict[str, Factor]] = {}
    with naming(file):
        signed = any(pair.get("kind") == NORM_GAIN for pair in fields.pairs)
        for key, tensor in tensors.items():
            check_factor(key, tensor, signed=signed)
        for key, factor in unpack(tensors, fields.products).items():
            module, _, axis = key.rpartition(".")
            axes.setdefault(module, {})[axis] = factor
        modules = {module: ModuleScales(**axes[module]) for module in sorted(axes)}
    return Scales(
        modules=modules,
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

    The tensors are ``{module}.input`` and ``{module}.output``, or the factors of those, each matrix
    once; the metadata holds the schema version, the techniques, each pair with its source layer and
    group layout, the hash of the original weights, and a hash of the file itself.

    :param rename: function that returns the name of a module in the original checkpoint.
    :param aimet_keys: write AIMET's own file too, ``aimet_omniquant_metadata.safetensor`` with
        ``{module}.prev`` (divides the output rows) and ``{module}.foll`` (multiplies the input
        columns). Its vectors are expanded, one entry for each row or column, so that AIMET never
        repeats them. AIMET does not divide biases by ``prev``; whoever applies it must.
    :raises ValueError: AIMET's file is to be written, and cannot hold rotations; a module is named.
    """
    tensors, products = cumulative_tensors(ledger, rename)
    pairs = [
        {
            "technique": entry.technique,
            "block": rename(entry.block),
            "pair": entry.pair,
            "kind": entry.kind,
            "source": rename(entry.source) if entry.source else "",
            "size": entry.size,
            "sides": [[rename(s.module), s.axis, width_of(s.factor)] for s in entry.sides],
        }
        for entry in ledger.entries
    ]
    fields = {
        "techniques": list(ledger.techniques),
        "pairs": pairs,
        "origin": ledger.origin or "",
        "version": versions()["aimet-ext"],
    }
    if aimet_keys:
        replace_file(folder / AIMET_FILE, save(aimet_tensors(tensors, products)))
    if not ledger.is_plain:
        fields["products"] = products
    write_sealed(folder / SCALES_FILE, _SCHEMAS[not ledger.is_plain], tensors, fields)


class _ScalesFields(BaseModel):
    techniques: Json[tuple[str, ...]]
    pairs: Json[tuple[dict[str, Any], ...]]
    origin: str
    version: str
    products: Json[dict[str, list[Place]]] = {}


def cumulative_tensors(
    ledger: Ledger, rename: Callable[[str], str]
) -> tuple[dict[str, Tensor], dict[str, list[Place]]]:
    """Return products of a ledger's factors as ``{module}.input`` and ``{module}.output``.

    :returns: the vectors, and factors of the products with matrices; and where these are.
    """
    return pack(
        {
            f"{module}.{axis}": factor
            for module, axes in ledger.cumulative(rename).items()
            for axis, factor in axes.items()
        }
    )


def check_aimet_keys(ledger: Ledger) -> None:
    """Refuse a ledger whose transforms AIMET's file cannot hold.

    :raises ValueError: it has rotations, or gains of norms that are zero; a module is named.
    """
    aimet_tensors(*cumulative_tensors(ledger, lambda name: name))


def aimet_tensors(
    cumulative: Mapping[str, Tensor], products: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Return cumulative scales in AIMET's convention: ``prev`` divides, ``output`` multiplies.

    :param products: names of those that are no vectors.
    :raises ValueError: there are some, or zeros that would divide.
    """
    if products := list(products):
        raise ValueError(
            f"aimet_keys: scales alone are required, as {AIMET_FILE} holds no matrices, but "
            f"{some(products, 3)} was rotated; leave aimet_keys out, or the rotation"
        )
    tensors = {}
    for name, vector in cumulative.items():
        module, _, axis = name.rpartition(".")
        if axis == "output" and bool((vector == 0).any()):
            raise ValueError(f"aimet_keys: {module} was multiplied by 0, which cannot divide")
        if axis == "output":
            tensors[f"{module}.prev"] = vector.reciprocal()
        else:
            tensors[f"{module}.foll"] = vector
    return tensors
