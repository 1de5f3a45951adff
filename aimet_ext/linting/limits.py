"""Limits within which each architecture of the HTP computes as a simulation does.

All of it was measured in Qualcomm's own simulation of the HTP, on graphs of one layer: what the
compiler refuses, and what it takes and computes wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Masked scores below this leave the others less than 40 dB, even at 16 bits.
MASK_LIMIT = -1e4


@dataclass(frozen=True, kw_only=True)
class HtpLimits:
    """Limits of one architecture.

    :param arch: Version.
    :param widths: Bits of weights and of activations that a layer can have together.
    :param lpbq: Bits of weights and of their integer scales.
    :param block_multiple: Number that divides every LPBQ block.
    :param small_block: A block below that, for input widths that are a multiple of it; None: none.
    :param lpbq_conv: True if convolutions can be LPBQ.
    :param wide_operands: True if the second operand of a product of two activations can have 16
        bits; else it is rounded to 8.
    :param float16: True if there is arithmetic in floating point.
    """

    arch: int
    widths: frozenset[tuple[int, int]]
    lpbq: frozenset[tuple[int, int]] = frozenset({(4, 4)})
    block_multiple: int = 32
    small_block: int | None = 16
    lpbq_conv: bool = True
    wide_operands: bool = True
    float16: bool = True

    def takes_block(self, block: int, width: int, *, conv: bool = False) -> bool:
        """Return True if LPBQ blocks of so many input channels are computed right.

        :param width: Input channels of the layer; one block that is all of them is a channel.
        :param conv: True for a convolution, which takes smaller ones.
        """
        if block == width or conv:
            return block % 8 == 0
        if block == self.small_block:
            return width % self.block_multiple == 0
        return block % self.block_multiple == 0

    def blocks(self, width: int, *, conv: bool = False) -> list[int]:
        """Return the usual block sizes for a layer of that input width, small ones first."""
        sizes = (size for size in (8, 16, 32, 64, 128, 256) if width % size == 0)
        return [size for size in sizes if self.takes_block(size, width, conv=conv)]


_EARLY = frozenset({(4, 8), (4, 16), (8, 8), (8, 16)})
_LATER = _EARLY | {(16, 16)}

LIMITS: dict[int, HtpLimits] = {
    68: HtpLimits(
        arch=68,
        widths=_EARLY,
        block_multiple=8,
        small_block=None,
        lpbq_conv=False,
        wide_operands=False,
        float16=False,
    ),
    69: HtpLimits(arch=69, widths=_EARLY, wide_operands=False),
    **{arch: HtpLimits(arch=arch, widths=_LATER) for arch in (73, 75, 79, 81)},
}
