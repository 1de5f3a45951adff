"""Ranges of activations, chosen by what they cost at the model's outputs."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import field
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from aimet_ext.analysis.analyze import error_slopes
from aimet_ext.analysis.divergence import Reference
from aimet_ext.config import ActivationRangesParams
from aimet_ext.errors import TransformRefused, some
from aimet_ext.files.folders import replace_folder
from aimet_ext.files.manifest import write_manifest
from aimet_ext.files.tensors import Checkpoints
from aimet_ext.sim.points import Point
from aimet_ext.sim.protocol import SimAdaptor, adapt
from aimet_ext.techniques.call import Call, technique
from aimet_ext.techniques.report import Report, UnitReport
from aimet_ext.techniques.session import open_checkpoints, open_ledger, undo_on_failure

_FACTORS = (0.8, 0.95)  # of a bound, each as often as it pays
_LEAST_GAIN = 1e-4  # relative, of a step


@dataclass(frozen=True, kw_only=True)
class RangeReport(UnitReport):
    """The range of one tensor, or of tensors that share one.

    :param name: Module whose output it is, or tensor.
    :param bitwidth: Bits of a value.
    :param before: Range of the calibration.
    :param after: Range as deployed.
    :param kl_before: Divergence of the model's outputs with the range of the calibration, in nats.
    :param kl_after: Divergence as deployed.
    :param seconds: Seconds of the search.
    :param resumed: True if it came from a checkpoint.
    """

    bitwidth: int
    before: tuple[float, float]
    after: tuple[float, float]
    kl_before: float
    kl_after: float


@dataclass(frozen=True, kw_only=True)
class ActivationRangesReport(Report):
    """The outcome of :func:`aimet_ext.apply_activation_ranges`; ``print`` shows a table.

    :param ranges: Entries of the tensors that were searched, in order.
    :param kl_before: Divergence of the outputs with the ranges of the calibration, mean
        KL(float || quantized) in nats.
    :param kl_after: Divergence as deployed.
    :param kept: Number of quantizers that keep the range of the calibration unsearched, as they
        hardly add to the divergence, or because their range is fixed or frozen.
    :param settings: Settings of the run.
    :param seconds: Seconds of the whole run.
    """

    ranges: tuple[RangeReport, ...]
    kl_before: float
    kl_after: float
    kept: int
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        changed = [entry for entry in self.ranges if entry.after != entry.before]
        width = max([20, *(len(entry.name) + 2 for entry in changed)])
        lines = [f"{'':<{width}}{'bits':>4}{'calibrated':>22}{'deployed':>22}{'KL':>10}"]
        lines += [
            f"{entry.name:<{width}}{entry.bitwidth:>4}{_shown(entry.before):>22}"
            f"{_shown(entry.after):>22}{entry.kl_after:>10.4f}"
            for entry in changed
        ]
        lines.append(
            f"KL to the float model {self.kl_before:.4g} before, {self.kl_after:.4g} after; "
            f"{len(changed)} ranges changed, {len(self.ranges) - len(changed) + self.kept} kept; "
            f"{self.seconds:.1f} s in all"
        )
        return "\n".join(lines)


def _shown(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.4g} … {bounds[1]:.4g}"


def _bounds(point: Point) -> tuple[float, float]:
    return point.low or 0.0, point.high or 0.0


class _Search:
    """The search, one tensor after the other, on the simulation itself.

    :param adaptor: Simulation whose quantizers all have ranges.
    :param exclude: Names of quantizers, modules or nodes to leave alone.
    """

    def __init__(
        self, adaptor: SimAdaptor, reference: Reference, call: Call[ActivationRangesParams]
    ) -> None:
        self.adaptor, self.reference, self.call = adaptor, reference, call
        self.points = adaptor.points()
        self.error = self.measure()

    def measure(self) -> float:
        """Return the divergence of the outputs with the ranges as they are."""
        with self.adaptor.running(self.points, self.call.options.forward_fn) as run:
            return self.reference.divergence(run)

    def scores(self, taken: Collection[str], batches: Sequence[Any]) -> list[RangeReport]:
        """Take shorter ranges of attention scores, all of them, if the divergence falls.

        :param taken: Places of quantizers that may change.
        """
        started = time.perf_counter()
        names = [name for name, point in self.points.items() if point.place in taken]
        found = self.adaptor.score_ranges(names, batches)
        for name, bounds in found.items():
            self.write([self.points[name]], bounds)
        before, after = self.error, self.measure() if found else math.inf
        if not after < before:
            for name in found:
                self.write([self.points[name]], _bounds(self.points[name]))
            return []
        self.error = after
        return [
            RangeReport(
                name=name,
                bitwidth=self.points[name].bitwidth,
                before=_bounds(self.points[name]),
                after=bounds,
                kl_before=before,
                kl_after=after,
                seconds=(time.perf_counter() - started) / len(found),
            )
            for name, bounds in found.items()
        ]

    def groups(self, taken: Collection[str]) -> list[list[Point]]:
        """Return the quantizers to search, those together whose ranges must be equal.

        :param taken: Places of quantizers that may change.
        """
        facts = self.adaptor.lint_facts()
        fixed = {activation.name for _, activation in facts.fixed}
        twins: dict[str, set[str]] = {}
        for one, other, *_ in facts.tied:
            if one is not None and other is not None:
                both = twins.get(one.name, {one.name}) | twins.get(other.name, {other.name})
                twins.update(dict.fromkeys(both, both))
        by_place = {point.place: point for point in self.points.values()}
        found: list[list[Point]] = []
        done: set[str] = set()
        for place in by_place:
            members = twins.get(place, {place})
            if place not in done and members <= set(taken) and not members & fixed:
                found.append([by_place[name] for name in sorted(members, key=list(by_place).index)])
            done |= members
        return self._worth(found)

    def _worth(self, groups: list[list[Point]]) -> list[list[Point]]:
        """Return the groups that the divergence hangs on, by its slope in each one's error."""
        try:
            slopes = error_slopes(self.adaptor, self.reference, self.call.options.forward_fn)
        except TransformRefused:
            return groups
        least = self.call.params.least_share * sum(map(abs, slopes.values()))
        return [
            group
            for group in groups
            if sum(abs(slopes.get(point.name, 0.0)) for point in group) > least
        ]

    def search(self, group: Sequence[Point]) -> RangeReport:
        """Choose the range of some quantizers, which hold it afterwards."""
        started, first = time.perf_counter(), group[0]
        start = best = _bounds(first)
        before = self.error
        for factors in self._steps(first):
            while True:
                tried = (best[0] * factors[0], best[1] * factors[1])
                if tried == best or not tried[0] < tried[1]:
                    break
                self.write(group, tried)
                error = self.measure()
                if not error < self.error * (1 - _LEAST_GAIN):
                    break
                best, self.error = tried, error
        self.write(group, best)
        return RangeReport(
            name=first.name,
            bitwidth=first.bitwidth,
            before=start,
            after=best,
            kl_before=before,
            kl_after=self.error,
            seconds=time.perf_counter() - started,
        )

    def _steps(self, point: Point) -> Iterator[tuple[float, float]]:
        """Yield factors of both bounds; of a symmetric range they are equal."""
        for factor in _FACTORS:
            if point.symmetric:
                yield factor, factor
            else:
                yield factor, 1.0
                yield 1.0, factor

    def write(self, group: Sequence[Point], bounds: tuple[float, float]) -> None:
        """Give quantizers a range."""
        for point in group:
            self.adaptor.write_range(point, *bounds)


@technique("activation_ranges")
def apply_activation_ranges(call: Call[ActivationRangesParams]) -> ActivationRangesReport:
    r"""Choose static ranges of activations by the divergence of the model's outputs.

    All ranges are calibrated first, as ``sim.compute_encodings`` does, those that are frozen
    excepted. Scores that go into a Softmax get shorter ranges, by the error of the Softmax. Then,
    one tensor after the other in the order in which data flows, its bounds are moved towards zero
    while that lowers

    .. math::
        \mathrm{KL}\bigl(p_\text{float} \,\Vert\, p_\text{quantized}\bigr)

    of the outputs, computed by the simulation with all of its quantizers on, so that a range
    is chosen for the errors that reach its tensor, and for what becomes of its own. A range is
    changed only where the divergence falls. Tensors that hardly add to the divergence, by its
    gradient, are not searched (``least_share``).

    Ranges that an operator fixes, such as 0 to 1 of a Softmax, and frozen ones stay. Tensors that
    share a quantizer, or must quantize alike such as a cache's input and output, get one range.
    Afterwards all ranges of activations are frozen, and every quantizer has one.

    :param dataloader: Batches as for the other techniques; a few suffice, such as 16 windows of
        text. The model runs on all of them for each range that is tried.
    :param modules_to_exclude: Modules, nodes or tensors whose ranges stay as calibrated, by name.
    :param checkpoint_dir: Folder for a checkpoint of each tensor. The same call goes on from there
        after a crash.
    :param cache_dir: Folder for the copies that undo a failed call; None keeps them in RAM.
    :param device: Without effect: the model runs where it is.
    :returns: Ranges and divergences before and after.
    :raises ValueError: Unusable data, outputs that are no logits, no quantizer of activations, a
        name that is excluded and not there, the same technique twice.

    >>> report = apply_activation_ranges(sim, batches)
    """
    adaptor, options = adapt(call.sim), call.options
    batches = adaptor.batches(call.dataloader, opaque=options.forward_fn is not None)
    chosen = _chosen(adaptor, call.modules_to_exclude)
    ledger = open_ledger(adaptor, call.row.name, [point.place for point in chosen])
    started = time.perf_counter()
    with undo_on_failure(adaptor, options.cache_dir, weights=False) as keep:
        keep("")
        adaptor.model.requires_grad_(False)
        adaptor.ledger = ledger = copy.deepcopy(ledger)
        adaptor.calibrate_all(batches, options.forward_fn)
        with adaptor.running((), options.forward_fn) as run:
            torch_model = adaptor.framework == "torch" and options.forward_fn is None
            reference = Reference(run, batches, adaptor.model if torch_model else None)
        search = _Search(adaptor, reference, call)
        before = search.error
        taken = {point.place for point in chosen}
        reports = search.scores(taken, batches)
        left = taken - {search.points[report.name].place for report in reports}
        reports += _search_all(search, search.groups(left), call)
        for point in adaptor.points().values():
            if point.kind != "weight":
                adaptor.write_range(point, *_bounds(point))
        ledger.log_run(call.row.name, sorted(taken), settings=call.params.to_dict())
        report = ActivationRangesReport(
            ranges=tuple(reports),
            kl_before=before,
            kl_after=search.error,
            kept=len([p for p in search.points.values() if p.kind != "weight"]) - len(reports),
            settings=call.params.to_dict(),
            seconds=time.perf_counter() - started,
        )
        if call.output_path is not None:
            with replace_folder(call.output_path) as place:
                report.save(place / "report.json")
                write_manifest(place, "report", techniques=list(ledger.techniques))
    return report


def _chosen(adaptor: SimAdaptor, exclude: Sequence[Any]) -> list[Point]:
    """Return the quantizers of activations whose ranges may change.

    :raises ValueError: There is none, or an excluded name is none.
    """
    modules = {id(module): name for name, module in adaptor.model.named_modules()}
    every = [point for point in adaptor.points().values() if point.kind != "weight"]
    if not every:
        raise ValueError(
            "a simulation with quantizers of activations is required, it has none; build it with "
            "activations=8, for example"
        )
    names = [name if isinstance(name, str) else modules.get(id(name), "?") for name in exclude]

    def inside(point: Point, name: str) -> bool:
        return f"{point.name} ".startswith(tuple(f"{name}{end}" for end in " ./_"))

    unknown = [name for name in names if not any(inside(point, name) for point in every)]
    if unknown:
        raise ValueError(
            "modules_to_exclude must name modules, nodes or tensors with quantizers, such as "
            f"{every[0].name!r}; not found: {some(unknown)}"
        )
    return [
        point for point in every if not point.frozen and not any(inside(point, n) for n in names)
    ]


def _search_all(
    search: _Search, groups: Sequence[Sequence[Point]], call: Call[ActivationRangesParams]
) -> list[RangeReport]:
    """Search group after group, or take it from its checkpoint."""
    reference, ranges = search.reference, [(p.low, p.high) for p in search.points.values()]
    data = [("ranges", torch.tensor(ranges, dtype=torch.float64))]
    data += [(f"{n}", reference.log_probabilities(n)) for n in range(len(reference.batches))]
    with open_checkpoints(
        search.adaptor,
        call.options,
        technique=call.row.name,
        settings=call.params.to_dict(),
        quantizers={},
        data=data,
        device=reference.log_probabilities(0).device,
        activations=True,
    ) as checkpoints:
        bar = tqdm(groups, "activation ranges", disable=not call.options.progress)
        return [_one(search, number, group, checkpoints) for number, group in enumerate(bar)]


def _one(
    search: _Search, number: int, group: Sequence[Point], checkpoints: Checkpoints | None
) -> RangeReport:
    if checkpoints is not None and number in checkpoints:
        with checkpoints.resuming(number) as (_, meta):
            report = RangeReport.from_checkpoint(meta["report"])
            search.write(group, report.after)
            search.error = report.kl_after
        return report
    report = search.search(group)
    if checkpoints is not None:
        checkpoints.save(number, {}, {"report": report.to_dict()})
    return report
