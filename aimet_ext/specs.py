"""Specifications of grids: width, symmetry, and the cells that share a range.

Each value is checked when its class is built: a mistake is an error before any work is done.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import field, replace
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from aimet_ext.errors import some

_log = logging.getLogger(__name__)

STRICT = ConfigDict(extra="forbid", strict=True)
"""Checks of every class of settings: known fields alone, and no conversion of values."""

BlockSize = Annotated[int, Field(ge=2)]
OnIndivisible = Literal["error", "per_channel", "pad"]


@dataclass(frozen=True, config=STRICT)
class PerTensor:
    """One range for the whole weight."""


@dataclass(frozen=True, config=STRICT)
class PerChannel:
    """One range for each output channel."""


@dataclass(frozen=True, config=STRICT)
class Blockwise:
    """One range for every ``block_size`` neighbouring input channels of an output channel.

    :param block_size: Input channels of a block.
    """

    block_size: BlockSize


@dataclass(frozen=True, config=STRICT)
class LPBQ:
    """Low-power blockwise quantization: blockwise, with integer block scales.

    The scale of a block is an integer in ``1 … 2**scale_bits`` times one float scale of its output
    channel, so ``decompressed_bw = bitwidth + scale_bits``.

    :param block_size: Input channels of a block.
    :param scale_bits: Bits of the integer scales, 1 to 8.
    """

    block_size: BlockSize = 64
    scale_bits: Annotated[int, Field(ge=1, le=8)] = 4


Granularity = PerTensor | PerChannel | Blockwise | LPBQ

_SPEC_TEXT = re.compile(r"u?int(\d+)")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QSpec:
    """Specification of a quantized tensor: width, symmetry and the cells that share a range.

    :param bitwidth: Bits, 2 to 32, as quantizers of AIMET have them; what is deployed takes 2 to
        8, and 16.
    :param symmetric: True for signed and symmetric, false for unsigned with an offset.
    :param granularity: :class:`PerTensor`, :class:`PerChannel`, :class:`Blockwise` or
        :class:`LPBQ`. Activations are always per tensor.
    :param on_indivisible: Treatment of a layer whose input width is no multiple of the block
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

    @property
    def width(self) -> str:
        """Width and symmetry as :meth:`parse` reads them: ``"int4"`` or ``"uint4"``."""
        return f"{'int' if self.symmetric else 'uint'}{self.bitwidth}"

    def to_dict(self) -> dict:
        """Return the spec as plain JSON values; :meth:`from_dict` reads it back."""
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


Kind = Literal["weights", "activations"]

STORED_BITS = (*range(2, 9), 16)
"""Bits that a quantized tensor may have: files and NPUs hold integers of no other width."""


def check_widths(kind: Kind, specs: Mapping[str, QSpec | None]) -> None:
    """Refuse specs of a width that no target stores.

    :param specs: Specs by the name of what they were given for, None for float.
    :raises ValueError: one has other bits than :data:`STORED_BITS`.
    """
    for name, spec in specs.items():
        if spec is not None:
            _check_bits(kind, name, spec.bitwidth)


def parse_width(kind: Kind, text: str) -> QSpec:
    """Return the spec of a width such as ``"int4"`` or ``"uint16"``, that a target stores.

    :raises ValueError: ``text`` is not of that form, or names another width.
    """
    if match := _SPEC_TEXT.fullmatch(text):
        _check_bits(kind, "width", int(match[1]))
    return QSpec.parse(text)


def _check_bits(kind: Kind, name: str, bits: int) -> None:
    if bits not in STORED_BITS:
        raise ValueError(
            f"{name}: {kind} of 2 to 8 bits, or of 16, are required, got {bits} bits (bitwidth)"
        )


class WeightPlan(NamedTuple):
    """A grid for every layer.

    :param specs: Specs by name of module, None for a weight that stays float.
    :param per_channel_instead: Layers whose width their block size does not divide, and which are
        quantized per channel instead.
    :param pad: Layers whose width must be padded first.
    :param recurrent: Specs by name of parameter, for the matrices of recurrent layers.
    """

    specs: dict[str, QSpec | None]
    per_channel_instead: tuple[str, ...]
    pad: tuple[str, ...]
    recurrent: dict[str, QSpec | None]


def fit_blocks(layers: Mapping[str, Any], specs: Mapping[str, QSpec | None]) -> WeightPlan:
    """Decide what becomes of layers that a block size does not fit.

    Of a transposed convolution no block size does: dimension 1 of its weight ``[in, out, …]`` holds
    output channels, of which each gets a range. A warning names others that have one range a row
    instead.

    :param layers: Layers by name, each other one with a ``weight`` ``[out, in, …]``.
    :raises ValueError: there are such layers, and their spec says ``on_indivisible="error"``.
    """
    fitted, turned, instead, pad, problems = dict(specs), [], [], [], []
    common = 0
    for name, spec in specs.items():
        width = layers[name].weight.shape[1]
        if spec is None or spec.block_size is None:
            continue
        if getattr(layers[name], "transposed", False):
            fitted[name] = replace(spec, granularity=PerChannel())
            turned.append(name)
            continue
        common = math.gcd(common, width)
        if width % spec.block_size == 0:
            continue
        if spec.on_indivisible == "per_channel":
            fitted[name] = replace(spec, granularity=PerChannel())
            instead.append(name)
        elif spec.on_indivisible == "pad":
            pad.append(name)
        else:
            groups = getattr(layers[name], "groups", 1)
            grouped = f" in each of {groups} groups" if groups > 1 else ""
            problems.append(f"{name} (width {width}{grouped}, block size {spec.block_size})")
    if problems:
        sizes = [str(size) for size in range(common, 1, -1) if common % size == 0]
        raise ValueError(
            f"a block size that divides the input width is required, got {some(problems)}; "
            'choose another, or on_indivisible="per_channel" or "pad"; sizes that divide all '
            f"layers with blocks: {some(sizes, 8) or 'none'}"
        )
    if instead:
        _log.warning(
            "%d layers have one range a row, as the block size does not divide their width: %s",
            len(instead),
            some(instead),
        )
    return WeightPlan(fitted, (*turned, *instead), tuple(pad), {})
