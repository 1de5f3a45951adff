"""OmniQuant's loop over blocks: learn, deploy, compare with plain rounding, move on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from aimet_ext.config import OmniQuantParams
from aimet_ext.core.equivalence import ScalePair, expand
from aimet_ext.core.objective import sqnr_db
from aimet_ext.data.batches import ForwardFn
from aimet_ext.data.cache import TensorCache
from aimet_ext.errors import TransformRefused
from aimet_ext.files.journal import Checkpoints, environment, hash_tensors
from aimet_ext.models.probe import probe, probe_inputs
from aimet_ext.models.proof import prove_pairs
from aimet_ext.models.topology import BlockTopology, select_pairs
from aimet_ext.sim.protocol import Range, SimAdaptor, WeightQuantizer, moved_ranges
from aimet_ext.techniques.blockwise.block import Block, BlockState
from aimet_ext.techniques.blockwise.report import BlockReport, Kept
from aimet_ext.techniques.blockwise.search import BlockSearch
from aimet_ext.techniques.blockwise.training import train_block
from aimet_ext.techniques.session import (
    on_device,
    peak_memory,
    weights_hash,
)
from aimet_ext.walk.stream import BlockStream

__all__ = ["TECHNIQUE", "OmniQuantRun", "RunOptions"]

TECHNIQUE = "omniquant"
# Largest change of a block's output by folding, relative to its largest value: at least this, and
# so many units in the last place where weights are stored in fewer bits.
_LARGEST_CHANGE = 1e-4
_LARGEST_CHANGE_UNITS = 16
_PROBE_BATCHES = 4  # that tell which encodings a transform made stale


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The arguments of a run that are not its data."""

    params: OmniQuantParams
    forward_fn: ForwardFn | None
    output_path: Path | None
    checkpoint_dir: str | Path | None
    cache_dir: str | Path | None
    device: torch.device | str | None
    aimet_keys: bool
    progress: bool


class OmniQuantRun:
    """The loop over blocks; everything it changes is kept for undoing first."""

    def __init__(
        self,
        adaptor: SimAdaptor,
        blocks: Sequence[BlockTopology],
        quantizers: Mapping[str, WeightQuantizer],
        options: RunOptions,
        keep: Callable[[str], None],
    ) -> None:
        self.adaptor = adaptor
        self.blocks = blocks
        self.quantizers = quantizers
        self.options = options
        self.keep = keep
        self.refused: dict[str, str] = {}

    def all_blocks(self, dataloader: Iterable[Any]) -> list[BlockReport]:
        """Work on every block in order."""
        self.adaptor.model.eval().requires_grad_(False)
        with ExitStack() as stack:
            floats, quantized = self._streams(dataloader)
            stack.callback(floats.close)
            stack.callback(quantized.close)
            checkpoints = self._checkpoints(floats)
            steps = len(self.blocks) * self.options.params.num_iterations
            bar = stack.enter_context(
                tqdm(total=steps, desc="OmniQuant", unit="step", disable=not self.options.progress)
            )
            reports = []
            for number, topology in enumerate(self.blocks):
                bar.set_description(f"OmniQuant, block {number + 1} of {len(self.blocks)}")
                reports.append(self._block(number, topology, floats, quantized, checkpoints, bar))
            return reports

    def _streams(self, dataloader: Iterable[Any]) -> tuple[BlockStream, BlockStream]:
        """Inputs of the first block, in the float model and with quantized embeddings."""
        options, adaptor = self.options, self.adaptor
        batches = adaptor.batches(dataloader, opaque=options.forward_fn is not None)

        def capture() -> BlockStream:
            return adaptor.capture(
                self.blocks[0].name,
                batches,
                options.forward_fn,
                cache_dir=options.cache_dir,
                device=options.device,
            )

        with adaptor.disabled_quantizers():
            floats = capture()
        embeddings = [
            name
            for name in adaptor.weight_quantizers()
            if isinstance(adaptor.model.get_submodule(name), nn.Embedding)
        ]
        if not embeddings:
            return floats, floats.fork()
        with adaptor.calibrated(embeddings), adaptor.disabled_quantizers(weights=False):
            quantized = capture()
        quantized.share_arguments(floats)
        return floats, quantized

    def _checkpoints(self, floats: BlockStream) -> Checkpoints | None:
        if self.options.checkpoint_dir is None:
            return None
        fingerprint = {
            **environment(floats.device),
            "technique": TECHNIQUE,
            "settings": self.options.params.to_dict(),
            "layers": {name: q.spec().to_dict() for name, q in self.quantizers.items()},
            "weights": weights_hash(self.adaptor),
            "data": hash_tensors(floats.named_tensors()),
        }
        return Checkpoints(self.options.checkpoint_dir, fingerprint)

    def _block(
        self,
        number: int,
        topology: BlockTopology,
        floats: BlockStream,
        quantized: BlockStream,
        checkpoints: Checkpoints | None,
        bar: Any,
    ) -> BlockReport:
        """Work on one block, or take it from its checkpoint, and move both streams past it."""
        started = time.perf_counter()
        adaptor, name = self.adaptor, topology.name
        module = adaptor.model.get_submodule(name)
        self.keep(name)
        with ExitStack() as stack:
            stack.enter_context(on_device(module, self.options.device))
            if floats.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(floats.device)
            targets = stack.enter_context(floats.new_cache("targets"))
            with adaptor.disabled_quantizers(name):
                floats.advance(module, out=targets)
            block = self._prepare(topology, module, floats, quantized, targets)
            if checkpoints is not None and number in checkpoints:
                tensors, meta = checkpoints.load(number)
                report = self._resume(block, tensors, meta)
                bar.update(self.options.params.num_iterations)
            else:
                report, smooth = self._learn(block, number, started, bar)
                self._record(block, smooth)
                if checkpoints is not None:
                    self._save(checkpoints, number, block, smooth, report)
            with block.activations():
                quantized.advance(module)
            for index, target in enumerate(targets):
                floats.hidden[index] = target
        return report

    def _prepare(
        self,
        topology: BlockTopology,
        module: nn.Module,
        floats: BlockStream,
        quantized: BlockStream,
        targets: TensorCache,
    ) -> Block:
        """The block as an optimisation problem, its scale pairs proved."""
        adaptor, name = self.adaptor, topology.name
        params = {
            key: parameter.detach().to(
                torch.promote_types(parameter.dtype, torch.float32), copy=True
            )
            for key, parameter in adaptor.float_parameters(name).items()
        }
        layers = {layer for layer in topology.linears if f"{name}.{layer}" in self.quantizers}
        pairs = self._pairs(topology, layers) if self.options.params.let else ()
        with adaptor.disabled_quantizers(name):
            call = floats.select(0)
            inputs = probe_inputs(module, call.args, call.kwargs)
            prove_pairs(probe(module, (), inputs), params, pairs, where=name)
        return Block(
            module=module,
            name=name,
            stages=[
                kept for stage in topology.stages if (kept := [n for n in stage if n in layers])
            ],
            quantizers={layer: self.quantizers[f"{name}.{layer}"] for layer in layers},
            pairs=pairs,
            params=params,
            float_stream=floats,
            quantized_stream=quantized,
            targets=targets,
            adaptor=adaptor,
            quantize_activations=self.options.params.quantize_activations,
        )

    def _pairs(self, topology: BlockTopology, layers: set[str]) -> tuple[ScalePair, ...]:
        """Pairs of the kinds asked for that the block can have and that touch no excluded layer."""
        kinds = self.options.params.pairs
        self.refused.update({k: v for k, v in topology.unavailable.items() if k in kinds})
        kept = []
        for pair in select_pairs(topology, kinds, unavailable="skip"):
            touched = {side.module for side in pair.sides} & set(topology.linears)
            if touched <= layers:
                kept.append(pair)
            else:
                left = ", ".join(sorted(touched - layers))
                self.refused[pair.kind] = f"it would rescale {left}, which is excluded"
        return tuple(kept)

    def _learn(
        self, block: Block, number: int, started: float, bar: Any
    ) -> tuple[BlockReport, Mapping[str, Tensor]]:
        """Search, train, search again; deploy the best state and compare it with plain rounding."""
        adaptor, name = self.adaptor, block.name
        ranges_before = adaptor.tensor_ranges(name, lambda: self._run_some(block))
        kept: Kept
        best, kept, before = self._best_state(block, number, bar)
        block.deploy(best)
        self._check_function(block)
        deployed = block.score()
        nearest_state = block.nearest()
        nearest = block.score(block.state_params(nearest_state))
        if not deployed < nearest:
            best, kept = nearest_state, "nearest"
            block.deploy(best)
            deployed = block.score()
        stale = self._reset_stale(block, ranges_before) if best.smooth else ()
        report = BlockReport(
            name=name,
            loss_nearest=nearest,
            loss_before=before,
            loss_after=deployed,
            sqnr_db=sqnr_db(block.signal(), deployed),
            kept=kept,
            seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory(block.quantized_stream.device),
            reset_encodings=stale,
        )
        return report, best.smooth

    def _best_state(self, block: Block, number: int, bar: Any) -> tuple[BlockState, Kept, float]:
        """The best state that was found, how it was found, and the score where training began."""
        params = self.options.params
        bar.set_postfix_str("search")
        search = BlockSearch(block, clip=params.lwc, float_target=params.float_target)
        found = search.run(sweeps=params.search_sweeps)
        states: dict[Kept, tuple[float, BlockState]] = {}
        states["search"] = (block.score(block.state_params(found)), found)
        start, before = found, states["search"][0]
        if block.pairs and params.let_start != "search":
            smoothquant = params.let_start == "smoothquant"
            start = search.ranges(search.smoothquant(params.smooth_alpha) if smoothquant else {})
            before = block.score(block.state_params(start))
            states["search"] = min(states["search"], (before, start), key=lambda state: state[0])
        trained, score = self._train(block, start, before, number, bar)
        states["training"] = (score, trained)
        if block.pairs and params.search_sweeps:
            bar.set_postfix_str("search again")
            polished = search.run(trained.smooth, sweeps=params.search_sweeps)
            states["polish"] = (block.score(block.state_params(polished)), polished)
        kept = min(states, key=lambda name: states[name][0])
        return states[kept][1], kept, before

    def _train(
        self, block: Block, start: BlockState, start_score: float, number: int, bar: Any
    ) -> tuple[BlockState, float]:
        params = self.options.params

        def on_step(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3g}", refresh=False)
            bar.update()

        with ExitStack() as stack:
            outputs = None
            if params.aug_loss:
                outputs = stack.enter_context(block.quantized_stream.new_cache("float_outputs"))
                with self.adaptor.disabled_quantizers(block.name):
                    block.quantized_stream.advance(block.module, out=outputs)
            seed = params.seed * len(self.blocks) + number
            return train_block(
                block,
                start,
                start_score,
                params,
                seed=seed,
                float_outputs=outputs,
                on_step=on_step,
            )

    def _run_some(self, block: Block) -> None:
        for index in range(min(_PROBE_BATCHES, len(block.float_stream))):
            block.float_stream.call(block.module, index)

    def _check_function(self, block: Block) -> None:
        """The folded block, in float, against what it computed before.

        :raises TransformRefused: it computes something else.
        """
        call = block.float_stream.select(0)
        reference = block.targets.read(0, block.float_stream.device)
        with torch.no_grad(), self.adaptor.disabled_quantizers(block.name):
            change = (block.run(call) - reference)[call.mask].abs().max()
        deviation = float(change / reference[call.mask].abs().max().clamp_min(1e-30))
        bound = max(_LARGEST_CHANGE, _LARGEST_CHANGE_UNITS * torch.finfo(reference.dtype).eps)
        if not deviation <= bound:
            raise TransformRefused(
                f"{block.name}: folding the learnt scales must leave the float function unchanged, "
                f"but max|change| / max|output| is {deviation:.1e} (at most {bound:.0e} is "
                "allowed); report this, or leave kinds of pairs out"
            )

    def _reset_stale(self, block: Block, before: Mapping[str, Range]) -> tuple[str, ...]:
        """Drop the ranges of calibrated quantizers whose tensors a transform changed."""
        after = self.adaptor.tensor_ranges(block.name, lambda: self._run_some(block))
        return tuple(self.adaptor.reset_encodings(moved_ranges(before, after)))

    def _record(self, block: Block, smooth: Mapping[str, Tensor]) -> None:
        """Note in the ledger what was folded into the weights."""
        for pair, scale in block.chosen(smooth):
            sides = [
                (
                    f"{block.name}.{side.module}",
                    side.axis,
                    expand(side, scale, _width(block.params[f"{side.module}.weight"], side.axis)),
                )
                for side in pair.sides
            ]
            producer = next((s.module for s in pair.sides if s.power == -1), "")
            self.adaptor.ledger.record(
                TECHNIQUE,
                block.name,
                pair.name,
                pair.kind,
                sides,
                size=pair.size,
                source=f"{block.name}.{producer}",
            )

    def _save(
        self,
        checkpoints: Checkpoints,
        number: int,
        block: Block,
        smooth: Mapping[str, Tensor],
        report: BlockReport,
    ) -> None:
        tensors, meta = self.adaptor.snapshot(block.name)
        named = {f"smooth/{name}": scale for name, scale in smooth.items()}
        named |= {f"state/{name}": tensor for name, tensor in tensors.items()}
        checkpoints.save(number, named, {"state": meta, "report": asdict(report)})

    def _resume(
        self, block: Block, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
    ) -> BlockReport:
        parts: dict[str, dict[str, Tensor]] = {"smooth": {}, "state": {}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            parts[kind][name] = tensor
        self.adaptor.restore(block.name, parts["state"], meta["state"])
        self._record(block, parts["smooth"])
        return BlockReport.from_dict(meta["report"], resumed=True)


def _width(weight: Tensor, axis: str) -> int:
    return weight.shape[0] if axis == "out" else weight.shape[1]
