"""The layer-wise methods of both sides, each called as its own documentation says."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from common import SEQ_MSE, SIMPLE, apply_seq_mse, call, quiet
from torch import Tensor, nn

import aimet_ext
from aimet_ext.sim.protocol import adapt

ADAROUND = "AIMET AdaRound"
AIMET_ADAROUND_STEPS = 15_000  # AIMET's default where a width is below 8 bits

# Techniques of ours in order, each with its settings.
Stack: TypeAlias = tuple[tuple[str, Mapping[str, Any]], ...]

BEST: Mapping[str, Any] = {"mode": "best"}
COMPATIBLE = "ours: seq_mse compatible"
BEST_STACK = "ours: best stack"
STACKS: dict[str, Stack] = {
    COMPATIBLE: (("seq_mse", {"mode": "compatible"}),),
    "ours: seq_mse": (("seq_mse", BEST),),
    "ours: seq_mse asym": (("seq_mse", {**BEST, "inp_symmetry": "asym"}),),
    "ours: gptq": (("gptq", {}),),
    "ours: adaround": (("adaround", {}),),
    "ours: autoround": (("autoround", {}),),
    "ours: seq_mse + gptq": (("seq_mse", BEST), ("gptq", {})),
    "ours: seq_mse + adaround": (("seq_mse", BEST), ("adaround", {})),
    BEST_STACK: (("gptq", {"beams": 4}),),
}


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much a method may do.

    :param candidates: of SeqMSE, both sides.
    :param aimet_steps: of AIMET's AdaRound, for each layer.
    :param aimet_scheme: how AIMET's AdaRound sets ranges before it rounds; its default is
        ``"post_training_tf_enhanced"``, ``"min_max"`` is what the others start from.
    :param steps: of our AdaRound; 0 is its own default.
    :param changes: settings of ours by technique; they win over the stack's.
    """

    candidates: int = 20
    aimet_steps: int = AIMET_ADAROUND_STEPS
    aimet_scheme: str = "post_training_tf_enhanced"
    steps: int = 0
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def apply_method(
    method: str, sim: Any, model: nn.Module, batches: Sequence[Tensor], effort: Effort
) -> dict[str, Any]:
    """Apply a method of either side to a simulation; what it says of itself, for the file.

    :param model: the float model that the simulation was made of, with the same names.
    """
    if method == SIMPLE:
        return {}
    if method == SEQ_MSE:
        return apply_seq_mse(sim, batches, effort.candidates)
    if method == ADAROUND:
        return apply_aimet_adaround(sim, model, batches, effort)
    return apply_stack(sim, batches, STACKS[method], effort)


def apply_stack(
    sim: Any, batches: Sequence[Tensor], stack: Stack, effort: Effort
) -> dict[str, Any]:
    """Our techniques, one after the other; the seconds of each."""
    done: dict[str, Any] = {}
    for technique, settings in stack:
        given = {**settings, **effort.changes.get(technique, {})}
        if technique == "seq_mse":
            given.setdefault("num_candidates", effort.candidates)
        if technique == "adaround" and effort.steps:
            given["num_iterations"] = effort.steps
        apply = getattr(aimet_ext, f"apply_{technique}")
        report = apply(sim, list(batches), progress=False, **given)
        done[technique] = {"settings": given, "seconds": getattr(report, "seconds", None)}
    return done


def apply_aimet_adaround(
    sim: Any, model: nn.Module, batches: Sequence[Tensor], effort: Effort
) -> dict[str, Any]:
    """AIMET's AdaRound, which makes a simulation of its own and returns a new model and a file.

    Both go into the simulation given, as its documentation has it: weights, then
    ``set_and_freeze_param_encodings``. Per channel and symmetric, as AIMET's default
    configuration is. Weights that the simulation leaves float are on the list to ignore.
    """
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
    from aimet_torch.common.defs import QuantScheme

    adaptor = adapt(sim)
    leaves = {
        name: module
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }
    views = {name: adaptor.weight_quantizer(name) for name in leaves}
    bits = {name: view.bitwidth for name, view in views.items() if view is not None}
    lowest = min(bits.values())
    parameters = AdaroundParameters(
        list(batches),
        num_batches=len(batches),
        default_num_iterations=effort.aimet_steps,
        forward_fn=call,
    )
    with tempfile.TemporaryDirectory() as folder, quiet():
        rounded = Adaround.apply_adaround(
            model,
            batches[0][:1],
            parameters,
            folder,
            "adaround",
            default_param_bw=lowest,
            param_bw_override_list=[(leaves[n], b) for n, b in bits.items() if b != lowest],
            ignore_quant_ops_list=[leaves[n] for n, view in views.items() if view is None],
            default_quant_scheme=QuantScheme[effort.aimet_scheme],
        )
        with torch.no_grad():
            for name in bits:
                weight = rounded.get_submodule(name).weight
                adaptor.model.get_submodule(name).weight.copy_(weight)
        sim.set_and_freeze_param_encodings(str(Path(folder) / "adaround.encodings"))
    return {"steps": effort.aimet_steps, "scheme": effort.aimet_scheme}
