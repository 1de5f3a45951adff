"""OmniQuant: learnable weight clipping and learnable equivalent transformation.

Shao et al., "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models",
arXiv 2308.13137.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

from aimet_ext.config import OmniQuantParams
from aimet_ext.core.equivalence import PairKind
from aimet_ext.models.topology import TopologyDescription
from aimet_ext.techniques.blockwise.block import Block, BlockState, Choice
from aimet_ext.techniques.blockwise.loop import BlockSolver, run_blockwise
from aimet_ext.techniques.blockwise.search import BlockSearch
from aimet_ext.techniques.blockwise.training import train_block
from aimet_ext.techniques.call import Call, technique
from aimet_ext.techniques.report import BlockwiseReport

__all__ = ["OmniQuantReport", "apply_omniquant"]

OmniQuantReport = BlockwiseReport


class OmniQuant(BlockSolver[OmniQuantParams]):
    """Search on second moments, training by gradient, and the search again."""

    @property
    def pairs(self) -> Collection[PairKind]:
        """Kinds of scale pairs to learn."""
        return self.params.pairs if self.params.let else ()

    @property
    def quantize_activations(self) -> bool:
        """True to train with the activation quantizers on."""
        return self.params.quantize_activations

    @property
    def steps(self) -> int:
        """Optimizer steps for each block."""
        return self.params.num_iterations

    def decide(self, block: Block, bar: Any) -> Choice:
        """Choose the best of the states found by search, training and a second search."""
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


@technique("omniquant")
def apply_omniquant(
    call: Call[OmniQuantParams],
    *,
    topology: TopologyDescription | None = None,
    aimet_keys: bool = False,
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

    Afterwards scales are folded into weights and norm gains, and the float function is what it was.

    :param sim: ``QuantizationSimModel`` of aimet_torch or aimet_onnx, made by :func:`create_sim`
        or by hand. The blocks of an ONNX model are found by its structure and computed in PyTorch,
        after a check against onnxruntime; scales go into its initializers. Mutated. Its
        activations may be calibrated already; encodings that a transform made stale are reset and
        named in the report.
    :param dataloader: Batches: a tensor of ids ``[batch, seq]``, a tuple of positional arguments,
        or a mapping of keyword arguments as Hugging Face's collators give (``labels`` ignored).
        Tokens with attention mask 0 count nowhere.
    :param output_path: Folder for the learnt scales (``scales.safetensors``, see
        :func:`load_scales`) and the report. A folder that this package wrote is replaced, another
        one refused.
    :param checkpoint_dir: Folder for a checkpoint of each finished block. The same call goes on
        from there after a crash and ends bit-identical on the same machine and versions.
    :param modules_to_exclude: Full names of layers to leave alone; of an ONNX model, names of
        nodes too.
    :param topology: Names of the modules in a block, for a model of an unknown family.
    :param aimet_keys: Write AIMET's own ``{module}.prev`` and ``{module}.foll`` as well.
    :returns: Losses before and after, of plain rounding, SQNR, seconds and memory of each block.
    :raises ValueError: Unusable data, an unknown architecture, layers without or with frozen
        weight quantizers, weights that hold NaN or are rounded already, the same technique twice.
    :raises TransformRefused: A scale pair changes the float function of this model, or a block of
        an ONNX model has operators that PyTorch cannot compute; all are named.

    >>> report = apply_omniquant(sim, batches, num_iterations=800, output_path="scales")
    >>> sim.compute_encodings(run_calibration)
    """
    return run_blockwise(call, OmniQuant, topology=topology, aimet_keys=aimet_keys)
