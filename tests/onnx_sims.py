"""ONNX simulations whose weights are quantized layer by layer as asked."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import aimet_onnx
import onnx
from aimet_onnx.qc_quantize_op import QcQuantizeOp

from aimet_ext.sim.onnx.ranges import parameter_quantizers, put_grids
from aimet_ext.sim.protocol import adapt
from aimet_ext.specs import QSpec

__all__ = ["build_sim"]


def build_sim(
    model: onnx.ModelProto,
    weights: Mapping[str, QSpec | None] | QSpec,
    activations: QSpec | None,
    config: str | None = None,
    **settings: Any,
) -> Any:
    """Return a simulation whose weights are quantized layer by layer as asked, ranges already set.

    :param model: copied.
    :param weights: a spec by name of layer, None for float, as are all other parameters. One spec
        is for all linear layers and convolutions that AIMET quantizes.
    :param activations: spec of all activations, None for float.
    :param config: alias or path of AIMET's configuration file.
    :param settings: further arguments of ``aimet_onnx.QuantizationSimModel``.
    :raises ValueError: there is no layer of a name, or AIMET has no such grid for it.
    """
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    sim = aimet_onnx.QuantizationSimModel(copied, config_file=config, **settings)
    for name in sim.activation_names:
        _set_activation(sim.qc_quantize_op_dict[name], activations)
    adaptor: Any = adapt(sim)
    layers = adaptor.layers
    found = parameter_quantizers(adaptor)
    if isinstance(weights, QSpec):
        kinds = ("linear", "conv")
        weights = {n: weights for n, q in found.items() if q.enabled and layers[n].kind in kinds}
    unknown = [name for name in weights if name not in layers]
    if unknown:
        raise ValueError(
            f"weights must name layers of the model, such as {next(iter(layers), '')!r}; not "
            f"found: {', '.join(unknown)}"
        )
    for name in sim.param_names:
        sim.qc_quantize_op_dict[name].enabled = False
    put_grids(adaptor, weights, ExitStack())
    return sim


def _set_activation(quantizer: QcQuantizeOp, spec: QSpec | None) -> None:
    if spec is None:
        quantizer.enabled = False
    else:
        quantizer.set_bitwidth(spec.bitwidth)
        quantizer.use_symmetric_encodings = spec.symmetric
