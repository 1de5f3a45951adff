"""AdaRound: learning whether each weight is rounded up or down.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aimet_ext.config import AdaRoundParams
from aimet_ext.core.adaround import adaround, adaround_samples
from aimet_ext.core.affine import Grid
from aimet_ext.core.columns import Factor
from aimet_ext.core.gptq import coordinate_descent, gptq
from aimet_ext.core.range_search import best_ranges, rounding_ranges
from aimet_ext.techniques.call import Call, technique
from aimet_ext.techniques.layer_report import LayerwiseReport
from aimet_ext.techniques.layerwise.deploy import Decision, Problem, SampleSum
from aimet_ext.techniques.layerwise.loop import Solver, run_layerwise
from aimet_ext.walk.order import Activation

_log = logging.getLogger(__name__)

_MANY_SWEEPS = 2000

_DAMPING = 1e-3  # of the rounding at the start
# Beams of it in layers that are not wider, where they gain most and cost little, and behind a ReLU,
# from where minibatches lead less far.
_BEAMS, _NARROW = 32, 256
_MINIBATCHES = 8  # that count as one iteration behind a ReLU


class AdaRound(Solver[AdaRoundParams]):
    """AdaRound's decision of one layer."""

    def samples(self, activation: Activation) -> SampleSum | None:
        """Return a collector of samples, to judge the layer behind its ReLU."""
        params = self.params
        if not params.activation_aware:
            return None
        return SampleSum(params.samples, activation, params.seed)

    def decide(self, problem: Problem) -> Decision:
        """Choose ranges, if asked to, and the integers that are learnt on them."""
        scale = offset = None
        if self.params.search_ranges and problem.frozen is None:
            row_wise = problem.layout.is_row_wise(problem.weight)
            moment = problem.moment
            what = problem.weight, problem.layout, moment.second, problem.pull
            if row_wise:
                factor = moment.once("adaround, ranges", lambda: Factor.of(moment.second))
                scale, offset = rounding_ranges(*what, factor=factor)
            else:
                scale, offset = best_ranges(*what)
        if problem.samples is None or problem.moment.is_short:
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

    def _start(self, problem: Problem, grid: Grid, beams: int) -> Tensor | None:
        """Return the rounding at the start, which relaxation misses where H is near singular."""
        if self.params.start == "weight":
            return None
        moment = problem.moment
        factor = moment.once(
            "adaround, start", lambda: Factor.of(moment.second, _DAMPING, act_order=True)
        )
        return gptq(problem.weight, grid, moment.second, problem.pull, beams=beams, factor=factor)

    def _by_moments(self, problem: Problem) -> Callable[[Grid], Tensor]:
        params, second, pull = self.params, problem.moment.second, problem.pull
        beams = _BEAMS if problem.weight.shape[1] <= _NARROW else 1

        def codes(grid: Grid) -> Tensor:
            learnt = adaround(
                problem.weight,
                grid,
                second,
                pull,
                start=self._start(problem, grid, beams),
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
                counts=behind.counts,
                start=self._start(problem, grid, _BEAMS),
                num_iterations=_MINIBATCHES * params.num_iterations,
                batch=params.batch_size,
                **self._pace(),
                generator=torch.Generator().manual_seed(params.seed),
            )

        return codes


class _Behind:
    """The output error behind the ReLU that follows, on samples."""

    def __init__(self, problem: Problem, samples: SampleSum) -> None:
        self.activation = samples.activation
        self.inputs = samples.inputs.to(problem.weight)  # [groups, n, in]
        self.counts = samples.weights  # [groups, n]
        self.bias = problem.bias
        self.targets = self._outputs(problem.weight, samples.originals.to(problem.weight))

    def errors(self, values: Tensor) -> Tensor:
        """Return mean squared errors of all rows ``[out]``, of quantized values ``[out, in]``."""
        outputs = self._outputs(values.to(self.inputs), self.inputs)
        squares = (self.activation(outputs) - self.activation(self.targets)).square()
        if self.counts is not None:
            groups = len(self.counts)
            grouped = squares.unflatten(1, (groups, -1))  # [n, groups, out / groups]
            squares = (grouped * self.counts.T.to(squares)[..., None]).flatten(1)
        return squares.mean(0)

    def _outputs(self, weight: Tensor, inputs: Tensor) -> Tensor:
        """Return the outputs ``[n, out]`` before the ReLU."""
        grouped = weight.view(inputs.shape[0], -1, weight.shape[1])  # [groups, out / groups, in]
        outputs = (inputs @ grouped.mT).transpose(0, 1).flatten(1)  # [n, out]
        return outputs if self.bias is None else outputs + self.bias


@technique("adaround")
def apply_adaround(call: Call[AdaRoundParams]) -> LayerwiseReport:
    r"""Learn for every weight whether it is rounded up or down.

    Source: AdaRound, Nagel et al. 2020, arXiv 2004.10568.

    For each layer, its quantizer's grid held, integers ``q`` are relaxed to real numbers:

    .. math::
        \min_{q} \; \mathrm{tr}\, E H E^{\top} - 2 \langle E, \text{pull} \rangle
        + \lambda {\textstyle\sum} h (1 - h),
        \quad E = s q - W, \; h = q - \lfloor q \rfloor

    while ``λ`` rises until every code ``q`` is whole, by coordinate descent: a few codes at a time
    take the best values for their row, between grid points at first. The error is exact over all
    tokens, which second moments ``H = Σ x̂ x̂ᵀ`` give at the cost of one product with ``H`` for all
    codes. The regulariser is the paper's with exponent 2, annealed by its weight, and a code may
    move on to a further grid point; both found lower errors in fewer steps. The result is improved
    by coordinate descent on the error alone (``refine_sweeps``). A layer
    that a ReLU follows is judged behind the ReLU, on samples of its inputs. Any grid will do,
    blockwise and LPBQ included.

    Unlike AIMET's, which returns a new model and a JSON file, this changes ``sim``: weights are on
    their grids afterwards. A row for which plain rounding is better keeps plain rounding.

    :param num_iterations: Sweeps over the codes of each layer, at most: a layer at which nothing
        moves any more is done.
    """
    if call.params.num_iterations > _MANY_SWEEPS:
        _log.warning(
            "adaround: num_iterations counts sweeps over all codes of a layer, got %d, which takes "
            "long; AIMET's counts steps of gradient descent: leave it out",
            call.params.num_iterations,
        )
    return run_layerwise(call, AdaRound)
