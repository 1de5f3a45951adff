"""Options and forms of output that commands share; widths, grids and techniques are read here."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from aimet_ext.cli.errors import message_of
from aimet_ext.config import LPBQ, Blockwise, QSpec
from aimet_ext.registry import TECHNIQUES, Technique, load

NEAREST = "nearest"
"""Plain rounding, in the place of a technique."""

BatchSize = Annotated[int, typer.Option(min=1, help="Windows in a batch.")]
Calibration = Annotated[
    Path,
    typer.Option(exists=True, dir_okay=False, help="Text to calibrate on: .txt, or .jsonl."),
]
NumBatches = Annotated[int, typer.Option(min=1, help="Calibration batches.")]
SeqLength = Annotated[int, typer.Option(min=2, help="Tokens in a window of text.")]
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


def folder_argument(metavar: str, text: str) -> Any:
    """Return an argument that names an existing folder.

    :param text: Help.
    """
    return typer.Argument(exists=True, file_okay=False, metavar=metavar, help=text)


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


def width_or_word(text: str) -> QSpec | str:
    """Read a width, or one of the words ``none`` and ``auto``."""
    return text if text == "auto" else width_or_none(text)


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


# ------------------------------------------------------------------------------------- techniques


def _offered() -> dict[str, Technique]:
    """Return the techniques to choose from, in the order in which they are applied.

    Grids are no technique here: other options choose them.
    """
    rows = sorted(TECHNIQUES.values(), key=lambda row: row.rank)
    return {row.name: row for row in rows if row.decides != "grids"}


def technique_names() -> list[str]:
    """Return the names of the techniques to choose from."""
    return [*_offered(), NEAREST]


def technique_name(text: str) -> str:
    """Read the name of a technique."""
    if text not in technique_names():
        names = ", ".join(map(repr, technique_names()))
        raise typer.BadParameter(f"{text!r} is not one of {names}.")
    return text


def chosen_techniques(
    names: Sequence[str], settings: Sequence[str], *, num_iterations: int | None, seed: int
) -> dict[str, Any]:
    """Return the techniques to apply, in order, each with its parameters; none for plain rounding.

    :param settings: Texts such as ``gptq.beams=4``.
    :param num_iterations: Steps of OmniQuant, if given.
    :param seed: Seed of every technique that has one, unless ``settings`` say otherwise.
    :raises typer.BadParameter: An order that the library refuses, or a wrong setting.
    """
    _check_order(names)
    values: dict[str, dict[str, Any]] = {name: {} for name in names if name != NEAREST}
    given = [("--set", *_parsed(text)) for text in settings]
    if num_iterations is not None:
        given.append(("--num-iterations", "omniquant", "num_iterations", num_iterations))
    for option, name, field, value in given:
        if name not in values:
            raise typer.BadParameter(
                f"{field} is a setting of {name}, which is not among the techniques "
                f"({', '.join(names)}); add --technique {name} or leave it out",
                param_hint=option,
            )
        if field in values[name]:
            raise typer.BadParameter(f"{name}.{field} is given twice", param_hint=option)
        values[name][field] = value
    found = {name: _params(name, fields, seed) for name, fields in values.items()}
    _check_open(found)
    return found


def _check_open(techniques: Mapping[str, Any]) -> None:
    """Refuse a technique that finds the ranges frozen which it is to choose.

    :raises typer.BadParameter: There is one.
    """
    names, offered = list(techniques), _offered()
    for earlier, later in itertools.combinations(names, 2):
        chooses = offered[later].decides in ("scales", "ranges")
        if chooses and getattr(techniques[earlier], "clip", False):
            raise typer.BadParameter(
                f"{later} cannot follow {earlier} that clips, for its ranges are frozen; add "
                f"--set {earlier}.clip=false",
                param_hint="--technique",
            )


def check_width(weights: QSpec, techniques: Mapping[str, Any]) -> None:
    """Refuse weights that a technique would leave to plain rounding.

    :raises typer.BadParameter: Weights of more bits than a technique decides.
    """
    for name, params in techniques.items():
        most = getattr(params, "max_bitwidth", weights.bitwidth)
        if weights.bitwidth > most:
            raise typer.BadParameter(
                f"{name} decides weights of at most {most} bits (max_bitwidth), got "
                f"{weights.bitwidth} bits; choose a smaller width or --technique {NEAREST}",
                param_hint="--weights",
            )


def _check_order(names: Sequence[str]) -> None:
    """Refuse an order that would fail in the middle of the work.

    :raises typer.BadParameter: Plain rounding with a technique, or one technique after another
        that leaves it nothing to decide.
    """
    if len(names) > 1 and NEAREST in names:
        raise typer.BadParameter(
            "nearest is plain rounding, without a technique: give it alone",
            param_hint="--technique",
        )
    offered = _offered()
    for earlier, later in itertools.pairwise(names):
        if offered[earlier].rank >= offered[later].rank:
            ranks = itertools.groupby(offered.values(), lambda row: row.rank)
            *first, last = (" or ".join(row.name for row in rows) for _, rows in ranks)
            raise typer.BadParameter(
                f"{later} cannot follow {earlier}; the order is {', '.join(first)}, then {last}, "
                "each at most once",
                param_hint="--technique",
            )


def _parsed(text: str) -> tuple[str, str, Any]:
    """Return technique, field and value of ``gptq.beams=4``; a word that is no JSON is itself.

    :raises typer.BadParameter: Another form, or an unknown technique or field.
    """
    place, equals, word = text.partition("=")
    name, dot, field = place.partition(".")
    if not (equals and dot):
        raise typer.BadParameter(
            f"a setting such as gptq.beams=4 is required, got {text!r}", param_hint="--set"
        )
    offered = _offered()
    if name not in offered:
        raise typer.BadParameter(
            f"{name!r} is no technique with settings; these are {', '.join(offered)}",
            param_hint="--set",
        )
    fields = [field.name for field in dataclasses.fields(load(offered[name].params))]
    if field not in fields:
        raise typer.BadParameter(
            f"{name} has no setting {field!r}; it has {', '.join(fields)}", param_hint="--set"
        )
    try:
        value = json.loads(word)
    except ValueError:
        value = word
    return name, field, tuple(value) if isinstance(value, list) else value


def _params(name: str, values: Mapping[str, Any], seed: int) -> Any:
    """Return the parameters of a technique, checked.

    :raises typer.BadParameter: A value that is not allowed.
    """
    kind = load(TECHNIQUES[name].params)
    seeded = {"seed": seed} if any(f.name == "seed" for f in dataclasses.fields(kind)) else {}
    try:
        return kind(**{**seeded, **values})
    except ValueError as error:
        raise typer.BadParameter(f"{name}: {message_of(error)}", param_hint="--set") from error
