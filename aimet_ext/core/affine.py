"""Affine grids: one type for per-tensor, per-channel and blockwise quantization.

Every weight is cut into the cells of a grid, one scale and one offset a cell. Per tensor is one
cell, per channel one cell a row, blockwise several cells a row: the same formula for all three.

    q = clamp(round(x / scale - shift) - offset, qmin, qmax)
    x̂ = (q + offset + shift) · scale

This is AIMET's convention: ``offset`` is minus the zero point, ``shift`` is its
``zero_point_shift``. The arithmetic is AIMET's too, to the last bit, see :func:`fake_quantize`.

LPBQ's block scales are an integer times one float scale of their output channel:

    scale[block] = clamp(round(raw[block] / s), 1, 2^scale_bits) · s,   s = max raw / 2^scale_bits

where the maximum runs over the blocks of a group (a whole output channel, as a rule). The block
with the largest raw scale gets the top integer and keeps its scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

_SHORT = 16  # significant bits of a scale that is to survive conversions


@dataclass(frozen=True, eq=False)
class Grid:
    """The values a weight may take, cell by cell.

    Invariants: ``scale`` is positive, ``scale`` and ``offset`` have the grid's shape, which
    divides the weight's shape dimension by dimension (aligned at the last one), and
    ``qmin < qmax`` are integers.

    :param scale: step between neighbouring values, ``[g0, g1, …]``.
    :param offset: minus the zero point, whole numbers in a float tensor, ``[g0, g1, …]``.
    :param qmin: smallest integer.
    :param qmax: largest integer.
    :param block_size: elements of a cell along each dimension where the grid is blockwise (-1:
        what the weight's shape says), None for per-tensor and per-channel grids.
    :param zero_point_shift: 0, or 0.5 where the values lie half a step off the integers.
    :param half_up: halfway between two values the larger one is taken, in float32 and counted
        from the smallest one: the arithmetic of aimet_onnx. Else the even integer.
    """

    scale: Tensor
    offset: Tensor
    qmin: int
    qmax: int
    block_size: tuple[int, ...] | None = None
    zero_point_shift: float = 0.0
    half_up: bool = False

    @property
    def shape(self) -> torch.Size:
        """Number of cells along each dimension."""
        return self.scale.shape


def to_blocks(tensor: Tensor, grid_shape: Sequence[int]) -> Tensor:
    """View a tensor as the cells of a grid, each dimension split in (cells, elements of a cell).

    :param tensor: ``[d0, d1, …]``.
    :param grid_shape: cells along each dimension ``(g0, g1, …)``; missing leading ones are 1.
    :returns: ``[g0, d0/g0, g1, d1/g1, …]``.
    :raises ValueError: the grid does not divide the tensor.
    """
    cells = _aligned(grid_shape, tensor.dim())
    if len(grid_shape) > tensor.dim() or any(
        d % g for d, g in zip(tensor.shape, cells, strict=True)
    ):
        raise ValueError(
            f"a grid that divides the tensor's shape {tuple(tensor.shape)} is required, "
            f"got {tuple(grid_shape)}; choose a block size that divides the width"
        )
    split = ((g, d // g) for d, g in zip(tensor.shape, cells, strict=True))
    return tensor.reshape(tuple(chain.from_iterable(split)))  # [g0, b0, g1, b1, …]


def from_blocks(blocks: Tensor) -> Tensor:
    """Undo :func:`to_blocks`: ``[g0, b0, g1, b1, …]`` to ``[g0·b0, g1·b1, …]``."""
    shape = blocks.shape
    return blocks.reshape([shape[i] * shape[i + 1] for i in range(0, len(shape), 2)])


def spread(cells: Tensor, like: Tensor) -> Tensor:
    """Return the number of each cell for every weight in it, in the shape and type of ``like``.

    :param cells: numbers of a grid, ``[g0, g1]``; missing leading dimensions are 1.
    :param like: ``[out, in]``.
    """
    rows, columns = _aligned(cells.shape, 2)
    cells = cells.to(like.dtype).reshape(rows, columns)
    wide = cells.repeat_interleave(like.shape[1] // columns, 1)
    return wide.repeat_interleave(like.shape[0] // rows, 0)


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes through as if it were the identity."""
    return x + (x.round() - x).detach() if x.requires_grad else x.round()


def clamp_ste(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp, with gradient 1 on the bounds too (where ``torch.clamp`` may give 0)."""
    if not x.requires_grad:
        return x.clamp(low, high)
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


def quantize(weight: Tensor, grid: Grid) -> Tensor:
    """Return the integers of a weight on a grid, as a float tensor; differentiable.

    :param weight: ``[out, in]``, or any shape that the grid divides.
    :raises ValueError: the grid does not divide the weight.
    """
    return from_blocks(_codes(weight, grid, *_cellwise(weight, grid)))


def dequantize(q: Tensor, grid: Grid) -> Tensor:
    """Return the values ``(q + offset + shift) · scale`` of integers, in the dtype of ``q``."""
    scale, offset = _cellwise(q, grid)
    return from_blocks(_values(to_blocks(q, grid.shape), grid, scale, offset))


def fake_quantize(weight: Tensor, grid: Grid) -> Tensor:
    """Move a weight to its nearest values on a grid, in its own dtype; differentiable.

    Gradients pass rounding straight through, are zero for weights beyond the grid, and reach
    ``scale`` and ``offset`` as well.

    Bit for bit what AIMET's quantizer returns. It has two ways to compute: per-tensor and
    per-channel grids that need no gradient go through ``torch.fake_quantize_*``, which multiplies
    by the float32 reciprocal of the scale; all others are divided by the scale, in the weight's
    own dtype if that can hold the integers with two bits to spare. The two differ in ties, and in
    bfloat16 by more.

    :param weight: ``[out, in]``, or any shape that the grid divides.
    :raises ValueError: the grid does not divide the weight.
    """
    scale, offset = _cellwise(weight, grid)
    codes = _codes(weight, grid, scale, offset)
    return from_blocks(_values(codes, grid, scale, offset)).to(weight.dtype)


def settled(codes: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Return values of integers that a quantizer of this grid leaves as they are.

    Rounded to bfloat16, a value near a power of two can be nearer to the next code, and that
    one's own value a different one, which stays.

    :param codes: integers ``[out, in]``.
    :param dtype: type in which the weight is stored.
    """
    return fake_quantize(dequantize(codes.to(dtype), grid).to(dtype), grid)


def check_settled(name: str, values: Tensor, grid: Grid) -> None:
    """Check that a quantizer leaves values as they are.

    :param name: name of the layer, for the message.
    :raises RuntimeError: the simulation would round them to something else.
    """
    moved = int((fake_quantize(values, grid) != values).sum())
    if moved:
        raise RuntimeError(
            f"{name}: values on the grid must stay as they are when the simulation quantizes "
            f"them, but {moved} of {values.numel()} move; report this"
        )


def minmax_range(
    weight: Tensor,
    grid_shape: Sequence[int],
    qmin: int,
    qmax: int,
    symmetric: bool,
    zero_point_shift: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return each cell's smallest range with zero and every weight in it, as AIMET calibrates.

    A symmetric range is ``delta · (qmin, qmax)`` with ``delta = max(max w / qmax, min w / qmin)``;
    at 2 bits without shift ``delta`` is as if ``qmax`` were 2, so that no level is wasted.

    :param weight: ``[out, in]``, or any shape that the grid divides.
    :returns: ``(min, max)``, each of ``grid_shape``, differentiable in the weight.
    """
    blocks = to_blocks(weight, grid_shape)
    inside = tuple(range(1, blocks.dim(), 2))
    low = blocks.amin(inside).reshape(tuple(grid_shape)).clamp(max=0)
    high = blocks.amax(inside).reshape(tuple(grid_shape)).clamp(min=0)

    steps = qmax - qmin - (1 if zero_point_shift == 0.5 else 0)
    smallest = minimum_scale(steps)
    widen = smallest * ((high - low) / steps < smallest)
    if not symmetric:
        return low, _finite(high + steps * widen, weight.dtype)
    up, down = math.floor(steps / 2), math.ceil(steps / 2)
    high, low = high + up * widen, low - down * widen
    delta = torch.maximum(high / (up + (steps == 3)), -low / down)
    return _finite(-down * delta, weight.dtype), _finite(up * delta, weight.dtype)


def scale_offset(
    low: Tensor, high: Tensor, qmin: int, qmax: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and offset that AIMET derives from a range, differentiable (straight-through).

    :param low: smallest value of each cell.
    :param high: largest value of each cell.
    :returns: ``(scale, offset)`` of the same shape; a symmetric offset is a constant.
    """
    steps = qmax - qmin
    scale = ((high - low) / steps).abs().clamp_min(minimum_scale(steps))
    if symmetric:
        return scale, torch.full_like(scale, symmetric_offset(qmin, qmax), requires_grad=False)
    return scale, clamp_ste(round_ste(low / scale) - qmin, -qmax, -qmin)


def symmetric_offset(qmin: int, qmax: int) -> int:
    """Return the offset of a symmetric grid: 0 for signed integers, else half the range."""
    return -round((qmin + qmax) / 2)


def short_scale(scale: Tensor) -> Tensor:
    """Round a scale to 16 significant bits, which changes it by a share of 1.6e-5 at most.

    Its products with the integers of 8 bits are exact in float32. So a range made of it gives it
    back to the last bit, whichever way a toolkit goes from scales to ranges and back.
    """
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2**_SHORT).round() / 2**_SHORT, exponent)


def minimum_scale(steps: int) -> float:
    """Return the smallest scale that AIMET allows a grid of ``steps + 1`` values."""
    return min(torch.finfo(torch.float32).eps, 0.01 / steps)


def bias_scale(bias: Tensor, peak: float, steps: int) -> Tensor:
    """Return the smallest scale of each row with which an int32 holds the row's bias.

    A bias is an integer of the step ``s_x · s_w``; the input's ``s_x`` is at least its largest
    magnitude over the number of its steps, half of which is taken as a margin.

    :param bias: Bias of the layer, shape [out].
    :param peak: Largest magnitude of the input, 0 if it is not known.
    :param steps: Steps of the input's grid, 0 for a float one.
    :returns: scales of shape [out], 0 where nothing is required.
    """
    if not peak or not steps:
        return torch.zeros_like(bias)
    return 2 * bias.abs() / (2**31 * (peak / steps))


def _aligned(shape: Sequence[int], dims: int) -> tuple[int, ...]:
    return (1,) * (dims - len(shape)) + tuple(shape)


def _finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype)
    return x.clamp(limit.min, limit.max).to(dtype)


def _needs_gradient(grid: Grid) -> bool:
    return torch.is_grad_enabled() and (grid.scale.requires_grad or grid.offset.requires_grad)


def _is_fused(grid: Grid) -> bool:
    """Return whether AIMET hands this grid to ``torch.fake_quantize_*``."""
    if grid.block_size is not None or grid.zero_point_shift or grid.half_up:
        return False
    if _needs_gradient(grid):
        return False
    if grid.scale.numel() == 1:
        return True
    zero_point_inside = bool(((grid.offset >= -grid.qmax) & (grid.offset <= -grid.qmin)).all())
    return zero_point_inside and sum(cells != 1 for cells in grid.shape) == 1


def _working_dtype(dtype: torch.dtype, grid: Grid) -> torch.dtype:
    """Return the dtype AIMET rounds in: the weight's, if it resolves a quarter of a step."""
    for candidate in (dtype, torch.float32):
        if torch.finfo(candidate).eps <= 0.25 / (grid.qmax - grid.qmin):
            return candidate
    return torch.float64


def _cellwise(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and offset as ``[g0, 1, g1, 1, …]`` in the dtype to compute in."""
    if _is_fused(grid) or grid.half_up:
        dtype = torch.promote_types(grid.scale.dtype, torch.float32)
    else:
        dtype = _working_dtype(weight.dtype, grid)
    cells = _aligned(grid.shape, weight.dim())
    shape = tuple(chain.from_iterable((g, 1) for g in cells))
    return grid.scale.to(dtype).reshape(shape), grid.offset.to(dtype).reshape(shape)


def _codes(weight: Tensor, grid: Grid, scale: Tensor, offset: Tensor) -> Tensor:
    blocks = to_blocks(weight, grid.shape)
    if grid.half_up:
        first = offset + (grid.qmin + grid.zero_point_shift)
        return clamp_ste(_half_up(blocks / scale - first), 0, grid.qmax - grid.qmin) + grid.qmin
    if _is_fused(grid):
        steps = blocks * scale.reciprocal()
    elif grid.zero_point_shift:
        steps = blocks.to(scale.dtype) / scale - grid.zero_point_shift
    else:
        steps = blocks.to(scale.dtype) / scale
    return clamp_ste(round_ste(steps) - offset, grid.qmin, grid.qmax)


def _half_up(x: Tensor) -> Tensor:
    """Round, halves up; straight-through."""
    whole = x.detach().floor()
    rounded = whole + (x.detach() - whole >= 0.5).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def _values(codes: Tensor, grid: Grid, scale: Tensor, offset: Tensor) -> Tensor:
    if grid.zero_point_shift:
        offset = offset + grid.zero_point_shift
    return (codes + offset) * scale


# ---- LPBQ ---------------------------------------------------------------------------------------


def channel_scale(raw_scale: Tensor, block_grouping: Sequence[int], scale_bits: int) -> Tensor:
    """Return the float scale that a group's blocks share: the largest raw scale / 2^scale_bits.

    :param raw_scale: float scale of every block, ``[out, blocks]`` for a linear layer.
    :param block_grouping: blocks of a group along each dimension, -1 for all of them;
        ``(1, -1)`` for a linear layer.
    :returns: ``[out, 1]`` for a linear layer.
    """
    groups = _groups(raw_scale, block_grouping)
    blocks = to_blocks(raw_scale, groups)
    return blocks.amax(tuple(range(1, blocks.dim(), 2))) / 2**scale_bits


def integer_scale(raw_scale: Tensor, block_grouping: Sequence[int], scale_bits: int) -> Tensor:
    """Return the integer scale of every block, 1 … 2^scale_bits, as float; differentiable.

    :param raw_scale: float scale of every block, ``[out, blocks]`` for a linear layer.
    :returns: same shape as ``raw_scale``.
    """
    shared = channel_scale(raw_scale, block_grouping, scale_bits)
    return from_blocks(_integers(raw_scale, shared, scale_bits))


def lpbq_scale(raw_scale: Tensor, block_grouping: Sequence[int], scale_bits: int) -> Tensor:
    """Scale of every block as LPBQ represents it; differentiable (straight-through).

    :param raw_scale: float scale of every block, ``[out, blocks]`` for a linear layer.
    :param block_grouping: blocks of a group along each dimension, -1 for all of them.
    :param scale_bits: bits of the integer, AIMET's ``decompressed_bw - bitwidth``.
    :returns: same shape as ``raw_scale``.
    """
    shared = channel_scale(raw_scale, block_grouping, scale_bits)
    integers = _integers(raw_scale, shared, scale_bits)
    return from_blocks(integers * _cells(shared))


def _integers(raw_scale: Tensor, shared: Tensor, scale_bits: int) -> Tensor:
    ratio = to_blocks(raw_scale, shared.shape) / _cells(shared)  # [g0, b0, g1, b1, …]
    return clamp_ste(round_ste(ratio), 1, 2**scale_bits)


def _cells(shared: Tensor) -> Tensor:
    for dim in range(shared.dim()):
        shared = shared.unsqueeze(2 * dim + 1)  # [g0, 1, g1, 1, …]
    return shared


def _groups(raw_scale: Tensor, block_grouping: Sequence[int]) -> tuple[int, ...]:
    return tuple(
        1 if group == -1 else cells // group
        for cells, group in zip(raw_scale.shape, block_grouping, strict=True)
    )
