"""Options and forms of output that commands share; widths, grids and techniques are read here."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from aimet_ext.cli.errors import message_of
from aimet_ext.errors import require
from aimet_ext.patterns import near
from aimet_ext.recipes.recipe import check_turns, offered, recipe_names
from aimet_ext.registry import TECHNIQUES, load
from aimet_ext.specs import QSpec, parse_width

NEAREST = "nearest"
"""Plain rounding, in the place of a technique."""

BatchSize = Annotated[int, typer.Option(min=1, help="Windows in a batch.")]
TEXTS = ".txt, .jsonl, .json, .csv or .parquet"
"""Files that text is read from."""

_CALIBRATION = typer.Option(
    exists=True,
    dir_okay=False,
    metavar="FILE",
    help=f"Text to calibrate on: {TEXTS}; again for more, in equal shares.",
)
Calibration = Annotated[list[Path], _CALIBRATION]
CalibrationOrRecipe = Annotated[list[Path] | None, _CALIBRATION]
TextField = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        show_default="text, content, messages, conversations or conversation",
        help="Field or column of the files that holds the text, or the messages of a chat.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help='Layers that techniques leave to plain rounding, such as "*.down_proj"; again for '
        "more.",
    ),
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


def model_path(text: str) -> Path:
    """Read the path of a model, a folder or an ONNX file, or its name in Hugging Face's cache."""
    from aimet_ext.models.cache import model_folder

    if text.lower().endswith(".onnx") and Path(text).is_file():
        return Path(text)

    try:
        return model_folder(text)
    except FileNotFoundError as error:
        raise typer.BadParameter(message_of(error)) from error


Model = Annotated[
    Path,
    typer.Argument(
        parser=model_path,
        metavar="MODEL",
        help="A Hugging Face model, a folder or a name in the local cache; or an .onnx file.",
    ),
]


def export_path(text: str) -> Path:
    """Read the path of an export: its folder, or an ONNX file in it."""
    from aimet_ext.cli.graphs import exported_folder

    if not Path(text).exists():
        raise typer.BadParameter(
            f"{text}: a folder that aimet-ext quantize or export wrote is required"
        )
    with bad_parameter("FOLDER"):
        return exported_folder(Path(text))


Export = Annotated[
    Path,
    typer.Argument(
        parser=export_path, metavar="FOLDER", help="What quantize wrote, or an .onnx file in it."
    ),
]
Tokenizer = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        file_okay=False,
        metavar="DIR",
        show_default="what is beside the model",
        help="Folder of the tokenizer, to read text for an ONNX graph.",
    ),
]


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
    """Read ``int4`` or ``uint4``, the width of a weight."""
    with bad_parameter(None):
        return parse_width("weights", text)


def weights_or_none(text: str) -> QSpec | str:
    """Read a width of weights, or the word ``none``."""
    return text if text == "none" else width(text)


def width_or_none(text: str) -> QSpec | str:
    """Read a width of activations, or the word ``none``."""
    if text == "none":
        return text  # None would stand for an option that was not given
    with bad_parameter(None):
        return parse_width("activations", text)


def width_or_word(text: str) -> QSpec | str:
    """Read a width, or one of the words ``none`` and ``auto``."""
    return text if text == "auto" else width_or_none(text)


# ------------------------------------------------------------------------------------- techniques


def technique_names() -> list[str]:
    """Return the names of the techniques to choose from."""
    return [*offered(), NEAREST]


def complete_technique(incomplete: str) -> list[str]:
    """Return the techniques that begin so, for the shell."""
    return [name for name in technique_names() if name.startswith(incomplete)]


def complete_recipe(incomplete: str) -> list[str]:
    """Return the recipes of the package that begin so, for the shell."""
    return [name for name in recipe_names() if name.startswith(incomplete)]


def technique_name(text: str) -> str:
    """Read the name of a technique."""
    if text not in technique_names():
        names = ", ".join(map(repr, technique_names()))
        raise typer.BadParameter(f"{text!r} is not one of {names}{near(text, technique_names())}")
    return text


def chosen_techniques(
    names: Sequence[str],
    settings: Sequence[str],
    *,
    base: Mapping[str, Mapping[str, Any]],
    num_iterations: int | None,
    seed: int | None,
) -> dict[str, dict[str, Any]]:
    """Return the techniques to apply, in order, with their settings; none for plain rounding.

    :param settings: Texts such as ``gptq.beams=4``.
    :param base: Settings that a recipe has.
    :param num_iterations: Steps of OmniQuant, if given.
    :param seed: Seed of every technique that has one, unless ``settings`` say otherwise.
    :raises typer.BadParameter: An order that the library refuses, or a wrong setting.
    """
    if len(names) > 1 and NEAREST in names:
        raise typer.BadParameter(
            "nearest is plain rounding, without a technique: give it alone",
            param_hint="--technique",
        )
    chosen = [name for name in names if name != NEAREST]
    with bad_parameter("--technique"):
        check_turns(chosen)
    values: dict[str, dict[str, Any]] = {name: {} for name in chosen}
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
    found = {}
    for name, fields in values.items():
        kind = load(TECHNIQUES[name].params)
        seeded = seed is not None and any(f.name == "seed" for f in dataclasses.fields(kind))
        found[name] = {**base.get(name, {}), **({"seed": seed} if seeded else {}), **fields}
        with bad_parameter("--set", f"{name}: "):
            kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in found[name].items()})
    return found


@contextlib.contextmanager
def bad_parameter(option: str | None, place: str = "") -> Iterator[None]:
    """Say of an error which option it is about; None where typer knows."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(f"{place}{message_of(error)}", param_hint=option) from error


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
    if name not in offered():
        raise typer.BadParameter(
            f"{name!r} is no technique with settings; these are {', '.join(offered())}"
            f"{near(name, offered())}",
            param_hint="--set",
        )
    fields = [field.name for field in dataclasses.fields(load(TECHNIQUES[name].params))]
    if field not in (*fields, "preset"):
        raise typer.BadParameter(
            f"{name} has no setting {field!r}; it has {', '.join(fields)}{near(field, fields)}",
            param_hint="--set",
        )
    try:
        value = json.loads(word)
    except ValueError:
        value = word
    return name, field, value


def check_plot(path: Path | None, *endings: str) -> None:
    """Refuse a file to draw to before the work that it shows, not after.

    :param path: File, None where nothing is to be drawn.
    :param endings: Endings of the forms that are drawn.
    :raises MissingExtraError: what draws it is not installed.
    """
    if path is None:
        return
    if path.suffix.lower() not in endings:
        raise typer.BadParameter(
            f"a file that ends in {' or '.join(endings)} is required, got {path}"
        )
    require("matplotlib", "report")
    if path.suffix.lower() == ".html":
        require("jinja2", "report")
