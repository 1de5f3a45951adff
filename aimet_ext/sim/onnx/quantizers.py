"""Quantizers of aimet_onnx: grid and range are read, written, calibrated and restored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
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

from aimet_ext.core.affine import (
    Grid,
    fake_quantize,
    lpbq_scale,
    minimum_scale,
    minmax_range,
    scale_offset,
    symmetric_offset,
)
from aimet_ext.core.clipping import GridLayout
from aimet_ext.core.interrupts import uninterrupted
from aimet_ext.core.transposed import as_convolution
from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.layers import OnnxLayer, stored_weight
from aimet_ext.sim.protocol import WeightQuantizer

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
        with uninterrupted():
            for quantizer in quantizers:
                quantizer.enabled = True


class SwitchedOff:
    """Quantizers, in a context of :meth:`open` off.

    :param quantizers: Those that are on, by the name of their tensor.
    :param quantized_in: Function from the name of a layer to the names of its tensors.
    """

    def __init__(
        self,
        quantizers: Mapping[str, QcQuantizeOp],
        quantized_in: Callable[[str], Sequence[str]],
    ) -> None:
        self._quantizers = quantizers
        self._quantized_in = quantized_in

    @contextmanager
    def open(self) -> Iterator[SwitchedOff]:
        """Switch the quantizers off; they are on again behind the context."""
        with switched_off(list(self._quantizers.values())):
            yield self

    @contextmanager
    def back(self, layers: Iterable[str]) -> Iterator[None]:
        """Open a context in which those of layers are on."""
        names = {name for layer in layers for name in self._quantized_in(layer)}
        own = [self._quantizers[name] for name in names if name in self._quantizers]
        try:
            for quantizer in own:
                quantizer.enabled = True
            yield
        finally:
            for quantizer in own:
                quantizer.enabled = False


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
    if "encodings" in tensors or (meta["state"]["initialized"] and form is None):
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


class OnnxWeightQuantizer(WeightQuantizer):
    """See :class:`aimet_ext.sim.protocol.WeightQuantizer`.

    All shapes are those of the weight with output channels first, also where the model stores it
    the other way around.

    AIMET computes in float32, ``q = clamp(round(x / scale − first), 0, steps)`` and
    ``x̂ = (q + first) · scale`` with halves rounded up, whatever type the weight has. A
    :class:`Grid` with ``half_up`` is that, to the last bit.

    :param name: Name of the layer, for messages.
    :param changed: Function to call when the weight was changed, which the session does not see.
    :param parameter: False for a table that AIMET counts as an activation.
    """

    def __init__(
        self,
        name: str,
        graph: OnnxGraph,
        layer: OnnxLayer,
        quantizer: QcQuantizeOp,
        changed: Callable[[], None],
        parameter: bool = True,
    ) -> None:
        self.name = name
        self.graph = graph
        self.layer = layer
        self.quantizer = quantizer
        self._changed = changed
        self._parameter = parameter

    @property
    def weight(self) -> Tensor:
        return stored_weight(self.graph, self.layer)

    @torch.no_grad()
    def set_weight(self, values: Tensor) -> None:
        self.graph.set_tensor(self.layer.weight, self._turned(values))
        self._changed()

    @property
    def shape(self) -> tuple[int, ...]:
        return self._turned_shape(stored_cells(self.quantizer, self._dims))

    @cached_property
    def layout(self) -> GridLayout:
        own, cells = self.quantizer, self.shape
        bits, symmetric = int(own.bitwidth), bool(own.use_symmetric_encodings)
        blockwise, scales = is_blockwise(own), own._scale_quantizer
        lpbq = blockwise and isinstance(scales, LPBQScaleQuantizer)
        grouping = [1] * self._dims
        grouping[own.quant_info.blockAxis % self._dims] = -1
        dims = self._turned_shape(self.graph.shape(self.layer.weight))
        return GridLayout(
            shape=((1,) * (2 - len(cells)) + cells)[:2],
            qmin=int(own.use_strict_symmetric) - (1 << (bits - 1)) if symmetric else 0,
            qmax=(1 << (bits - int(symmetric))) - 1,
            symmetric=symmetric,
            zero_point_shift=float(own.get_zero_point_shift()),
            block_size=(
                tuple(d // c for d, c in zip(dims, cells, strict=True)) if blockwise else None
            ),
            block_grouping=self._turned_shape(grouping)[:2] if lpbq else None,
            scale_bits=int(scales.scale_bits) if lpbq else None,
        )

    @property
    def bitwidth(self) -> int:
        return int(self.quantizer.bitwidth)

    @property
    def frozen(self) -> bool:
        return bool(self.quantizer.is_encoding_frozen())

    @property
    def initialized(self) -> bool:
        return bool(self.quantizer.is_initialized())

    def grid(self) -> Grid:
        if not self.initialized:
            raise self.no_range()
        layout = self.layout
        scale, first = read_encodings(self.quantizer)
        return Grid(
            scale=self._cells(scale).float(),
            offset=self._cells(first - layout.qmin - layout.zero_point_shift).float(),
            qmin=layout.qmin,
            qmax=layout.qmax,
            block_size=layout.block_size,
            zero_point_shift=layout.zero_point_shift,
            half_up=True,
        )

    def free_grid(self) -> Grid:
        """Return the grid with LPBQ's raw float scale for every block, without its integers.

        It is known where :meth:`set_scale` or :meth:`calibrate` wrote the range; AIMET forgets it.

        :raises ValueError: the quantizer has no range yet.
        """
        grid, layout = self.grid(), self.layout
        raw = getattr(self.quantizer, RAW_SCALE, None)
        if layout.scale_bits is None or layout.block_grouping is None or raw is None:
            return grid
        if raw.shape != grid.shape:
            return grid
        grouping = layout.block_grouping + (1,) * (raw.dim() - 2)
        own = lpbq_scale(raw, grouping, layout.scale_bits).float()
        return replace(grid, scale=raw.float()) if torch.equal(own, grid.scale) else grid

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        if not (low.isfinite().all() and high.isfinite().all()):
            raise ValueError(f"{self.name}: a finite range is required, got NaN or infinity")
        low, high = self.shaped(low.float()), self.shaped(high.float())
        self.set_scale(*self.layout.raw(low, high))

    @torch.no_grad()
    def set_scale(self, scale: Tensor, offset: Tensor | None = None) -> None:
        """Write a scale, so that :meth:`grid` reads back the same one (but LPBQ's).

        :raises ValueError: the scale is not finite.
        """
        if not scale.isfinite().all():
            raise ValueError(f"{self.name}: a finite scale is required, got NaN or infinity")
        layout = self.layout
        steps = layout.qmax - layout.qmin
        scale = self.shaped(scale.detach().float().cpu()).clamp_min(minimum_scale(steps))
        if offset is None or layout.symmetric:
            offset = torch.full_like(scale, symmetric_offset(layout.qmin, layout.qmax))
        first = self.shaped(offset.detach().double().cpu())
        first = first + layout.qmin + layout.zero_point_shift
        load_scale(
            self.quantizer,
            self._turned(scale.double()).flatten().tolist(),
            self._turned(first).flatten().tolist(),
            steps,
        )
        setattr(self.quantizer, RAW_SCALE, None if layout.scale_bits is None else scale.double())

    def calibrate(self) -> None:
        if self.frozen:
            return
        weight, raw = self.graph.array(self.layer.weight), None
        if self.layout.scale_bits is not None:
            scales = self.quantizer._scale_quantizer
            try:
                self.quantizer._scale_quantizer = None
                calibrate_on(self.quantizer, weight)
                raw = self._cells(read_encodings(self.quantizer)[0])
            finally:
                self.quantizer._scale_quantizer = scales
        calibrate_on(self.quantizer, weight)
        setattr(self.quantizer, RAW_SCALE, raw)

    def freeze(self, frozen: bool = True) -> None:
        self.quantizer._is_encoding_frozen = frozen

    def reset(self) -> None:
        if self.initialized:
            uninitialize(self.quantizer, parameter=self._parameter)

    @property
    def _dims(self) -> int:
        return len(self.graph.shape(self.layer.weight))

    def _turned(self, values: Tensor) -> Tensor:
        return values.transpose(0, 1) if self.layer.transposed else values

    def _turned_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (shape[1], shape[0], *shape[2:]) if self.layer.transposed else tuple(shape)

    def _cells(self, stored: Tensor) -> Tensor:
        """Return numbers of all cells, which are in AIMET's order, in the grid's shape."""
        return self._turned(stored.reshape(stored_cells(self.quantizer, self._dims))).contiguous()


class TransposedQuantizer(OnnxWeightQuantizer):
    """The quantizer of a transposed convolution's weight, seen as that of a convolution.

    See :func:`~aimet_ext.core.transposed.as_convolution`. Groups share the ranges of their output
    channels, so that a grid by channels has rows of its own without groups only.
    """

    @property
    def weight(self) -> Tensor:
        return as_convolution(super().weight, self.layer.group)

    def set_weight(self, values: Tensor) -> None:
        super().set_weight(self.stored(values))

    def stored(self, values: Tensor) -> Tensor:
        return as_convolution(values, self.layer.group).contiguous()

    @property
    def shape(self) -> tuple[int, ...]:
        out, width, *kernel = super().shape
        return (width, out, *kernel)

    def _cells(self, stored: Tensor) -> Tensor:
        return super()._cells(stored).reshape(self.shape)


class RecurrentQuantizer(OnnxWeightQuantizer):
    """The quantizer of a recurrent node's weight, seen as one matrix; AIMET gives it one range."""

    def set_weight(self, values: Tensor) -> None:
        super().set_weight(values.reshape(self.graph.shape(self.layer.weight)))

    @property
    def shape(self) -> tuple[int, ...]:
        return (1,) * (2 + len(self.layer.kernel))

    def _cells(self, stored: Tensor) -> Tensor:
        return stored.reshape(self.shape)


def weight_quantizer_of(
    graph: OnnxGraph,
    layer: OnnxLayer,
    quantizer: QcQuantizeOp,
    changed: Callable[[], None],
    parameter: bool = True,
) -> OnnxWeightQuantizer:
    """Return the weight quantizer of a layer; see :class:`OnnxWeightQuantizer`."""
    by_channel = bool(quantizer.quant_info.usePerChannelMode)
    rows = not by_channel or (layer.group == 1 and not is_blockwise(quantizer))
    turned = layer.output_padding is not None and rows
    kind = TransposedQuantizer if turned else OnnxWeightQuantizer
    kind = RecurrentQuantizer if layer.directions else kind
    return kind(layer.name, graph, layer, quantizer, changed, parameter)


def live_quantizer(quantizer: Any) -> Callable[[Tensor], Tensor]:
    """Return a function that quantizes a tensor on its own range, as an activation quantizer would.

    Gradients pass straight through the rounding; the range counts as a constant.
    """
    symmetric = bool(quantizer.use_symmetric_encodings)
    steps = 2 ** int(quantizer.bitwidth) - 1
    low_int = -(steps + 1) // 2 if symmetric else 0
    integers = (low_int, low_int + steps, symmetric)

    def quantize(tensor: Tensor) -> Tensor:
        if not tensor.numel() or not tensor.is_floating_point():
            return tensor
        low, high = minmax_range(tensor.detach(), (1,), *integers)
        scale, offset = scale_offset(low.float(), high.float(), *integers)
        return fake_quantize(tensor, Grid(scale, offset, *integers[:2], half_up=True))

    return quantize
