"""The run of a rotation: chosen, folded into a simulation and proved, or undone."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from aimet_ext.config import RotationParams, TechniqueParams
from aimet_ext.core.hadamard import Rotation, rotation
from aimet_ext.core.key_maps import KeyMap
from aimet_ext.errors import TransformRefused
from aimet_ext.files.folders import replace_folder
from aimet_ext.files.manifest import write_manifest
from aimet_ext.files.scales import write_scales
from aimet_ext.models.description import TopologyDescription
from aimet_ext.models.proof import BOUNDS, float64_casts, probe, probe_inputs
from aimet_ext.models.residual import (
    ResidualEnds,
    Survey,
    read_norms,
    value_pair,
)
from aimet_ext.models.topology import BlockTopology
from aimet_ext.progress import bar as progress_bar
from aimet_ext.sim.protocol import SimAdaptor, WeightQuantizer, adapt, moved_ranges
from aimet_ext.techniques.call import Call
from aimet_ext.techniques.report import RotatedPart, RotationReport
from aimet_ext.techniques.rotating.fold import Folded, Rotations, fold_block, fold_ends
from aimet_ext.techniques.session import RunOptions, layers_to_turn, open_ledger, undo_on_failure
from aimet_ext.walk.hooks import run_batch
from aimet_ext.walk.streamed import StreamedBlock

P = TypeVar("P", bound=TechniqueParams)

# Largest change of the model's outputs, relative to the largest one: at least this, and so many
# units in the last place where weights are stored in fewer bits.
_LARGEST_CHANGE, _LARGEST_CHANGE_UNITS = 1e-4, 16
_PROBE_BATCHES = 4  # that tell which encodings a transform made stale


@dataclass
class RotationRun:
    """The fold of rotations into a simulation; everything it changes is kept for undoing first.

    :param batches: Batches on which it is proved, and on which stale encodings are told.
    :param keep: Function to call with a part's name before the part is changed.
    """

    adaptor: SimAdaptor
    technique: str
    blocks: Sequence[BlockTopology]
    ends: ResidualEnds | None
    rotations: Rotations
    batches: Sequence[Any]
    options: RunOptions
    keep: Callable[[str], None]

    @property
    def hidden(self) -> Rotation | None:
        """R1 if there is one."""
        found = self.rotations.hidden
        assert not isinstance(found, Tensor)
        return found

    def fold(self) -> list[RotatedPart]:
        """Prove and fold every part."""
        adaptor, options, parts = self.adaptor, self.options, []
        names = [block.name for block in self.blocks]
        with ExitStack() as stack, torch.no_grad():
            with adaptor.disabled_quantizers():
                streams = adaptor.block_pass(
                    names,
                    self.batches[:1],
                    effective={},
                    forward_fn=options.forward_fn,
                    cache_dir=options.cache_dir,
                    device=options.device,
                )
            stack.enter_context(closing(streams))
            blocks = stack.enter_context(closing(streams.blocks()))
            bar = progress_bar(
                zip(self.blocks, blocks, strict=True),
                desc=self.technique,
                total=len(names),
                unit="block",
                shown=options.progress,
            )
            for block, data in bar:
                self.keep(data.name)
                with adaptor.disabled_quantizers(data.name):
                    parts.append(self._block(block, data))
            if self.ends is not None:
                parts.append(self._ends(self.ends))
        return parts

    def _block(self, block: BlockTopology, data: StreamedBlock) -> RotatedPart:
        started = time.perf_counter()
        stream = data.flows["float"]
        call = stream.select(0)
        inputs = probe_inputs(data.module, *call.arguments())
        target = stream.call(data.module, 0)
        own = {k: p.detach().double() for k, p in self.adaptor.float_parameters(data.name).items()}
        folded = fold_block(own, block, self.rotations)
        hidden, first = self.hidden, next(iter(inputs))
        turned = inputs if hidden is None else {**inputs, first: hidden.apply(inputs[first])}
        with float64_casts(torch.float64):
            expected = probe(data.module, (), inputs)(own)
            expected = expected if hidden is None else hidden.apply(expected)
            found = probe(data.module, (), turned)(folded.params)
        deviation = _deviation(found, expected)
        self._check(data.name, deviation)
        self._write(data.name, folded.params)
        self._record(data.name, data.name, folded)
        stream.hidden[0] = target
        return RotatedPart(
            name=data.name, deviation=deviation, seconds=time.perf_counter() - started
        )

    def _ends(self, ends: ResidualEnds) -> RotatedPart:
        started = time.perf_counter()
        assert self.hidden is not None
        own = {
            f"{module}.{key}": parameter.detach().double()
            for module in ends.modules
            for key, parameter in self.adaptor.float_parameters(module).items()
        }
        folded = fold_ends(own, ends, self.hidden)
        deviation = _deviation(ends.outputs(folded.params), ends.outputs(own))
        self._check(", ".join(ends.modules), deviation)
        for module in ends.modules:
            self.keep(module)
            prefix = f"{module}."
            inside = {k: v for k, v in folded.params.items() if k.startswith(prefix)}
            self._write(module, {k.removeprefix(prefix): v for k, v in inside.items()})
        self._record("", "ends", folded)
        return RotatedPart(name="ends", deviation=deviation, seconds=time.perf_counter() - started)

    def _check(self, name: str, deviation: float) -> None:
        """Refuse rotations that do not leave a part's function as it was.

        :raises TransformRefused: They do not.
        """
        bound = BOUNDS[torch.float64]
        if not deviation <= bound:  # NaN fails
            raise TransformRefused(
                f"{name}: rotations must leave the float function unchanged, but max|change| / "
                f"max|output| is {deviation:.1e} in float64, at most {bound:.0e} is allowed. Pass "
                "r1=False or r2=False, or a TopologyDescription that fits the model"
            )

    def _write(self, part: str, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.adaptor.float_parameters(part).items():
            parameter.copy_(values[name])
        self.adaptor.commit(part)

    def _record(self, prefix: str, block: str, folded: Folded) -> None:
        """Note in the ledger what was folded into a part."""
        for pair, kind, turns in folded.turns:
            named = [f"{prefix}.{each.module}".lstrip(".") for each in turns]
            sides = []
            for name, each in zip(named, turns, strict=True):
                shape = folded.params[f"{each.module}.weight"].shape
                width = shape[1] if each.axis == "in" else shape[0]
                sides.append((name, each.axis, each.recorded(width)))
            size = sides[0][2].shape[-1]
            source = named[0] if kind == "norm_gain" else ""
            self.adaptor.ledger.record(
                self.technique, block, pair, kind, sides, size=size, source=source
            )


def _deviation(found: Tensor, expected: Tensor) -> float:
    """Return max|change| / max|output|."""
    largest = expected.abs().max().clamp_min(1e-30)
    return float((found - expected).abs().max() / largest)


def allowed_change(dtype: torch.dtype) -> float:
    """Return the largest change of a model's outputs that is taken for rounding."""
    return max(_LARGEST_CHANGE, _LARGEST_CHANGE_UNITS * torch.finfo(dtype).eps)


def check_outputs(before: Survey, after: Survey) -> float:
    """Return the largest change of a model's outputs, relative to the largest one.

    :raises TransformRefused: It is more than rounding in the model's precision.
    """
    deviation, bound = 0.0, 0.0
    for found, expected in zip(after.outputs, before.outputs, strict=True):
        deviation = max(deviation, _deviation(found.double(), expected.double()))
        bound = max(bound, allowed_change(expected.dtype))
    if not deviation <= bound:
        raise TransformRefused(
            "rotations must leave the float model unchanged, but max|change| / max|output| of its "
            f"outputs is {deviation:.1e} (at most {bound:.0e} is allowed); report this, or pass "
            "r1=False or r2=False"
        )
    return deviation


@dataclass(frozen=True, eq=False)
class Plan:
    """A model whose rotations are to be chosen.

    :param ends: What stands beside the blocks, None where the hidden states stay as they are.
    :param width: Channels of the hidden states.
    :param keeps_mean: True if its norms take the mean away, so that R1 must keep it.
    :param refused: Rotations that the model cannot have, with the reason.
    :param quantizers: Quantizers, by layer, of the weights that are turned.
    """

    adaptor: SimAdaptor
    blocks: Sequence[BlockTopology]
    ends: ResidualEnds | None
    width: int
    keeps_mean: bool
    batches: Sequence[Any]
    refused: dict[str, str]
    quantizers: Mapping[str, WeightQuantizer]

    def rotations(self, params: RotationParams) -> Rotations:
        """Return the rotations of these settings."""
        hidden, heads = None, {}
        options: dict[str, Any] = {"mode": params.mode}
        if self.ends is not None:
            hidden = rotation(self.width, seed=params.seed, keeps_mean=self.keeps_mean, **options)
        for number, block in enumerate(self.blocks):
            if params.r2 and not any(name in self.refused for name in ("r2", block.name)):
                assert block.head_dim is not None
                seed = params.seed + 1 + number
                heads[block.name] = rotation(block.head_dim, seed=seed, **options)
        return Rotations(hidden, heads)


@dataclass(frozen=True, eq=False)
class Chosen:
    """The rotations for a model.

    :param losses: What they are worth, by name, where they were learnt.
    :param resumed: Steps of learning that a checkpoint had.
    :param key_maps: Maps of the keys of each attention, in order, where they were fitted.
    :param key_losses: What keys of 8 bits cost, by what they are turned by.
    """

    rotations: Rotations
    losses: dict[str, float] = field(default_factory=dict)
    resumed: int = 0
    key_maps: tuple[KeyMap, ...] = ()
    key_losses: dict[str, float] = field(default_factory=dict)


def _refused_heads(blocks: Sequence[BlockTopology]) -> dict[str, str]:
    """Return the blocks whose values cannot be rotated, with the reason; ``"r2"`` for all."""
    refused = {}
    for block in blocks:
        try:
            value_pair(block)
        except TransformRefused as reason:
            refused[block.name] = str(reason)
    return {"r2": next(iter(refused.values()))} if len(refused) == len(blocks) else refused


def _look(
    adaptor: SimAdaptor,
    blocks: Sequence[BlockTopology],
    batches: Sequence[Any],
    options: RunOptions,
) -> tuple[int, bool]:
    """Return the width of the hidden states, and True if blocks let their mean through."""
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(adaptor.disabled_quantizers())
        streams = adaptor.block_pass(
            [block.name for block in blocks],
            batches,
            effective={},
            forward_fn=options.forward_fn,
            device=options.device,
        )
        stack.enter_context(closing(streams))
        data = next(stack.enter_context(closing(streams.blocks())))
        call = data.flows["float"].select(0)
        inputs = probe_inputs(data.module, *call.arguments())
        first = next(iter(inputs))
        moved = {**inputs, first: inputs[first].double() + 1}
        own = {k: p.detach().double() for k, p in adaptor.float_parameters(data.name).items()}
        with float64_casts(torch.float64):
            expected = probe(data.module, (), inputs)(own) + 1
            found = probe(data.module, (), moved)(own)
        keeps_mean = _deviation(found, expected) <= BOUNDS[torch.float64]
        return inputs[first].shape[-1], keeps_mean


def run_rotation(
    call: Call[P],
    choose: Callable[[Plan, Call[P]], Chosen],
    *,
    r1: bool,
    r2: bool,
    topology: TopologyDescription | None,
) -> RotationReport:
    """Choose rotations, fold them into a simulation and prove it, or leave it as it was.

    :param choose: Function from the model to its rotations.
    """
    if call.modules_to_exclude:
        raise ValueError(
            "modules_to_exclude must be left out: a rotation turns all layers at once that read or "
            f"write the hidden states, got {list(map(str, call.modules_to_exclude))}"
        )
    options, name, started = call.options, call.row.name, time.perf_counter()
    adaptor = adapt(call.sim)
    kinds = [*(("norm_qkv", "norm_mlp") if r1 else ()), *(("v_o",) if r2 else ())]
    ends_of_own = adaptor.own_ends(topology) if r1 else nullcontext()
    with adaptor.own_parameters(kinds, topology), ends_of_own:
        batches = _batches(adaptor, call)
        first = partial(run_batch, adaptor.model, batches[0], 0, options.forward_fn)
        blocks = adaptor.find_blocks(topology, first)
        refused = _refused_heads(blocks) if r2 else {}
        if "r2" in refused and not r1:
            raise TransformRefused(refused["r2"])
        for block in blocks if r1 else ():
            read_norms(block)
        ends = adaptor.residual_ends(blocks, batches[0], options.forward_fn) if r1 else None
        outer = () if ends is None else ends.modules
        layers = [f"{block.name}.{layer}" for block in blocks for layer in _turned(block, r1)]
        quantizers = layers_to_turn(
            adaptor,
            [*layers, *(outer if ends is None else (*ends.embeddings, *ends.norm.readers))],
            [*(block.name for block in blocks), *outer],
        )
        modules = [*layers, *outer]
        ledger = open_ledger(adaptor, name, modules)
        with undo_on_failure(adaptor, options.cache_dir) as keep:
            adaptor.ledger = ledger = copy.deepcopy(ledger)
            adaptor.model.requires_grad_(False)
            few = batches[:_PROBE_BATCHES]
            width, keeps_mean = _look(adaptor, blocks, few, options)
            before = adaptor.survey(few, options.forward_fn)
            plan = Plan(adaptor, blocks, ends, width, keeps_mean, batches, refused, quantizers)
            chosen = choose(plan, call)
            rotations = chosen.rotations
            ledger.key_maps = chosen.key_maps
            run = RotationRun(adaptor, name, blocks, ends, rotations, batches, options, keep)
            parts = run.fold()
            after = adaptor.survey(few, options.forward_fn)
            deviation = check_outputs(before, after)
            stale = adaptor.reset_encodings(moved_ranges(before.ranges, after.ranges))
            stale += _reset(quantizers)
            ledger.log_run(name, modules, settings=call.params.to_dict())
            report = RotationReport(
                rotations=_described(rotations),
                refused=refused,
                blocks=tuple(parts),
                deviation=deviation,
                losses=chosen.losses,
                resumed=chosen.resumed,
                key_losses=chosen.key_losses,
                reset_encodings=tuple(stale),
                settings=call.params.to_dict(),
                seconds=time.perf_counter() - started,
            )
            if call.output_path is not None:
                with replace_folder(call.output_path) as place:
                    write_scales(place, ledger, rename=adaptor.original_names())
                    report.save(place / "report.json")
                    write_manifest(place, "scales", techniques=list(ledger.techniques))
    return report


def _batches(adaptor: SimAdaptor, call: Call[Any]) -> list[Any]:
    if call.dataloader is None:
        return [adaptor.probe_batch()]
    opaque = call.options.forward_fn is not None
    return adaptor.batches(call.dataloader, opaque=opaque)


def _turned(block: BlockTopology, r1: bool) -> Iterable[str]:
    """Return the layers of a block that rotations change."""
    if r1:
        return block.linears
    return dict.fromkeys(side.module for side in value_pair(block).sides)


def _reset(quantizers: Mapping[str, WeightQuantizer]) -> list[str]:
    """Drop the ranges of weights that are others now."""
    had = [name for name, quantizer in quantizers.items() if quantizer.initialized]
    for name in had:
        quantizers[name].reset()
    return had


def _described(rotations: Rotations) -> dict[str, str]:
    found = {}
    hidden, heads = rotations.hidden, list(rotations.heads.values())
    if isinstance(hidden, Rotation):
        found["r1"] = f"{hidden.size} channels of the hidden states, {hidden.how}"
    if heads and isinstance(heads[0], Rotation):
        found["r2"] = f"{heads[0].size} channels of each head, {heads[0].how}"
    return found
