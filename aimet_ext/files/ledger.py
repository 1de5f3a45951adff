"""The ledger of a sim's transforms, and their cumulative scales as files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Json
from pydantic.dataclasses import dataclass
from safetensors.torch import save
from torch import Tensor

from aimet_ext.errors import some
from aimet_ext.files.folders import replace_file
from aimet_ext.files.manifest import LEDGER, versions
from aimet_ext.files.numbers import number_fault
from aimet_ext.files.reading import naming
from aimet_ext.files.tensors import read_sealed, write_sealed

SCALES_FILE = "scales.safetensors"
AIMET_FILE = "aimet_omniquant_metadata.safetensor"

Axis = Literal["in", "out"]
_KEYS: dict[str, str] = {"in": "input", "out": "output"}
_SCHEMA, _SCALES_SCHEMA = "aimet_ext.ledger/1", "aimet_ext.scales/1"
_TYPED = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


@dataclass(frozen=True, eq=False, config=_TYPED)
class LedgerSide:
    """One multiplication: of a module's output rows or of its input columns.

    :param module: full name of the module.
    :param axis: ``"out"`` for rows of the weight and the bias, ``"in"`` for columns.
    :param multiplier: ``[width]``, expanded: one factor for every row or column.
    """

    module: str
    axis: Axis
    multiplier: Tensor


@dataclass(frozen=True, eq=False, kw_only=True, config=_TYPED)
class Entry:
    """One scale pair that was folded into the weights.

    :param pair: name of the pair, for people.
    :param kind: kind of the pair, for example ``"v_o"``.
    :param source: full name of the layer that the scales are taken out of; may be empty.
    :param size: number of independent scales; a side that is wider repeats them.
    """

    technique: str
    block: str
    pair: str
    kind: str
    source: str
    size: int
    sides: tuple[LedgerSide, ...]


@dataclass(frozen=True, kw_only=True, config=_TYPED)
class Run:
    """One technique that was applied, with or without leaving scales.

    :param modules: full names of the modules it worked on.
    :param rounds: True if the weights are on their grid since.
    :param settings: its parameters, seed included, as JSON values.
    """

    technique: str
    modules: tuple[str, ...]
    rounds: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Ledger:
    """Record of everything that was done to a sim, in order.

    With all transforms applied, the weight of a module is ``W' = diag(output) W diag(input)``
    and its bias ``diag(output) b``, of a norm the effective gain ``output · gain``, where ``W``,
    ``b`` and the gain are those of the original checkpoint. Copies made with ``copy.deepcopy`` are
    independent: tensors in a ledger are never changed.

    :param origin: SHA-256 of the original checkpoint's weights, if known.
    """

    def __init__(self, origin: str | None = None) -> None:
        self.origin = origin
        self.entries: list[Entry] = []
        self.runs: list[Run] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        copied = Ledger(self.origin)
        copied.entries, copied.runs = list(self.entries), list(self.runs)
        memo[id(self)] = copied
        return copied

    def check_can_apply(self, technique: str, modules: Iterable[str]) -> None:
        """Refuse a technique that was applied before, or one that comes after the rounding.

        :raises ValueError: one of the modules had this technique, or holds rounded weights.
        """
        wanted = set(modules)
        for run in self.runs:
            common = sorted(wanted.intersection(run.modules))
            if not common:
                continue
            if run.technique == technique:
                raise ValueError(
                    f"{technique} was already applied to {some(common, 3)}; a technique is applied "
                    "once: start again from a new sim"
                )
            if run.rounds:
                raise ValueError(
                    f"{technique} needs float weights, but {run.technique} already rounded those "
                    f"of {some(common, 3)}; apply {technique} first, on a new sim"
                )

    def log_run(
        self,
        technique: str,
        modules: Iterable[str],
        *,
        rounds: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Note that a technique was applied to modules; see :class:`Run`."""
        self.runs.append(
            Run(technique=technique, modules=tuple(modules), rounds=rounds, settings=settings or {})
        )

    def record(
        self,
        technique: str,
        block: str,
        pair: str,
        kind: str,
        sides: Sequence[tuple[str, Axis, Tensor]],
        *,
        size: int,
        source: str = "",
    ) -> None:
        """Note that a scale pair was folded into weights.

        :param sides: full name of the module, axis and multiplier ``[width]`` of each side,
            expanded and raised to its power.
        :param size: number of independent scales of the pair.
        :param source: full name of the layer that the scales are taken out of.
        :raises ValueError: a multiplier is no vector of finite numbers above zero.
        """
        kept = []
        for module, axis, multiplier in sides:
            values = multiplier.detach().to("cpu", copy=True)
            _check_vector(f"{technique}, {module} ({axis})", values)
            kept.append(LedgerSide(module, axis, values))
        named = {"technique": technique, "block": block, "pair": pair, "kind": kind}
        entry = Entry(**named, source=source, size=size, sides=tuple(kept))
        self.entries.append(entry)

    @property
    def techniques(self) -> tuple[str, ...]:
        """Names of the techniques in the order they were first applied."""
        names = [run.technique for run in self.runs] + [entry.technique for entry in self.entries]
        return tuple(dict.fromkeys(names))

    def cumulative(
        self, rename: Callable[[str], str] = lambda name: name
    ) -> dict[str, dict[str, Tensor]]:
        """Return the product of all multipliers as ``{module: {"input": …, "output": …}}``.

        :param rename: function that returns the name of a module in the original checkpoint.
        :returns: float32 vectors; only the axes that were scaled.
        :raises ValueError: two multipliers of one axis differ in width.
        """
        products: dict[str, dict[str, Tensor]] = {}
        for entry in self.entries:
            for side in entry.sides:
                axes = products.setdefault(rename(side.module), {})
                factor, key = side.multiplier.double(), _KEYS[side.axis]
                if key in axes and axes[key].shape != factor.shape:
                    raise ValueError(
                        f"{side.module}, {key}: multipliers of one width are required, got "
                        f"{len(axes[key])} and then {len(factor)} ({entry.technique})"
                    )
                axes[key] = axes[key] * factor if key in axes else factor
        return {
            module: {key: product.float() for key, product in axes.items()}
            for module, axes in products.items()
        }

    @property
    def described_runs(self) -> list[dict[str, Any]]:
        """The runs as JSON values."""
        return [{**vars(run), "modules": list(run.modules)} for run in self.runs]

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the whole ledger as named tensors and JSON values; see :meth:`from_tensors`."""
        tensors: dict[str, Tensor] = {}
        entries = []
        for number, entry in enumerate(self.entries):
            sides = [[side.module, side.axis] for side in entry.sides]
            entries.append({**vars(entry), "sides": sides})
            for place, side in enumerate(entry.sides):
                tensors[f"{number}.{place}"] = side.multiplier
        fields = {"origin": self.origin, "entries": entries, "runs": self.described_runs}
        return tensors, fields

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], fields: Any) -> Ledger:
        """Read back what :meth:`to_tensors` returned.

        :raises ValueError: fields are absent, unknown or of another type.
        :raises KeyError: a multiplier is absent.
        """
        stored = _Fields.model_validate(fields)
        ledger = cls(stored.origin)
        for number, entry in enumerate(stored.entries):
            sides = [
                (module, axis, tensors[f"{number}.{place}"])
                for place, (module, axis) in enumerate(entry["sides"])
            ]
            ledger.record(**{**entry, "sides": sides})
        ledger.runs = stored.runs
        return ledger

    def save(self, folder: Path) -> None:
        """Write ``ledger.safetensors``, exactly as the ledger is."""
        tensors, fields = self.to_tensors()
        write_sealed(folder / LEDGER, _SCHEMA, tensors, {"ledger": fields})

    @classmethod
    def load(cls, folder: Path) -> Ledger:
        """Read what :meth:`save` wrote.

        :raises CorruptFileError: the file was changed, cut short, or was not written by aimet_ext.
        """
        tensors, content = read_sealed(folder / LEDGER, _SCHEMA, _Content)
        with naming(folder / LEDGER):
            return cls.from_tensors(tensors, content.ledger)


def _check_vector(name: str, values: Tensor) -> None:
    """Refuse what no rows or columns can be multiplied by.

    :raises ValueError: It is no vector of finite numbers above zero.
    """
    if values.ndim != 1 or not values.is_floating_point() or number_fault(values, positive=True):
        raise ValueError(
            f"{name}: a vector of finite multipliers above 0 is required, got {values.dtype} "
            f"of shape {tuple(values.shape)}"
            + (f" in [{values.min():.3g}, {values.max():.3g}]" if values.numel() else "")
        )


class _Fields(BaseModel, extra="forbid"):
    origin: str | None
    entries: list[dict[str, Any]]
    runs: list[Run]


class _Content(BaseModel):
    ledger: Json[dict[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class ModuleScales:
    """Scales of one module: ``W' = diag(output) W diag(input)``.

    :param input: ``[in]``, one factor for each input column, or None where there was none.
    :param output: ``[out]``, one factor for each output row, or None where there was none.
    """

    input: Tensor | None = None
    output: Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
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
    tensors, fields = read_sealed(file, _SCALES_SCHEMA, _ScalesFields)
    axes: dict[str, dict[str, Tensor]] = {}
    with naming(file):
        for key, tensor in tensors.items():
            _check_vector(key, tensor)
            module, _, axis = key.rpartition(".")
            axes.setdefault(module, {})[axis] = tensor
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
    write_sealed(folder / SCALES_FILE, _SCALES_SCHEMA, tensors, fields)
    if aimet_keys:
        replace_file(folder / AIMET_FILE, save(aimet_tensors(tensors)))


class _ScalesFields(BaseModel):
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
