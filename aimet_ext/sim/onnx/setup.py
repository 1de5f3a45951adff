"""The construction of an ONNX simulation, before its layers get their grids."""

from __future__ import annotations

import copy
from typing import Any

import onnx
from aimet_onnx import QuantizationSimModel

from aimet_ext.sim.protocol import adapt
from aimet_ext.specs import QSpec

_GAINS = 16  # bits at most of what is stored and is no layer's weight


def build_sim(
    model: onnx.ModelProto, activations: QSpec | None, config: str, *, in_place: bool
) -> Any:
    """Return a simulation of a graph with 8-bit weights.

    :param activations: Spec of all activations; None leaves them and gains of norms float.
    :param config: Alias or path of AIMET's configuration.
    :param in_place: Make it of the model itself, which AIMET changes.
    """
    sim = QuantizationSimModel(
        model if in_place else copy.deepcopy(model),
        param_type="int8",
        activation_type="int16",
        config_file=config,
        providers=["CPUExecutionProvider"],
    )
    adaptor: Any = adapt(sim)
    weights = {layer.weight for layer in adaptor.layers.values()}
    for name, quantizer in sim.qc_quantize_op_dict.items():
        if activations is None:
            quantizer.enabled &= name in weights
        elif name in sim.activation_names:
            quantizer.set_bitwidth(activations.bitwidth)
            # Where the configuration asks for symmetric ones, a target needs them.
            quantizer.use_symmetric_encodings |= activations.symmetric
        elif name not in weights:
            quantizer.set_bitwidth(min(_GAINS, activations.bitwidth))
    return sim
