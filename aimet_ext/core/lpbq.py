"""LPBQ: block scales that are an integer times one float scale of their output channel.

    scale[block] = clamp(round(raw[block] / s), 1, 2^scale_bits) · s,   s = max raw / 2^scale_bits

where the maximum runs over the blocks of a group (a whole output channel, as a rule). The block
with the largest raw scale gets the top integer and keeps its scale.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from aimet_ext.core.affine import clamp_ste, from_blocks, round_ste, to_blocks

__all__ = ["channel_scale", "integer_scale", "lpbq_scale"]


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
