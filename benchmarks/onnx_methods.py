"""The methods of both sides on simulations of aimet_onnx, and what they are scored by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from common import SEQ_MSE, SIMPLE, quiet
from methods import ADAROUND, STACKS, Effort, apply_stack
from onnx_models import run, weight_names_of_sim

AIMET_ONNX_STEPS = 10_000  # default of aimet_onnx.apply_adaround

Inputs = Sequence[Mapping[str, np.ndarray]]


def apply_onnx(method: str, sim: Any, inputs: Inputs, effort: Effort) -> dict[str, Any]:
    """A method of either side, called as its own documentation says.

    AIMET's stop with a ``TypeError`` at a layer whose weight stays float, so that these are named
    as the ones to leave alone.
    """
    import aimet_onnx

    if method == SIMPLE:
        return {}
    if method == SEQ_MSE:
        rest = [name for name, on in nodes(sim).items() if not on]
        with quiet():
            aimet_onnx.apply_seq_mse(sim, inputs, effort.candidates, rest or None)
        return {"candidates": effort.candidates}
    if method == ADAROUND:
        with quiet():
            aimet_onnx.apply_adaround(
                sim, inputs, effort.aimet_steps, [name for name, on in nodes(sim).items() if on]
            )
        return {"steps": effort.aimet_steps}
    return apply_stack(sim, inputs, STACKS[method], effort)


def nodes(sim: Any) -> dict[str, bool]:
    """Nodes with a weight, and whether it is quantized."""
    return {
        node: sim.qc_quantize_op_dict[weight].enabled
        for node, weight in weight_names_of_sim(sim).items()
        if weight in sim.qc_quantize_op_dict
    }


def output_error(sim: Any, inputs: Inputs, expected: Iterable[np.ndarray]) -> float:
    """Mean squared error of the first output relative to its mean square."""
    error = signal = 0.0
    for got, wanted in zip(run(sim, inputs), expected, strict=True):
        difference = torch.from_numpy(got).double() - torch.from_numpy(wanted).double()
        error += float(difference.square().sum())
        signal += float(torch.from_numpy(wanted).double().square().sum())
    return error / signal
