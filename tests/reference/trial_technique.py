"""A technique as its author writes it: everything of it is in this file, but its row."""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor

from aimet_ext.config import LayerwiseParams
from aimet_ext.core.affine import Grid, quantize
from aimet_ext.specs import STRICT
from aimet_ext.techniques.call import Call, technique
from aimet_ext.techniques.layer_report import LayerwiseReport
from aimet_ext.techniques.layerwise.deploy import Decision, Problem
from aimet_ext.techniques.layerwise.loop import Solver, run_layerwise


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrialParams(LayerwiseParams):
    """Settings of :func:`apply_trial`.

    :param shrink: Share of the full range that is kept.
    """

    shrink: float = 0.9


class Trial(Solver[TrialParams]):
    """Rounding to nearest on a shrunk range."""

    def decide(self, problem: Problem) -> Decision:
        """Shrink the range where it may be chosen, and round to nearest."""

        def codes(grid: Grid) -> Tensor:
            return quantize(problem.weight, grid)

        if problem.frozen is not None:
            return Decision(codes=codes)
        plain = problem.nearest_grid()
        return Decision(scale=plain.scale * self.params.shrink, offset=plain.offset, codes=codes)


@technique("trial")
def apply_trial(call: Call[TrialParams]) -> LayerwiseReport:
    """Round to nearest on shrunk ranges; a row for which plain rounding is better keeps that."""
    return run_layerwise(call, Trial)
