"""AIMET's weight quantizers of ONNX models, read and written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from aimet_onnx.qc_quantize_op import LPBQScaleQuantizer, QcQuantizeOp
from torch import Tensor

from aimet_ext.core.affine import Grid, lpbq_scale, minimum_scale, symmetric_offset
from aimet_ext.core.clipping import GridLayout
from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.layers import OnnxLayer, stored_weight
from aimet_ext.sim.onnx.quantizer_state import (
    RAW_SCALE,
    calibrate_on,
    is_blockwise,
    load_scale,
    read_encodings,
    stored_cells,
    uninitialize,
)
from aimet_ext.sim.protocol import WeightQuantizer

__all__ = ["OnnxWeightQuantizer"]


class OnnxWeightQuantizer(WeightQuantizer):
    """See :class:`aimet_ext.sim.protocol.WeightQuantizer`.

    All shapes are those of the weight with output channels first, also where the model stores it
    the other way around.

    AIMET computes in float32, ``q = clamp(round(x / scale − first), 0, steps)`` and
    ``x̂ = (q + first) · scale`` with halves rounded up, whatever type the weight has. A
    :class:`Grid` with ``half_up`` is that, to the last bit.

    :param name: Name of the layer, for messages.
    :param changed: Function to call when the weight was changed, which the session does not see.
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
            uninitialize(self.quantizer)

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
