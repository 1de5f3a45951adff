"""The parts of a report of a run, as they are written and read back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainSerializer
from pydantic.dataclasses import dataclass

from aimet_ext.files.folders import WORDS, in_words
from aimet_ext.specs import STRICT


def _read(value: Any) -> Any:
    return WORDS.get(value, value) if isinstance(value, str) else value


#: A float whose infinities are words in the file.
Number = Annotated[
    float, BeforeValidator(_read), PlainSerializer(in_words, return_type=Any, when_used="json")
]

StateName = Literal["float", "rounding", "quantized"]

STATES: dict[StateName, str] = {
    "float": "float model",
    "rounding": "plain rounding",
    "quantized": "as deployed",
}
"""Words for the states of a model, in order."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class UnitResult:
    """The outcome of a technique for one unit of the model.

    :param name: Name of the layer, block or tensor.
    :param rounding: Loss of plain rounding, or the loss before; None if there is none.
    :param result: Loss as deployed.
    :param upstream: Part of either loss that the units before it cause; None if it is not known.
    :param sqnr_db: SQNR as deployed, in dB; None if it is not known.
    :param grid: Grid of the weight, or what became of the unit.
    :param seconds: Seconds of work.
    """

    name: str
    rounding: Number | None = None
    result: Number | None = None
    upstream: Number | None = None
    sqnr_db: Number | None = None
    grid: str = ""
    seconds: float = 0.0

    @property
    def share(self) -> float | None:
        """Loss as deployed as a share of plain rounding's, None without both."""
        if self.rounding is None or self.result is None or not self.rounding > 0:
            return None
        return self.result / self.rounding

    @property
    def own(self) -> float | None:
        """Loss as deployed less that of the units before it, None if that is not known.

        It is negative where the unit takes back some of theirs.
        """
        if self.result is None or self.upstream is None:
            return None
        return self.result - self.upstream


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TechniqueResult:
    """The outcome of a technique.

    :param name: Name of the technique.
    :param measure: Quantity that the losses are of, in words.
    :param unit: Word for its units: ``"layer"``, ``"block"`` or ``"range"``.
    :param units: Entries in the order in which data flows.
    :param numbers: Further measures by name.
    :param settings: Settings of the call.
    :param seconds: Seconds of the call.
    """

    name: str
    measure: str = ""
    unit: str = "layer"
    units: tuple[UnitResult, ...] = ()
    numbers: dict[str, Number] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def shares(self) -> list[float]:
        """Return losses as shares of plain rounding's, of the units that have both."""
        return [unit.share for unit in self.units if unit.share is not None]

    def worst(self, count: int = 1) -> list[UnitResult]:
        """Return units with the highest loss of their own, or else the lowest SQNR, or share."""
        known = [unit for unit in self.units if unit.own is not None]
        if known:
            return sorted(known, key=lambda unit: -(unit.own or 0.0))[:count]
        known = [unit for unit in self.units if unit.sqnr_db is not None]
        if known:
            return sorted(known, key=lambda unit: unit.sqnr_db or 0.0)[:count]
        known = [unit for unit in self.units if unit.share is not None]
        return sorted(known, key=lambda unit: -(unit.share or 0.0))[:count]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WeightUse:
    """The use that a layer's weight makes of its grid.

    Codes are counted on whole rows, evenly spaced over a large weight; scales on all of it.

    :param name: Name of the layer.
    :param grid: Grid in short, such as ``"int4:64"``.
    :param bitwidth: Bits of a code.
    :param weights: Numbers in the weight.
    :param bits: Bits of all of it with scales and offsets.
    :param counted: Weights whose codes were counted; what has no code, such as NaN, is none.
    :param qmin: Smallest code.
    :param qmax: Largest code.
    :param codes: Counts of the codes from the smallest to the largest, in 64 bins where there are
        more codes.
    :param low_edge: Share of the weights at the smallest code.
    :param high_edge: Share at the largest one.
    :param codes_used: Number of codes that occur.
    :param entropy: Entropy of the codes, in bits: the width that a perfect code would need.
    :param cells: Number of scales.
    :param scales: Counts of the scales, in bins between the smallest and the largest one that are
        equal on a logarithmic axis; those that have no place on it are left out.
    :param scale_low: Smallest scale.
    :param scale_median: Median of the scales.
    :param scale_high: Largest scale.
    """

    name: str
    grid: str
    bitwidth: int
    weights: int
    bits: int
    counted: int
    qmin: int
    qmax: int
    codes: tuple[int, ...]
    low_edge: float
    high_edge: float
    codes_used: int
    entropy: float
    cells: int
    scales: tuple[int, ...]
    scale_low: Number
    scale_median: Number
    scale_high: Number

    @property
    def at_edges(self) -> float:
        """Share of the weights at both ends of the grid."""
        return self.low_edge + self.high_edge


def share_at_edges(uses: Sequence[WeightUse]) -> float | None:
    """Return the share of all weights at the ends of their grids, None where none was counted."""
    counted = sum(use.counted for use in uses)
    return sum(use.at_edges * use.counted for use in uses) / counted if counted else None


def bits_by_grid(uses: Sequence[WeightUse]) -> list[tuple[str, float, float]]:
    """Return each grid with its share of all weights, and bits of a weight with scales on it."""
    total = sum(use.weights for use in uses)
    found = []
    for grid in dict.fromkeys(use.grid for use in uses):
        alike = [use for use in uses if use.grid == grid]
        count = sum(use.weights for use in alike)
        found.append((grid, count / total, sum(use.bits for use in alike) / count))
    return sorted(found, key=lambda each: -each[1])


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StateQuality:
    """Measures of the model in one state; the divergence is from the float model.

    :param perplexity: Perplexity.
    :param kl: Mean KL(float || this) over tokens, in nats.
    :param kl_high: Its 99.9th percentile.
    :param flips: Share of tokens whose likeliest next one is another.
    :param rows: Number of tokens that were compared.
    """

    perplexity: Number | None = None
    kl: Number | None = None
    kl_high: Number | None = None
    flips: Number | None = None
    rows: int | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Quality:
    """Measures of the model before and after.

    :param text: Description of the text.
    :param windows: Windows of it, 0 where that is not known.
    :param states: Measures of the float model, of plain rounding, and as deployed.
    :param tokens: Tokens of a window, 0 where that is not known.
    """

    text: str
    windows: int
    states: dict[StateName, StateQuality]
    tokens: int = 0

    @property
    def measured_on(self) -> str:
        """Windows, their length and their text, in words."""
        length = f" of {self.tokens} tokens" if self.tokens else ""
        word = "window" if self.windows == 1 else "windows"
        return f"{self.windows or 'some'} {word}{length} of {self.text}"

    @property
    def recovered(self) -> float | None:
        """Share of plain rounding's loss of perplexity that is gained back."""
        found = [self.states.get(name, StateQuality()).perplexity for name in STATES]
        float_, rounding, quantized = found
        if float_ is None or rounding is None or quantized is None or rounding <= float_:
            return None
        return (rounding - quantized) / (rounding - float_)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Phase:
    """One part of a run.

    :param name: Name of the part.
    :param seconds: Time that it took.
    :param memory_bytes: Most bytes that the process held during it; None where that is not known.
    :param gpu_memory_bytes: Most bytes of tensors on the GPU; None without one.
    """

    name: str
    seconds: float
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Mark:
    """A named point beside a curve.

    :param name: Name.
    :param bits: Average bits of a weight.
    :param kl: Divergence, in nats.
    """

    name: str
    bits: float
    kl: Number


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Budget:
    """The choice of widths that a run follows, see :func:`aimet_ext.assign_widths`.

    :param curve: Average bits of a weight and the least estimated divergence there.
    :param marks: Points of one choice for all layers, and of the result.
    :param choices: Number of layers with each choice.
    :param rows: Tokens that the estimate is of.
    :param grids: Hash of the grids of the recipe that the choice became.
    :param format: Version of the form, of a file of its own.
    """

    curve: tuple[tuple[float, Number], ...]
    marks: tuple[Mark, ...]
    choices: dict[str, int]
    rows: int
    grids: str
    format: Literal[1] = 1
