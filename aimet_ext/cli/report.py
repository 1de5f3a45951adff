"""Reports of runs on the command line: one as a summary or a page, or two side by side."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aimet_ext.cli.output import Result
from aimet_ext.errors import MissingExtraError

if TYPE_CHECKING:
    from aimet_ext.recipes.recipe import Recipe
    from aimet_ext.reporting.comparison import RunComparison
    from aimet_ext.reporting.parts import Budget

_log = logging.getLogger(__name__)

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


def write_run(
    folder: Path, sim: Any, reports: dict[str, Any], quality: dict[str, Any], **facts: Any
) -> None:
    """Write the report of a run to its folder, as JSON, and as a page if that can be drawn.

    Whatever fails here is a warning: the export beside it is finished, and may be hours of work.

    :param folder: Folder of the run.
    :param quality: Perplexities by state, their divergences, and the text; empty without text.
    :param facts: Further arguments of :meth:`aimet_ext.RunReport.of`.
    """
    from aimet_ext import RunReport
    from aimet_ext.core.divergence import Divergence
    from aimet_ext.reporting.run_report import REPORT_HTML, REPORT_JSON

    name = REPORT_JSON
    try:
        if quality:
            divergences = quality["divergence"].items()
            facts |= {
                "perplexity": {name: quality[name] for name in ("float", "rounding", "quantized")},
                "divergence": {name: Divergence(**fields) for name, fields in divergences},
                "text": quality["text"],
                "windows": quality["windows"],
            }
        run = RunReport.of(sim, reports, **facts)
        run.save(folder / REPORT_JSON)
        name = REPORT_HTML
        run.save_html(folder / REPORT_HTML)
    except MissingExtraError as error:
        _log.warning("%s is not written: %s", name, error)
    except Exception as error:  # noqa: BLE001  (whatever it is, the export is worth more)
        _log.warning(
            "%s is not written: %s: %s. The export beside it is whole",
            name,
            type(error).__name__,
            error,
        )
