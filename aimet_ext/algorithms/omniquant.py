"""OmniQuant: learnable weight clipping and learnable equivalent transformation.

Shao et al., "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models",
arXiv 2308.13137.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from aimet_ext.algorithms.aliases import accepts_aimet_arguments
from aimet_ext.algorithms.block import Block, BlockState
from aimet_ext.algorithms.checks import layers_to_quantize, resolve_params
from aimet_ext.algorithms.report import BlockReport, Kept, OmniQuantReport
from aimet_ext.algorithms.search import search_block, smoothquant_start
from aimet_ext.algorithms.session import (
    on_device,
    open_ledger,
    original_names,
    peak_memory,
    undo_on_failure,
    weights_hash,
)
from aimet_ext.algorithms.training import train_block
from aimet_ext.config import OmniQuantParams
from aimet_ext.core.equivalence import ScalePair, expand
from aimet_ext.core.objective import sqnr_db
from aimet_ext.errors import TransformRefused
from aimet_ext.export.folders import check_output, replace_folder
from aimet_ext.export.ledger import Ledger
from aimet_ext.export.manifest import write_manifest
from aimet_ext.export.scales import write_scales
from aimet_ext.model.batches import ForwardFn, iterate_batches
from aimet_ext.model.cache import TensorCache
from aimet_ext.model.capture import capture_block_inputs
from aimet_ext.model.journal import Checkpoints, environment, hash_tensors
from aimet_ext.model.probe import probe, probe_inputs
from aimet_ext.model.proof import prove_pairs
from aimet_ext.model.stream import BlockStream
from aimet_ext.model.topology import BlockTopology, TopologyDescription, find_blocks, select_pairs
from aimet_ext.sim.base import Range, SimAdaptor, WeightQuantizer, adapt, moved_ranges

__all__ = ["OmniQuantReport", "apply_omniquant"]

_TECHNIQUE = "omniquant"
_LARGEST_CHANGE = 1e-4  # of a float32 block's output by folding, relative to its largest value
_FLOAT32_EPS = torch.finfo(torch.float32).eps
_PROBE_BATCHES = 4  # that tell which encodings a transform made stale


@accepts_aimet_arguments(order=("sim", "dataloader", "forward_fn", "num_iterations", "output_path"))
def apply_omniquant(
    sim: Any,
    dataloader: Iterable[Any],
    num_iterations: int = 800,
    *,
    forward_fn: ForwardFn | None = None,
    output_path: str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    modules_to_exclude: Sequence[str] = (),
    topology: TopologyDescription | None = None,
    params: OmniQuantParams | None = None,
    device: torch.device | str | None = None,
    aimet_keys: bool = False,
    progress: bool = True,
    **settings: Any,
) -> OmniQuantReport:
    r"""Learn clipping ranges and equivalent scales that minimise each block's output error.

    For every decoder block ``F`` with weights ``W``, in order,

    .. math::
        \min_{s, \gamma} \; \lVert F(W; X) - F(Q_\gamma(W_s); \hat X) \rVert^2

    where ``X`` are the block's inputs in the float model and ``X̂`` in the model quantized so far,
    ``W_s`` are the weights after a function-preserving rescaling by ``s`` (LET), and ``Q_γ``
    rounds to the nearest value of a grid whose range is a learnt share of each cell's (LWC).
    Scales and ranges come from SmoothQuant's formula and a search on second moments, are trained
    by gradient, searched again, and the best state on all batches is kept. A block for which plain
    rounding is no worse keeps plain rounding.

    Afterwards scales are folded into weights and norm gains, the float function is what it was,
    the weight quantizers of the blocks are set and frozen; ``sim.compute_encodings`` fills in the
    rest. If anything fails or is interrupted, the simulation is left as it was.

    :param sim: ``aimet_torch.QuantizationSimModel``, made by :func:`create_sim` or by hand.
        Mutated. Its activations may be calibrated already; encodings that a transform made stale
        are reset and named in the report.
    :param dataloader: batches: a tensor of ids ``[batch, seq]``, a tuple of positional arguments,
        or a mapping of keyword arguments as Hugging Face's collators give (``labels`` ignored).
        Tokens with attention mask 0 count nowhere.
    :param num_iterations: optimizer steps for each block, 800 if not given. A callable in its
        place is taken for ``forward_fn``, as in AIMET's order of arguments.
    :param forward_fn: called as ``forward_fn(model, batch)`` in place of ``model(batch)``.
    :param output_path: folder for the learnt scales (``scales.safetensors``, see
        :func:`load_scales`) and the report. A folder of ours is replaced, another one refused.
    :param checkpoint_dir: folder for a checkpoint of each finished block. The same call goes on
        from there after a crash and ends bit-identical on the same machine and versions.
    :param cache_dir: folder for memory-mapped caches; None keeps them in RAM.
    :param modules_to_exclude: full names of layers to leave alone.
    :param topology: names of the modules in a block, for a model of an unknown family.
    :param params: settings, see :class:`OmniQuantParams`.
    :param device: where the block being worked on goes; None leaves it where it is.
    :param aimet_keys: write AIMET's own ``{module}.prev`` and ``{module}.foll`` as well.
    :param progress: show progress bars.
    :param settings: fields of :class:`OmniQuantParams`, in place of ``params``; AIMET's names of
        arguments (``quant_sim``, …) are understood as well.
    :returns: losses before and after, of plain rounding, SQNR, seconds and memory of each block.
    :raises TypeError: a wrong type of simulation, batch or argument, or one argument twice.
    :raises ValueError: unusable data, an unknown architecture, layers without or with frozen
        weight quantizers, weights that hold NaN or are rounded already, the same technique twice.
    :raises TransformRefused: a scale pair changes the float function of this model.
    :raises FileExistsError: ``output_path`` holds files that are not ours.
    :raises RuntimeError: ``forward_fn`` failed.

    >>> report = apply_omniquant(sim, batches, num_iterations=800, output_path="scales")
    >>> sim.compute_encodings(run_calibration)
    """
    options = _Options(
        params=resolve_params(params, num_iterations, settings),
        forward_fn=forward_fn,
        output_path=None if output_path is None else check_output(output_path),
        checkpoint_dir=checkpoint_dir,
        cache_dir=cache_dir,
        device=device,
        aimet_keys=aimet_keys,
        progress=progress,
    )
    adaptor = adapt(sim)
    blocks = find_blocks(adaptor.model, topology)
    quantizers = layers_to_quantize(adaptor, blocks, modules_to_exclude)
    ledger = open_ledger(adaptor, _TECHNIQUE, list(quantizers))
    started = time.perf_counter()
    with undo_on_failure(adaptor, cache_dir) as keep:
        adaptor.ledger = ledger = copy.deepcopy(ledger)
        run = _Run(adaptor, blocks, quantizers, options, keep)
        reports = run.all_blocks(dataloader)
        ledger.log_run(_TECHNIQUE, list(quantizers), settings=options.params.to_dict())
        report = OmniQuantReport(
            blocks=tuple(reports),
            settings=options.params.to_dict(),
            refused_pairs=run.refused,
            seconds=time.perf_counter() - started,
        )
        if options.output_path is not None:
            _write(options.output_path, adaptor, ledger, report, aimet_keys)
    return report


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The arguments of a run that are not its data."""

    params: OmniQuantParams
    forward_fn: ForwardFn | None
    output_path: Path | None
    checkpoint_dir: str | Path | None
    cache_dir: str | Path | None
    device: torch.device | str | None
    aimet_keys: bool
    progress: bool


class _Run:
    """The loop over blocks; everything it changes is kept for undoing first."""

    def __init__(
        self,
        adaptor: SimAdaptor,
        blocks: Sequence[BlockTopology],
        quantizers: Mapping[str, WeightQuantizer],
        options: _Options,
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
                bar.set_postfix(block=f"{number + 1}/{len(self.blocks)}")
                reports.append(self._block(number, topology, floats, quantized, checkpoints, bar))
            return reports

    def _streams(self, dataloader: Iterable[Any]) -> tuple[BlockStream, BlockStream]:
        """Inputs of the first block, in the float model and with quantized embeddings."""
        options, adaptor = self.options, self.adaptor
        batches = list(iterate_batches(dataloader, opaque=options.forward_fn is not None))

        def capture() -> BlockStream:
            return capture_block_inputs(
                adaptor.model,
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
            return floats, capture()

    def _checkpoints(self, floats: BlockStream) -> Checkpoints | None:
        if self.options.checkpoint_dir is None:
            return None
        fingerprint = {
            **environment(floats.device),
            "technique": _TECHNIQUE,
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
        sweeps = params.search_sweeps if params.let else 0
        search = partial(search_block, clip=params.lwc, float_target=params.float_target)
        states: dict[Kept, tuple[float, BlockState]] = {}
        start = self._start(block, search)
        before = block.score(block.state_params(start))
        if params.search_sweeps:
            found = start if params.let_start == "search" else search(block, sweeps=sweeps)
            states["search"] = (block.score(block.state_params(found)), found)
        trained, score = self._train(block, start, number, bar)
        states["training"] = (score, trained)
        if params.search_sweeps:
            polished = search(block, trained.smooth, sweeps=sweeps)
            states["polish"] = (block.score(block.state_params(polished)), polished)
        kept = min(states, key=lambda name: states[name][0])
        return states[kept][1], kept, before

    def _start(self, block: Block, search: Callable[..., BlockState]) -> BlockState:
        """Where training begins: scales by the chosen rule, ranges by search."""
        params = self.options.params
        if not params.let or params.let_start == "ones":
            return search(block, sweeps=0)
        if params.let_start == "smoothquant":
            return search(block, smoothquant_start(block, params.smooth_alpha), sweeps=0)
        return search(block, sweeps=max(1, params.search_sweeps))

    def _train(
        self, block: Block, start: BlockState, number: int, bar: Any
    ) -> tuple[BlockState, float]:
        params = self.options.params

        def on_step(loss: float) -> None:
            bar.update()

        with ExitStack() as stack:
            outputs = None
            if params.aug_loss:
                outputs = stack.enter_context(block.quantized_stream.new_cache("float_outputs"))
                with self.adaptor.disabled_quantizers(block.name):
                    block.quantized_stream.advance(block.module, out=outputs)
            seed = params.seed * len(self.blocks) + number
            return train_block(
                block, start, params, seed=seed, float_outputs=outputs, on_step=on_step
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
        bound = _LARGEST_CHANGE * max(1.0, torch.finfo(reference.dtype).eps / _FLOAT32_EPS)
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
                _TECHNIQUE,
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


def _write(
    path: Path, adaptor: SimAdaptor, ledger: Ledger, report: OmniQuantReport, aimet_keys: bool
) -> None:
    """Write scales and report to a folder, in one step."""
    rename = original_names(adaptor.model)
    with replace_folder(path) as folder:
        write_scales(folder, ledger, rename=rename, aimet_keys=aimet_keys)
        report.save(folder / "report.json")
        write_manifest(folder, "scales", techniques=list(ledger.techniques))
