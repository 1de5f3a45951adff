"""The loop over decoder blocks that block-wise techniques share.

Each block is decided, deployed and compared with plain rounding before the next one is looked at.
"""

from __future__ import annotations

import copy
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from aimet_ext.config import TechniqueParams
from aimet_ext.core.clipping import shares_of
from aimet_ext.core.equivalence import PairKind, ScalePair
from aimet_ext.data.batches import call_model
from aimet_ext.data.cache import TensorCache
from aimet_ext.files.folders import replace_folder
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.manifest import write_manifest
from aimet_ext.files.scales import check_aimet_keys, write_scales
from aimet_ext.files.starts import write_clips
from aimet_ext.files.tensors import Checkpoints
from aimet_ext.models.description import TopologyDescription
from aimet_ext.models.proof import (
    BlockFn,
    PairFailure,
    judge_pairs,
    probe,
    probe_inputs,
)
from aimet_ext.models.topology import BlockTopology, select_pairs
from aimet_ext.progress import bar as progress_bar
from aimet_ext.sim.protocol import (
    SimAdaptor,
    WeightQuantizer,
    adapt,
    calibrated,
)
from aimet_ext.techniques.blockwise.block import Block, Choice
from aimet_ext.techniques.blockwise.inputs import StageInputs
from aimet_ext.techniques.blockwise.settle import float_ranges, resume, save, settle
from aimet_ext.techniques.blockwise.shared import SharedWeights
from aimet_ext.techniques.call import Call
from aimet_ext.techniques.excluded import excluded_names
from aimet_ext.techniques.report import BlockReport, BlockwiseReport
from aimet_ext.techniques.session import (
    OnGrids,
    RunOptions,
    layers_to_quantize,
    open_checkpoints,
    open_ledger,
    undo_on_failure,
)
from aimet_ext.walk.passes import BlockPass
from aimet_ext.walk.streamed import StreamedBlock

LOGGER = logging.getLogger(__name__)
P = TypeVar("P", bound=TechniqueParams)


@dataclass(frozen=True)
class BlockSolver(ABC, Generic[P]):
    """Base of a block-wise technique: how it decides one block.

    :param params: Settings of the run.
    :param technique: Name, in reports and in the ledger.
    """

    params: P
    technique: str

    @property
    def title(self) -> str:
        """Name beside the progress bar, that of the class."""
        return type(self).__name__

    @property
    def pairs(self) -> Collection[PairKind]:
        """Kinds of scale pairs that it may fold into the weights; none if it does not transform."""
        return ()

    @property
    def quantize_activations(self) -> bool:
        """True to score blocks with their activation quantizers on."""
        return False

    @property
    def compares(self) -> bool:
        """True to keep plain rounding of a block where that has the lower error."""
        return True

    @property
    def gathers(self) -> Literal["magnitudes", "moments"] | None:
        """Sums over the inputs of stages to gather while the float block runs; None for none.

        If it is not None, the technique sees the float model alone, whatever is quantized so far.
        """
        return None

    @property
    def leans(self) -> bool:
        """True to decide experts that no token reaches, by the tokens of all experts."""
        return False

    @property
    def judged(self) -> int | None:
        """Number of tokens that scores are taken over, about; None for all."""
        return None

    @property
    def trim(self) -> float:
        """Share of a block's outputs that count in no score, those that are furthest off."""
        return 0.0

    @property
    def steps(self) -> int:
        """Number of times that :meth:`decide` updates the progress bar."""
        return 0

    @property
    def contents(self) -> dict[str, str]:
        """Hashes of what files hold that settings name, by the settings, for checkpoints."""
        return {}

    def check(self, ledger: Ledger) -> None:
        """Refuse a simulation by what was done to it before.

        :raises ValueError: The technique does not fit it.
        """

    @abstractmethod
    def decide(self, block: Block, bar: Any) -> Choice:
        """Choose scales of pairs and ranges of weights for a block.

        :param bar: Progress bar.
        """


def run_blockwise(
    call: Call[P],
    solver_class: type[BlockSolver[P]],
    *,
    topology: TopologyDescription | None = None,
    aimet_keys: bool = False,
) -> BlockwiseReport:
    """Apply a block-wise technique to a simulation, or leave it as it was.

    :param topology: Names of the modules in a block, in place of what is found in a run of it.
    :param aimet_keys: True to write AIMET's names of scales as well.
    """
    solver, options = solver_class(call.params, call.row.name), call.options
    adaptor = adapt(call.sim)
    batches = adaptor.batches(call.dataloader, opaque=options.forward_fn is not None)
    first = partial(call_model, adaptor.model, batches[0], options.forward_fn)
    with adaptor.own_parameters(solver.pairs, topology):
        blocks = adaptor.find_blocks(topology, first)
        quantizers = layers_to_quantize(
            adaptor,
            blocks,
            call.modules_to_exclude,
            technique=solver.technique,
            rounds=call.row.rounds,
        )
        layers = [quantizer.name for quantizer in quantizers.values()]
        ledger = open_ledger(adaptor, solver.technique, layers)
        if aimet_keys:
            check_aimet_keys(ledger)
        solver.check(ledger)
        started = time.perf_counter()
        with undo_on_failure(adaptor, options.cache_dir) as keep:
            adaptor.ledger = ledger = copy.deepcopy(ledger)
            excluded = excluded_names(adaptor, call.modules_to_exclude, blocks)
            run = BlockwiseRun(
                adaptor, blocks, quantizers, solver, options, keep, excluded=excluded
            )
            reports = run.all_blocks(batches)
            rounds, settings = call.row.rounds, solver.params.to_dict()
            ledger.log_run(solver.technique, layers, rounds=rounds, settings=settings)
            report = BlockwiseReport(
                blocks=tuple(reports),
                settings=settings,
                refused_pairs=run.refused,
                seconds=time.perf_counter() - started,
            )
            if call.output_path is not None:
                rename = adaptor.original_names()
                with replace_folder(call.output_path) as place:
                    if not rounds:
                        write_scales(place, ledger, rename=rename, aimet_keys=aimet_keys)
                    if not rounds and (shares := _shares(quantizers)):
                        named = {rename(name): pair for name, pair in shares.items()}
                        write_clips(place, named, origin=ledger.origin)
                    report.save(place / "report.json")
                    kind = "report" if rounds else "scales"
                    write_manifest(place, kind, techniques=list(ledger.techniques))
    return report


def _shares(quantizers: Mapping[str, WeightQuantizer]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the shares of their full ranges that frozen quantizers keep, by layer."""
    found = {}
    for name, quantizer in quantizers.items():
        if quantizer.frozen:
            weight = quantizer.weight.detach().flatten(1).float()
            shape = quantizer.layout.shape
            scale, offset = quantizer.free_grid().scale, quantizer.grid().offset
            grid = scale.reshape(shape), offset.reshape(shape)
            found[name] = shares_of(quantizer.layout, weight, *grid)
    return found


@dataclass
class BlockwiseRun:
    """The loop over blocks; everything it changes is kept for undoing first.

    :param quantizers: Weight quantizers of the layers to decide, by full name.
    :param keep: Function to call with a block's name before the block is changed.
    :param refused: Kinds of scale pairs that are not used, with the reason.
    :param excluded: Full names of layers that are left alone, float meanwhile.
    """

    adaptor: SimAdaptor
    blocks: Sequence[BlockTopology]
    quantizers: Mapping[str, WeightQuantizer]
    solver: BlockSolver[Any]
    options: RunOptions
    keep: Callable[[str], None]
    refused: dict[str, str] = field(default_factory=dict)
    excluded: Collection[str] = ()

    @cached_property
    def _activation_bits(self) -> int:
        return self.adaptor.activation_bits()

    @cached_property
    def _shared(self) -> SharedWeights:
        return SharedWeights(self.adaptor)

    def all_blocks(self, batches: Sequence[Any]) -> list[BlockReport]:
        """Decide every block in order.

        :param batches: Result of :meth:`SimAdaptor.batches`.
        """
        self.adaptor.model.eval().requires_grad_(False)
        with ExitStack() as stack:
            streams = stack.enter_context(closing(self._open(batches)))
            floats, solver = streams.flows["float"], self.solver
            checkpoints = stack.enter_context(
                open_checkpoints(
                    self.adaptor,
                    self.options,
                    technique=solver.technique,
                    settings={
                        **solver.params.to_dict(),
                        **{f"contents of {k}": v for k, v in solver.contents.items()},
                    },
                    quantizers=self.quantizers,
                    data=floats.named_tensors(),
                    device=floats.device,
                    activations=solver.quantize_activations,
                )
            )
            bar = stack.enter_context(
                progress_bar(
                    total=len(self.blocks) * solver.steps,
                    desc=solver.title,
                    unit="step",
                    shown=self.options.progress,
                )
            )
            reports = []
            blocks = stack.enter_context(closing(streams.blocks()))
            for number, data in enumerate(blocks):
                bar.set_description(f"{solver.title}, block {number + 1} of {len(self.blocks)}")
                reports.append(self._block(number, data, checkpoints, bar))
            return reports

    def _open(self, batches: Sequence[Any]) -> BlockPass:
        """Return the first block's inputs in the float model and with quantized weights."""
        options, adaptor = self.options, self.adaptor
        names = [block.name for block in self.blocks]
        inside = tuple(f"{name}." for name in names)
        every = {**adaptor.weight_quantizers(), **adaptor.other_quantizers()}
        others = {name: q for name, q in every.items() if not name.startswith(inside)}
        with calibrated(others.values()):
            effective = OnGrids(others)
            with adaptor.disabled_quantizers():
                found = adaptor.block_pass(
                    names,
                    batches,
                    effective={} if self.solver.gathers else effective,
                    forward_fn=options.forward_fn,
                    cache_dir=options.cache_dir,
                    device=options.device,
                )
        if self.solver.gathers:
            found.drop("quantized")
        return found

    def _block(
        self, number: int, data: StreamedBlock, checkpoints: Checkpoints | None, bar: Any
    ) -> BlockReport:
        """Decide one block, or take it from its checkpoint, and move both streams past it."""
        started = time.perf_counter()
        self.keep(data.name)
        self._shared.hold(data)
        layers = (f"{data.name}.{layer}" for stage in self._stages(number) for layer in stage)
        before = self._shared.copies(self.quantizers[layer] for layer in layers)
        if data.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(data.device)
        resumed = checkpoints is not None and number in checkpoints
        inputs = [] if resumed else self._inputs(number, data)
        notes = {stage[0]: each.add for stage, each in inputs}
        with self.adaptor.disabled_quantizers(data.name):
            targets = data.outputs("float", notes)
        with targets:
            block = self._prepare(number, data, targets, inputs)
            if checkpoints is not None and resumed:
                with checkpoints.resuming(number) as saved:
                    report = resume(block, self.solver.technique, *saved)
                bar.update(self.solver.steps)
            else:
                ranges_before = float_ranges(block)
                report, smooth = settle(
                    block,
                    self.solver.decide(block, bar),
                    ranges_before,
                    technique=self.solver.technique,
                    compares=self.solver.compares,
                    started=started,
                )
                if checkpoints is not None:
                    save(checkpoints, block, smooth, report)
            block.take_ranges()
            if "quantized" in data.flows:
                with block.activations():
                    data.advance("quantized")
            for index, target in enumerate(targets):
                block.float_stream.hidden[index] = target
        self._shared.note(before)
        return report

    def _stages(self, number: int) -> list[list[str]]:
        """Return the layers of a block that are decided, those that share an input together."""
        topology = self.blocks[number]
        kept = (
            [n for n in stage if f"{topology.name}.{n}" in self.quantizers]
            for stage in topology.stages
        )
        return [stage for stage in kept if stage]

    def _inputs(self, number: int, data: StreamedBlock) -> list[tuple[Sequence[str], StageInputs]]:
        """Return what sums over the inputs of each stage, empty as yet."""
        if self.solver.gathers is None:
            return []
        return [
            (
                stage,
                StageInputs(
                    f"{data.name}.{stage[0]}",
                    data.module.get_submodule(stage[0]),
                    moments=self.solver.gathers == "moments",
                    mapped_dir=data.flows["float"].hidden.cache_dir,
                ),
            )
            for stage in self._stages(number)
        ]

    def _prepare(
        self,
        number: int,
        data: StreamedBlock,
        targets: TensorCache,
        inputs: Sequence[tuple[Sequence[str], StageInputs]],
    ) -> Block:
        """Return the block as an optimisation problem, its scale pairs proved."""
        adaptor, name, topology = self.adaptor, data.name, self.blocks[number]
        params = {
            key: parameter.detach().to(
                torch.promote_types(parameter.dtype, torch.float32), copy=True
            )
            for key, parameter in adaptor.float_parameters(name).items()
        }
        layers = [layer for layer in topology.linears if f"{name}.{layer}" in self.quantizers]
        known = {*self.excluded, *(f"{name}.{layer}" for layer in layers)}
        beside = adaptor.matrices_beside(name, known)
        pairs = self._pairs(topology, set(layers), beside)
        with adaptor.disabled_quantizers(name):
            idle = self._idle(data, layers)
            call = data.flows["float"].select(0)

            def block_fn(length: int) -> BlockFn:
                tokens = probe_inputs(data.module, *call.arguments(), length=length)
                return probe(data.module, (), tokens)

            failures, exact = judge_pairs(block_fn, params, pairs)
        pairs = self._without(name, pairs, failures)
        stages = [stage for stage in self._stages(number) if not set(stage) & set(idle)]
        if idle:
            LOGGER.warning(
                "no token of the batches is sent to %s, which keep plain rounding",
                ", ".join(f"{name}.{layer}" for layer in idle),
            )
        return Block(
            number=number,
            count=len(self.blocks),
            data=data,
            stages=stages,
            quantizers={layer: self.quantizers[f"{name}.{layer}"] for layer in layers},
            pairs=pairs,
            exact=exact,
            params=params,
            targets=targets,
            adaptor=adaptor,
            activation_bits=self._activation_bits,
            inputs=[each for stage, each in inputs if list(stage) in stages],
            judged=self.solver.judged,
            trim=self.solver.trim,
            quantize_activations=self.solver.quantize_activations,
            beside=beside,
        )

    def _idle(self, data: StreamedBlock, layers: Sequence[str]) -> list[str]:
        """Return the layers of experts that nothing decides, as no token can be sent there."""
        found = data.look(layers).idle
        if not self.solver.leans:
            return found
        pools = {layer: data.pool([layer]) for layer in found}
        return [
            layer
            for layer, pool in pools.items()
            if pool is None or not any(True for _ in pool.inputs(1)[1])
        ]

    def _without(
        self, name: str, pairs: Sequence[ScalePair], failures: Sequence[PairFailure]
    ) -> tuple[ScalePair, ...]:
        """Return the pairs of a block that hold; those that do not are noted."""
        for failure in failures:
            kind, reason = failure.pair.kind, f"{name}: {failure}"
            LOGGER.warning("a scale pair is left out, it changes the float function: %s", reason)
            before = self.refused.get(kind)
            self.refused[kind] = reason if before is None else f"{before}; {reason}"
        lost = [failure.pair for failure in failures]
        return tuple(pair for pair in pairs if pair not in lost)

    def _pairs(
        self, topology: BlockTopology, layers: set[str], beside: Sequence[str]
    ) -> tuple[ScalePair, ...]:
        """Return the pairs of the kinds asked for that fit and touch no layer that is left alone.

        :param layers: Layers to decide.
        :param beside: Full names of quantized layers that keep their grids.
        """
        fixed = {name.removeprefix(f"{topology.name}.") for name in beside}
        kinds = self.solver.pairs
        self.refused.update({k: v for k, v in topology.unavailable.items() if k in kinds})
        kept = []
        for pair in select_pairs(topology, kinds):
            touched = {side.module for side in pair.sides} & {*topology.linears, *fixed}
            if touched <= layers:
                kept.append(pair)
            else:
                left = ", ".join(sorted(touched - layers))
                why = "is not decided with its block" if touched & fixed else "is excluded"
                self.refused[pair.kind] = f"it would rescale {left}, which {why}"
        return tuple(kept)
