"""Options and forms of output that commands share; widths and grids are read into a QSpec."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from aimet_ext.cli.errors import message_of
from aimet_ext.config import LPBQ, Blockwise, QSpec

__all__ = [
    "AsJson",
    "OnIndivisible",
    "Output",
    "Seed",
    "on_blocks",
    "stdout_for_results",
    "table",
    "width",
    "width_or_none",
]

Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Output = Annotated[
    Path,
    typer.Option(
        help="Folder to write. One that this program wrote is replaced, any other must be empty."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]


@contextlib.contextmanager
def stdout_for_results() -> Iterator[None]:
    """Send what libraries print to stderr: stdout carries results only."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Return rows of two columns as aligned lines."""
    longest = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{longest}}  {value}" for name, value in rows)


class OnIndivisible(str, enum.Enum):
    """Treatment of a layer whose width is not a whole number of blocks."""

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
    """Return the spec with the requested blocks."""
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
