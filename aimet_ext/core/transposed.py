"""A transposed convolution as the convolution of its input with zeros put in between.

Output ``p`` of a transposed convolution sums ``W[i, o, t] · x[i, q]`` over the taps ``t`` and
inputs ``q`` with ``q · stride − padding + t · dilation = p``. With ``stride − 1`` zeros after each
input, that is a convolution of stride 1 with the weight ``[out, in, kernel]``, its taps reversed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def as_convolution(weight: Tensor, groups: int) -> Tensor:
    """Return the weight of the convolution, ``[out, in / groups, *kernel]``, and back again.

    :param weight: ``[in, out / groups, *kernel]`` of the transposed convolution; of the other, the
        same steps lead back.
    """
    grouped = weight.unflatten(0, (groups, -1)).transpose(1, 2)  # [groups, out, in, *kernel]
    return grouped.flatten(0, 1).flip([*range(2, weight.dim())])


def spread_out(images: Tensor, stride: Sequence[int]) -> Tensor:
    """Return images ``[images, channels, ...]`` with ``stride - 1`` zeros between their pixels."""
    sizes = [(n - 1) * s + 1 for n, s in zip(images.shape[2:], stride, strict=True)]
    wide = images.new_zeros(*images.shape[:2], *sizes)
    pixels = [slice(None), slice(None), *(slice(None, None, step) for step in stride)]
    wide[tuple(pixels)] = images
    return wide
