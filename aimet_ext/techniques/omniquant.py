"""OmniQuant: learnable weight clipping and learnable equivalent transformation.

Shao et al., "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models",
arXiv 2308.13137.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from aimet_ext.config import OmniQuantParams
from aimet_ext.core.equivalence import PairKind
from aimet_ext.data.batches import ForwardFn
from aimet_ext.models.topology import TopologyDescription
from aimet_ext.techniques.aliases import accepts_aimet_arguments
from aimet_ext.techniques.blockwise.block import Block, BlockState, Choice
from aimet_ext.techniques.blockwise.loop import BlockSolver, run_blockwise
from aimet_ext.techniques.blockwise.report import BlockwiseReport
from aimet_ext.techniques.blockwise.search import BlockSearch
from aimet_ext.techniques.blockwise.training import train_block
from aimet_ext.techniques.checks import merge_params
from aimet_ext.techniques.session import RunOptions

__all__ = ["OmniQuantReport", "apply_omniquant"]

OmniQuantReport = BlockwiseReport


class _OmniQuant(BlockSolver[OmniQuantParams]):
    """Search on second moments, training by gradient, and the search again."""

    @property
    def pairs(self) -> Collection[PairKind]:
        return self.params.pairs if self.params.let else ()

    @property
    def quantize_activations(self) -> bool:
        return self.params.quantize_activations

    @property
    def steps(self) -> int:
        return self.params.num_iterations

    def decide(self, block: Block, bar: Any) -> Choice:
        params = self.params
        bar.set_postfix_str("search")
        search = BlockSearch(block, clip=params.lwc, float_target=params.float_target)
        found = search.run(sweeps=params.search_sweeps)
        states: dict[str, tuple[float, BlockState]] = {}
        states["search"] = (block.score(block.state_params(found)), found)
        start, before = found, states["search"][0]
        if block.pairs and params.let_start != "search":
            smoothquant = params.let_start == "smoothquant"
            start = search.ranges(search.smoothquant(params.smooth_alpha) if smoothquant else {})
            before = block.score(block.state_params(start))
            states["search"] = min(states["search"], (before, start), key=lambda state: state[0])
        trained, score = self._train(block, start, before, bar)
        states["training"] = (score, trained)
        if block.pairs and params.search_sweeps:
            bar.set_postfix_str("search again")
            polished = search.run(trained.smooth, sweeps=params.search_sweeps)
            states["polish"] = (block.score(block.state_params(polished)), polished)
        kept = min(states, key=lambda name: states[name][0])
        return Choice(states[kept][1], kept, before)

    def _train(
        self, block: Block, start: BlockState, start_score: float, bar: Any
    ) -> tuple[BlockState, float]:
        def on_step(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3g}", refresh=False)
            bar.update()

        with ExitStack() as stack:
            outputs = None
            if self.params.aug_loss:
                with block.adaptor.disabled_quantizers(block.name):
                    outputs = stack.enter_context(block.data.outputs("quantized"))
            return train_block(
                block,
                start,
                start_score,
                self.params,
                seed=self.params.seed * block.count + block.number,
                float_outputs=outputs,
                on_step=on_step,
            )


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
) -> BlockwiseReport:
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

    :param sim: ``QuantizationSimModel`` of aimet_torch or aimet_onnx, made by :func:`create_sim`
        or by hand. The blocks of an ONNX model are found by its structure and computed in PyTorch,
        after a check against onnxruntime; scales go into its initializers. Mutated. Its
        activations may be calibrated already; encodings that a transform made stale are reset and
        named in the report.
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
    :param modules_to_exclude: full names of layers to leave alone; of an ONNX model, names of
        nodes too.
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
    :raises TransformRefused: a scale pair changes the float function of this model, or a block of
        an ONNX model has operators that PyTorch cannot compute; all are named.
    :raises FileExistsError: ``output_path`` holds files that are not ours.
    :raises RuntimeError: ``forward_fn`` failed.

    >>> report = apply_omniquant(sim, batches, num_iterations=800, output_path="scales")
    >>> sim.compute_encodings(run_calibration)
    """
    merged = merge_params(
        OmniQuantParams, "apply_omniquant", params, settings, num_iterations=num_iterations
    )
    return run_blockwise(
        sim,
        dataloader,
        _OmniQuant(merged, "omniquant"),
        RunOptions(
            forward_fn=forward_fn,
            checkpoint_dir=checkpoint_dir,
            cache_dir=cache_dir,
            device=device,
            progress=progress,
        ),
        modules_to_exclude=modules_to_exclude,
        output_path=output_path,
        topology=topology,
        aimet_keys=aimet_keys,
    )
