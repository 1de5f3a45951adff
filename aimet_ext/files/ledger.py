"""The ledger of a sim's transforms, as an object and as a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Json
from pydantic.dataclasses import dataclass
from torch import Tensor

from aimet_ext.core.factors import Factor, Product, width_of
from aimet_ext.core.key_maps import KeyMap
from aimet_ext.errors import some
from aimet_ext.files.factors import (
    NORM_GAIN,
    MatrixNames,
    SharedMatrices,
    check_factor,
    stored_stack,
)
from aimet_ext.files.manifest import LEDGER
from aimet_ext.files.reading import naming
from aimet_ext.files.tensors import read_sealed, write_sealed

Axis = Literal["in", "out"]
_KEYS: dict[str, str] = {"in": "input", "out": "output"}
# The first version holds positive vectors alone, and is what those are still written as.
# The third has maps of keys.
_SCHEMAS = ("aimet_ext.ledger/1", "aimet_ext.ledger/2", "aimet_ext.ledger/3")
_TYPED = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


@dataclass(frozen=True, eq=False, config=_TYPED)
class LedgerSide:
    """One multiplication: of a module's output rows or of its input columns.

    :param module: full name of the module.
    :param axis: ``"out"`` for rows of the weight and the bias, ``"in"`` for columns.
    :param factor: ``[width]``, expanded: one multiplier for every row or column; or ``[n, d, d]``,
        matrices along the diagonal of one of width ``n · d``.
    """

    module: str
    axis: Axis
    factor: Tensor


@dataclass(frozen=True, eq=False, kw_only=True, config=_TYPED)
class Entry:
    """One scale pair, or one rotation, that was folded into the weights.

    :param pair: name of the pair, for people.
    :param kind: kind of the pair, for example ``"v_o"``; ``"norm_gain"`` for gains that a norm,
        the source, gave up to the layers behind it.
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

    With all transforms applied, the weight of a module is ``W' = OUT W IN`` and its bias ``OUT b``,
    of a norm the effective gain ``OUT · gain``, where ``W``, ``b`` and the gain are those of the
    original checkpoint. Each later transform multiplies from outside: ``IN = IN_1 IN_2 …`` and
    ``OUT = … OUT_2 OUT_1``. Copies made with ``copy.deepcopy`` are independent: tensors in a ledger
    are never changed.

    :param origin: SHA-256 of the original checkpoint's weights, if known.
    """

    def __init__(self, origin: str | None = None) -> None:
        self.origin = origin
        self.entries: list[Entry] = []
        self.runs: list[Run] = []
        #: Maps of the keys of each attention, in order, where ``r3="fitted"`` found some.
        self.key_maps: tuple[KeyMap, ...] = ()
        self._matrices = SharedMatrices()

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        copied = Ledger(self.origin)
        copied.entries, copied.runs = list(self.entries), list(self.runs)
        copied.key_maps = self.key_maps
        copied._matrices = self._matrices.copy()
        memo[id(self)] = copied
        return copied

    def check_can_apply(
        self, technique: str, modules: Iterable[str], *, rounded: bool = False
    ) -> None:
        """Refuse a technique that was applied before, or one that comes after the rounding.

        :param rounded: True if the technique works on rounded weights.
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
            if run.rounds and not rounded:
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
        """Note that a scale pair or a rotation was folded into weights.

        :param sides: full name of the module, axis and factor of each side. A vector ``[width]`` is
            expanded and raised to its power; a stack ``[n, d, d]`` may be an expanded view. Equal
            matrices are kept once.
        :param kind: kind of the pair; in one of kind ``"norm_gain"``, whose ``source`` is the norm,
            vectors may hold zeros and negative numbers.
        :param size: number of independent scales of the pair.
        :param source: full name of the layer that the scales are taken out of.
        :raises ValueError: a factor is no vector of finite numbers above zero, and no stack of
            finite, non-singular matrices.
        """
        kept = []
        for module, axis, factor in sides:
            name = f"{technique}, {module} ({axis})"
            check_factor(name, factor, signed=kind == NORM_GAIN)
            if factor.dim() == 1:
                values = factor.detach().to("cpu", copy=True)
            else:
                values = self._matrices.keep(name, factor)
            kept.append(LedgerSide(module, axis, values))
        named = {"technique": technique, "block": block, "pair": pair, "kind": kind}
        entry = Entry(**named, source=source, size=size, sides=tuple(kept))
        self.entries.append(entry)

    @property
    def techniques(self) -> tuple[str, ...]:
        """Names of the techniques in the order they were first applied."""
        names = [run.technique for run in self.runs] + [entry.technique for entry in self.entries]
        return tuple(dict.fromkeys(names))

    @property
    def rotates_keys(self) -> bool:
        """True if queries and keys are to be turned when the model runs (``r3`` of a rotation)."""
        return any(run.settings.get("r3") for run in self.runs)

    @property
    def is_plain(self) -> bool:
        """True if there are only vectors of positive numbers, as files of version 1 hold."""
        return all(
            entry.kind != NORM_GAIN and all(side.factor.dim() == 1 for side in entry.sides)
            for entry in self.entries
        )

    def cumulative(
        self, rename: Callable[[str], str] = lambda name: name
    ) -> dict[str, dict[str, Factor]]:
        """Return the product of all factors as ``{module: {"input": …, "output": …}}``.

        :param rename: function that returns the name of a module in the original checkpoint.
        :returns: vectors, float32, of a ledger that has nothing else; with matrices in it products,
            not multiplied out, and vectors in float64. Only the axes that were transformed.
        :raises ValueError: two factors of one axis differ in width.
        """
        products: dict[str, dict[str, Product]] = {}
        for entry in self.entries:
            for side in entry.sides:
                axes = products.setdefault(rename(side.module), {})
                factor, key = side.factor, _KEYS[side.axis]
                factor = factor.double() if factor.dim() == 1 else factor
                if key in axes and axes[key].width != width_of(factor):
                    raise ValueError(
                        f"{side.module}, {key}: multipliers of one width are required, got "
                        f"{axes[key].width} and then {width_of(factor)} ({entry.technique})"
                    )
                if key not in axes:
                    axes[key] = Product((factor,))
                else:
                    axes[key] = getattr(axes[key], "then" if key == "input" else "behind")(factor)
        return {
            module: {key: self._short(product) for key, product in axes.items()}
            for module, axes in products.items()
        }

    def _short(self, product: Product) -> Factor:
        """Return a product of one vector as the vector."""
        first = product.factors[0]
        if len(product.factors) > 1 or first.dim() > 1:
            return product
        return first.float() if self.is_plain else first

    @property
    def described_runs(self) -> list[dict[str, Any]]:
        """The runs as JSON values."""
        return [{**vars(run), "modules": list(run.modules)} for run in self.runs]

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the whole ledger as named tensors and JSON values; see :meth:`from_tensors`."""
        tensors: dict[str, Tensor] = {}
        matrices, entries = MatrixNames(), []
        for number, entry in enumerate(self.entries):
            sides: list[list[Any]] = []
            for place, side in enumerate(entry.sides):
                sides.append([side.module, side.axis])
                if side.factor.dim() == 1:
                    tensors[f"{number}.{place}"] = side.factor
                else:
                    sides[-1] += matrices.place(side.factor)
            entries.append({**vars(entry), "sides": sides})
        for number, own in enumerate(self.key_maps):
            tensors.update({f"keys.{number}.matrix": own.matrix, f"keys.{number}.shift": own.shift})
        fields = {"origin": self.origin, "entries": entries, "runs": self.described_runs}
        return {**tensors, **matrices.tensors}, fields

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], fields: Any) -> Ledger:
        """Read back what :meth:`to_tensors` returned.

        :raises ValueError: fields are absent, unknown or of another type.
        :raises KeyError: a factor is absent.
        """
        stored = _Fields.model_validate(fields)
        ledger = cls(stored.origin)
        for number, entry in enumerate(stored.entries):
            sides = []
            for place, (module, axis, *matrix) in enumerate(entry["sides"]):
                if matrix:
                    name, count = matrix
                    sides.append((module, axis, stored_stack(tensors, (name, count))))
                else:
                    sides.append((module, axis, tensors[f"{number}.{place}"]))
            ledger.record(**{**entry, "sides": sides})
        ledger.runs = stored.runs
        count = sum(name.startswith("keys.") for name in tensors) // 2
        ledger.key_maps = tuple(
            KeyMap(*(tensors[f"keys.{number}.{part}"] for part in ("matrix", "shift")))
            for number in range(count)
        )
        return ledger

    def save(self, folder: Path) -> None:
        """Write ``ledger.safetensors``, exactly as the ledger is."""
        tensors, fields = self.to_tensors()
        schema = _SCHEMAS[2 if self.key_maps else not self.is_plain]
        write_sealed(folder / LEDGER, schema, tensors, {"ledger": fields})

    @classmethod
    def load(cls, folder: Path) -> Ledger:
        """Read what :meth:`save` wrote.

        :raises CorruptFileError: the file was changed, cut short, or was not written by aimet_ext.
        """
        tensors, content = read_sealed(folder / LEDGER, _SCHEMAS, _Content)
        with naming(folder / LEDGER):
            return cls.from_tensors(tensors, content.ledger)


class _Fields(BaseModel, extra="forbid"):
    origin: str | None
    entries: list[dict[str, Any]]
    runs: list[Run]


class _Content(BaseModel):
    ledger: Json[dict[str, Any]]
