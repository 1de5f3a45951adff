"""GPTQ: rounding column after column, each making up for the errors of those before.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.config import GPTQParams
from aimet_ext.core.affine import Grid
from aimet_ext.core.rounding import coordinate_descent, gptq
from aimet_ext.core.rounding_ranges import rounding_ranges
from aimet_ext.data.batches import ForwardFn
from aimet_ext.techniques.aliases import accepts_aimet_arguments
from aimet_ext.techniques.call import run_layerwise
from aimet_ext.techniques.checks import merge_params
from aimet_ext.techniques.layerwise.deploy import Decision, Problem
from aimet_ext.techniques.layerwise.report import LayerwiseReport
from aimet_ext.techniques.layerwise.samples import SampleSum
from aimet_ext.techniques.session import RunOptions
from aimet_ext.walk.protocol import Activation

__all__ = ["apply_gptq"]


@dataclass(frozen=True)
class _GPTQ:
    params: GPTQParams
    technique: str = "gptq"
    rounds: bool = True
    aimet_stream: bool = False

    def samples(self, activation: Activation) -> SampleSum | None:
        return None

    def decide(self, problem: Problem) -> Decision:
        def codes(grid: Grid) -> Tensor:
            return self._round(problem, grid, self.params.beams, self.params.refine_sweeps)

        choose = self.params.scale_candidates > 0 and problem.frozen is None
        if not choose or not problem.layout.is_row_wise(problem.weight):
            return Decision(codes=codes)
        scale, offset = rounding_ranges(
            problem.weight,
            problem.layout,
            problem.moment.second,
            problem.pull,
            candidates=self.params.scale_candidates,
            damping=self.params.damping,
        )
        return Decision(scale=scale, offset=offset, codes=codes)

    def _round(self, problem: Problem, grid: Grid, beams: int, sweeps: int) -> Tensor:
        params, second, pull = self.params, problem.moment.second, problem.pull
        codes = gptq(
            problem.weight,
            grid,
            second,
            pull,
            damping=params.damping,
            act_order=params.act_order,
            beams=beams,
        )
        if not sweeps:
            return codes
        return coordinate_descent(problem.weight, codes, grid, second, pull, sweeps=sweeps)


@accepts_aimet_arguments(order=("sim", "dataloader"))
def apply_gptq(
    sim: Any,
    dataloader: Iterable[Any],
    *,
    forward_fn: ForwardFn | None = None,
    modules_to_exclude: Sequence[str | nn.Module] | None = None,
    output_path: str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    params: GPTQParams | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    **settings: Any,
) -> LayerwiseReport:
    r"""Round every weight so that later columns make up for the errors of earlier ones.

    For each output row ``w`` of a layer, on the grid that its quantizer has,

    .. math::
        \min_{\hat w \in \text{grid}} \; (\hat w - w) H (\hat w - w)^{\top}
        - 2 (\hat w - w) \cdot \text{pull},
        \quad H = \textstyle\sum \hat x \hat x^{\top}

    is solved column by column through a Cholesky factor of ``H``, then improved by coordinate
    descent on the full objective (``refine_sweeps``). ``pull`` is 0 unless
    ``inp_symmetry="asym"``, the default here, which has a layer make up for a share of the errors
    before it. Where no earlier technique froze a row's range, multiples of it are tried, each
    with its own rounding. Any grid will do, blockwise and LPBQ included.

    Weights are on their grids and quantizers frozen afterwards; ``sim.compute_encodings`` fills
    in the rest. A row for which plain rounding is better keeps plain rounding. If anything fails
    or is interrupted, the simulation is left as it was.

    :param sim: ``aimet_torch.QuantizationSimModel`` of any model with linear layers or
        convolutions. Mutated. Run this last of all techniques: it needs float weights and leaves
        rounded ones.
    :param dataloader: batches: a tensor, a tuple of positional arguments, or a mapping of keyword
        arguments. Tokens with attention mask 0 count nowhere.
    :param forward_fn: called as ``forward_fn(model, batch)`` in place of ``model(batch)``.
    :param modules_to_exclude: layers to leave alone, by name or as modules of ``sim.model``; they
        compute in float meanwhile.
    :param output_path: folder for the report. A folder of ours is replaced, another one refused.
    :param checkpoint_dir: folder for a checkpoint of each finished stage. The same call goes on
        from there after a crash.
    :param cache_dir: folder for memory-mapped caches; None keeps them in RAM.
    :param params: settings, see :class:`GPTQParams`.
    :param device: where the block being worked on goes; None leaves it where it is.
    :param progress: show a progress bar.
    :param settings: fields of :class:`GPTQParams`, in place of ``params``.
    :returns: objective of every layer, of plain rounding too; layers left alone with the reason.
    :raises TypeError: a wrong type of simulation, batch or argument, or one argument twice.
    :raises ValueError: unusable data, a layer that no data reached, weights that hold NaN or are
        rounded already, the same technique twice.
    :raises FileExistsError: ``output_path`` holds files that are not ours.
    :raises RuntimeError: ``forward_fn`` failed.

    >>> report = apply_gptq(sim, batches)
    >>> sim.compute_encodings(run_calibration)
    """
    merged = merge_params(GPTQParams, "apply_gptq", params, settings)
    return run_layerwise(
        sim,
        dataloader,
        _GPTQ(merged),
        RunOptions(
            forward_fn=forward_fn,
            checkpoint_dir=checkpoint_dir,
            cache_dir=cache_dir,
            device=device,
            progress=progress,
        ),
        modules_to_exclude=modules_to_exclude,
        output_path=output_path,
        max_bitwidth=merged.max_bitwidth,
    )
