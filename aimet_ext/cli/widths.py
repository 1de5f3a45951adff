"""Widths under a budget on the command line, written as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aimet_ext.cli.options import (
    BatchSize,
    Calibration,
    Model,
    NumBatches,
    OnIndivisible,
    SeqLength,
    TextField,
    Tokenizer,
    check_plot,
)
from aimet_ext.cli.output import Result

EPILOG = """\b
Examples:
  aimet-ext assign-widths ./llama --calibration text.txt --budget 4.5 --output mine.yaml
  aimet-ext quantize ./llama --recipe mine.yaml --technique gptq --calibration text.txt --output out
\b
  Low-power blocks of 64 in 4 bits or one range a row in 8, with one grid for what is fused:
    aimet-ext assign-widths ./llama --calibration text.txt --budget 5 --choices int4:lpbq64,int8 \\
        --group q_proj,k_proj,v_proj --group gate_proj,up_proj --output mine.yaml
"""


def assign_widths(
    model_dir: Model,
    calibration: Calibration,
    budget: Annotated[
        str,
        typer.Option(
            metavar="BITS|SIZE",
            help='Average bits of a weight with scales, such as 4.5, or a size such as "300 MB".',
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            dir_okay=False,
            metavar="FILE",
            help="Recipe to write, YAML; its curve goes to FILE.widths.json.",
        ),
    ],
    choices: Annotated[
        str,
        typer.Option(
            metavar="GRID,...", help="Grids to choose from, such as int4, int4:64, int4:lpbq64."
        ),
    ] = "int4,int8",
    group: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,NAME|PATTERN",
            help="Layers with one grid: siblings such as gate_proj,up_proj, or all that fit a "
            "pattern; again for more.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Layers to leave out; again for more."),
    ] = None,
    on_indivisible: Annotated[
        OnIndivisible, typer.Option(help="Layers whose width is no multiple of the block.")
    ] = OnIndivisible.ERROR,
    seq_length: SeqLength = 256,
    num_batches: NumBatches = 16,
    batch_size: BatchSize = 4,
    text_field: TextField = None,
    tokenizer: Tokenizer = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Draw the divergence over the bits to this .svg file, or with all numbers to this "
            ".html page.",
        ),
    ] = None,
) -> Result:
    """Choose widths of layers that keep the outputs nearest within a budget; write a recipe."""
    check_plot(plot, ".svg", ".html")
    from aimet_ext.cli import jobs
    from aimet_ext.reporting.budget import save_beside

    report, recipe = jobs.assign_widths(
        model_dir,
        calibration,
        budget,
        [each.strip() for each in choices.split(",")],
        groups=[tuple(each.split(",")) if "," in each else each for each in group or ()],
        modules_to_exclude=exclude or (),
        on_indivisible=on_indivisible.value,
        seq_length=seq_length,
        num_batches=num_batches,
        batch_size=batch_size,
        text_field=text_field,
        tokenizer=tokenizer,
    )
    recipe.save(output)
    save_beside(output, report, recipe)
    if plot is not None:
        report.plot(plot)
    return Result(str(report), report.to_dict())
