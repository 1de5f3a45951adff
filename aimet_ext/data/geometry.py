"""From a layer's input to the rows that multiply its weight.

A linear layer multiplies its weight with rows, one per token; a convolution does too, one row per
position of its output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from aimet_ext.core.transposed import spread_out

_CHUNK = 2**24  # elements of the rows unrolled at a time: 64 MiB of float32
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Geometry:
    """The way from a layer's input to the rows that multiply its weight.

    Layers of equal geometry that read one input have the same second moments. Hence settings
    that make no difference (how padding is spelled, its mode where there is none, the dilation of
    a 1 × 1 kernel) are brought to one form. All fields are empty or 1 for a linear layer.

    :param kernel_size: one number per spatial dimension.
    :param stride: likewise.
    :param dilation: likewise.
    :param padding: numbers before and after each dimension, the last dimension first, as
        ``torch.nn.functional.pad`` takes them.
    :param padding_mode: as torch.nn.Conv2d names it.
    :param groups: groups of channels, each with inputs and outputs of its own.
    :param spread: one number per spatial dimension of a transposed convolution, the stride of its
        inputs among zeros, which a convolution then reads, see :mod:`aimet_ext.core.transposed`.
    """

    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    groups: int = 1
    spread: tuple[int, ...] = ()

    @classmethod
    def of(cls, module: nn.Module) -> Geometry:
        """Return the geometry of a linear layer or of a convolution in one to three dimensions.

        A convolution may be a transposed one.

        :raises TypeError: the module is neither.
        """
        if isinstance(module, nn.Linear):
            return cls()
        if not isinstance(module, (*_CONVOLUTIONS, *TRANSPOSED)):
            raise TypeError(
                "a layer with second moments must be nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d, "
                f"or nn.ConvTranspose1d to 3d, got {type(module).__name__}; leave it out"
            )
        kernel, dilation = module.kernel_size, module.dilation
        if isinstance(module, TRANSPOSED):
            return cls(
                kernel_size=tuple(kernel),
                stride=(1,) * len(kernel),
                dilation=tuple(dilation),
                padding=_transposed_padding(module),
                groups=module.groups,
                spread=tuple(module.stride),
            )
        padding = _padding(module)
        return cls(
            kernel_size=tuple(kernel),
            stride=tuple(module.stride),
            dilation=tuple(1 if k == 1 else d for k, d in zip(kernel, dilation, strict=True)),
            padding=padding,
            padding_mode=module.padding_mode if any(padding) else "zeros",
            groups=module.groups,
        )

    def rows(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return all rows of an input, one per token or output position, as the weight orders them.

        :param x: ``[..., in]`` for a linear layer, ``[images, channels, ...]`` for a convolution,
            which takes a single image ``[channels, ...]`` as well.
        :param mask: bool of leading dimensions of ``x``, true for what counts: tokens for a linear
            layer, images ``[images]`` for a convolution.
        :returns: ``[groups, tokens, in]``, with ``in = channels / groups * kernel elements`` in
            the order of ``weight.flatten(1)``.
        :raises ValueError: ``x`` or ``mask`` has a shape that does not fit.
        """
        return torch.cat(list(self.chunks(x, mask)), 1)

    def chunks(self, x: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the result of :meth:`rows` in order, in chunks of at most some 64 MiB of float32.

        How rows are cut depends on shapes only: the chunks of two streams go together.
        """
        x = x.detach()
        if not self.kernel_size:
            yield from self._linear_chunks(_select(x, mask, x.dim() - 1))
        else:
            batched = x if x.dim() == len(self.kernel_size) + 2 else x.unsqueeze(0)
            yield from self._patch_chunks(_select(batched, mask, 1))

    def _linear_chunks(self, x: Tensor) -> Iterator[Tensor]:
        tokens = x.reshape(-1, x.shape[-1])  # [tokens, in]
        for part in tokens.split(max(1, _CHUNK // max(1, tokens.shape[1]))):
            yield part.unsqueeze(0)  # [1, tokens, in]

    def _patch_chunks(self, images: Tensor) -> Iterator[Tensor]:
        patches = self._patches(images)  # [groups, images, *output, in / kernel, *kernel]
        spatial = len(self.kernel_size)
        width = math.prod(patches.shape[2 + spatial :])
        line = self.groups * width * math.prod(patches.shape[3 : 2 + spatial])
        lines = max(1, _CHUNK // max(1, line))  # of the output's first dimension
        count = max(1, lines // max(1, patches.shape[2]))  # images
        for group in patches.split(count, 1):
            # Only an image that is too large for a chunk of its own is cut.
            for part in group.split(max(1, patches.shape[2]) if count > 1 else lines, 2):
                yield part.reshape(self.groups, -1, width)  # [groups, tokens, in]

    def _patches(self, images: Tensor) -> Tensor:
        """Return the padded images seen as ``[groups, images, *output, in / kernel, *kernel]``."""
        spatial = len(self.kernel_size)
        if images.dim() != spatial + 2 or images.shape[1] % self.groups:
            raise ValueError(
                f"the input of a convolution with {self.groups} groups and a kernel of "
                f"{self.kernel_size} must be [images, channels, {spatial} dimensions], "
                f"got {list(images.shape)}"
            )
        if self.spread:
            images = spread_out(images, self.spread)
        if any(self.padding):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            images = functional.pad(images, self.padding, mode=mode)
        settings = zip(self.kernel_size, self.stride, self.dilation, strict=True)
        for dimension, (kernel, stride, dilation) in enumerate(settings, 2):
            span = dilation * (kernel - 1) + 1
            images = images.unfold(dimension, span, stride)[..., ::dilation]
        # [images, groups, channels / groups, *output, *kernel]
        patches = images.unflatten(1, (self.groups, -1))
        output = range(3, 3 + spatial)
        kernels = range(3 + spatial, 3 + 2 * spatial)
        return patches.permute(1, 0, *output, 2, *kernels)


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    """Return the padding of a convolution as ``torch.nn.functional.pad`` takes it."""
    kernel, dilation, padding = module.kernel_size, module.dilation, module.padding
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    elif padding == "valid":
        sides = [(0, 0)] * len(kernel)
    else:
        sides = [(int(p), int(p)) for p in padding]
    return tuple(amount for side in reversed(sides) for amount in side)


def _transposed_padding(module: Any) -> tuple[int, ...]:
    """Return what the convolution of spread inputs has in place of a transposed one's padding."""
    reach = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    before = [r - p for r, p in zip(reach, module.padding, strict=True)]
    sides = [(b, b + more) for b, more in zip(before, module.output_padding, strict=True)]
    return tuple(amount for side in reversed(sides) for amount in side)


def _select(x: Tensor, mask: Tensor | None, most: int) -> Tensor:
    """Return the part of ``x`` that a mask leaves.

    :param most: largest number of the mask's dimensions.
    """
    if mask is None:
        return x
    if (
        mask.dtype != torch.bool
        or not 1 <= mask.dim() <= most
        or x.shape[: mask.dim()] != mask.shape
    ):
        raise ValueError(
            f"a mask must be bool, of the first dimensions (at most {most}) of an input "
            f"{list(x.shape)}, got {str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
        )
    if bool(mask.all()):
        return x.flatten(0, mask.dim() - 1)
    return x[mask.to(x.device)]
