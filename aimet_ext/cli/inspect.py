"""The ``inspect`` command: what an export, or a graph, holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aimet_ext.cli.output import Result

EPILOG = """\b
Examples:
  aimet-ext inspect ./llama-w4
  aimet-ext inspect ./llama-w4 --json | jq .files
"""


def inspect(
    folder: Annotated[
        Path,
        typer.Argument(
            exists=True, metavar="FOLDER", help="What quantize wrote, or any .onnx file."
        ),
    ],
) -> Result:
    """Check an exported folder and list it; of a graph say what it takes, gives and holds."""
    from aimet_ext.cli import graphs

    if graphs.is_graph(folder):
        found = graphs.inspect(folder)
        return Result(graphs.inspected(found), found)
    from aimet_ext.artifact.inspect import inspect_export
    from aimet_ext.cli.summary import summary
    from aimet_ext.files.reading import naming

    found = inspect_export(folder)
    with naming(folder):
        return Result(summary(found), found)
