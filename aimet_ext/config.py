"""Settings: how a tensor is quantized, and the parameters of every technique.

Everything here is frozen, keyword-only where it has more than one field, and checked when it is
built, so that a mistake is an error before any work is done.
"""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

__all__ = [
    "LPBQ",
    "Blockwise",
    "Granularity",
    "OmniQuantParams",
    "PerChannel",
    "PerTensor",
    "QSpec",
]

_STRICT = ConfigDict(extra="forbid", strict=True)

BlockSize = Annotated[int, Field(ge=2)]
OnIndivisible = Literal["error", "per_channel", "pad"]


@dataclass(frozen=True, config=_STRICT)
class PerTensor:
    """One range for the whole weight."""


@dataclass(frozen=True, config=_STRICT)
class PerChannel:
    """One range for each output channel."""


@dataclass(frozen=True, config=_STRICT)
class Blockwise:
    """One range for every ``block_size`` neighbouring input channels of an output channel."""

    block_size: BlockSize


@dataclass(frozen=True, config=_STRICT)
class LPBQ:
    """Low-power blockwise quantization: blockwise, with integer block scales.

    The scale of a block is an integer in ``1 … 2**scale_bits`` times one float scale of its output
    channel, so ``decompressed_bw = bitwidth + scale_bits``.
    """

    block_size: BlockSize = 64
    scale_bits: Annotated[int, Field(ge=1, le=8)] = 4


Granularity = PerTensor | PerChannel | Blockwise | LPBQ

_SPEC_TEXT = re.compile(r"u?int(\d+)")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class QSpec:
    """How a tensor is quantized: width, symmetry and how ranges are shared across it.

    :param bitwidth: 2 to 32 bits.
    :param symmetric: signed and symmetric if true, else unsigned with an offset.
    :param granularity: :class:`PerTensor`, :class:`PerChannel`, :class:`Blockwise` or
        :class:`LPBQ`. Activations are always per tensor.
    :param on_indivisible: what to do with a layer whose input width is no multiple of the block
        size: ``"error"``, ``"per_channel"`` (that layer falls back), or ``"pad"`` (the inner width
        of an MLP is padded with zeros, which leaves its function as it was).

    >>> QSpec(bitwidth=4, granularity=LPBQ(block_size=64))
    QSpec(bitwidth=4, symmetric=True, granularity=LPBQ(block_size=64, scale_bits=4), ...)
    """

    bitwidth: Annotated[int, Field(ge=2, le=32)] = 4
    symmetric: bool = True
    granularity: PerTensor | PerChannel | Blockwise | LPBQ = field(default_factory=PerChannel)
    on_indivisible: OnIndivisible = "error"

    @model_validator(mode="after")
    def _lpbq_is_symmetric(self) -> QSpec:
        if isinstance(self.granularity, LPBQ) and not self.symmetric:
            raise ValueError(
                "LPBQ needs symmetric=True, got symmetric=False; "
                "use Blockwise for an asymmetric grid"
            )
        return self

    @classmethod
    def parse(cls, text: str, *, granularity: Granularity | None = None, **rest: object) -> QSpec:
        """Build a spec from a width such as ``"int4"`` (symmetric) or ``"uint4"`` (asymmetric).

        :raises ValueError: ``text`` is not of that form.
        """
        match = _SPEC_TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f'a width such as "int4" or "uint8" is required, got {text!r}')
        values = dict(rest, bitwidth=int(match[1]), symmetric=not text.startswith("u"))
        return cls(granularity=granularity or PerChannel(), **values)  # type: ignore[arg-type]

    @property
    def block_size(self) -> int | None:
        """Input channels that share a range, or None where there are no blocks."""
        return getattr(self.granularity, "block_size", None)

    def to_dict(self) -> dict:
        """The spec as plain JSON values; :meth:`from_dict` reads it back."""
        plain = TypeAdapter(QSpec).dump_python(self, mode="json")
        plain["granularity"] = {"type": type(self.granularity).__name__, **plain["granularity"]}
        return plain

    @classmethod
    def from_dict(cls, plain: dict) -> QSpec:
        """Read back what :meth:`to_dict` wrote; an unknown key is an error."""
        values = dict(plain)
        shape = dict(values.pop("granularity", {"type": "PerChannel"}))
        name = shape.pop("type", None)
        kinds = {kind.__name__: kind for kind in (PerTensor, PerChannel, Blockwise, LPBQ)}
        if name not in kinds:
            raise ValueError(f"granularity type must be one of {sorted(kinds)}, got {name!r}")
        return cls(granularity=kinds[name](**shape), **values)
