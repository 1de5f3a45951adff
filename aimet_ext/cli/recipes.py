"""Recipes on the command line: those of the package, and the one that options ask for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from aimet_ext.cli.options import NEAREST, bad_parameter, chosen_techniques, complete_recipe
from aimet_ext.cli.output import Result, table
from aimet_ext.errors import some
from aimet_ext.recipes.recipe import Grid, Recipe, read_recipe, recipe_names

_CHANGED = ", changed"  # behind the name of a recipe that options changed

EPILOG = """\b
Examples:
  aimet-ext recipes
  aimet-ext recipes w4a16-best > mine.yaml
"""


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", autocompletion=complete_recipe, help="A recipe to print as YAML."
        ),
    ] = None,
) -> Result:
    """List the recipes with their measured gain and cost, or print one."""
    with bad_parameter("NAME"):
        found = [read_recipe(each) for each in ([name] if name else recipe_names())]
    if name:
        return Result(found[0].to_yaml().rstrip(), found[0].to_dict())
    rows = [(recipe.name, line) for recipe in found for line in _lines(recipe)]
    return Result(table(rows), [recipe.to_dict() for recipe in found])


def _lines(recipe: Recipe) -> list[str]:
    """Return what a recipe is for, and what it gave."""
    measured = [
        f"  {each.model}: perplexity {each.quantized:.2f} (float {each.float_perplexity:.2f}, "
        f"rounding {each.rounding:.2f}): {each.recovered:.0%} of the loss gained back in "
        f"{each.seconds:.0f} processor s"
        for each in recipe.measured
    ]
    return [recipe.description, *measured]


def chosen_recipe(source: str | None, options: Mapping[str, Any]) -> Recipe:
    """Return the recipe to follow: one that is named, as options change it.

    :param source: Name or file; None for the defaults of the options.
    :param options: Options that were given, or all of them without a recipe.
    :raises typer.BadParameter: A recipe or an option is wrong, or they do not go together.
    """
    with bad_parameter("--recipe"):
        base = Recipe() if source is None else read_recipe(source)
    names = options.get("technique") or [*base.techniques] or [NEAREST]
    techniques = chosen_techniques(
        names,
        options.get("settings") or [],
        base=base.techniques,
        num_iterations=options.get("num_iterations"),
        seed=options.get("seed"),
    )
    given = {
        key: options[key] for key in ("seq_length", "num_batches", "batch_size") if key in options
    }
    changes: dict[str, Any] = {
        "techniques": techniques,
        "weights": _weights(base.weights, options),
        "calibration": dataclasses.replace(base.calibration, **given),
    }
    if "lm_head" in options:
        changes["lm_head"] = Grid.of(options["lm_head"])
    if (activations := options.get("activations")) is not None:
        changes["activations"] = activations if activations == "none" else activations.width
    if options.get("override"):
        own = dict(map(_override, options["override"]))
        changes["overrides"] = {**own, **{k: v for k, v in base.overrides.items() if k not in own}}
    if options.get("exclude"):
        changes["exclude"] = [*base.exclude, *options["exclude"]]
    if source is not None and options:
        changes |= {
            "name": f"{base.name.removesuffix(_CHANGED)}{_CHANGED}",
            "version": 1,
            "description": "",
            "measured": [],
        }
    with bad_parameter("--technique"):
        return dataclasses.replace(base, **changes)


def with_text(recipe: Recipe, files: Sequence[Path] | None, field: str | None) -> Recipe:
    """Return a recipe with the text to calibrate on: of the options, or else its own.

    :raises typer.BadParameter: There is none, or a file of the recipe is absent, or one
        of the options is no regular one.
    """
    own = recipe.calibration
    named = [*map(str, files)] if files else own.files
    if not named:
        raise typer.BadParameter(
            "text is required: give --calibration FILE, or a recipe whose calibration has files",
            param_hint="--calibration",
        )
    if absent := [name for name in named if not Path(name).is_file()]:
        if files:  # which exist: the option sees to it
            raise typer.BadParameter(
                "a regular file is required, since text is read more than once, but "
                f"{some(absent)} is a pipe or device; write the text to a file",
                param_hint="--calibration",
            )
        raise typer.BadParameter(
            f"the recipe names files to calibrate on, of which {some(absent)} is absent; give "
            "others by --calibration",
            param_hint="--recipe",
        )
    plan = dataclasses.replace(own, files=named, text_field=field or own.text_field)
    return dataclasses.replace(recipe, calibration=plan)


def as_written(recipe: Recipe, folder: Path) -> Recipe:
    """Return a recipe as a run writes it to its folder.

    Without what the package measured, which is of other models; and the files of text by their way
    from the folder, unless all that they have in common with it is the root.
    """
    home = folder.resolve()
    files = []
    for name in recipe.calibration.files:
        path = Path(name).resolve()
        near = path.drive == home.drive and path.parts[1:2] == home.parts[1:2]
        files.append(Path(os.path.relpath(path, home)).as_posix() if near else str(path))
    plan = dataclasses.replace(recipe.calibration, files=files)
    return dataclasses.replace(recipe, calibration=plan, measured=[])


def _weights(base: Grid, options: Mapping[str, Any]) -> Grid:
    """Return the grid of the weights."""
    changes: dict[str, Any] = {}
    if "weights" in options:
        changes["width"] = Grid.of(options["weights"]).width
    blocks = {key: options.get(key) for key in ("block_size", "lpbq")}
    if any(blocks.values()):
        if all(blocks.values()):
            raise typer.BadParameter("give --block-size or --lpbq, not both")
        changes |= blocks
    if "on_indivisible" in options:
        changes["on_indivisible"] = options["on_indivisible"].value
    with bad_parameter("--weights"):
        return dataclasses.replace(base, **changes)


def _override(text: str) -> tuple[str, Grid]:
    """Read a pattern and a width."""
    pattern, equals, width = text.rpartition("=")
    if not (pattern and equals):
        raise typer.BadParameter(
            f'a pattern and a width such as "*.down_proj=int8" are required, got {text!r}',
            param_hint="--override",
        )
    with bad_parameter("--override"):
        return pattern, Grid(width=width)
