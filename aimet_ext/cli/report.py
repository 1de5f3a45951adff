"""Reports of runs on the command line: one as a summary or a page, or two side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aimet_ext.cli.output import Result

if TYPE_CHECKING:
    from aimet_ext.recipes.recipe import Recipe
    from aimet_ext.reporting.comparison import RunComparison
    from aimet_ext.reporting.parts import Budget

EPILOG = """\b
Examples:
  aimet-ext report ./llama-w4
  aimet-ext report ./llama-w4 --output page.html
  aimet-ext report ./llama-w4 ./llama-w3 --output both.html
"""


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            exists=True, metavar="FOLDER [FOLDER]", help="What quantize wrote, or a report.json."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", dir_okay=False, help="Write a page to this .html file."),
    ] = None,
) -> Result:
    """Print the summary of a run, or what differs between two."""
    if len(folders) > 2:
        raise typer.BadParameter(f"one folder or two are required, got {len(folders)}")
    if output is not None and output.suffix.lower() != ".html":
        raise typer.BadParameter(f"a file that ends in .html is required, got {output}")
    from aimet_ext.reporting.run_report import RunReport

    one, *others = map(RunReport.read, folders)
    shown: RunReport | RunComparison = one
    if others:
        last = [folder.resolve().name for folder in folders]
        names = last if len(set(last)) > 1 else [*map(str, folders)]
        shown = one.compare(others[0], names)
    if output is not None:
        shown.save_html(output)
    return Result(str(shown), shown.to_dict())


def widths_of(source: str | None, recipe: Recipe) -> Budget | None:
    """Return the choice of widths that ``assign-widths`` wrote beside a recipe, if it is of it.

    :param source: File or name of the recipe that was given.
    :param recipe: Recipe to follow, as options changed it.
    """
    from aimet_ext.reporting.budget import read_beside

    return None if source is None else read_beside(Path(source), recipe)
