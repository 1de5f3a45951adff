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
from aimet_ext.files.manifest import is_export
from aimet_ext.progress import step, steps

if TYPE_CHECKING:
    from torch import Tensor

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
            show_default="as many as quantize scores",
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

    :param text: File; None for the text of the recipe beside an export, of which the windows behind
        those that were calibrated on are scored.
    :param seq_length: Tokens of a window; None for the recipe's.
    :param num_windows: Most windows to score; None for as many as ``quantize`` scores.
    :param reference: The float model, whose perplexity and divergence are measured too.
    :param tokenizer: Folder of the tokenizer, None for that of the model.
    :raises ValueError: no text is given and none is named beside the model, or it is too short.
    """
    from aimet_ext.cli import graphs, jobs

    step("load the model")
    model, quantized = _any_model(folder)
    size, length = graphs.fixed_shape(folder, *(() if reference is None else (reference,)))
    plan = plan_of(folder)
    length = length or seq_length or (plan.seq_length if plan else SEQ_LENGTH)
    read = graphs.tokenizer_of(folder, tokenizer)
    if plan is not None and text is None:
        batches, described = _of_run(read, plan, length, size, num_windows, text_field)
    elif text is None:
        raise ValueError(
            f"{folder}: text to score is required, and no recipe beside the model names any; give "
            "--text FILE"
        )
    else:
        most = num_windows or jobs.QUALITY_WINDOWS
        batches = _of_file(read, text, length, size or 1, most, text_field)
        described = text.name
    jobs.check_ids(folder, model, batches)
    step("score")
    found = {
        "perplexity": aimet_ext.evaluate_perplexity(model, batches),
        "windows": sum(len(batch) for batch in batches),
        "seq_length": length,
        "text": described,
        "quantized": quantized,
    }
    if reference is not None:
        step("compare with the float model")
        original, _ = _any_model(reference)
        jobs.check_ids(reference, original, batches)
        found["reference_perplexity"] = aimet_ext.evaluate_perplexity(original, batches)
        found |= dataclasses.asdict(aimet_ext.evaluate_divergence(model, batches, original))
    return found


def plan_of(folder: Path) -> CalibrationPlan | None:
    """Return what an export was calibrated on, None where that is not known."""
    from aimet_ext.cli.graphs import ARRAYS
    from aimet_ext.cli.jobs import RECIPE

    if not (is_export(folder) and (folder / RECIPE).is_file()):
        return None
    plan = aimet_ext.read_recipe(folder / RECIPE).calibration
    return plan if plan.files and not plan.files[0].lower().endswith(ARRAYS) else None


def _of_run(
    tokenizer: Any,
    plan: CalibrationPlan,
    length: int,
    size: int | None,
    count: int | None,
    field: str | None,
) -> tuple[list[Tensor], str]:
    """Return the windows that ``quantize`` scored, as long and as many as is asked for."""
    from aimet_ext.cli import jobs
    from aimet_ext.errors import some

    files = [Path(file) for file in plan.files]
    if absent := [str(file) for file in files if not file.is_file()]:
        raise ValueError(
            f"the text that the recipe beside the model names is required, but {some(absent)} is "
            "absent here; give --text FILE"
        )
    field = field or plan.text_field
    batches = aimet_ext.calibration_batches(
        tokenizer, files, length, plan.num_batches, size or plan.batch_size, text_field=field
    )
    most = count or jobs.QUALITY_WINDOWS
    return jobs.held_out_text(tokenizer, files, batches, field, size or 1, most)


def _of_file(
    tokenizer: Any, text: Path, length: int, size: int, most: int, field: str | None
) -> list[Tensor]:
    """Return the first windows of a text, in batches that are full."""
    windows = aimet_ext.calibration_batches(tokenizer, text, length, None, size, text_field=field)
    batches = [batch for batch in windows[: max(1, most // size)] if len(batch) == size]
    if not batches:
        raise ValueError(
            f"{text}: text for {size} windows of {length} tokens is required, a batch of the "
            f"graph, got enough for {len(windows[0])}; give more text"
        )
    return batches


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
