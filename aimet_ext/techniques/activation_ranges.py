"""Ranges of activations, chosen by what they cost at the model's outputs."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import torch

from aimet_ext.analysis.analyze import error_slopes
from aimet_ext.analysis.divergence import Reference
from aimet_ext.config import ActivationRangesParams
from aimet_ext.errors import TransformRefused, some
from aimet_ext.files.folders import replace_folder
from aimet_ext.files.manifest import write_manifest
from aimet_ext.files.tensors import Checkpoints
from aimet_ext.patterns import fits, near, scopes
from aimet_ext.progress import bar as progress_bar
from aimet_ext.sim.points import Point, Range
from aimet_ext.sim.protocol import SimAdaptor, adapt
from aimet_ext.techniques.blockwise.ranges import BlockRanges, search_range
from aimet_ext.techniques.call import Call, technique
from aimet_ext.techniques.range_report import ActivationRangesReport, RangeReport
from aimet_ext.techniques.session import OnGrids, open_checkpoints, open_ledger, undo_on_failure


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
                places=(self.points[name].place,),
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
        return found

    def worth(self, groups: Sequence[Sequence[Point]]) -> Sequence[Sequence[Point]]:
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
        start, before = _bounds(first), self.error

        def judge(bounds: Range) -> float:
            self.write(group, bounds)
            return self.measure()

        best, self.error = search_range(first, start, before, judge)
        self.write(group, best)
        return RangeReport(
            name=first.name,
            places=tuple(point.place for point in group),
            bitwidth=first.bitwidth,
            before=start,
            after=best,
            kl_before=before,
            kl_after=self.error,
            seconds=time.perf_counter() - started,
        )

    def write(self, group: Sequence[Point], bounds: tuple[float, float]) -> None:
        """Give quantizers a range."""
        for point in group:
            self.adaptor.write_range(point, *bounds)


@technique("activation_ranges")
def apply_activation_ranges(call: Call[ActivationRangesParams]) -> ActivationRangesReport:
    r"""Choose static ranges of activations by the error of blocks' outputs, or of the model's.

    Source: of this project, :ref:`ptq-activation-ranges`.

    All ranges are calibrated first, as ``sim.compute_encodings`` does, those that are frozen
    excepted. Scores that go into a Softmax get shorter ranges, by the error of the Softmax. Then,
    one tensor after the other in the order in which data flows, its bounds are moved towards zero
    while that lowers a loss with all other quantizers on, so that a range is chosen for the errors
    that reach its tensor, and for what becomes of its own: for each decoder block ``F``

    .. math::
        \lVert F(X) - \hat F(\hat X) \rVert^2

    where ``X`` are the block's inputs in the float model and ``X̂`` in the model quantized so far,
    starting from percentiles of a tensor's values too; or, with ``objective="output"``,

    .. math::
        \mathrm{KL}\bigl(p_\text{float} \,\Vert\, p_\text{quantized}\bigr)

    of the model's outputs. A range is changed only where the loss falls, and blocks' ranges only if
    the divergence of the outputs falls. Tensors that hardly add to the loss are not searched
    (``least_share``). What is in no block is judged by the outputs.

    Ranges that an operator fixes, such as 0 to 1 of a Softmax, and frozen ones stay. Tensors that
    share a quantizer, or must quantize alike such as a cache's input and output, get one range.
    Afterwards all ranges of activations are frozen, and every quantizer has one.

    :param dataloader: Batches as for the other techniques; a few suffice, such as 16 windows of
        text. A block, or the model, runs on all of them for each range that is tried.
    :param modules_to_exclude: Modules, nodes or tensors whose ranges stay as calibrated, by name or
        pattern.
    :param checkpoint_dir: Folder for a checkpoint of each block or tensor. The same call goes on
        from there after a crash.
    :param cache_dir: Folder for the copies that undo a failed call, and for what flows into blocks;
        None keeps them in RAM.
    :param device: Device of the block that is worked on; the model runs where it is.
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
        begins = f"{point.name} ".startswith(tuple(f"{name}{end}" for end in " ./_"))
        return begins or fits(name, *scopes(point.name))

    unknown = [name for name in names if not any(inside(point, name) for point in every)]
    if unknown:
        raise ValueError(
            "modules_to_exclude must name modules, nodes or tensors with quantizers, such as "
            f"{every[0].name!r}; not found: {some(unknown)}{near(unknown, [p.name for p in every])}"
        )
    return [
        point for point in every if not point.frozen and not any(inside(point, n) for n in names)
    ]


def _search_all(
    search: _Search, groups: Sequence[Sequence[Point]], call: Call[ActivationRangesParams]
) -> list[RangeReport]:
    """Search group after group, or take it from its checkpoint."""
    reference, ranges = search.reference, [(p.low, p.high) for p in search.points.values()]
    by_blocks = call.params.objective == "block"
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
        reports, first = list[RangeReport](), 0
        if by_blocks and (blocks := _blocks(search.adaptor)):
            reports, inside = _search_blocks(search, groups, blocks, call, checkpoints)
            first = len(blocks)
            groups = [group for group in groups if not inside.issuperset(p.place for p in group)]
        else:
            groups = search.worth(groups)
        bar = progress_bar(groups, "activation ranges", shown=call.options.progress)
        return reports + [_one(search, n, group, checkpoints) for n, group in enumerate(bar, first)]


def _blocks(adaptor: SimAdaptor) -> list[str]:
    """Return the names of the decoder blocks, none of a model that has none that are known."""
    try:
        return [block.name for block in adaptor.find_blocks(None)]
    except ValueError:
        return []


def _search_blocks(
    search: _Search,
    groups: Sequence[Sequence[Point]],
    names: Sequence[str],
    call: Call[ActivationRangesParams],
    checkpoints: Checkpoints | None,
) -> tuple[list[RangeReport], set[str]]:
    """Search block after block, or take one from its checkpoint, and write what was found.

    If the divergence of the model's outputs does not fall, all calibrated ranges are kept.

    :param names: Blocks, in order.
    :returns: Entries, and the places of all quantizers in blocks.
    """
    adaptor, options, reports = search.adaptor, call.options, list[RangeReport]()
    points = {p.place: p for p in adaptor.points().values() if p.kind != "weight"}
    ranges = {place: _bounds(point) for place, point in points.items()}
    prefixes = tuple(f"{name}." for name in names)
    every = {**adaptor.weight_quantizers(), **adaptor.other_quantizers()}
    effective = OnGrids({name: q for name, q in every.items() if not name.startswith(prefixes)})
    with ExitStack() as stack:
        with adaptor.disabled_quantizers():
            passing = adaptor.block_pass(
                names,
                search.reference.batches,
                effective=effective,
                forward_fn=options.forward_fn,
                cache_dir=options.cache_dir,
                device=options.device,
            )
        stack.enter_context(closing(passing))
        blocks = stack.enter_context(closing(passing.blocks()))
        bar = progress_bar(blocks, "activation ranges", total=len(names), shown=options.progress)
        inside: set[str] = set()
        for number, data in enumerate(bar):
            with adaptor.disabled_quantizers(data.name):
                targets = data.outputs("float")
            with targets:
                work = BlockRanges(adaptor, data, targets, points, ranges)
                if checkpoints is not None and number in checkpoints:
                    with checkpoints.resuming(number) as (_, meta):
                        found = [RangeReport.from_checkpoint(each) for each in meta["reports"]]
                        ranges.update({p: each.after for each in found for p in each.places})
                else:
                    own = [group for group in groups if not inside & {p.place for p in group}]
                    found = _one_block(work, own, call)
                    if checkpoints is not None:
                        checkpoints.save(
                            number, {}, {"reports": [each.to_dict() for each in found]}
                        )
                inside |= work.places()
                work.advance()
            reports += found
    for entry in reports:
        search.write([points[place] for place in entry.places], entry.after)
    if (error := search.measure()) < search.error:
        search.error = error
        return reports, inside
    for entry in reports:
        search.write([points[place] for place in entry.places], entry.before)
    return [replace(e, after=e.before, loss_before=None, loss_after=None) for e in reports], inside


def _one_block(
    work: BlockRanges, groups: Sequence[Sequence[Point]], call: Call[ActivationRangesParams]
) -> list[RangeReport]:
    """Choose the ranges of those groups that lie in a block, as far as they matter."""
    seen, found = work.places(), []
    own = [group for group in groups if all(point.place in seen for point in group)]
    own = work.worth(own, call.params.least_share)
    starts, loss = work.starts([group[0].place for group in own]), work.loss(work.ranges)
    for group in own:
        started, first, before = time.perf_counter(), group[0], loss
        calibrated = work.ranges[first.place]
        after, loss = work.search(group, loss, starts.get(first.place, ()))
        found.append(
            RangeReport(
                name=first.name,
                places=tuple(point.place for point in group),
                bitwidth=first.bitwidth,
                before=calibrated,
                after=after,
                block=work.data.name,
                loss_before=before,
                loss_after=loss,
                seconds=time.perf_counter() - started,
            )
        )
    return found


def _one(
    search: _Search, number: int, group: Sequence[Point], checkpoints: Checkpoints | None
) -> RangeReport:
    if checkpoints is not None and number in checkpoints:
        with checkpoints.resuming(number) as (_, meta):
            report = RangeReport.from_checkpoint(meta["report"])
            search.write(group, report.after)
            search.error = report.kl_after or 0.0
        return report
    report = search.search(group)
    if checkpoints is not None:
        checkpoints.save(number, {}, {"report": report.to_dict()})
    return report
