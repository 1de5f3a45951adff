"""RTN: plain rounding to the nearest value of the grid."""

from __future__ import annotations

from functools import partial

from aimet_ext.config import RTNParams
from aimet_ext.core.affine import quantize
from aimet_ext.techniques.call import Call, technique
from aimet_ext.techniques.layer_report import WeightsReport
from aimet_ext.techniques.layerwise.deploy import Decision, Problem
from aimet_ext.techniques.layerwise.loop import Solver
from aimet_ext.techniques.layerwise.weights import run_on_weights


class RTN(Solver[RTNParams]):
    """Plain rounding of one layer."""

    def decide(self, problem: Problem) -> Decision:
        """Round to nearest on the range of plain rounding, or the frozen one."""
        return Decision(codes=partial(quantize, problem.stored), compare=False)


@technique("rtn")
def apply_rtn(call: Call[RTNParams]) -> WeightsReport:
    """Round every weight to the nearest value of its grid.

    Source: ranges and rounding are those of AIMET 2.42.

    The baseline that other techniques are compared with. A range that an earlier technique froze is
    kept; any other one becomes the smallest range that holds every weight of its cell, as
    ``sim.compute_encodings`` computes it. Any grid will do, blockwise and LPBQ included. Where
    activations are integers and calibrated, scales leave room for biases in int32.

    Weights are on their grids afterwards, and ranges are frozen.

    >>> report = apply_rtn(sim)
    >>> sim.compute_encodings(run_calibration)
    """
    return run_on_weights(call, RTN)
