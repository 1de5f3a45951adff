"""Chips that models are compiled for, as data."""

from __future__ import annotations

from dataclasses import dataclass


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
        raise ValueError(f"target: one of {', '.join(target_names())} was required, got {name!r}")
    return target
