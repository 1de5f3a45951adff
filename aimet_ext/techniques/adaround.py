"""AdaRound: learning whether each weight is rounded up or down.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.config import AdaRoundParams
from aimet_ext.core.adaround import adaround, adaround_samples
from aimet_ext.core.affine import Grid
from aimet_ext.core.range_search import best_ranges
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

__all__ = ["apply_adaround"]

# Of the rounding to begin with.
_DAMPING, _BEAMS = 1e-3, 32
# What is added to the diagonal where there are fewer tokens than inputs, as a share of its mean.
_DOUBT = 0.05


@dataclass(frozen=True)
class _AdaRound:
    params: AdaRoundParams
    technique: str = "adaround"
    rounds: bool = True
    aimet_stream: bool = False

    def samples(self, activation: Activation) -> SampleSum | None:
        params = self.params
        if not params.activation_aware:
            return None
        return SampleSum(params.samples, activation, params.seed)

    def decide(self, problem: Problem) -> Decision:
        problem = _doubted(problem)
        scale = offset = None
        if self.params.search_ranges and problem.frozen is None:
            row_wise = problem.layout.is_row_wise(problem.weight)
            search = rounding_ranges if row_wise else best_ranges
            scale, offset = search(
                problem.weight, problem.layout, problem.moment.second, problem.pull
            )
        if problem.samples is None:
            return Decision(scale=scale, offset=offset, codes=self._by_moments(problem))
        behind = _Behind(problem, problem.samples)
        return Decision(
            scale=scale,
            offset=offset,
            codes=self._by_samples(problem, behind),
            judge=behind.errors,
        )

    def _pace(self) -> dict[str, Any]:
        params = self.params
        momentum = {} if params.momentum is None else {"momentum": params.momentum}
        return {"learning_rate": params.learning_rate, **momentum}

    def _start(self, problem: Problem, grid: Grid) -> Tensor | None:
        """Rounding to begin with: what relaxation alone does not find where H is near singular."""
        if self.params.start == "weight":
            return None
        second, pull = problem.moment.second, problem.pull
        return gptq(
            problem.weight, grid, second, pull, damping=_DAMPING, act_order=True, beams=_BEAMS
        )

    def _by_moments(self, problem: Problem) -> Callable[[Grid], Tensor]:
        params, second, pull = self.params, problem.moment.second, problem.pull

        def codes(grid: Grid) -> Tensor:
            learnt = adaround(
                problem.weight,
                grid,
                second,
                pull,
                start=self._start(problem, grid),
                num_iterations=params.num_iterations,
                **self._pace(),
            )
            if not params.refine_sweeps:
                return learnt
            return coordinate_descent(
                problem.weight, learnt, grid, second, pull, sweeps=params.refine_sweeps
            )

        return codes

    def _by_samples(self, problem: Problem, behind: _Behind) -> Callable[[Grid], Tensor]:
        params = self.params

        def codes(grid: Grid) -> Tensor:
            return adaround_samples(
                problem.weight,
                problem.bias,
                grid,
                behind.inputs,
                behind.targets,
                behind.activation,
                start=self._start(problem, grid),
                num_iterations=params.num_iterations,
                batch=params.batch_size,
                **self._pace(),
                generator=torch.Generator().manual_seed(params.seed),
            )

        return codes


def _doubted(problem: Problem) -> Problem:
    """The problem with the second moment drawn to equal, independent inputs if tokens are few.

    Roundings make up for one another along directions that few tokens say little about, and would
    pay for it on others. With many tokens for each input nothing changes.
    """
    moment = problem.moment
    second = moment.second
    share = _DOUBT * min(1.0, second.shape[-1] / moment.tokens)
    diagonal = second.diagonal(dim1=-2, dim2=-1)  # [..., in]
    equal = torch.where(diagonal > 0, diagonal.mean(-1, keepdim=True), 0.0)
    second = second * (1 - share)
    second.diagonal(dim1=-2, dim2=-1).add_(equal, alpha=share)
    return replace(problem, moment=replace(moment, second=second))


class _Behind:
    """The output error behind the ReLU that follows, on samples."""

    def __init__(self, problem: Problem, samples: SampleSum) -> None:
        self.activation = samples.activation
        self.inputs = samples.inputs.to(problem.weight)  # [groups, n, in]
        self.bias = problem.bias
        self.targets = self._outputs(problem.weight, samples.originals.to(problem.weight))

    def errors(self, values: Tensor) -> Tensor:
        """Mean squared error of every row ``[out]`` for quantized values ``[out, in]``."""
        outputs = self._outputs(values.to(self.inputs), self.inputs)
        difference = self.activation(outputs) - self.activation(self.targets)
        return difference.square().mean(0)

    def _outputs(self, weight: Tensor, inputs: Tensor) -> Tensor:
        """``[n, out]`` before the ReLU."""
        grouped = weight.view(inputs.shape[0], -1, weight.shape[1])  # [groups, out / groups, in]
        outputs = (inputs @ grouped.mT).transpose(0, 1).flatten(1)  # [n, out]
        return outputs if self.bias is None else outputs + self.bias


@accepts_aimet_arguments(order=("sim", "dataloader", "num_iterations"))
def apply_adaround(
    sim: Any,
    dataloader: Iterable[Any],
    num_iterations: int = 300,
    *,
    forward_fn: ForwardFn | None = None,
    modules_to_exclude: Sequence[str | nn.Module] | None = None,
    output_path: str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    params: AdaRoundParams | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    **settings: Any,
) -> LayerwiseReport:
    r"""Learn for every weight whether it is rounded up or down.

    For each layer, its quantizer's grid held, integers ``q`` are relaxed to real numbers:

    .. math::
        \min_{q} \; \mathrm{tr}\, E H E^{\top} - 2 \langle E, \text{pull} \rangle
        + \lambda \textstyle\sum h (1 - h),
        \quad E = s q - W, \; h = q - \lfloor q \rfloor

    while ``λ`` rises until every code ``q`` is whole. The gradient is exact over all tokens, which
    second moments ``H = Σ x̂ x̂ᵀ`` give at the cost of one product with ``H``. The regulariser is
    the paper's with exponent 2, annealed by its weight, and a code may move on to a further grid
    point; both found lower errors in fewer steps. The result is improved by coordinate descent on
    the same objective (``refine_sweeps``). A layer that a ReLU follows is judged behind the ReLU,
    on samples of its inputs. Any grid will do, blockwise and LPBQ included.

    Unlike AIMET's, which returns a new model and a JSON file, this changes ``sim``: weights are on
    their grids and quantizers frozen afterwards; ``sim.compute_encodings`` fills in the rest. A
    row for which plain rounding is better keeps plain rounding. If anything fails or is
    interrupted, the simulation is left as it was.

    :param sim: ``aimet_torch.QuantizationSimModel`` of any model with linear layers or
        convolutions. Mutated. Run this last of all techniques: it needs float weights and leaves
        rounded ones.
    :param dataloader: batches: a tensor, a tuple of positional arguments, or a mapping of keyword
        arguments. Tokens with attention mask 0 count nowhere.
    :param num_iterations: optimizer steps for each layer, at most: a layer at which nothing moves
        any more is done.
    :param forward_fn: called as ``forward_fn(model, batch)`` in place of ``model(batch)``.
    :param modules_to_exclude: layers to leave alone, by name or as modules of ``sim.model``; they
        compute in float meanwhile.
    :param output_path: folder for the report. A folder of ours is replaced, another one refused.
    :param checkpoint_dir: folder for a checkpoint of each finished stage. The same call goes on
        from there after a crash.
    :param cache_dir: folder for memory-mapped caches; None keeps them in RAM.
    :param params: settings, see :class:`AdaRoundParams`.
    :param device: where the block being worked on goes; None leaves it where it is.
    :param progress: show a progress bar.
    :param settings: fields of :class:`AdaRoundParams`, in place of ``params``.
    :returns: objective of every layer, of plain rounding too; layers left alone with the reason.
    :raises TypeError: a wrong type of simulation, batch or argument, or one argument twice.
    :raises ValueError: unusable data, a layer that no data reached, weights that hold NaN or are
        rounded already, the same technique twice.
    :raises FileExistsError: ``output_path`` holds files that are not ours.
    :raises RuntimeError: ``forward_fn`` failed.

    >>> report = apply_adaround(sim, batches)
    >>> sim.compute_encodings(run_calibration)
    """
    merged = merge_params(
        AdaRoundParams, "apply_adaround", params, settings, num_iterations=num_iterations
    )
    return run_layerwise(
        sim,
        dataloader,
        _AdaRound(merged),
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
