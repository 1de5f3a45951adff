"""AIMET's quantizers of ONNX models: built as asked, given grids, put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aimet_onnx
import numpy as np
import onnx
from aimet_onnx.common.defs import QuantizationDataType
from aimet_onnx.common.libpymo import TensorQuantizerOpMode
from aimet_onnx.qc_quantize_op import QcQuantizeOp

from aimet_ext.config import LPBQ, Blockwise, PerTensor, QSpec
from aimet_ext.sim.onnx.quantizer_state import RAW_SCALE, calibrate_on, uninitialize
from aimet_ext.sim.protocol import adapt

__all__ = [
    "QuantizerState",
    "aimet_spec",
    "bias_state",
    "build_sim",
    "calibrated_state",
    "is_per_channel",
    "parameter_quantizers",
]

_BITS = 8  # of what gets a spec of its own anyway


@dataclass(frozen=True, eq=False)
class QuantizerState:
    """All that makes a quantizer, without the place in the graph that it stands at.

    The quantizer's C++ part is not copied: whoever changes one must give it a new one first, as
    :func:`calibrated_state` does.
    """

    parts: Mapping[str, Any]
    info: Mapping[str, Any]

    @classmethod
    def of(cls, quantizer: QcQuantizeOp) -> QuantizerState:
        """The state of a quantizer as it is now."""
        return cls(
            {key: getattr(quantizer, key, None) for key in _PARTS},
            {key: getattr(quantizer.quant_info, key) for key in _INFO},
        )

    def put(self, quantizer: QcQuantizeOp) -> None:
        """Have a quantizer of the same sim, or a copy of it, be in this state."""
        for key, value in self.info.items():
            setattr(quantizer.quant_info, key, value)
        for key, value in self.parts.items():
            setattr(quantizer, key, value)


_PARTS = (
    "quant_scheme",
    "rounding_mode",
    "tensor_quantizer_params",
    "_encoding_min_max_fixed_vals",
    "_is_encoding_frozen",
    "_scale_quantizer",
    RAW_SCALE,
)
_INFO = (
    "tensorQuantizerRef",
    "opMode",
    "useSymmetricEncoding",
    "enabled",
    "isIntDataType",
    "usePerChannelMode",
    "channelAxis",
    "blockAxis",
    "blockSize",
)


def parameter_quantizers(sim: Any, weights: Mapping[str, str]) -> dict[str, QcQuantizeOp]:
    """Weight quantizers of layers, of any type, on or off.

    The table of an embedding has none: AIMET takes it for an activation.

    :param weights: name of the stored weight by name of layer.
    """
    known, quantizers = set(sim.param_names), sim.qc_quantize_op_dict
    return {name: quantizers[weight] for name, weight in weights.items() if weight in known}


def calibrated_state(
    name: str,
    quantizer: QcQuantizeOp | None,
    spec: QSpec | None,
    weight: np.ndarray[Any, Any],
    axis: int,
) -> QuantizerState:
    """A quantizer with the range that ``sim.compute_encodings`` would set, as a state to put.

    The quantizer itself is left as it is.

    :param name: of the layer, for messages.
    :param spec: None for a float weight.
    :param weight: as stored in the model.
    :param axis: of the weight's output channels.
    :raises ValueError: AIMET has no such grid for the layer.
    """
    if quantizer is None:
        raise ValueError(
            f"{name}: a weight for which the simulation has a quantizer is required, it has none "
            "(AIMET takes the table of an embedding for an activation); leave the layer out"
        )
    copy = _fresh(quantizer)
    copy.enabled = spec is not None
    if spec is None:
        return QuantizerState.of(copy)
    if not isinstance(spec.granularity, PerTensor):
        _check_axes(name, copy, spec, weight.ndim, axis)
    copy.set_qspec(aimet_spec(spec))
    calibrate_on(copy, weight)
    return QuantizerState.of(copy)


def bias_state(quantizer: QcQuantizeOp, bias: np.ndarray[Any, Any]) -> QuantizerState:
    """The quantizer of a bias with a range for each channel, as AIMET has it beside blocks.

    It stays off if it was.
    """
    copy = _fresh(quantizer)
    copy.data_type = QuantizationDataType.int
    copy.use_symmetric_encodings = True
    copy.enable_per_channel_quantization()
    if copy.enabled:
        calibrate_on(copy, bias)
    return QuantizerState.of(copy)


def is_per_channel(quantizer: QcQuantizeOp) -> bool:
    """Whether a quantizer has a range for each channel, or for each block."""
    return bool(quantizer.quant_info.usePerChannelMode)


def _check_axes(name: str, quantizer: QcQuantizeOp, spec: QSpec, dims: int, axis: int) -> None:
    own = quantizer.tensor_quantizer_params
    if own is None or own.channel_axis is None:
        raise ValueError(
            f"{name}: AIMET knows no channels of this weight and quantizes it per tensor only, "
            f"got {spec.granularity}; give it PerTensor() or leave it out"
        )
    if own.channel_axis % dims != axis:
        raise ValueError(
            f"{name}: output channels of the stored weight in dimension {axis} are required, but "
            f"AIMET takes dimension {own.channel_axis % dims} for them; give it PerTensor() or "
            "leave it out"
        )


def aimet_spec(spec: QSpec) -> aimet_onnx.QSpec:
    """A spec in AIMET's classes."""
    dtype = aimet_onnx.qtype.int(spec.bitwidth)
    granularity = spec.granularity
    if isinstance(granularity, LPBQ):
        return aimet_onnx.QSpec.lpbq(dtype, granularity.block_size, granularity.scale_bits)
    if isinstance(granularity, Blockwise):
        return aimet_onnx.QSpec.blockwise(dtype, granularity.block_size, symmetric=spec.symmetric)
    if isinstance(granularity, PerTensor):
        return aimet_onnx.QSpec.per_tensor(dtype, symmetric=spec.symmetric)
    return aimet_onnx.QSpec.per_channel(dtype, symmetric=spec.symmetric)


def build_sim(
    model: onnx.ModelProto,
    weights: Mapping[str, QSpec | None] | QSpec,
    activations: QSpec | None,
    config: str | None = None,
    **settings: Any,
) -> Any:
    """A simulation whose weights are quantized layer by layer as asked, ranges already set.

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
    found = parameter_quantizers(sim, {name: layer.weight for name, layer in layers.items()})
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
    for name, spec in weights.items():
        layer, quantizer = layers[name], found.get(name)
        stored = adaptor.graph.array(layer.weight)
        state = calibrated_state(name, quantizer, spec, stored, int(layer.transposed))
        state.put(found[name])
    return sim


def _set_activation(quantizer: QcQuantizeOp, spec: QSpec | None) -> None:
    if spec is None:
        quantizer.enabled = False
    else:
        quantizer.set_bitwidth(spec.bitwidth)
        quantizer.use_symmetric_encodings = spec.symmetric


def _fresh(quantizer: QcQuantizeOp) -> QcQuantizeOp:
    """A copy with a C++ part of its own and no range, which may be changed."""
    copy = quantizer._copy()
    uninitialize(copy)
    setattr(copy, RAW_SCALE, None)
    copy.op_mode = TensorQuantizerOpMode.oneShotQuantizeDequantize
    return copy
