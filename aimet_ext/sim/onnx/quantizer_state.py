"""What a quantizer of aimet_onnx holds: read, written, calibrated, dropped, kept and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import aimet_onnx
import numpy as np
import torch
from aimet_onnx.common import libpymo
from aimet_onnx.common.defs import QuantizationDataType
from aimet_onnx.qc_quantize_op import LPBQScaleQuantizer, QcQuantizeOp
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
    "stored_cells",
    "uninitialize",
]

# Attribute of AIMET's quantizer: LPBQ's scale of each block as it was before AIMET put the scales
# of a channel on integers, which is all that AIMET keeps.
RAW_SCALE = "aimet_ext_raw_scale"


def is_integer(quantizer: QcQuantizeOp | None) -> bool:
    """Whether a quantizer is there, is on, and rounds to integers."""
    return (
        quantizer is not None
        and bool(quantizer.enabled)
        and quantizer.data_type == QuantizationDataType.int
    )


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
    modes = libpymo.TensorQuantizerOpMode
    quantizer.op_mode = modes.oneShotQuantizeDequantize if parameter else modes.updateStats


def quantizer_state(quantizer: QcQuantizeOp) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copies of a quantizer's range, and as JSON values what kind of grid it has."""
    info = quantizer.quant_info
    dtype = quantizer.precision().to_legacy_repr()
    meta = {
        "integer": dtype[0] == QuantizationDataType.int,
        "bitwidth": int(dtype[1]),
        "enabled": bool(quantizer.enabled),
        "frozen": bool(quantizer.is_encoding_frozen()),
        "initialized": bool(quantizer.is_initialized()),
        "op_mode": int(quantizer.op_mode),
        "symmetric": bool(info.useSymmetricEncoding),
        "strict": bool(quantizer.use_strict_symmetric),
        "unsigned": bool(quantizer.use_unsigned_symmetric),
        "shift": float(quantizer.get_zero_point_shift()),
        "per_channel": bool(info.usePerChannelMode),
        "axes": [int(info.channelAxis), int(info.blockAxis), int(info.blockSize)],
        "scale_bits": getattr(quantizer._scale_quantizer, "scale_bits", None),
    }
    tensors: dict[str, Tensor] = {}
    encodings = quantizer.get_encodings()
    if encodings is not None:
        rows = [(e.min, e.max, e.delta, e.offset) for e in encodings]
        tensors["encodings"] = torch.tensor(rows, dtype=torch.float64)
    raw = getattr(quantizer, RAW_SCALE, None)
    if raw is not None:
        tensors["raw_scale"] = raw.clone()
    return tensors, meta


def restore_quantizer(
    quantizer: QcQuantizeOp, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Put back what :func:`quantizer_state` returned, the kind of grid too."""
    quantizer._is_encoding_frozen = False
    if quantizer_state(quantizer)[1] != {**meta, "frozen": False}:
        _restore_grid(quantizer, meta)
    quantizer.reset_encoding_stats()
    if "encodings" in tensors:
        found = [
            _encoding(meta["bitwidth"], *row) for row in tensors["encodings"].double().tolist()
        ]
        quantizer._tensor_quantizer.setEncodings(found)
    setattr(quantizer, RAW_SCALE, tensors.get("raw_scale"))
    quantizer.op_mode = libpymo.TensorQuantizerOpMode(meta["op_mode"])
    quantizer.enabled = meta["enabled"]
    quantizer._is_encoding_frozen = meta["frozen"]


def _restore_grid(quantizer: QcQuantizeOp, meta: Mapping[str, Any]) -> None:
    info = quantizer.quant_info
    info.useSymmetricEncoding = meta["symmetric"]
    info.usePerChannelMode = meta["per_channel"]
    info.channelAxis, info.blockAxis, info.blockSize = meta["axes"]
    bits = meta["scale_bits"]
    quantizer._scale_quantizer = None if bits is None else LPBQScaleQuantizer(bits)
    if meta["integer"]:
        quantizer.set_precision(aimet_onnx.qtype.int(meta["bitwidth"]))
    quantizer._tensor_quantizer = quantizer._build_tensor_quantizer()
    quantizer.use_strict_symmetric = meta["strict"]
    quantizer.use_unsigned_symmetric = meta["unsigned"]
    quantizer.set_zero_point_shift(meta["shift"])


def is_blockwise(quantizer: QcQuantizeOp) -> bool:
    """Whether a quantizer has cells along the input dimension."""
    info = quantizer.quant_info
    return bool(info.usePerChannelMode) and info.blockSize > 0


def stored_cells(quantizer: QcQuantizeOp, dims: int) -> tuple[int, ...]:
    """Cells along each dimension of the weight as it is stored."""
    info = quantizer.quant_info
    cells = [1] * dims
    if info.usePerChannelMode:
        shape = quantizer.tensor_quantizer_params.tensor_shape
        cells[info.channelAxis % dims] = shape[info.channelAxis % dims]
        if info.blockSize > 0:
            cells[info.blockAxis % dims] = shape[info.blockAxis % dims] // info.blockSize
    return tuple(cells)


def read_encodings(quantizer: QcQuantizeOp) -> tuple[Tensor, Tensor]:
    """Scale and first value in steps of every cell, in AIMET's order, float64 ``[cells]``."""
    rows = [(e.delta, e.offset) for e in quantizer.get_encodings()]
    scale, first = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return scale, first


def load_scale(
    quantizer: QcQuantizeOp, scale: Sequence[float], first: Sequence[float], steps: int
) -> None:
    """Write the encodings of all cells, frozen or not; LPBQ's scales are put on integers there."""
    bits = int(quantizer.bitwidth)
    found = [
        _encoding(bits, s * f, s * (f + steps), s, f) for s, f in zip(scale, first, strict=True)
    ]
    frozen = quantizer._is_encoding_frozen
    try:
        quantizer._is_encoding_frozen = False
        quantizer.load_encodings(found)
    finally:
        quantizer._is_encoding_frozen = frozen


def _encoding(bits: int, low: float, high: float, delta: float, offset: float) -> Any:
    encoding = libpymo.TfEncoding()
    encoding.bw = bits
    encoding.min, encoding.max, encoding.delta, encoding.offset = low, high, delta, offset
    return encoding
