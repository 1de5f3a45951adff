"""GPTQ: rounding column by column, with the error compensated in the remaining columns.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323.
"""

from __future__ import annotations

from torch import Tensor

from aimet_ext.config import GPTQParams
from aimet_ext.core.affine import Grid
from aimet_ext.core.columns import Factor
from aimet_ext.core.gptq import coordinate_descent, gptq
from aimet_ext.core.range_search import rounding_ranges
from aimet_ext.techniques.call import Call, technique
from aimet_ext.techniques.layer_report import LayerwiseReport
from aimet_ext.techniques.layerwise.deploy import Decision, Problem
from aimet_ext.techniques.layerwise.loop import Solver, run_layerwise


class GPTQ(Solver[GPTQParams]):
    """GPTQ's decision of one layer."""

    def decide(self, problem: Problem) -> Decision:
        """Choose the integers, and where it may be chosen the range that suits them."""
        params, second, pull = self.params, problem.moment.second, problem.pull
        factor = self._factor(problem, act_order=params.act_order)
        shift = None if pull is None else factor.shift(pull)

        def codes(grid: Grid) -> Tensor:
            codes = gptq(
                problem.weight,
                grid,
                second,
                pull,
                beams=params.beams,
                factor=factor,
                shift=shift,
            )
            if not params.refine_sweeps:
                return codes
            sweeps = params.refine_sweeps
            return coordinate_descent(problem.weight, codes, grid, second, pull, sweeps=sweeps)

        if (
            not params.scale_candidates
            or problem.frozen is not None
            or not problem.layout.is_row_wise(problem.weight)
        ):
            return Decision(codes=codes)
        plain, pulled = factor, shift  # in the order of the weight
        if params.act_order:
            plain, pulled = self._factor(problem, act_order=False), None
        scale, offset = rounding_ranges(
            problem.weight,
            problem.layout,
            second,
            pull,
            candidates=params.scale_candidates,
            factor=plain,
            shift=pulled,
        )
        return Decision(scale=scale, offset=offset, codes=codes)

    def _factor(self, problem: Problem, *, act_order: bool) -> Factor:
        """Return the factor that all layers with this input share."""
        second, damping = problem.moment.second, self.params.damping
        return problem.moment.once(
            f"gptq, {act_order}", lambda: Factor.of(second, damping, act_order=act_order)
        )


@technique("gptq")
def apply_gptq(call: Call[GPTQParams]) -> LayerwiseReport:
    r"""Round weights column by column and compensate the rounding error in the remaining columns.

    Source: GPTQ, Frantar et al. 2022, arXiv 2210.17323.

    For each output row ``w`` of a layer, on the grid that its quantizer has,

    .. math::
        \min_{\hat w \in \text{grid}} \; (\hat w - w) H (\hat w - w)^{\top}
        - 2 (\hat w - w) \cdot \text{pull},
        \quad H = {\textstyle\sum} \hat x \hat x^{\top}

    is solved column by column through a Cholesky factor of ``H``, then improved by coordinate
    descent on the full objective (``refine_sweeps``). ``pull`` is 0 unless
    ``inp_symmetry="asym"``, the default here, with which a layer compensates a share of the errors
    of the layers before it. Where no earlier technique froze a row's range, multiples of it are
    tried, each with its own rounding. Any grid will do, blockwise and LPBQ included.

    Weights are on their grids afterwards. A row for which plain rounding is better keeps plain
    rounding.
    """
    return run_layerwise(call, GPTQ)
