"""HQQ: ranges that minimise an lp norm of the weights' errors, by half-quadratic splitting.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023),
https://dropbox.github.io/hqq_blog.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from aimet_ext.config import HQQParams
from aimet_ext.core.affine import quantize
from aimet_ext.core.hqq import hqq_ranges, lp_rows
from aimet_ext.techniques.call import Call, technique
from aimet_ext.techniques.layer_report import WeightsReport
from aimet_ext.techniques.layerwise.deploy import Decision, Problem
from aimet_ext.techniques.layerwise.loop import Solver
from aimet_ext.techniques.layerwise.weights import run_on_weights


class HQQ(Solver[HQQParams]):
    """HQQ's decision of one layer."""

    def decide(self, problem: Problem) -> Decision:
        """Choose the ranges, where they may be chosen, and round to nearest."""
        params, codes = self.params, partial(quantize, problem.stored)

        def judge(values: Tensor) -> Tensor:
            return lp_rows(values.to(problem.weight) - problem.weight, params.lp_norm)

        if problem.frozen is not None:
            return Decision(codes=codes, judge=judge)
        scale, offset = hqq_ranges(
            problem.weight,
            problem.layout,
            problem.raised(problem.weight.new_zeros(problem.layout.shape)),
            num_iterations=params.num_iterations,
            lp_norm=params.lp_norm,
            beta=params.beta,
            kappa=params.kappa,
        )
        return Decision(scale=scale, offset=offset, codes=codes, judge=judge)


@technique("hqq")
def apply_hqq(call: Call[HQQParams]) -> WeightsReport:
    r"""Round weights to nearest on ranges that minimise an lp norm of their errors.

    Source: HQQ, Badri and Shaji 2023, https://dropbox.github.io/hqq_blog.

    For every cell of a weight's grid,

    .. math::
        \min_{s, z} \; \lVert W - Q(W) \rVert_p^p, \quad p < 1,
        \quad Q(W) = s \, (q - z), \quad q = \mathrm{clamp}(\mathrm{round}(W / s + z))

    is lowered by half-quadratic splitting: the large errors are taken out by soft-thresholding, and
    the range becomes the least-squares solution for the rest. Outliers so count less than in a
    squared error. Any grid will do, blockwise and LPBQ included, each as it is deployed. A range
    that an earlier technique froze is kept. Where activations are integers and calibrated, scales
    leave room for biases in int32.

    Weights are on their grids afterwards. A row for which plain rounding has the lower norm keeps
    plain rounding.

    >>> report = apply_hqq(sim, num_iterations=20)
    >>> sim.compute_encodings(run_calibration)
    """
    norm = f"sum of |error|^{call.params.lp_norm:g} of the weights"
    return run_on_weights(call, HQQ, objective=norm)
