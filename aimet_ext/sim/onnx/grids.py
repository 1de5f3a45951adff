"""Grids that the weights of an ONNX simulation are given, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import aimet_onnx
import numpy as np
from aimet_onnx.common.defs import QuantizationDataType
from aimet_onnx.qc_quantize_op import QcQuantizeOp
from onnx import NodeProto

from aimet_ext.config import LPBQ, Blockwise, PerTensor, QSpec
from aimet_ext.sim.onnx.quantizer_state import (
    RAW_SCALE,
    calibrate_on,
    quantizer_state,
    restore_quantizer,
    uninitialize,
)

if TYPE_CHECKING:
    from aimet_ext.onnx.layers import OnnxLayer
    from aimet_ext.sim.onnx.adaptor import OnnxSim

__all__ = [
    "aimet_spec",
    "body_names",
    "is_frozen",
    "is_fused",
    "parameter_quantizers",
    "put_grids",
    "readers",
]


def parameter_quantizers(adaptor: OnnxSim) -> dict[str, QcQuantizeOp]:
    """Return the weight quantizers of layers, of any type, on or off.

    The table of an embedding has none: AIMET takes it for an activation.
    """
    known, quantizers = set(adaptor.sim.param_names), adaptor.sim.qc_quantize_op_dict
    return {n: quantizers[x.weight] for n, x in adaptor.layers.items() if x.weight in known}


def readers(adaptor: OnnxSim) -> dict[str, list[NodeProto]]:
    """Return the simulation's own nodes that read a tensor, quantized or not, by its name."""
    nodes = adaptor.sim.model.model.graph.node
    through = {n.output[0]: n.input[0] for n in nodes if n.op_type == "QcQuantizeOp"}
    found: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input if node.op_type != "QcQuantizeOp" else ():
            found.setdefault(through.get(name, name), []).append(node)
    return found


def body_names(adaptor: OnnxSim) -> dict[str, list[str]]:
    """Return the names of the nodes of each function of the simulation's model, by its domain."""
    functions = adaptor.sim.model.model.functions
    return {function.domain: [node.name for node in function.node] for function in functions}


def is_frozen(quantizer: QcQuantizeOp | None) -> bool:
    """Return True if an earlier technique froze the range of a quantizer."""
    return quantizer is not None and quantizer.is_encoding_frozen()


def is_fused(node: NodeProto) -> bool:
    """Return True for what AIMET makes of MatMul and Add."""
    return node.domain.startswith("aimet.supergroup")


def put_grids(adaptor: OnnxSim, specs: Mapping[str, QSpec | None], undo: ExitStack) -> None:
    """Give layers their grids and ranges; all quantizers are made before any is changed.

    :param specs: Grid of each layer, None for a float weight.
    :param undo: Gets what puts every quantizer back.
    :raises ValueError: AIMET has no such grid for a layer.
    """
    quantizers = parameter_quantizers(adaptor)
    made: dict[str, tuple[Any, Any]] = {}
    for name, spec in specs.items():
        layer = adaptor.layers[name]
        if layer.weight not in made:
            own = quantizers.get(name)
            stored = adaptor.graph.array(layer.weight)
            copy = _weight_copy(name, own, spec, stored, int(layer.transposed))
            made[layer.weight] = (own, copy)
            made.update(_bias_copies(adaptor, layer, spec))
    for quantizer, copy in made.values():
        undo.callback(restore_quantizer, quantizer, *quantizer_state(quantizer))
        restore_quantizer(quantizer, *quantizer_state(copy))


def _weight_copy(
    name: str,
    quantizer: QcQuantizeOp | None,
    spec: QSpec | None,
    weight: np.ndarray[Any, Any],
    axis: int,
) -> QcQuantizeOp:
    """Copy a weight's quantizer, with a grid and the range that calibration would set."""
    if quantizer is None:
        raise ValueError(
            f"{name}: a weight for which the simulation has a quantizer is required, it has none "
            "(AIMET takes the table of an embedding for an activation); leave the layer out"
        )
    copy = _empty_copy(quantizer)
    copy.enabled = spec is not None
    if spec is None:
        return copy
    if not isinstance(spec.granularity, PerTensor):
        _check_axes(name, copy, spec, weight.ndim, axis)
    copy.set_qspec(aimet_spec(spec))
    calibrate_on(copy, weight)
    return copy


def _bias_copies(
    adaptor: OnnxSim, layer: OnnxLayer, spec: QSpec | None
) -> Iterator[tuple[str, tuple[QcQuantizeOp, QcQuantizeOp]]]:
    """Copy a bias's quantizer, with a range for each channel, as AIMET has it beside blocks.

    It stays off if it was.
    """
    name = layer.bias or ""
    bias = adaptor.sim.qc_quantize_op_dict.get(name)
    if bias is None or spec is None or isinstance(spec.granularity, PerTensor):
        return
    if bias.tensor_quantizer_params is None:  # of a lone Add, which has one scale
        return
    if bias.quant_info.usePerChannelMode or bias.is_encoding_frozen():
        return
    copy = _empty_copy(bias)
    copy.data_type = QuantizationDataType.int
    copy.use_symmetric_encodings = True
    copy.enable_per_channel_quantization()
    if copy.enabled:
        calibrate_on(copy, adaptor.graph.array(name))
    yield name, (bias, copy)


def _empty_copy(quantizer: QcQuantizeOp) -> QcQuantizeOp:
    """Copy a quantizer, with a C++ part of its own and no range."""
    copy = quantizer._copy()
    uninitialize(copy)
    setattr(copy, RAW_SCALE, None)
    return copy


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
    """Return a spec in AIMET's classes."""
    dtype, granularity = aimet_onnx.qtype.int(spec.bitwidth), spec.granularity
    if isinstance(granularity, LPBQ):
        return aimet_onnx.QSpec.lpbq(dtype, granularity.block_size, granularity.scale_bits)
    if isinstance(granularity, Blockwise):
        return aimet_onnx.QSpec.blockwise(dtype, granularity.block_size, symmetric=spec.symmetric)
    if isinstance(granularity, PerTensor):
        return aimet_onnx.QSpec.per_tensor(dtype, symmetric=spec.symmetric)
    return aimet_onnx.QSpec.per_channel(dtype, symmetric=spec.symmetric)
