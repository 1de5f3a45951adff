"""Reports of techniques that decide layer by layer, from data or from weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any

from pydantic.dataclasses import dataclass

from aimet_ext.core.objective import TOKENS_AN_INPUT, is_short, sqnr_db
from aimet_ext.techniques.report import Report, UnitReport, left_alone

_LITTLE = 0.005  # share below which an expert decided by itself


@dataclass(frozen=True, kw_only=True)
class LayerReport(UnitReport):
    """Report on one layer.

    Losses are mean squared errors of the layer's output over all tokens that count, summed over
    its rows. With ``inp_symmetry="asym"`` the errors of the layers before it are among them, in
    part estimated from every sixteenth token. Where a ReLU follows and counts, losses are taken
    behind it.

    :param name: Name of the layer.
    :param spec: Grid of its weight.
    :param bitwidth: Bits of its weight.
    :param loss_nearest: Loss of plain nearest rounding.
    :param loss_after: Loss as deployed.
    :param loss_upstream: Part of either loss that the errors of the layers before it cause,
        whatever its own weight; 0 where that is not told apart.
    :param signal: Mean square of the float output, likewise.
    :param rows_nearest: Output rows for which plain rounding was better and was kept.
    :param rows: Output rows.
    :param tokens: Rows of input that the losses are taken over.
    :param effective_tokens: Rows that would tell as much if each counted alike: fewer with
        ``token_weights``, more for an expert that leans on the tokens of all.
    :param leaned: Share of the tokens of all experts in what decided one's layer, and in its
        losses; 0 for other layers.
    :param expert: Number of the expert that it is a layer of, None for other layers.
    :param inputs: Inputs of an output row.
    :param storage: Place of its second moments: ``"memory"``, or ``"mapped"`` files where they
        would not fit.
    :param seconds: Seconds of work.
    :param resumed: True if it came from a checkpoint.
    """

    spec: str
    bitwidth: int
    loss_nearest: float
    loss_after: float
    signal: float
    rows_nearest: int
    rows: int
    tokens: int
    effective_tokens: float
    inputs: int
    storage: str
    loss_upstream: float = 0.0
    leaned: float = 0.0
    expert: int | None = None

    @property
    def is_short_of_tokens(self) -> bool:
        """True if so few tokens came that what was decided may fit these alone."""
        return is_short(self.effective_tokens, self.inputs) and self.rows_nearest < self.rows

    @property
    def sqnr_db(self) -> float:
        """SQNR of the output as deployed, in dB."""
        return sqnr_db(self.signal, self.loss_after)


@dataclass(frozen=True, kw_only=True)
class LayerwiseReport(Report):
    """Report of a layer-wise technique; ``print`` shows a table.

    :param technique: Name of the technique.
    :param layers: One entry each, in the order in which data flows.
    :param skipped: Layers that were left alone, with the reason.
    :param settings: Settings of the run.
    :param cost: Cost of bringing the calibration data to the layers.
    :param seconds: Seconds of the whole run.
    """

    technique: str
    layers: tuple[LayerReport, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max([20, *(len(layer.name) + 2 for layer in self.layers)])
        head = f"{'layer':<{width}}{'bits':>4}{'rounding':>12}{'deployed':>12}{'SQNR':>10}{'s':>8}"
        rows = [
            f"{layer.name:<{width}}{layer.bitwidth:>4}"
            f"{_share(layer.loss_nearest, layer.signal):>12}"
            f"{_share(layer.loss_after, layer.signal):>12}"
            f"{f'{layer.sqnr_db:.1f} dB':>10}"
            f"{layer.seconds:>8.2f}  {layer.spec}"
            for layer in self.layers
        ]
        lines = [f"{self.technique}: errors of the layers' outputs, as shares of their signal"]
        lines += [f"{head}  grid", *rows, f"{self.seconds:.1f} s in all", *self.notes]
        return "\n".join([*lines, *self.infos])

    @property
    def notes(self) -> list[str]:
        """Layers with too few tokens, without some calls, left alone, or with moments in files."""
        lines = []
        if short := [layer for layer in self.layers if layer.is_short_of_tokens]:
            least = min(short, key=lambda layer: layer.effective_tokens / layer.inputs)
            enough = max(TOKENS_AN_INPUT * layer.inputs for layer in short)
            lines.append(
                f"too few tokens for {len(short)} of {len(self.layers)} layers: {least.name} has "
                f"{least.inputs} inputs and saw {_tokens(least)} tokens; give at least {enough}, "
                "or other text may fare worse than with plain rounding"
            )
        few = [x for x in self.layers if x.effective_tokens < x.inputs]
        lines += [
            f"plain rounding, for want of tokens: {x.name} has {x.inputs} inputs and saw "
            f"{_tokens(x)}"
            for x in few
            if x.rows_nearest == x.rows
        ]
        none, shared = _experts(self.layers)
        lines += shared if none else []
        lines += [
            f"leans on the tokens of all experts: {x.name} saw {x.tokens}, and by {x.leaned:.0%} "
            "all decided"
            for x in self.layers
            if x.leaned >= _LITTLE
        ]
        lines += [
            f"decided on the calls that the float and the quantized model share, without {calls} "
            f"that one of them has more: {name}"
            for name, calls in self.cost.get("calls_left_out", {}).items()
        ]
        lines += left_alone(self.skipped)
        mapped = [layer.name for layer in self.layers if layer.storage == "mapped"]
        if mapped:
            lines.append(f"second moments in mapped files, for want of memory: {', '.join(mapped)}")
        return lines

    @property
    def infos(self) -> list[str]:
        """Shares of experts that all got tokens, beside what others tell."""
        none, shared = _experts(self.layers)
        return [*super().infos, *([] if none else shared)]


def _experts(layers: Sequence[LayerReport]) -> tuple[int, list[str]]:
    """Return how many experts' layers got no token, and a line on the shares, if there are any."""
    alike: dict[str, list[LayerReport]] = {}
    for layer in layers:
        if layer.expert is not None:
            alike.setdefault(_of_any_expert(layer), []).append(layer)
    shares = [
        (layer.tokens / max(1, sum(other.tokens for other in each)), layer)
        for each in alike.values()
        for layer in each
    ]
    if not shares:
        return 0, []
    none = sum(not layer.tokens for _, layer in shares)
    share, least = min(shares, key=lambda found: found[0] or 2)
    return none, [
        f"tokens of experts: {none} of {len(shares)} layers got none; the fewest of the "
        f"others are {least.tokens} of {least.name}, {share:.1%} of its like"
    ]


def _of_any_expert(layer: LayerReport) -> str:
    """Return the name of an expert's layer with ``*`` for the number of the expert."""
    head, _, tail = f".{layer.name}.".rpartition(f".{layer.expert}.")
    return f"{head}.*.{tail}"


def _tokens(layer: LayerReport) -> str:
    """Return the number of tokens that a layer saw, and what they are worth if that is less."""
    worth = int(layer.effective_tokens)
    return f"{layer.tokens}" + (f" (worth {worth})" if worth < layer.tokens else "")


@dataclass(frozen=True, kw_only=True)
class WeightReport(UnitReport):
    """Report on one layer that was decided without data.

    :param name: Name of the layer.
    :param spec: Grid of its weight.
    :param bitwidth: Bits of its weight.
    :param loss_nearest: Objective of plain nearest rounding; the sum of squared errors of the
        weights where the technique has none.
    :param loss_after: Objective as deployed, likewise.
    :param signal: Sum of the squared weights.
    :param noise_nearest: Sum of squared errors of the weights with plain nearest rounding.
    :param noise: Sum of squared errors of the weights as deployed.
    :param rows_nearest: Output rows for which plain rounding was better and was kept.
    :param rows: Output rows.
    :param seconds: Seconds of work.
    :param resumed: True if it came from a checkpoint.
    """

    spec: str
    bitwidth: int
    loss_nearest: float
    loss_after: float
    signal: float
    noise_nearest: float
    noise: float
    rows_nearest: int
    rows: int

    @property
    def sqnr_db(self) -> float:
        """SQNR of the weights themselves as deployed, in dB."""
        return sqnr_db(self.signal, self.noise)

    @property
    def sqnr_nearest_db(self) -> float:
        """SQNR of the weights themselves with plain nearest rounding, in dB."""
        return sqnr_db(self.signal, self.noise_nearest)


@dataclass(frozen=True, kw_only=True)
class WeightsReport(Report):
    """Report of a technique that needs no data; ``print`` shows a table.

    :param technique: Name of the technique.
    :param objective: Quantity that was minimised, in words; ``"none"`` for plain rounding.
    :param layers: One entry each, in the model's order.
    :param skipped: Layers that were left alone, with the reason.
    :param settings: Settings of the run.
    :param seconds: Seconds of the whole run.
    """

    technique: str
    objective: str
    layers: tuple[WeightReport, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max([20, *(len(layer.name) + 2 for layer in self.layers)])
        chosen = self.objective != "none"
        head = f"{'layer':<{width}}{'bits':>4}{'rounding':>12}{'deployed':>12}"
        head += f"{'objective':>12}" * chosen + f"{'s':>8}  grid"
        lines = [
            f"{self.technique}: no data, objective: {self.objective}; SQNR of the weights "
            + "themselves"
            + ", and the objective as a share of plain rounding's" * chosen,
            head,
        ]
        for layer in self.layers:
            share = _share(layer.loss_after, layer.loss_nearest)
            lines.append(
                f"{layer.name:<{width}}{layer.bitwidth:>4}"
                f"{f'{layer.sqnr_nearest_db:.1f} dB':>12}{f'{layer.sqnr_db:.1f} dB':>12}"
                + f"{share:>12}" * chosen
                + f"{layer.seconds:>8.2f}  {layer.spec}"
            )
        return "\n".join([*lines, f"{self.seconds:.1f} s in all", *self.notes, *self.infos])

    @property
    def notes(self) -> list[str]:
        """Layers that were left alone."""
        return left_alone(self.skipped)


def _share(loss: float, signal: float) -> str:
    """Return a loss as a share of the signal."""
    return f"{loss / signal:.3%}" if signal > 0 else "n/a"
