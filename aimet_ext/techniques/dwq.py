"""DWQ: scales and norm gains polished end to end, with integers fixed or learnt as well.

The second phase of EfficientQAT (Chen et al., "EfficientQAT: Efficient Quantization-Aware Training
for Large Language Models", arXiv 2407.11062), with the float model's probabilities as the target,
as in MLX's distilled weight quantization.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import field
from functools import partial
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from aimet_ext.analysis.divergence import Reference
from aimet_ext.config import DWQParams
from aimet_ext.core.divergence import Divergence
from aimet_ext.core.precision import training_precision
from aimet_ext.data.batches import call_model, held_out, tensors_in
from aimet_ext.errors import some
from aimet_ext.evaluation.divergence import reference_for
from aimet_ext.files.folders import replace_folder
from aimet_ext.files.manifest import write_manifest
from aimet_ext.files.scales import write_scales
from aimet_ext.files.tensors import Checkpoints
from aimet_ext.models.description import TopologyDescription
from aimet_ext.progress import bar as progress_bar
from aimet_ext.sim.points import Run
from aimet_ext.sim.protocol import SimAdaptor, adapt, calibrated, moved_ranges
from aimet_ext.techniques.call import Call, technique
from aimet_ext.techniques.polished import (
    Polished,
    Progress,
    blocks_of,
    moves_of,
    own_gains,
)
from aimet_ext.techniques.report import Report, UnitReport, left_alone
from aimet_ext.techniques.session import (
    choose_layers,
    open_checkpoints,
    open_ledger,
    undo_on_failure,
)

_log = logging.getLogger(__name__)

_PROBE_BATCHES = 4  # that tell which encodings new gains made stale
_WARM = 0.1  # of all steps, in which a rate rises
_INTEGER_RATE = 0.2  # over the square root of the steps, as noise adds up
_WORSE = 0.05  # of the lowest divergence, what noise of steps at the first rate may add to it
_LOWER = 3.0  # by which the rate is divided then


@dataclass(frozen=True, kw_only=True)
class DWQStage(UnitReport):
    """The steps of learning up to one evaluation.

    :param name: Number of the last step.
    :param loss: Mean divergence on the batches of its steps, in nats, while they were made.
    :param kl: Mean divergence on the batches held out, after the last step.
    :param rate: Learning rate that they started from, before its rise and fall. Where it is lower
        than that of the stage before, that one cost too much, and was taken back.
    :param seconds: Seconds of the steps and of the evaluation.
    :param resumed: True if it came from a checkpoint.
    """

    loss: float
    kl: float
    rate: float


@dataclass(frozen=True, kw_only=True)
class DWQReport(Report):
    """The outcome of :func:`aimet_ext.apply_dwq`; ``print`` shows a table.

    Divergences are those of :func:`aimet_ext.evaluate_divergence`, with activations float.

    :param kept: ``"learnt"``, or ``"start"`` where nothing learnt was better on the batches held
        out: the simulation was left as it was.
    :param before: Divergences on the batches held out, at the start.
    :param after: As deployed, computed by the simulation itself.
    :param stages: Entry of each evaluation.
    :param num_layers: Number of layers whose scales were learnt.
    :param num_norms: Number of norms whose gains were learnt.
    :param scales_moved: Mean relative change of the scales as deployed.
    :param gains_moved: Mean relative change of the gains as deployed.
    :param integers_moved: Share of the weights whose integers are others as deployed.
    :param skipped: Layers that were left alone, with the reason.
    :param reset_encodings: Quantizers whose ranges no longer fit; ``compute_encodings`` sets them.
    :param settings: Settings of the run.
    :param seconds: Seconds of the whole run.
    """

    kept: str
    before: Divergence
    after: Divergence
    stages: tuple[DWQStage, ...]
    num_layers: int
    num_norms: int
    scales_moved: float
    gains_moved: float
    integers_moved: float
    skipped: dict[str, str] = field(default_factory=dict)
    reset_encodings: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{'step':>6}{'loss':>12}{'KL held out':>14}{'rate':>10}{'s':>8}"]
        lines += [
            f"{stage.name:>6}{stage.loss:>12.5f}{stage.kl:>14.5f}{stage.rate:>10.2g}"
            f"{stage.seconds:>8.1f}"
            for stage in self.stages
        ]
        lines += [
            f"before: {self.before}",
            f"after:  {self.after}",
            f"{self.kept}: scales of {self.num_layers} layers moved by {self.scales_moved:.2%}, "
            f"gains of {self.num_norms} norms by {self.gains_moved:.2%}, "
            f"{self.integers_moved:.2%} of the integers; {self.seconds:.1f} s in all",
        ]
        return "\n".join([*lines, *self.notes, *self.infos])

    @property
    def notes(self) -> list[str]:
        """Layers that were left alone."""
        return left_alone(self.skipped)

    @property
    def infos(self) -> list[str]:
        """Ranges that no longer fit, beside what others tell."""
        few = some(self.reset_encodings)
        lines = [f"ranges that compute_encodings sets anew: {few}"] if few else []
        return [*super().infos, *lines]


class _NotBetter(Exception):
    """Result that is not better than the start, to which the simulation goes back."""

    def __init__(self, report: DWQReport) -> None:
        super().__init__()
        self.report = report


class _Learning:
    """Gradient descent on the divergence of a simulation's outputs.

    :param reference: Outputs of the float model on all batches.
    """

    def __init__(self, polished: Polished, reference: Reference, call: Call[DWQParams]) -> None:
        self.polished, self.reference, self.call = polished, reference, call
        self.train, self.held = held_out(len(reference.batches))
        self.train = [n for n in self.train if reference.tokens(n)]
        if not self.train or not any(map(reference.tokens, self.held)):
            raise ValueError(
                "a batch to learn from and one to judge by with tokens that count are required, "
                "but the attention masks hide all of one; give more data"
            )
        params = call.params
        start = polished.start(integers=params.learn_integers)
        leaves = {name: log.requires_grad_() for name, log in start.items()}
        best = {n: log.detach().clone() for n, log in leaves.items()}
        self.progress = Progress(leaves, best, params.learning_rate)
        integers = {moves_of(name) for name in polished.codes}
        rate = params.integer_rate or _INTEGER_RATE / math.sqrt(params.num_iterations)
        unit = rate / params.learning_rate
        groups = [
            {"params": [leaf for n, leaf in leaves.items() if n not in integers], "unit": 1.0},
            {"params": [leaf for n, leaf in leaves.items() if n in integers], "unit": unit},
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.Adam(groups, lr=params.learning_rate, foreach=False)

    def measure(self, logs: dict[str, Tensor] | None = None) -> Divergence:
        """Return the divergence on the batches held out, of the simulation or with logarithms."""
        with (
            torch.no_grad(),
            self.polished.running(logs, self.call.options.forward_fn) as run,
        ):
            return self.reference.measure(run, self.held)

    def learn(self, before: Divergence, checkpoints: Checkpoints | None) -> list[DWQStage]:
        """Learn until the last step, or until it is of no more use; see ``progress.best``."""
        params, progress = self.call.params, self.progress
        progress.scores.append(before.kl)
        count = min(params.evaluations, params.num_iterations)
        ends = [params.num_iterations * (n + 1) // count for n in range(count)]
        order = _forever(self.train, torch.Generator().manual_seed(params.seed))
        stages: list[DWQStage] = []
        shown = self.call.options.progress
        with progress_bar(desc="dwq", total=params.num_iterations, unit="step", shown=shown) as bar:
            for number, end in enumerate(ends):
                numbers = [next(order) for _ in range(end - progress.step)]
                if checkpoints is not None and number in checkpoints:
                    with checkpoints.resuming(number) as (tensors, meta):
                        progress.load(tensors, self.optimizer)
                        progress.scores = list(meta["scores"])
                        progress.rate, progress.began = meta["rate"], meta["began"]
                        progress.failures = meta["failures"]
                        stages.append(DWQStage.from_checkpoint(meta["report"]))
                    progress.step = end
                    bar.update(len(numbers))
                else:
                    stage = self._stage(numbers, bar)
                    if not math.isfinite(stage.kl):
                        _log.warning("dwq: diverged; a smaller learning_rate may not")
                        break
                    stages.append(stage)
                    if checkpoints is not None:
                        meta = {
                            "scores": progress.scores,
                            "rate": progress.rate,
                            "began": progress.began,
                            "failures": progress.failures,
                            "report": stage.to_dict(),
                        }
                        checkpoints.save(number, progress.tensors(self.optimizer), meta)
                if progress.failures >= params.patience:
                    break
        return stages

    def _stage(self, numbers: Sequence[int], bar: Any) -> DWQStage:
        """Make some steps, and judge the state behind them."""
        started, progress, losses = time.perf_counter(), self.progress, []
        with (
            torch.enable_grad(),
            self.polished.running(progress.logs, self.call.options.forward_fn) as run,
        ):
            for number in numbers:
                losses.append(self._step(run, number))
                bar.set_postfix(loss=f"{losses[-1]:.4g}", refresh=False)
                bar.update()
        score, rate = self.measure(progress.logs).kl, progress.rate
        best = progress.best_score
        progress.scores.append(score)
        if score < best:
            progress.best = {n: log.detach().clone() for n, log in progress.logs.items()}
            progress.failures = 0
        elif score > best * (1 + _WORSE * self._fall()) and not self.call.params.learn_integers:
            progress.go_back(rate / _LOWER, self.optimizer)
            _log.info(
                "dwq: steps %d to %d cost more than they may at a rate of %.2g; on from the best "
                "state at %.2g", progress.step - len(numbers) + 1, progress.step, rate,
                progress.rate,
            )  # fmt: skip
        return DWQStage(
            name=str(progress.step),
            loss=sum(losses) / len(losses),
            kl=score,
            rate=rate,
            seconds=time.perf_counter() - started,
        )

    def _fall(self) -> float:
        """Return the share of the rate that is left, and so of the noise that it makes."""
        return 1 - self.progress.step / self.call.params.num_iterations

    def _step(self, run: Run, number: int) -> float:
        params, progress, reference = self.call.params, self.progress, self.reference
        # Adam's first steps have the full size whatever the gradients' noise.
        rise = (progress.step - progress.began + 1) / (_WARM * params.num_iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = group["unit"] * progress.rate * min(1.0, rise) * self._fall()
        device = reference.log_probabilities(number).device
        with training_precision(device, params.autocast):
            logits = run(reference.batches[number])
        loss = reference.loss(number, logits) / reference.tokens(number)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        progress.step += 1
        return float(loss.detach())


def _forever(numbers: Sequence[int], generator: torch.Generator) -> Iterator[int]:
    while True:
        for place in torch.randperm(len(numbers), generator=generator).tolist():
            yield numbers[place]


@technique("dwq")
def apply_dwq(
    call: Call[DWQParams], *, reference: Any = None, topology: TopologyDescription | None = None
) -> DWQReport:
    r"""Polish rounded weights, and norm gains, on the outputs of the whole model.

    Source: the second phase of EfficientQAT, Chen et al. 2024, arXiv 2407.11062, with the
    objective of MLX's DWQ.

    A technique such as :func:`apply_gptq` has decided the integers, layer by layer. They stay,
    every one of them unless ``learn_integers`` is true, and

    .. math::
        \min_{s, \, g} \; \operatorname{mean}_t \;
        \operatorname{KL}\bigl(p(x_t) \,\|\, p_{s, g}(x_t)\bigr)

    is lowered by Adam over the scales ``s`` of their grids and the gains ``g`` of the norms, both
    relative to what they were; ``p`` are the float model's probabilities. So layers
    compensate errors of each other. Of LPBQ's scales the float ones are learnt, the
    integers of the blocks stay. Activations are float meanwhile, and weights that are not learnt
    are on their grids. With ``learn_integers`` a number is learnt for each weight as well, which is
    added to its integer and rounded, straight through for gradients. What a block computes is
    computed again for its gradients, so that memory does not grow with the depth.

    A quarter of the batches is held out. Where some steps have raised the divergence on these by
    more than noise that goes when the rate falls, learning goes back to the best state and on from
    there at a third of the rate; with ``learn_integers`` it goes on to the last step as it is,
    since turned integers cost at first and pay in the end. The best state is deployed, if the
    simulation is then better on it than before; otherwise all stays as it was, and the report says
    so.

    New gains change the float model inside the simulation. The ledger knows them: LoRA adapters of
    the original model are folded so that they add what they did.

    :param sim: ``QuantizationSimModel`` of aimet_torch or aimet_onnx, of any model that returns
        logits, whose weights a technique rounded. Mutated.
    :param num_iterations: Steps of gradient descent, each on one batch.
    :param dataloader: Batches: ids ``[batch, seq]``, a tuple of positional arguments, or a mapping
        of keyword arguments. Tokens with attention mask 0 count nowhere. A step holds one batch.
    :param modules_to_exclude: Layers whose scales stay: names, patterns, modules of ``sim.model``.
    :param checkpoint_dir: Folder for a checkpoint of each evaluation. The same call goes on from
        there after a crash.
    :param device: Without effect: the model runs where it is.
    :param reference: The float model, or what :func:`aimet_ext.float_logits` kept of it for these
        batches. A rounded simulation has no float weights any more, so it must be given.
    :param topology: Names of the modules in a block, which tell what layers read a norm, in place
        of what is found in a run of it.
    :returns: Divergences before and after, and of each evaluation.
    :raises ValueError: Unusable data, no reference or that of other batches, no layer with rounded
        weights, the same technique twice.
    :raises TransformRefused: An ONNX graph has operators that PyTorch cannot compute.

    >>> apply_gptq(sim, batches)
    >>> report = apply_dwq(sim, batches, 100, reference=model)
    """
    if reference is None:
        raise ValueError(
            "reference must be the float model, or aimet_ext.float_logits(model, batches) of it: "
            "the simulation's own weights are rounded"
        )
    adaptor, options, params = adapt(call.sim), call.options, call.params
    batches = adaptor.batches(call.dataloader, opaque=options.forward_fn is not None)
    found = reference_for(reference, batches, top_k=params.top_k, forward_fn=options.forward_fn)
    try:
        with own_gains(adaptor, topology) if params.norm_gains else nullcontext():
            return _polish(adaptor, found, call, topology)
    except _NotBetter as outcome:
        return outcome.report


def _polish(
    adaptor: SimAdaptor,
    reference: Reference,
    call: Call[DWQParams],
    topology: TopologyDescription | None,
) -> DWQReport:
    """Learn, deploy and compare.

    :raises _NotBetter: What was learnt is not better; the simulation was left as it was.
    """
    started, options, params, name = time.perf_counter(), call.options, call.params, call.row.name
    settings = params.to_dict()
    choice = choose_layers(
        adaptor,
        call.modules_to_exclude,
        technique=name,
        max_bitwidth=params.max_bitwidth,
        rounds=True,
        rounded=True,
    )
    run = partial(call_model, adaptor.model, reference.batches[0], options.forward_fn)
    norms = adaptor.norm_gains(blocks_of(adaptor, topology, run)) if params.norm_gains else []
    modules = [*choice.decided, *(norm.module for norm in norms)]
    ledger = open_ledger(adaptor, name, modules, rounded=True)
    with undo_on_failure(adaptor, options.cache_dir) as keep:
        adaptor.ledger = ledger = copy.deepcopy(ledger)
        adaptor.model.requires_grad_(False)
        polished = Polished.of(adaptor, choice.decided, norms)
        learning = _Learning(polished, reference, call)
        data = list(tensors_in(list(reference.batches)))
        data += [reference.log_probabilities(n) for n in range(len(reference.batches))]
        with (
            calibrated(choice.others.values()),
            open_checkpoints(
                adaptor,
                options,
                technique=name,
                settings=settings,
                quantizers=choice.decided,
                data=((str(number), tensor) for number, tensor in enumerate(data)),
                device=data[-1].device,
            ) as checkpoints,
        ):
            before = learning.measure()
            stages = learning.learn(before, checkpoints)
            best = learning.progress.best
            after = before
            stale: list[str] = []
            if any(bool(log.any()) for log in best.values()):
                for part in polished.parts():
                    keep(part)
                stale = _deploy(polished, best, reference, call)
                after = learning.measure()
        better = after.kl < before.kl
        report = DWQReport(
            kept="learnt" if better else "start",
            before=before,
            after=after if better else before,
            stages=tuple(stages),
            num_layers=len(polished.codes),
            num_norms=len(polished.gains),
            scales_moved=polished.moved(best, polished.codes) if better else 0.0,
            gains_moved=polished.moved(best, polished.gains) if better else 0.0,
            integers_moved=polished.turned(best) if better else 0.0,
            skipped=choice.skipped,
            reset_encodings=tuple(stale) if better else (),
            settings=settings,
            seconds=time.perf_counter() - started,
        )
        if better:
            polished.record(ledger, name, best)
            ledger.log_run(name, modules, rounds=True, settings=settings)
        if call.output_path is not None:
            with replace_folder(call.output_path) as place:
                if ledger.entries:
                    write_scales(place, ledger, rename=adaptor.original_names())
                report.save(place / "report.json")
                kind = "scales" if ledger.entries else "report"
                write_manifest(place, kind, techniques=list(ledger.techniques))
        if not better:
            raise _NotBetter(report)
    return report


def _deploy(
    polished: Polished, logs: dict[str, Tensor], reference: Reference, call: Call[DWQParams]
) -> list[str]:
    """Write what was learnt; return the quantizers whose ranges no longer fit, now without one."""
    adaptor, few = polished.adaptor, reference.batches[:_PROBE_BATCHES]
    if not polished.gains:
        polished.deploy(logs)
        return []
    before = adaptor.survey(few, call.options.forward_fn).ranges
    polished.deploy(logs)
    after = adaptor.survey(few, call.options.forward_fn).ranges
    return adaptor.reset_encodings(moved_ranges(before, after))
