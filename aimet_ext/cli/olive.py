"""The ``olive-config`` command: Olive's pass with the techniques of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aimet_ext.cli.output import Result

EPILOG = """\b
Examples:
  aimet-ext olive-config
  olive run --config workflow.json --package-config olive_package.json
"""


def olive_config(
    output: Annotated[
        Path,
        typer.Option(
            dir_okay=False, help="File to write; one that this command wrote is replaced."
        ),
    ] = Path("olive_package.json"),
    base: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            show_default="Olive's own",
            help="A package config of yours to start from.",
        ),
    ] = None,
) -> Result:
    """Write a package config with which Olive's AimetQuantization has these techniques."""
    from aimet_ext.integrations.olive_config import write_package_config

    write_package_config(output, base)
    run = f"olive run --config WORKFLOW --package-config {output}"
    return Result(f"{output}\n{run}", {"output": str(output), "command": run})
