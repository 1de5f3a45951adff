"""SmoothQuant: part of the difficulty of quantizing activations moves to the weights.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", arXiv 2211.10438.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor

from aimet_ext.config import SmoothQuantParams
from aimet_ext.core.equivalence import PairKind
from aimet_ext.models.description import TopologyDescription
from aimet_ext.techniques.blockwise.block import Block, BlockState, Choice
from aimet_ext.techniques.blockwise.loop import BlockSolver, run_blockwise
from aimet_ext.techniques.blockwise.pairs import read_pairs
from aimet_ext.techniques.call import Call, technique
from aimet_ext.techniques.report import BlockwiseReport

_ALPHAS = (0.25, 0.4, 0.5, 0.6, 0.75, 0.9)  # for "search", in which 0.5 is the start
_JUDGED = 4096  # tokens


class SmoothQuant(BlockSolver[SmoothQuantParams]):
    """The formula on peaks of inputs and weights, with one alpha, or the best for each pair."""

    @property
    def pairs(self) -> Collection[PairKind]:
        """Kinds of scale pairs to smooth."""
        return self.params.pairs

    @property
    def gathers(self) -> Literal["magnitudes"]:
        """Peaks of inputs."""
        return "magnitudes"

    @property
    def compares(self) -> bool:
        """False: it is not for the error of plain rounding that activations are smoothed."""
        return False

    @property
    def quantize_activations(self) -> bool:
        """True: errors are those with quantized activations, where the simulation has them."""
        return True

    @property
    def judged(self) -> int:
        """Number of tokens that errors are taken over, about."""
        return _JUDGED

    @torch.no_grad()
    def decide(self, block: Block, bar: Any) -> Choice:
        """Choose a scale for each pair, and leave the ranges open."""
        scales: dict[str, dict[float, Tensor]] = {}  # by pair and alpha
        alpha = self.params.alpha
        alphas = [alpha] if isinstance(alpha, float) else _ALPHAS
        for stage, inputs in zip(block.stages, block.inputs, strict=True):
            peak = inputs.magnitudes.checked(inputs.name).peak
            for read in read_pairs(block, stage):
                scales[read.pair.name] = {a: read.smoothquant(peak, a) for a in alphas}
        smooth = {
            pair: found[0.5 if len(found) > 1 else alphas[0]] for pair, found in scales.items()
        }
        if len(alphas) > 1 and smooth:
            self._search(block, scales, smooth)
        return Choice(BlockState(smooth), "smoothquant")

    def _search(
        self, block: Block, scales: dict[str, dict[float, Tensor]], smooth: dict[str, Tensor]
    ) -> None:
        """Give one pair after the other the scale with the lowest error of the block's output."""

        def error() -> float:
            return block.score(block.state_params(BlockState(smooth)))

        lowest = error()
        for pair, found in scales.items():
            best = smooth[pair]
            for scale in found.values():
                if scale is best:
                    continue
                smooth[pair] = scale
                if (now := error()) < lowest:
                    lowest, best = now, scale
            smooth[pair] = best


@technique("smoothquant")
def apply_smoothquant(
    call: Call[SmoothQuantParams],
    *,
    topology: TopologyDescription | None = None,
    aimet_keys: bool = False,
) -> BlockwiseReport:
    r"""Rescale channels so that activations are as easy to quantize as weights, or as hard.

    Source: SmoothQuant, Xiao et al. 2022, arXiv 2211.10438.

    For every input channel ``j`` of the layers that read one tensor

    .. math::
        s_j = \frac{\max |X_j|^\alpha}{\max |W_j|^{1 - \alpha}}

    divides the activations, folded into what comes before, and multiplies the weights. ``X`` are
    the inputs in the float model. The float function is what it was. Weights stay float and their
    ranges open: what follows decides them, such as :func:`apply_gptq`, or
    ``sim.compute_encodings`` alone.

    Losses in the report are those with weights rounded to nearest, before and after, and with
    activations quantized on the range of each batch where the simulation quantizes them; they
    are taken over some 4096 tokens of the float model's data. No block is left as it was because
    its loss rises: what is gained shows in activations, at the bits that these have.

    :param sim: ``QuantizationSimModel`` of aimet_torch or aimet_onnx, made by :func:`create_sim`
        or by hand. Mutated. Encodings of activations that the transform made stale are reset and
        named in the report.
    :param dataloader: Batches: a tensor of ids ``[batch, seq]``, a tuple of positional arguments,
        or a mapping of keyword arguments as Hugging Face's collators give (``labels`` ignored).
        Tokens with attention mask 0 count nowhere.
    :param output_path: Folder for the scales (``scales.safetensors``, see :func:`load_scales`) and
        the report. A folder that this package wrote is replaced, another one refused.
    :param checkpoint_dir: Folder for a checkpoint of each finished block. The same call goes on
        from there after a crash.
    :param modules_to_exclude: Layers to leave alone, by name or pattern; of an ONNX model, names of
        nodes too.
    :param topology: Names of the modules in a block, in place of what is found in a run of it.
    :param aimet_keys: Write AIMET's own ``{module}.prev`` and ``{module}.foll`` as well.
    :returns: Losses before and after, seconds and memory of each block.
    :raises ValueError: Unusable data, a model without decoder blocks, layers without or with frozen
        weight quantizers, weights that hold NaN or are rounded already, the same technique twice.
    :raises TransformRefused: Folded scales change the float function of a block, or one of an ONNX
        model has operators that PyTorch cannot compute; all are named.

    >>> report = apply_smoothquant(sim, batches, alpha=0.5)
    >>> sim.compute_encodings(run_calibration)
    """
    return run_blockwise(call, SmoothQuant, topology=topology, aimet_keys=aimet_keys)
