"""Chips that models are compiled for, and limits of their architectures, as data.

Within its limits an HTP computes as a simulation does. They were measured in Qualcomm's own
simulation of the HTP, on graphs of one layer: what the compiler refuses, and what it takes and
computes wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass

from aimet_ext.patterns import near

#: Masked scores below this leave the others less than 40 dB, even at 16 bits.
MASK_LIMIT = -1e4

#: Rounding scores that go into a Softmax by half of this changes attention weights by 5 %.
SCORE_STEP = 0.1

#: Rounding an angle by half of this, in radians, changes its cosine by up to 5 %.
ANGLE_STEP = 0.1

#: Remedy for a gain that :func:`refuses_norm`.
NORM_REMEDY = (
    "quantize its gain to unsigned integers as wide as the norm's output (bitwidth=8, "
    "symmetric=False beside activations of 8 bits), or give its input or output 16 bits"
)


@dataclass(frozen=True, kw_only=True)
class HtpTarget:
    """A Hexagon Tensor Processor and one chip that has it.

    QNN compiles for the chip: where ``soc_model`` names another architecture than ``arch``, the
    chip's one counts, and a ``soc_model`` that it does not know is compiled for some other chip
    without an error. So both are given together, from this table alone.

    :param name: name that users give.
    :param arch: version of the architecture.
    :param soc: name of the chip, as compiled files have it.
    :param soc_model: QNN's number of the chip.
    """

    name: str
    arch: int
    soc: str
    soc_model: int

    @property
    def config(self) -> str:
        """AIMET's name for the quantizer placement of this architecture: ``htp_v79``."""
        return f"htp_v{self.arch}"


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

# Chip, its architecture and QNN's number of it. The first of an architecture stands for it. A
# model compiled for a number says which chip and architecture that is; a test compares.
_CHIPS = (
    ("SM8350", 68, 30),  # Snapdragon 888
    ("QCS6490", 68, 93),
    ("SM8450", 69, 36),  # Snapdragon 8 Gen 1
    ("SM8475", 69, 42),  # Snapdragon 8+ Gen 1
    ("SM8550", 73, 43),  # Snapdragon 8 Gen 2
    ("SM8635", 73, 68),  # Snapdragon 8s Gen 3
    ("SC8380XP", 73, 60),  # Snapdragon X Elite
    ("QCS8550", 73, 66),
    ("SA8255", 73, 52),
    ("SM8650", 75, 57),  # Snapdragon 8 Gen 3
    ("SM8750", 79, 69),  # Snapdragon 8 Elite
    ("SM8850", 81, 87),  # Snapdragon 8 Elite Gen 5
    ("SC8480XP", 81, 88),  # Snapdragon X2 Elite
)


def _targets() -> dict[str, HtpTarget]:
    found: dict[str, HtpTarget] = {}
    for soc, arch, soc_model in _CHIPS:
        for name in (f"htp_v{arch}", soc.lower()):
            target = HtpTarget(name=name, arch=arch, soc=soc, soc_model=soc_model)
            found.setdefault(name, target)
    return found


_TARGETS = _targets()


def refuses_norm(reads: str | None, gain: str | None, makes: str | None) -> bool:
    """Return True if no HTP takes an RMS norm of these integers.

    Measured on all architectures, with ``SimplifiedLayerNormalization``.

    :param reads: Type of its input, such as ``"uint8"``; None if it is float or not known.
    :param gain: Type of its gain, likewise.
    :param makes: Type of its output, likewise.
    """
    if gain is None or reads is None or makes is None:
        return False
    wide = {kind.endswith("16") for kind in (reads, makes)}
    if len(wide) == 2:  # one side of 16 bits and one of 8: any gain will do
        return False
    return gain == "int8" if wide == {True} else gain != "uint8"


def target_names() -> list[str]:
    """Return names that :func:`find_target` knows: architectures first, then chips."""
    return sorted(_TARGETS, key=lambda name: (not name.startswith("htp_"), name))


def find_target(name: str | HtpTarget) -> HtpTarget:
    """Return the target of a name, upper or lower case.

    :param name: an architecture (``"htp_v75"``) or a chip (``"sm8650"``); a target is returned
        as it is.
    :raises ValueError: the name is not known; the message lists those that are.
    """
    if isinstance(name, HtpTarget):
        return name
    target = _TARGETS.get(name.lower())
    if target is None:
        raise ValueError(
            f"target: one of {', '.join(target_names())} was required, got {name!r}"
            f"{near(name, target_names())}"
        )
    return target
