"""One quantizer of aimet_onnx: grid and range are read, written, calibrated and restored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import aimet_onnx
import numpy as np
import torch
from aimet_onnx.common import libpymo
from aimet_onnx.common.defs import QuantizationDataType, QuantScheme
from aimet_onnx.qc_quantize_op import (
    LPBQScaleQuantizer,
    OpMode,
    QcQuantizeOp,
    TensorQuantizerParams,
)
from torch import Tensor

__all__ = [
    "RAW_SCALE",
    "calibrate_on",
    "is_blockwise",
    "is_integer",
    "load_scale",
    "quantizer_state",
    "read_encodings",
    "restore_quantizer",
    "rounds_to_integers",
    "stored_cells",
    "switched_off",
    "uninitialize",
]

# Attribute of AIMET's quantizer: LPBQ's scale of each block as it was before AIMET put the scales
# of a channel on integers, which is all that AIMET keeps.
RAW_SCALE = "aimet_ext_raw_scale"
_FLOAT_FIELDS = ("exponent_bits", "mantissa_bits", "finite", "unsigned_zero")


def rounds_to_integers(quantizer: QcQuantizeOp) -> bool:
    """Return True for a quantizer of an integer type, on or off."""
    return bool(quantizer.data_type == QuantizationDataType.int)


def is_integer(quantizer: QcQuantizeOp | None) -> bool:
    """Return True for a quantizer that is there, is on, and rounds to integers."""
    return quantizer is not None and bool(quantizer.enabled) and rounds_to_integers(quantizer)


@contextmanager
def switched_off(quantizers: Sequence[QcQuantizeOp]) -> Iterator[None]:
    """Open a context in which these quantizers, which are on, do nothing."""
    try:
        for quantizer in quantizers:
            quantizer.enabled = False
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enabled = True


def calibrate_on(quantizer: QcQuantizeOp, values: np.ndarray[Any, Any]) -> None:
    """Set a quantizer's range from all the values it is to quantize, on or off."""
    enabled = quantizer.enabled
    try:
        quantizer.enabled = True
        quantizer.reset_encoding_stats()
        quantizer.update_encoding_stats(np.ascontiguousarray(values, dtype=np.float32))
        quantizer.compute_encodings()
    finally:
        quantizer.enabled = enabled


def uninitialize(quantizer: QcQuantizeOp, *, parameter: bool = True) -> None:
    """Drop a quantizer's range, frozen or not: it is as AIMET built it, waiting for calibration."""
    quantizer._is_encoding_frozen = False
    quantizer.reset_encoding_stats()
    quantizer.op_mode = OpMode.oneShotQuantizeDequantize if parameter else OpMode.updateStats


def quantizer_state(quantizer: QcQuantizeOp) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return copies of a quantizer's range, and the kind of its grid as JSON values.

    :returns: ``encodings``, a row of delta, offset, min and max for each cell, and LPBQ's
        ``raw_scale``, where there are such; all else that makes the quantizer.
    """
    info, params = quantizer.quant_info, quantizer.tensor_quantizer_params
    precision, scales = quantizer.precision(), quantizer._scale_quantizer
    fixed = quantizer._encoding_min_max_fixed_vals
    meta = {
        "dtype": quantizer.data_type.name,
        "bitwidth": quantizer.bitwidth,
        "format": (
            None
            if rounds_to_integers(quantizer)
            else {field: getattr(precision, field) for field in _FLOAT_FIELDS}
        ),
        "symmetric": quantizer.use_symmetric_encodings,
        "strict_symmetric": quantizer.use_strict_symmetric,
        "unsigned_symmetric": quantizer.use_unsigned_symmetric,
        "zero_point_shift": quantizer.get_zero_point_shift(),
        "per_channel": info.usePerChannelMode,
        "channel_axis": info.channelAxis,
        "block_axis": info.blockAxis,
        "block_size": info.blockSize,
        "scale_bits": None if scales is None else scales.scale_bits,
        "layout": None
        if params is None
        else {
            "tensor_shape": [int(size) for size in params.tensor_shape],
            "channel_axis": params.channel_axis,
            "block_axis": params.block_axis,
        },
        "quant_scheme": quantizer.quant_scheme.name,
        "op_mode": quantizer.op_mode.name,
        "fixed_range": None if fixed is None else list(fixed),
        "state": {
            "enabled": quantizer.enabled,
            "frozen": quantizer.is_encoding_frozen(),
            "initialized": quantizer.is_initialized(),
        },
    }
    tensors: dict[str, Tensor] = {}
    encodings = quantizer.get_encodings()
    if encodings is not None:
        rows = [(e.delta, e.offset, e.min, e.max) for e in encodings]
        tensors["encodings"] = torch.tensor(rows, dtype=torch.float64)
    raw = getattr(quantizer, RAW_SCALE, None)
    if raw is not None:
        tensors["raw_scale"] = raw.clone()
    return tensors, meta


def restore_quantizer(
    quantizer: QcQuantizeOp, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Give a quantizer the state that :func:`quantizer_state` returned, of this or another one."""
    quantizer._is_encoding_frozen = False
    layout, form, fixed = meta["layout"], meta["format"], meta["fixed_range"]
    quantizer.tensor_quantizer_params = None if layout is None else TensorQuantizerParams(**layout)
    info = quantizer.quant_info
    info.usePerChannelMode = meta["per_channel"]
    info.channelAxis, info.blockAxis = meta["channel_axis"], meta["block_axis"]
    info.blockSize = meta["block_size"]
    quantizer.data_type = QuantizationDataType[meta["dtype"]]
    quantizer.quant_scheme = QuantScheme[meta["quant_scheme"]]
    quantizer.use_symmetric_encodings = meta["symmetric"]
    qtype = aimet_onnx.qtype
    inner = quantizer._build_tensor_quantizer(
        qtype.float(**form) if form else qtype.int(meta["bitwidth"])
    )
    inner.setStrictSymmetric(meta["strict_symmetric"])
    inner.setUnsignedSymmetric(meta["unsigned_symmetric"])
    inner.setZeroPointShift(meta["zero_point_shift"])
    quantizer._tensor_quantizer = inner
    bits = meta["scale_bits"]
    quantizer._scale_quantizer = None if bits is None else LPBQScaleQuantizer(bits)
    quantizer._encoding_min_max_fixed_vals = None if fixed is None else tuple(fixed)
    if "encodings" in tensors:
        # As they are: AIMET's own setter would compress LPBQ's scales once more.
        rows = tensors["encodings"].double().tolist()
        inner.setEncodings([_encoding(meta["bitwidth"], *row) for row in rows])
    setattr(quantizer, RAW_SCALE, tensors.get("raw_scale"))
    quantizer.op_mode = OpMode.__members__[meta["op_mode"]]
    quantizer.enabled = meta["state"]["enabled"]
    quantizer._is_encoding_frozen = meta["state"]["frozen"]


def is_blockwise(quantizer: QcQuantizeOp) -> bool:
    """Return True for a quantizer with cells along the input dimension."""
    info = quantizer.quant_info
    return bool(info.usePerChannelMode) and info.blockSize > 0


def stored_cells(quantizer: QcQuantizeOp, dims: int) -> tuple[int, ...]:
    """Return the number of cells along each dimension of the weight as it is stored."""
    info = quantizer.quant_info
    cells = [1] * dims
    if info.usePerChannelMode:
        shape = quantizer.tensor_quantizer_params.tensor_shape
        cells[info.channelAxis % dims] = shape[info.channelAxis % dims]
        if info.blockSize > 0:
            cells[info.blockAxis % dims] = shape[info.blockAxis % dims] // info.blockSize
    return tuple(cells)


def read_encodings(quantizer: QcQuantizeOp) -> tuple[Tensor, Tensor]:
    """Return scale and first value in steps of every cell, as AIMET orders them, in float64."""
    rows = [(e.delta, e.offset) for e in quantizer.get_encodings()]
    scale, first = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return scale, first


def load_scale(
    quantizer: QcQuantizeOp, scale: Sequence[float], first: Sequence[float], steps: int
) -> None:
    """Write the encodings of all cells, frozen or not; LPBQ's scales are put on integers there."""
    bits = int(quantizer.bitwidth)
    found = [
        _encoding(bits, s, f, s * f, s * (f + steps)) for s, f in zip(scale, first, strict=True)
    ]
    frozen = quantizer._is_encoding_frozen
    try:
        quantizer._is_encoding_frozen = False
        quantizer.load_encodings(found)
    finally:
        quantizer._is_encoding_frozen = frozen


def _encoding(bits: int, delta: float, offset: float, low: float, high: float) -> Any:
    encoding = libpymo.TfEncoding()
    encoding.bw = bits
    encoding.delta, encoding.offset, encoding.min, encoding.max = delta, offset, low, high
    return encoding
