"""Options that name a width or a grid, read into a :class:`aimet_ext.QSpec`."""

from __future__ import annotations

import dataclasses
import enum

import typer

from aimet_ext.cli.errors import message_of
from aimet_ext.config import LPBQ, Blockwise, QSpec

__all__ = ["OnIndivisible", "on_blocks", "width", "width_or_none"]


class OnIndivisible(str, enum.Enum):
    """What happens where no whole number of blocks fits."""

    ERROR = "error"
    PER_CHANNEL = "per_channel"
    PAD = "pad"


def width(text: str) -> QSpec:
    """Read ``int4`` or ``uint4``."""
    try:
        return QSpec.parse(text)
    except ValueError as error:
        raise typer.BadParameter(message_of(error)) from error


def width_or_none(text: str) -> QSpec | str:
    """Read a width, or the word ``none``."""
    # None would stand for an option that was not given.
    return "none" if text == "none" else width(text)


def on_blocks(
    spec: QSpec, block_size: int | None, lpbq: int | None, otherwise: OnIndivisible
) -> QSpec:
    """The spec with the blocks that were asked for."""
    if block_size is not None and lpbq is not None:
        raise typer.BadParameter("give --block-size or --lpbq, not both")
    try:
        if block_size is not None:
            spec = dataclasses.replace(spec, granularity=Blockwise(block_size))
        if lpbq is not None:
            spec = dataclasses.replace(spec, granularity=LPBQ(block_size=lpbq))
        return dataclasses.replace(spec, on_indivisible=otherwise.value)
    except ValueError as error:
        raise typer.BadParameter(message_of(error)) from error
