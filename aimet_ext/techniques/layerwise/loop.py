"""The loop over layers that all layer-wise techniques share.

One pass over the calibration data brings each layer's second moments, in the order in which data
flows; each layer is decided, deployed and read back before the next one is looked at.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from aimet_ext.config import WeightParams
from aimet_ext.core.affine import quantize
from aimet_ext.data.batches import seen_arguments, tensors_in, with_tokens
from aimet_ext.files.folders import replace_folder
from aimet_ext.files.manifest import write_manifest
from aimet_ext.files.tensors import Checkpoints
from aimet_ext.progress import bar as progress_bar
from aimet_ext.sim.protocol import Disabled, SimAdaptor, WeightQuantizer, adapt, calibrated
from aimet_ext.techniques.call import Call
from aimet_ext.techniques.layer_report import LayerReport, LayerwiseReport
from aimet_ext.techniques.layerwise.deploy import (
    Decision,
    Outcome,
    Problem,
    SampleSum,
    deploy,
)
from aimet_ext.techniques.layerwise.evidence import Evidence, Seen
from aimet_ext.techniques.layerwise.token_weights import TokenWeights
from aimet_ext.techniques.report import Report, UnitReport
from aimet_ext.techniques.session import (
    OnGrids,
    RunOptions,
    choose_layers,
    open_checkpoints,
    open_ledger,
    undo_on_failure,
)
from aimet_ext.walk.order import Activation
from aimet_ext.walk.walk import Stage, Streams, Walk

P = TypeVar("P", bound=WeightParams)

R = TypeVar("R", bound=Report)

_log = logging.getLogger(__name__)

_STREAMS: dict[str, Streams] = {"symqt": "quantized", "symfp": "float", "asym": "both"}


@dataclass(frozen=True)
class Solver(ABC, Generic[P]):
    """Base of a layer-wise technique: how it decides one layer.

    :param params: Settings of the run.
    :param technique: Name, in reports and in the ledger.
    :param rounds: True if weights are on their grid afterwards.
    """

    params: P
    technique: str
    rounds: bool

    @property
    def aimet_stream(self) -> bool:
        """True if the quantized stream is that of AIMET's SeqMSE.

        Embeddings are float there, and each block of LPBQ has a float scale of its own.
        """
        return False

    @property
    def max_bitwidth(self) -> int:
        """Bits above which a layer is left to plain rounding."""
        return self.params.max_bitwidth

    def samples(self, activation: Activation) -> SampleSum | None:
        """Return a collector of input rows for a layer that a ReLU follows; None for moments alone.

        :param activation: The ReLU.
        """
        return None

    @abstractmethod
    def decide(self, problem: Problem) -> Decision:
        """Choose the ranges of a layer, and its integers if the technique rounds."""


def run_layerwise(
    call: Call[P], solver_class: type[Solver[P]], *, only: Collection[str] | None = None
) -> LayerwiseReport:
    """Apply a layer-wise technique to a simulation, or leave it as it was.

    :param only: Names of the layers to decide at most; None for all.
    """

    def report(layers: list[Any], **common: Any) -> LayerwiseReport:
        short = [layer for layer in layers if layer.is_short_of_tokens]
        if call.row.rounds and short:
            _log.warning(
                "%s: too few tokens for %d of %d layers, see the report",
                call.row.name,
                len(short),
                len(layers),
            )
        return LayerwiseReport(layers=tuple(layers), **common)

    return run_on_layers(call, solver_class, LayerwiseRun, report, only=only)


def run_on_layers(
    call: Call[P],
    solver_class: type[Solver[P]],
    run_class: type[LayerwiseRun],
    reported: Callable[..., R],
    *,
    only: Collection[str] | None = None,
) -> R:
    """Decide the layers of a simulation, or leave it as it was.

    :param run_class: Way of the run over the layers.
    :param reported: Function from the reports of layers, and fields that the report of a technique
        has beside them, to that report.
    :param only: Names of the layers to decide at most; None for all.
    """
    adaptor = adapt(call.sim)
    with adaptor.recurrent_as_linear():
        return _run(call, adaptor, solver_class, run_class, reported, only)


def _run(
    call: Call[P],
    adaptor: SimAdaptor,
    solver_class: type[Solver[P]],
    run_class: type[LayerwiseRun],
    reported: Callable[..., R],
    only: Collection[str] | None,
) -> R:
    started = time.perf_counter()
    row, options, settings = call.row, call.options, call.params.to_dict()
    solver = solver_class(call.params, row.name, row.rounds)
    choice = choose_layers(
        adaptor,
        call.modules_to_exclude,
        technique=row.name,
        max_bitwidth=solver.max_bitwidth,
        rounds=row.rounds,
        only=only,
    )
    ledger = open_ledger(adaptor, row.name, list(choice.decided))
    with undo_on_failure(adaptor, options.cache_dir, weights=row.rounds) as keep:
        adaptor.ledger = ledger = copy.deepcopy(ledger)
        run = run_class(
            adaptor, choice.decided, choice.others, solver, options, keep, choice.together
        )
        with calibrated(choice.others.values()):
            layers = run.all_layers(call.dataloader)
        ledger.log_run(row.name, list(choice.decided), rounds=row.rounds, settings=settings)
        report = reported(
            layers,
            technique=row.name,
            skipped=choice.skipped,
            settings=settings,
            cost=run.cost,
            seconds=time.perf_counter() - started,
        )
        if call.output_path is not None:
            with replace_folder(call.output_path) as place:
                report.save(place / "report.json")
                write_manifest(place, "report", techniques=list(ledger.techniques))
    return report


@dataclass
class LayerwiseRun:
    """The walk over a simulation's layers; everything it changes is kept for undoing first.

    :param quantizers: Weight quantizers of the layers to decide, by full name.
    :param others: Quantized weights that are not decided, which are on their grids meanwhile.
    :param keep: Function to call with a layer's name before the layer is changed.
    :param together: Further modules that hold the weight of a layer to decide, by layer.
    :param cost: Cost of the walk, once it is done.
    :param token_weights: Weights of the tokens, None if all count alike.
    :param input_steps: Most steps of the grid of a layer's input, 0 where all are float.
    """

    adaptor: SimAdaptor
    quantizers: Mapping[str, WeightQuantizer]
    others: Mapping[str, WeightQuantizer]
    solver: Solver[Any]
    options: RunOptions
    keep: Callable[[str], None]
    together: Mapping[str, Sequence[str]] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    token_weights: TokenWeights | None = None
    input_steps: int = 0

    report_class: ClassVar[type[UnitReport]] = LayerReport

    def all_layers(self, dataloader: Any) -> list[UnitReport]:
        """Decide every layer, in the order in which data flows."""
        batches = self._batches(dataloader)
        self.adaptor.model.eval().requires_grad_(False)
        walk = self._walk(batches)
        reports: list[UnitReport] = []
        bar = progress_bar(
            total=len(self.quantizers),
            desc=self.solver.technique,
            unit="layer",
            shown=self.options.progress,
        )
        try:
            stages = walk.stages()
            number = 0
            self.input_steps = self._input_steps()
            with (
                self._checkpoints(batches) as checkpoints,
                bar,
                # Once: switching the quantizers of the whole model takes time that grows with it.
                self.adaptor.disabled_quantizers() as disabled,
            ):
                while (stage := self._next(stages)) is not None:
                    reports += self._stage(number, stage, walk, checkpoints, disabled, bar)
                    number += 1
            self.cost = walk.cost
        finally:
            walk.close()
        return reports

    def _batches(self, dataloader: Iterable[Any]) -> Sequence[Any]:
        """Return the batches of a dataloader that are used, each one checked."""
        opaque, share = self.options.forward_fn is not None, self.solver.params.tokens_per_input
        batches = self.adaptor.batches(dataloader, opaque=opaque)
        if opaque or share is None:
            return batches
        inputs = max(quantizer.weight[0].numel() for quantizer in self.quantizers.values())
        return with_tokens(batches, math.ceil(share * inputs), self.adaptor.model)

    def _walk(self, batches: Sequence[Any]) -> Walk:
        aimet, adaptor, options = self.solver.aimet_stream, self.adaptor, self.options
        if self.solver.params.token_weights == "loss":
            self.token_weights = TokenWeights(
                adaptor,
                [name for name in self.quantizers if name not in self.together],
                batches,
                options.forward_fn,
                progress=options.progress,
            )
        others = {
            name: quantizer
            for name, quantizer in self.others.items()
            if not aimet or adaptor.counts_as_weight(name)
        }
        effective = OnGrids(others, free_blocks=aimet)
        with adaptor.disabled_quantizers(), torch.no_grad():
            return adaptor.walk(
                batches,
                list(self.quantizers),
                streams=_STREAMS[self.solver.params.inp_symmetry],
                effective=effective,
                together=self.together,
                forward_fn=options.forward_fn,
                cache_dir=options.cache_dir,
                device=options.device,
            )

    def _input_steps(self) -> int:
        bits = self.adaptor.activation_bits()
        return 2**bits - 1 if bits else 0

    @torch.no_grad()
    def _next(self, stages: Iterator[Stage]) -> Stage | None:
        return next(stages, None)

    def _checkpoints(self, batches: Sequence[Any]) -> AbstractContextManager[Checkpoints | None]:
        device = next(iter(self.quantizers.values())).weight.device
        return open_checkpoints(
            self.adaptor,
            self.options,
            technique=self.solver.technique,
            settings=self.solver.params.to_dict(),
            quantizers=self.quantizers,
            data=self._data(batches),
            device=self.options.device or device,
        )

    def _data(self, batches: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that tell one set of data from another, by name."""
        if self.options.forward_fn is None:
            yield from ((str(n), tensor) for n, tensor in enumerate(tensors_in(list(batches))))
            return
        with self.adaptor.disabled_quantizers(), torch.no_grad():
            yield from seen_arguments(self.adaptor.model, batches, self.options.forward_fn)

    def _stage(
        self,
        number: int,
        stage: Stage,
        walk: Walk,
        checkpoints: Checkpoints | None,
        disabled: Disabled,
        bar: Any,
    ) -> list[UnitReport]:
        """Decide the layers of a stage, or take them from their checkpoint."""
        if self.solver.rounds:
            for layer in stage.layers:
                walk.hold(layer)
        resumed = checkpoints is not None and number in checkpoints
        bar.set_postfix_str(stage.layers[0])
        started = time.perf_counter()
        with torch.no_grad():
            seen = None if resumed else self._gather(stage)
        gathering = (time.perf_counter() - started) / len(stage.layers)
        with disabled.back(stage.layers):
            if checkpoints is not None and seen is None:
                with checkpoints.resuming(number) as saved:
                    reports = self._resume(stage, *saved)
            else:
                assert seen is not None
                reports = self._decide(stage, seen, gathering)
                if checkpoints is not None:
                    self._save(checkpoints, number, stage, reports)
            decided = {layer: self.quantizers[layer] for layer in stage.layers}
            in_stream = OnGrids(decided, free_blocks=self.solver.aimet_stream)
            for layer in stage.layers:
                walk.decide(layer, in_stream[layer])
        bar.update(len(stage.layers))
        return reports

    def _decide(self, stage: Stage, seen: Seen, gathering: float) -> list[UnitReport]:
        """Decide and deploy the layers of a stage.

        :param gathering: Seconds that each layer's part of the evidence took.
        """
        reports: list[UnitReport] = []
        for layer in stage.layers:
            started = time.perf_counter()
            quantizer = self.quantizers[layer]
            self.keep(layer)
            module: Any = self.adaptor.model.get_submodule(layer)
            problem = Problem.of(
                layer,
                quantizer,
                getattr(module, "bias", None),
                seen.moment,
                seen.samples.get(layer),
                self.input_steps,
                seen.upstream.get(layer, 0.0),
            )
            with torch.no_grad():
                decide = self.solver.decide if seen.moment.is_known else self._without_tokens
                outcome = deploy(problem, quantizer, decide)
            report = self._report(problem, quantizer, outcome, seen)
            seconds = gathering + time.perf_counter() - started
            reports.append(replace(report, seconds=seconds))
        return reports

    def _report(
        self, problem: Problem, quantizer: WeightQuantizer, outcome: Outcome, seen: Seen
    ) -> UnitReport:
        """Return the report on a layer that was deployed, but its seconds."""
        rows, inputs = problem.weight.shape
        tokens = problem.moment.tokens
        return LayerReport(
            name=problem.name,
            spec=str(quantizer.spec().granularity),
            bitwidth=quantizer.bitwidth,
            loss_nearest=outcome.nearest,
            loss_after=outcome.after,
            loss_upstream=outcome.upstream,
            signal=outcome.signal,
            rows_nearest=outcome.rows_nearest if problem.moment.is_known else rows,
            rows=rows,
            tokens=tokens,
            leaned=problem.moment.leaned,
            effective_tokens=problem.moment.effective_tokens,
            inputs=inputs,
            storage=seen.storage,
            expert=seen.expert,
            seconds=0.0,
        )

    def _without_tokens(self, problem: Problem) -> Decision:
        """Leave a layer that no token is sent to to plain rounding."""
        codes = partial(quantize, problem.stored) if self.solver.rounds else None
        return Decision(codes=codes)

    def _gather(self, stage: Stage) -> Seen:
        return self._evidence.gather(stage)

    @cached_property
    def _evidence(self) -> Evidence:
        return Evidence(
            model=self.adaptor.model,
            quantizers=self.quantizers,
            params=self.solver.params,
            samples=self.solver.samples,
            wide=self.solver.rounds,
            believes=self.solver.aimet_stream,
            options=self.options,
            token_weights=self.token_weights,
        )

    def _save(
        self,
        checkpoints: Checkpoints,
        number: int,
        stage: Stage,
        reports: Sequence[UnitReport],
    ) -> None:
        tensors, metas = {}, {}
        for layer in stage.layers:
            state, metas[layer] = self.adaptor.snapshot(layer, weights=self.solver.rounds)
            tensors.update({f"{layer}/{name}": tensor for name, tensor in state.items()})
        plain = [report.to_dict() for report in reports]
        checkpoints.save(number, tensors, {"states": metas, "reports": plain})

    def _resume(
        self, stage: Stage, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
    ) -> list[UnitReport]:
        for layer in stage.layers:
            self.keep(layer)
            prefix = f"{layer}/"
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            self.adaptor.restore(layer, state, meta["states"][layer])
            self.quantizers[layer].grid()  # which a decided layer has, or the file is damaged
        return [self.report_class.from_checkpoint(plain) for plain in meta["reports"]]
