"""AIMET's weight quantizers of PyTorch models, read and written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from aimet_torch.quantization.affine import AffineQuantizerBase, GroupedBlockQuantizeDequantize
from torch import Tensor, nn

from aimet_ext.config import LPBQ, Blockwise, Granularity, PerChannel, PerTensor, QSpec
from aimet_ext.core.affine import Grid, symmetric_offset

__all__ = ["TorchWeightQuantizer", "quantizer_state", "restore_quantizer", "uninitialize"]


class TorchWeightQuantizer:
    """See :class:`aimet_ext.sim.protocol.WeightQuantizer`.

    Both of AIMET's parametrisations are known, ``min`` and ``max`` and ``scale`` and ``offset``.

    :param name: name of the layer, for messages.
    :param module: AIMET's quantized layer.
    """

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.module = module
        if not isinstance(self.quantizer, AffineQuantizerBase):
            raise TypeError(
                f"{name}: an integer weight quantizer is required, "
                f"got {type(self.quantizer).__name__}; set it to a QuantizeDequantize"
            )

    @property
    def quantizer(self) -> Any:
        """AIMET's own object."""
        return self.module.param_quantizers["weight"]

    @property
    def weight(self) -> nn.Parameter:
        """The layer's float weight."""
        return self.module.weight

    @torch.no_grad()
    def set_weight(self, values: Tensor) -> None:
        """Put values in the weight's place; the parameter stays the same object."""
        self.weight.copy_(values)

    @property
    def shape(self) -> tuple[int, ...]:
        """Cells of the grid along each dimension."""
        return tuple(self.quantizer.shape)

    @property
    def bitwidth(self) -> int:
        """Bits of a quantized weight."""
        return (self.qmax - self.qmin).bit_length()

    @property
    def symmetric(self) -> bool:
        """Whether the offset is fixed."""
        return self.quantizer.symmetric

    @property
    def qmin(self) -> int:
        """Smallest integer."""
        return int(self.quantizer.qmin)

    @property
    def qmax(self) -> int:
        """Largest integer."""
        return int(self.quantizer.qmax)

    @property
    def zero_point_shift(self) -> float:
        """0, or 0.5 where the values lie half a step off the integers."""
        return self.quantizer.zero_point_shift

    @property
    def block_size(self) -> tuple[int, ...] | None:
        """AIMET's block size along each dimension, None unless blockwise."""
        size = self.quantizer.block_size
        return None if size is None else tuple(int(n) for n in size)

    @property
    def block_grouping(self) -> tuple[int, ...] | None:
        """Blocks that share a float scale along each dimension, None unless LPBQ."""
        return tuple(self.quantizer.block_grouping) if self.scale_bits is not None else None

    @property
    def scale_bits(self) -> int | None:
        """Bits of LPBQ's integer scales, None for any other grid."""
        if not isinstance(self.quantizer, GroupedBlockQuantizeDequantize):
            return None
        return self.quantizer.decompressed_bw - self.bitwidth

    @property
    def granularity(self) -> Granularity:
        """The nearest word of :mod:`aimet_ext.config` for the grid's shape."""
        cells = (1,) * (self.weight.dim() - len(self.shape)) + self.shape
        if self.block_size is not None:
            width = self.weight.shape[1] // cells[1]  # input channels, whatever the kernel
            if self.scale_bits:
                return LPBQ(width, self.scale_bits)
            return Blockwise(width)
        return PerTensor() if torch.Size(cells).numel() == 1 else PerChannel()

    @property
    def frozen(self) -> bool:
        """Whether ``sim.compute_encodings`` leaves the range alone."""
        return not self.quantizer.is_overwrite_allowed()

    @property
    def initialized(self) -> bool:
        """Whether there is a range."""
        return self.quantizer.is_initialized()

    def spec(self) -> QSpec:
        """Width, symmetry and granularity in the words of :mod:`aimet_ext.config`."""
        return QSpec(bitwidth=self.bitwidth, symmetric=self.symmetric, granularity=self.granularity)

    @torch.no_grad()
    def grid(self) -> Grid:
        """The grid that AIMET quantizes with, in float32.

        :raises ValueError: the quantizer has no range yet.
        """
        if not self.initialized:
            raise ValueError(
                f"{self.name}: a weight quantizer with a range is required, got one without; "
                "run sim.compute_encodings first"
            )
        return Grid(
            scale=self.quantizer.get_scale(dtype=torch.float32).clone(),
            offset=self.quantizer.get_offset(dtype=torch.float32).clone(),
            qmin=self.qmin,
            qmax=self.qmax,
            block_size=self.block_size,
            zero_point_shift=self.zero_point_shift,
        )

    def free_grid(self) -> Grid:
        """The same with LPBQ's raw float scale for every block: no integers, no channel's scale.

        :raises ValueError: the quantizer has no range yet.
        """
        grid = self.grid()
        if self.scale_bits is None:
            return grid
        low, high = self.quantizer.min.detach().float(), self.quantizer.max.detach().float()
        return replace(grid, scale=(high - low) / (self.qmax - self.qmin))

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Write the range of each cell.

        :param low: smallest value, of the grid's ``shape`` or one that expands to it.
        :param high: largest value.
        :raises ValueError: a bound is not finite.
        """
        if not (low.isfinite().all() and high.isfinite().all()):
            raise ValueError(f"{self.name}: a finite range is required, got NaN or infinity")
        self.quantizer.set_range(low.expand(self.shape), high.expand(self.shape))

    @torch.no_grad()
    def set_scale(self, scale: Tensor, offset: Tensor | None = None) -> None:
        """Write a scale, so that :meth:`grid` reads back the same one.

        AIMET keeps ``min`` and ``max`` in float32 and divides their difference again, so the last
        bit of the scale may differ: use what is read back.

        :param scale: of the grid's ``shape``; for LPBQ the raw scale of each block, which AIMET
            turns into an integer times its channel's scale.
        :param offset: AIMET's offset (minus the zero point), None for a symmetric grid.
        """
        quantizer, steps = self.quantizer, self.qmax - self.qmin
        if offset is None:
            offset = torch.full_like(scale, symmetric_offset(self.qmin, self.qmax))
        if "scale" in dict(quantizer.named_parameters(recurse=False)):
            quantizer.scale.copy_(scale)
            if not self.symmetric:
                quantizer.offset.copy_(offset)
            return
        if self.scale_bits is not None:
            # AIMET's exporter makes a range of the scale and a scale of that again, in float32:
            # one that comes out as it went in is needed for encodings that are the sim's.
            scale = scale.float()
            scale = (scale * self.qmax - scale * self.qmin) / steps
        scale = scale.double()
        low = (scale * (offset.double() + self.qmin)).float()
        high = (low.double() + scale * steps).float()
        best = high
        for candidate in _neighbours(high):
            error = ((candidate - low) / steps - scale).abs()
            best = torch.where(error < ((best - low) / steps - scale).abs(), candidate, best)
        self.set_range(low, best)

    def calibrate(self) -> None:
        """Set the range from the weight, as ``sim.compute_encodings`` does; not if frozen."""
        self.module.compute_param_encodings()

    def freeze(self, frozen: bool = True) -> None:
        """Have ``sim.compute_encodings`` leave the range alone, or no longer."""
        self.quantizer.allow_overwrite(not frozen)


def quantizer_state(quantizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copies of a quantizer's parameters, and as JSON values which are set and which may change."""
    tensors = {
        name: parameter.detach().clone()
        for name, parameter in quantizer.named_parameters(recurse=False)
    }
    meta = {
        "initialized": quantizer.is_initialized(),
        "overwrite": {key: quantizer.is_overwrite_allowed(key) for key in _bounds(quantizer)},
    }
    return tensors, meta


@torch.no_grad()
def restore_quantizer(quantizer: Any, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Put back what :func:`quantizer_state` returned."""
    for name, parameter in quantizer.named_parameters(recurse=False):
        parameter.copy_(tensors[name])
    if not meta["initialized"]:
        uninitialize(quantizer)
    quantizer.allow_overwrite(**meta["overwrite"])


def uninitialize(quantizer: Any) -> None:
    """Make AIMET see a quantizer's parameters as never set, so that calibration fills them."""
    for name, parameter in list(quantizer.named_parameters(recurse=False)):
        quantizer.register_quantization_parameter(name, parameter)


def _bounds(quantizer: Any) -> tuple[str, ...]:
    return ("min", "max") if isinstance(quantizer, AffineQuantizerBase) else ()


def _neighbours(x: Tensor) -> list[Tensor]:
    """The float32 numbers next to ``x``, two on either side."""
    up, down = torch.full_like(x, torch.inf), torch.full_like(x, -torch.inf)
    above, below = torch.nextafter(x, up), torch.nextafter(x, down)
    return [above, below, torch.nextafter(above, up), torch.nextafter(below, down)]
