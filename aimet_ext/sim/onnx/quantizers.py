"""AIMET's weight quantizers of ONNX models, read and written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from aimet_onnx.qc_quantize_op import LPBQScaleQuantizer, QcQuantizeOp
from torch import Tensor

from aimet_ext.config import LPBQ, Blockwise, Granularity, PerChannel, PerTensor, QSpec
from aimet_ext.core.affine import Grid, minimum_scale, scale_offset, symmetric_offset
from aimet_ext.core.lpbq import lpbq_scale
from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.layers import OnnxLayer
from aimet_ext.onnx.shells import stored_weight
from aimet_ext.sim.onnx.quantizer_state import (
    RAW_SCALE,
    calibrate_on,
    is_blockwise,
    load_scale,
    read_encodings,
    stored_cells,
)

__all__ = ["OnnxWeightQuantizer"]


class OnnxWeightQuantizer:
    """See :class:`aimet_ext.sim.protocol.WeightQuantizer`.

    All shapes are those of the weight with output channels first, also where the model stores it
    the other way around.

    AIMET computes in float32, ``q = clamp(round(x / scale − first), 0, steps)`` and
    ``x̂ = (q + first) · scale`` with halves rounded up, whatever type the weight has. A
    :class:`Grid` with ``half_up`` is that, to the last bit.

    :param name: name of the layer, for messages.
    :param changed: to be called when the weight was changed, which the session does not see.
    """

    def __init__(
        self,
        name: str,
        graph: OnnxGraph,
        layer: OnnxLayer,
        quantizer: QcQuantizeOp,
        changed: Callable[[], None],
    ) -> None:
        self.name = name
        self.graph = graph
        self.layer = layer
        self.quantizer = quantizer
        self._changed = changed

    @property
    def weight(self) -> Tensor:
        """The layer's float weight, output channels first; a copy."""
        return stored_weight(self.graph, self.layer)

    @torch.no_grad()
    def set_weight(self, values: Tensor) -> None:
        """Put values in the weight's place, in the model."""
        self.graph.set_tensor(self.layer.weight, self._turned(values))
        self._changed()

    @property
    def shape(self) -> tuple[int, ...]:
        """Cells of the grid along each dimension."""
        return self._turned_shape(stored_cells(self.quantizer, self._dims))

    @property
    def bitwidth(self) -> int:
        """Bits of a quantized weight."""
        return int(self.quantizer.bitwidth)

    @property
    def symmetric(self) -> bool:
        """Whether the offset is fixed."""
        return bool(self.quantizer.use_symmetric_encodings)

    @property
    def qmin(self) -> int:
        """Smallest integer: 0 where the offset is free."""
        if not self.symmetric:
            return 0
        return int(self.quantizer.use_strict_symmetric) - (1 << (self.bitwidth - 1))

    @property
    def qmax(self) -> int:
        """Largest integer."""
        return (1 << (self.bitwidth - int(self.symmetric))) - 1

    @property
    def zero_point_shift(self) -> float:
        """0, or 0.5 where the values lie half a step off the integers."""
        return float(self.quantizer.get_zero_point_shift())

    @property
    def block_size(self) -> tuple[int, ...] | None:
        """Elements of a block along each dimension, None unless blockwise."""
        if not is_blockwise(self.quantizer):
            return None
        weight = self._turned_shape(self.graph.shape(self.layer.weight))
        return tuple(d // c for d, c in zip(weight, self.shape, strict=True))

    @property
    def block_grouping(self) -> tuple[int, ...] | None:
        """Blocks that share a float scale along each dimension, None unless LPBQ."""
        if self.scale_bits is None:
            return None
        grouping = [1] * self._dims
        grouping[self.quantizer.quant_info.blockAxis % self._dims] = -1
        return self._turned_shape(grouping)

    @property
    def scale_bits(self) -> int | None:
        """Bits of LPBQ's integer scales, None for any other grid."""
        scales = self.quantizer._scale_quantizer
        if not isinstance(scales, LPBQScaleQuantizer) or not is_blockwise(self.quantizer):
            return None
        return int(scales.scale_bits)

    @property
    def granularity(self) -> Granularity:
        """The nearest word of :mod:`aimet_ext.config` for the grid's shape."""
        block = self.block_size
        if block is not None:
            return LPBQ(block[1], self.scale_bits) if self.scale_bits else Blockwise(block[1])
        return PerTensor() if torch.Size(self.shape).numel() == 1 else PerChannel()

    @property
    def frozen(self) -> bool:
        """Whether ``sim.compute_encodings`` leaves the range alone."""
        return bool(self.quantizer.is_encoding_frozen())

    @property
    def initialized(self) -> bool:
        """Whether there is a range."""
        return bool(self.quantizer.is_initialized())

    def spec(self) -> QSpec:
        """Width, symmetry and granularity in the words of :mod:`aimet_ext.config`."""
        return QSpec(bitwidth=self.bitwidth, symmetric=self.symmetric, granularity=self.granularity)

    def grid(self) -> Grid:
        """The grid that AIMET quantizes with, in float32.

        :raises ValueError: the quantizer has no range yet.
        """
        if not self.initialized:
            raise ValueError(
                f"{self.name}: a weight quantizer with a range is required, got one without; "
                "run sim.compute_encodings first"
            )
        scale, first = read_encodings(self.quantizer)
        return Grid(
            scale=self._cells(scale).float(),
            offset=self._cells(first - self.qmin - self.zero_point_shift).float(),
            qmin=self.qmin,
            qmax=self.qmax,
            block_size=self.block_size,
            zero_point_shift=self.zero_point_shift,
            half_up=True,
        )

    def free_grid(self) -> Grid:
        """The same with LPBQ's raw float scale for every block: no integers, no channel's scale.

        Known where :meth:`set_scale` or :meth:`calibrate` wrote the range; AIMET forgets it.

        :raises ValueError: the quantizer has no range yet.
        """
        grid = self.grid()
        raw = getattr(self.quantizer, RAW_SCALE, None)
        if self.scale_bits is None or self.block_grouping is None or raw is None:
            return grid
        if raw.shape != grid.shape:
            return grid
        own = lpbq_scale(raw, self.block_grouping, self.scale_bits).float()
        return replace(grid, scale=raw.float()) if torch.equal(own, grid.scale) else grid

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Write the range of each cell.

        :param low: smallest value, of the grid's ``shape`` or one that expands to it.
        :param high: largest value.
        :raises ValueError: a bound is not finite.
        """
        if not (low.isfinite().all() and high.isfinite().all()):
            raise ValueError(f"{self.name}: a finite range is required, got NaN or infinity")
        low, high = low.float().expand(self.shape), high.float().expand(self.shape)
        self.set_scale(*scale_offset(low, high, self.qmin, self.qmax, self.symmetric))

    @torch.no_grad()
    def set_scale(self, scale: Tensor, offset: Tensor | None = None) -> None:
        """Write a scale, so that :meth:`grid` reads back the same one (but LPBQ's).

        :param scale: of the grid's ``shape``; for LPBQ the raw scale of each block, which AIMET
            turns into an integer times its channel's scale.
        :param offset: AIMET's offset (minus the zero point), None for a symmetric grid.
        :raises ValueError: the scale is not finite.
        """
        if not scale.isfinite().all():
            raise ValueError(f"{self.name}: a finite scale is required, got NaN or infinity")
        scale = scale.detach().float().cpu().expand(self.shape)
        scale = scale.clamp_min(minimum_scale(self.qmax - self.qmin))
        if offset is None or self.symmetric:
            offset = torch.full_like(scale, symmetric_offset(self.qmin, self.qmax))
        first = offset.detach().double().cpu().expand(self.shape)
        first = first + self.qmin + self.zero_point_shift
        load_scale(
            self.quantizer,
            self._turned(scale.double()).flatten().tolist(),
            self._turned(first).flatten().tolist(),
            self.qmax - self.qmin,
        )
        setattr(self.quantizer, RAW_SCALE, None if self.scale_bits is None else scale.double())

    def calibrate(self) -> None:
        """Set the range from the weight, as ``sim.compute_encodings`` does; not if frozen."""
        if self.frozen:
            return
        weight, raw = self.graph.array(self.layer.weight), None
        if self.scale_bits is not None:
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
        """Have ``sim.compute_encodings`` leave the range alone, or no longer."""
        self.quantizer._is_encoding_frozen = frozen

    @property
    def _dims(self) -> int:
        return len(self.graph.shape(self.layer.weight))

    def _turned(self, values: Tensor) -> Tensor:
        return values.transpose(0, 1) if self.layer.transposed else values

    def _turned_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (shape[1], shape[0], *shape[2:]) if self.layer.transposed else tuple(shape)

    def _cells(self, stored: Tensor) -> Tensor:
        """Numbers of all cells, in AIMET's order, as the grid's shape."""
        return self._turned(stored.reshape(stored_cells(self.quantizer, self._dims))).contiguous()
