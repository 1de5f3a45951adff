"""SeqMSE: ranges of weights by a search that minimises each layer's output error in sequence."""

from __future__ import annotations

import warnings

from aimet_ext.config import SeqMSEParams
from aimet_ext.core.range_search import best_ranges, compatible_ranges
from aimet_ext.techniques.call import Call, technique
from aimet_ext.techniques.layer_report import LayerwiseReport
from aimet_ext.techniques.layerwise.deploy import Decision, Problem
from aimet_ext.techniques.layerwise.loop import Solver, run_layerwise

_COMPATIBLE_BITS = 4  # AIMET leaves wider weights alone


class SeqMSE(Solver[SeqMSEParams]):
    """SeqMSE's decision of one layer."""

    @property
    def aimet_stream(self) -> bool:
        """True in mode ``"compatible"``: what AIMET takes depends on what it sees."""
        return self.params.mode == "compatible"

    @property
    def max_bitwidth(self) -> int:
        """Bits above which a layer is left to plain rounding."""
        wide = self.params.max_bitwidth
        return min(wide, _COMPATIBLE_BITS) if self.params.mode == "compatible" else wide

    def decide(self, problem: Problem) -> Decision:
        """Choose the ranges."""
        second, pull, params = problem.moment.second, problem.pull, self.params
        if params.mode == "compatible":
            chosen = compatible_ranges(
                problem.weight,
                problem.layout,
                second,
                problem.moment.cross,
                params.num_candidates,
            )
            return Decision(range=chosen, compare=False)
        scale, offset = best_ranges(
            problem.weight,
            problem.layout,
            second,
            pull,
            num_candidates=params.num_candidates,
            sweeps=params.sweeps,
        )
        return Decision(scale=scale, offset=offset)


@technique("seq_mse")
def apply_seq_mse(
    call: Call[SeqMSEParams], *, checkpoints_config: str | None = None
) -> LayerwiseReport:
    r"""Choose the range of every weight that minimises its layer's output error.

    Source: SeqMSE of AIMET 2.42, on second moments in place of samples.

    For each cell of a weight's grid, layer after layer,

    .. math::
        \min_{\text{range}} \; \mathrm{tr}\, E H E^{\top}, \quad E = Q(W) - W,
        \quad H = {\textstyle\sum} \hat x \hat x^{\top}

    over all tokens, on what reaches the layer in the model quantized so far (``inp_symmetry``).
    The second moments ``H`` are gathered once for all layers that read one input, in one streamed
    pass; candidates cost no tokens. In mode ``"best"`` cells are judged together on the whole
    ``H`` by coordinate descent, asymmetric ranges on either side by themselves, and LPBQ on the
    grid that is deployed. Mode ``"compatible"`` takes the ranges that AIMET's own SeqMSE takes.

    :param checkpoints_config: AIMET's file that tells where to cut a model. Not needed: ignored,
        with a warning.
    """
    if checkpoints_config is not None:
        warnings.warn(
            "checkpoints_config is not needed and ignored: blocks are found in the model",
            stacklevel=3,
        )
    return run_layerwise(call, SeqMSE)
