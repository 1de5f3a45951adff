"""Slow and plain: the rows of a convolution position by position, and sums of their products.

Written from the definition of the convolution in the documentation of torch.nn.Conv2d.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn


def conv_rows_by_loop(module: nn.Conv2d, x: Tensor) -> Tensor:
    """``[groups, tokens, in]`` of an input ``[images, channels, height, width]``, float64."""
    (above, below), (left, right) = (_sides(module, dimension) for dimension in (0, 1))
    height, width = x.shape[2:]
    spans = [d * (k - 1) + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    lines = range(-above, height + below - spans[0] + 1, module.stride[0])
    columns = range(-left, width + right - spans[1] + 1, module.stride[1])
    channels = module.in_channels // module.groups
    groups = []
    for group in range(module.groups):
        tokens = [
            [
                _value(module.padding_mode, image[channel], line + down, column + along)
                for channel in range(group * channels, (group + 1) * channels)
                for down in range(0, spans[0], module.dilation[0])
                for along in range(0, spans[1], module.dilation[1])
            ]
            for image in x
            for line in lines
            for column in columns
        ]
        groups.append(tokens)
    return torch.tensor(groups, dtype=torch.float64)


def moments_by_loop(
    rows: Tensor, float_rows: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``Σ s x̂ x̂ᵀ`` and ``Σ s x̂ (x − x̂)ᵀ`` over tokens, divided by ``Σ s``, in float64.

    :param rows: ``[tokens, in]``.
    :param float_rows: the same.
    :param weights: ``s [tokens]``, None for 1.
    """
    second = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    cross = torch.zeros_like(second)
    weights = torch.ones(len(rows)) if weights is None else weights
    for seen, original, weight in zip(rows.double(), float_rows.double(), weights, strict=True):
        second += weight * torch.outer(seen, seen)
        cross += weight * torch.outer(seen, original - seen)
    return second / weights.sum(), cross / weights.sum()


def _sides(module: nn.Conv2d, dimension: int) -> tuple[int, int]:
    """Padding before and after a dimension."""
    if module.padding == "valid":
        return 0, 0
    if module.padding == "same":
        total = module.dilation[dimension] * (module.kernel_size[dimension] - 1)
        return total // 2, total - total // 2
    amount = module.padding[dimension]
    return amount, amount


def _value(mode: str, channel: Tensor, line: int, column: int) -> float:
    """The pixel at a place that may lie outside of the channel ``[height, width]``."""
    places = []
    for place, size in zip((line, column), channel.shape, strict=True):
        if 0 <= place < size:
            places.append(place)
        elif mode == "zeros":
            return 0.0
        elif mode == "replicate":
            places.append(min(max(place, 0), size - 1))
        elif mode == "circular":
            places.append(place % size)
        else:
            places.append(-place if place < 0 else 2 * (size - 1) - place)
    return float(channel[places[0], places[1]])


def transposed_rows_by_columns(module: Any, x: Tensor) -> Tensor:
    """``[groups, tokens, in]`` of a transposed convolution: column ``(channel, tap)`` is what the
    layer gives with a weight of 1 there and 0 elsewhere. Taps are in reversed order.
    """
    probe = copy.deepcopy(module)
    probe.bias = None
    inside, outside = module.in_channels // module.groups, module.out_channels // module.groups
    taps = list(itertools.product(*(range(size) for size in module.kernel_size)))[::-1]
    groups = []
    for group in range(module.groups):
        columns = []
        for channel in range(inside):
            for tap in taps:
                probe.weight.zero_()
                probe.weight[(group * inside + channel, 0, *tap)] = 1
                columns.append(probe(x)[:, group * outside].flatten())
        groups.append(torch.stack(columns, 1))
    return torch.stack(groups)
