"""AWQ: scales that round channels with large activations more finely, and clipping, by search.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
arXiv 2306.00978.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch

from aimet_ext.config import AWQParams
from aimet_ext.core.equivalence import PairKind
from aimet_ext.models.description import TopologyDescription
from aimet_ext.techniques.blockwise.block import Block, BlockState, Choice
from aimet_ext.techniques.blockwise.loop import BlockSolver, run_blockwise
from aimet_ext.techniques.blockwise.search import BlockSearch
from aimet_ext.techniques.call import Call, technique
from aimet_ext.techniques.report import BlockwiseReport

_JUDGED = 4096  # tokens; the search itself sees all


class AWQ(BlockSolver[AWQParams]):
    """The grid of exponents for each pair on second moments, then the grid of clipping."""

    @property
    def title(self) -> str:
        """Name beside the progress bar."""
        return "AWQ"

    @property
    def pairs(self) -> Collection[PairKind]:
        """Kinds of scale pairs to search."""
        return self.params.pairs

    @property
    def gathers(self) -> Literal["moments"]:
        """Second moments and mean magnitudes of the float model's inputs."""
        return "moments"

    @property
    def judged(self) -> int:
        """Tokens on which the result is compared with plain rounding, about."""
        return _JUDGED

    @torch.no_grad()
    def decide(self, block: Block, bar: Any) -> Choice:
        """Choose a scale for each pair, then ranges for the scaled weights."""
        search = BlockSearch(block).seeing(block.inputs)
        smooth = search.awq(self.params.num_grid, self.params.duo_scaling)
        if not self.params.clip:
            return Choice(BlockState(smooth), "awq")
        return Choice(search.clipped(smooth, self.params.num_grid), "awq")


@technique("awq")
def apply_awq(
    call: Call[AWQParams],
    *,
    topology: TopologyDescription | None = None,
    aimet_keys: bool = False,
) -> BlockwiseReport:
    r"""Search scales and clipping that lower each layer's output error, without a gradient.

    Source: AWQ, Lin et al. 2023, arXiv 2306.00978.

    For the layers that read one tensor, input channel ``j`` of their weights is multiplied by

    .. math::
        s_j = \operatorname{mean}(|X_j|)^a

    and what comes before divided by it, with the exponent ``a`` of a grid that gives the lowest
    squared error of their outputs, weights rounded on the grid that is deployed. ``a = 0``, which
    changes nothing, is among them. Then every cell's range is clipped to the share, down to half,
    with the lowest error. ``X`` are the inputs in the float model, of which second moments are
    gathered in one pass: no candidate costs a pass of its own.

    A block for which plain rounding is no worse, on a part of the data, keeps plain rounding.
    Afterwards scales are folded into weights and norm gains, and the float function is what it was.

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
    :returns: Losses before and after, of plain rounding, SQNR, seconds and memory of each block.
    :raises ValueError: Unusable data, a model without decoder blocks, layers without or with frozen
        weight quantizers, weights that hold NaN or are rounded already, the same technique twice.
    :raises TransformRefused: Folded scales change the float function of a block, or one of an ONNX
        model has operators that PyTorch cannot compute; all are named.

    >>> report = apply_awq(sim, batches, num_grid=20)
    >>> sim.compute_encodings(run_calibration)
    """
    return run_blockwise(call, AWQ, topology=topology, aimet_keys=aimet_keys)
