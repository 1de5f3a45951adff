"""``aimet-ext verify``: whether an export computes on the target what it does in the simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import aimet_ext
from aimet_ext.cli.options import TEXTS, Export, TextField, Tokenizer, model_path
from aimet_ext.cli.output import Result

EPILOG = """\b
Examples:
  aimet-ext verify ./llama-w4 --text held_out.txt --reference ./llama
\b
  Keep the QDQ model, the context binary and the report:
    aimet-ext verify ./llama-w4 --target sm8650 --text held_out.txt --output ./llama-sm8650
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
            show_default="made-up tokens",
            help=f"Text to run on, of which the target's own ranges come too: {TEXTS}.",
        ),
    ] = None,
    text_field: TextField = None,
    tokenizer: Tokenizer = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text to compare on.")] = 4,
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

    most = max(windows, calibration_windows)
    report = run(
        folder,
        None if text is None else _batches(folder, text, text_field, tokenizer)[:most],
        target=target,
        output=output,
        reference=None if reference is None else jobs.load_model(reference)[0],
        windows=windows,
    )
    return Result(str(report), report.to_json(), passed=report.passed)


def _batches(folder: Path, text: Path, field: str | None, tokenizer: Path | None) -> list[Any]:
    """Return windows of the length that a folder's model was exported with.

    Of the text that it was calibrated on, windows that no technique saw come first.
    """
    from aimet_ext.cli import jobs
    from aimet_ext.cli.evaluate import plan_of
    from aimet_ext.files.manifest import read_export
    from aimet_ext.verification.verify import exported_length

    prefix = read_export(folder, verify=False)["prefix"]
    length = exported_length(folder / f"{prefix}.onnx")
    read = jobs.load_tokenizer(tokenizer or folder)
    found = aimet_ext.calibration_batches(read, text, length, None, text_field=field)
    plan = plan_of(folder)
    if plan is None or text.resolve() not in [Path(file).resolve() for file in plan.files]:
        return found
    seen = -(-plan.num_batches * plan.batch_size * plan.seq_length // (length * len(plan.files)))
    return [*found[seen:], *found[:seen]]
