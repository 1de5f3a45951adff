"""The ``evaluate`` command: perplexity of a model, and its divergence from the float model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import aimet_ext
from aimet_ext.cli.options import TEXTS, TextField, Tokenizer, model_path
from aimet_ext.cli.output import Result
from aimet_ext.cli.windows import MOST, absent_files, files_of, plan_of, read_windows
from aimet_ext.errors import some
from aimet_ext.files.manifest import is_export
from aimet_ext.progress import step, steps

if TYPE_CHECKING:
    from aimet_ext.recipes.recipe import CalibrationPlan

EPILOG = """\b
Examples:
  On the text that quantize scored the model on, against the float model:
    aimet-ext evaluate ./llama-w4 --reference ./llama
\b
  On other text:
    aimet-ext evaluate ./llama-w4 --text held_out.txt --json
    aimet-ext evaluate llama.onnx --tokenizer ./llama --text held_out.txt
"""

SEQ_LENGTH = 512
"""Tokens in a window, where no recipe is beside a model: those of the package's recipes."""


def evaluate(
    folder: Annotated[
        Path,
        typer.Argument(
            parser=model_path,
            metavar="MODEL",
            help="A Hugging Face model, its name in the local cache, an .onnx file, or what "
            "quantize wrote.",
        ),
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            show_default="what quantize scored on",
            help=f"Text to score: {TEXTS}.",
        ),
    ] = None,
    text_field: TextField = None,
    tokenizer: Tokenizer = None,
    seq_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            show_default=f"the recipe's, or {SEQ_LENGTH}",
            help="Tokens in a window of text.",
        ),
    ] = None,
    num_windows: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=f"{MOST}, as quantize scores",
            help="Windows to score at most; less text than that is fine.",
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            parser=model_path,
            metavar="MODEL",
            help="The float model: its perplexity, and the divergence from it.",
        ),
    ] = None,
) -> Result:
    """Print a model's perplexity on a text, and how far it is from the float model."""
    found = run(
        folder,
        text,
        text_field=text_field,
        tokenizer=tokenizer,
        seq_length=seq_length,
        num_windows=num_windows,
        reference=reference,
    )
    return Result("\n".join(_table(found)), found)


@steps("evaluate", 3)
def run(
    folder: Path,
    text: Path | None,
    *,
    seq_length: int | None = None,
    num_windows: int | None = None,
    reference: Path | None = None,
    text_field: str | None = None,
    tokenizer: Path | None = None,
) -> dict[str, Any]:
    """Measure the perplexity of a model folder, or of an export with quantization simulated.

    A graph of a fixed shape, also as the reference, sets tokens of a window and windows of a batch.

    :param text: File, of which the first windows are scored; None for the text of the recipe beside
        an export, of which those are that no technique saw.
    :param seq_length: Tokens of a window; None for the recipe's.
    :param num_windows: Most windows to score.
    :param reference: The float model, whose perplexity and divergence are measured too.
    :param tokenizer: Folder of the tokenizer, None for that of the model.
    :raises ValueError: no text is given and none is named beside the model, or it is too short.
    """
    from aimet_ext.cli import graphs, jobs

    step("load the model")
    model, quantized = _any_model(folder)
    size, length = graphs.fixed_shape(folder, *(() if reference is None else (reference,)))
    plan = plan_of(folder)
    if text is None:
        _check_text(folder, plan)
    length = length or seq_length or (plan.seq_length if plan else SEQ_LENGTH)
    # Of a text that is given its first windows, so that other models can be compared on them.
    windows = read_windows(
        graphs.tokenizer_of(folder, tokenizer),
        text,
        length,
        plan=plan if text is None else None,
        text_field=text_field,
        most=num_windows or MOST,
        size=size or 1,
    )
    batches = windows.batches()
    calibrated = text is not None and plan is not None and text.resolve() in files_of(plan)
    jobs.check_ids(folder, model, batches)
    step("score")
    found = {
        "perplexity": aimet_ext.evaluate_perplexity(model, batches),
        "windows": sum(len(batch) for batch in batches),
        "seq_length": length,
        "text": windows.text + ", which was calibrated on" * calibrated,
        "quantized": quantized,
    }
    if reference is not None:
        step("compare with the float model")
        original, _ = _any_model(reference)
        jobs.check_ids(reference, original, batches)
        found["reference_perplexity"] = aimet_ext.evaluate_perplexity(original, batches)
        found |= dataclasses.asdict(aimet_ext.evaluate_divergence(model, batches, original))
    return found


def _check_text(folder: Path, plan: CalibrationPlan | None) -> None:
    """Refuse to score without text."""
    if plan is None:
        raise ValueError(
            f"{folder}: text to score is required, and no recipe beside the model names any; give "
            "--text FILE"
        )
    if absent := absent_files(plan):
        raise ValueError(
            f"the text that the recipe beside the model names is required, but {some(absent)} is "
            "absent here; give --text FILE"
        )


def _any_model(path: Path) -> tuple[Any, bool]:
    """Return a model to score, and if it is quantized: a folder of either kind, or a graph."""
    from aimet_ext.cli import graphs, jobs

    if graphs.is_graph(path):
        return graphs.open_graph(path), graphs.is_quantized(path)
    if is_export(path):
        return aimet_ext.load(path), True
    return jobs.load_model(path)[0], False


def _table(found: dict[str, Any]) -> Sequence[str]:
    """Return the measures as ``quantize`` shows them."""
    from aimet_ext.reporting.parts import STATES, Quality, StateName, StateQuality
    from aimet_ext.reporting.text import quality_table

    names = ("kl", "kl_high", "flips", "rows")
    own = StateQuality(perplexity=found["perplexity"], **{n: found[n] for n in names if n in found})
    states: dict[StateName, StateQuality] = {"quantized": own}
    if "reference_perplexity" in found:
        float_model = StateQuality(perplexity=found["reference_perplexity"])
        states = {"float": float_model, "quantized": own}
    words = {**STATES, "quantized": STATES["quantized"] if found["quantized"] else "this model"}
    quality = Quality(
        text=found["text"], windows=found["windows"], states=states, tokens=found["seq_length"]
    )
    return list(quality_table(quality, words))
