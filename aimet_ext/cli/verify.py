"""``aimet-ext verify``: whether an export computes on the target what it does in the simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aimet_ext.cli.options import TEXTS, Export, TextField, Tokenizer, model_path
from aimet_ext.cli.output import Result
from aimet_ext.cli.windows import MOST, Windows, absent_files, plan_of, read_windows

EPILOG = """\b
Examples:
  aimet-ext verify ./llama-w4 --reference ./llama
\b
  Keep the QDQ model, the context binary and the report:
    aimet-ext verify ./llama-w4 --target sm8650 --output ./llama-sm8650
\b
  For other programs:
    aimet-ext verify ./llama-w4 --text held_out.txt --json | jq .passed
"""


def verify(
    folder: Export,
    target: Annotated[
        str | None,
        typer.Option(
            show_default="what the export was made for",
            help="An architecture, htp_v68 to htp_v81, or a chip such as sm8650.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            show_default="what quantize scored on, or else made-up tokens",
            help=f"Text to run on, of which the target's own ranges come too: {TEXTS}.",
        ),
    ] = None,
    text_field: TextField = None,
    tokenizer: Tokenizer = None,
    windows: Annotated[
        int,
        typer.Option(
            min=1, help=f"Windows of text to compare on: the first of the {MOST} of quantize."
        ),
    ] = 4,
    calibration_windows: Annotated[
        int, typer.Option(min=1, help="Windows of text to calibrate on, those included.")
    ] = 16,
    reference: Annotated[
        Path | None,
        typer.Option(
            parser=model_path,
            metavar="MODEL",
            show_default="the export with its quantizers off",
            help="The original model, as it was before any technique, to compare with.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for what was built. One that this program wrote is replaced, any other "
            "must be empty."
        ),
    ] = None,
) -> Result:
    """Check an export down to the numbers that a Snapdragon's HTP computes."""
    from aimet_ext.cli import jobs
    from aimet_ext.verification.verify import verify as run

    found = _windows(folder, text, text_field, tokenizer, max(windows, calibration_windows))
    batches = None if found is None else [*found.unseen, *found.seen]
    compared = windows if found is None else min(windows, len(found.scored))
    report = run(
        folder,
        None if batches is None else batches[: max(compared, calibration_windows)],
        target=target,
        output=output,
        reference=None if reference is None else jobs.load_model(reference)[0],
        windows=compared,
        text="" if found is None else found.text,
    )
    return Result(str(report), report.to_dict(), passed=report.passed)


def _windows(
    folder: Path, text: Path | None, field: str | None, tokenizer: Path | None, most: int
) -> Windows | None:
    """Return windows of the length that a model was exported with, None where there is no text."""
    from aimet_ext.cli.jobs import load_tokenizer
    from aimet_ext.files.manifest import read_export
    from aimet_ext.verification.verify import exported_length

    plan = plan_of(folder)
    if text is None and (plan is None or absent_files(plan)):
        return None
    prefix = read_export(folder, verify=False)["prefix"]
    length = exported_length(folder / f"{prefix}.onnx")
    read = load_tokenizer(tokenizer or folder)
    return read_windows(read, text, length, plan=plan, text_field=field, most=most)
