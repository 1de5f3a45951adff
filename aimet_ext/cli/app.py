"""The commands. Results go to stdout, progress and messages to stderr.

Everything heavy is imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from aimet_ext.cli.demo import EPILOG as DEMO_EPILOG
from aimet_ext.cli.demo import demo
from aimet_ext.cli.errors import EXIT_CODES_HELP, ErrorsAsCodes
from aimet_ext.cli.evaluate import EPILOG as EVALUATE_EPILOG
from aimet_ext.cli.evaluate import evaluate
from aimet_ext.cli.inspect import EPILOG as INSPECT_EPILOG
from aimet_ext.cli.inspect import inspect
from aimet_ext.cli.lora import app as lora_app
from aimet_ext.cli.olive import EPILOG as OLIVE_EPILOG
from aimet_ext.cli.olive import olive_config
from aimet_ext.cli.options import (
    TEXTS,
    BatchSize,
    CalibrationOrRecipe,
    Exclude,
    Export,
    Model,
    NumBatches,
    OnIndivisible,
    Output,
    Seed,
    SeqLength,
    TextField,
    Tokenizer,
    check_plot,
    complete_recipe,
    complete_technique,
    technique_name,
    technique_names,
    width,
    width_or_none,
)
from aimet_ext.cli.output import Result, command, table
from aimet_ext.cli.recipes import EPILOG as RECIPES_EPILOG
from aimet_ext.cli.recipes import as_written, chosen_recipe, recipes, with_text
from aimet_ext.cli.report import EPILOG as REPORT_EPILOG
from aimet_ext.cli.report import report, widths_of
from aimet_ext.cli.verify import EPILOG as VERIFY_EPILOG
from aimet_ext.cli.verify import verify
from aimet_ext.cli.widths import EPILOG as WIDTHS_EPILOG
from aimet_ext.cli.widths import assign_widths

_log = logging.getLogger(__name__)

_HELP = """Quantize language models with AIMET and techniques that AIMET lacks.

\b
A first look, without a model of your own:
  aimet-ext demo
\b
Your own model, a folder that transformers can read:
  aimet-ext quantize ./llama --weights int4 --calibration text.txt --output ./llama-w4
  aimet-ext evaluate ./llama-w4 --reference ./llama
  aimet-ext inspect ./llama-w4
  aimet-ext verify ./llama-w4 --reference ./llama
"""

app = typer.Typer(
    cls=ErrorsAsCodes,
    name="aimet-ext",
    help=_HELP,
    epilog=EXIT_CODES_HELP,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(asked: bool) -> None:
    if asked:
        from aimet_ext.files.manifest import versions

        typer.echo("\n".join(f"{name} {number}" for name, number in versions().items()))
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show versions, AIMET's too."
        ),
    ] = False,
) -> None:
    pass


@command(
    app,
    epilog="""\b
Examples:
  4 bits, one range a row (the default grid), and a Hugging Face checkpoint beside the ONNX:
    aimet-ext quantize ./llama --calibration text.txt --output out --hf-checkpoint
\b
  3 bits in groups of 128, weights only, for other runtimes:
    aimet-ext quantize ./llama --weights int3 --block-size 128 --activations none \\
        --calibration text.txt --output out --hf-checkpoint
\b
  4 bits in low-power blocks of 64; if it is stopped, the same command goes on:
    aimet-ext quantize ./llama --lpbq 64 --checkpoint-dir ckpt --calibration text.txt --output out
\b
  By a recipe; --set and the other options change it:
    aimet-ext quantize ./llama --recipe w4a16-lpbq-fast --calibration text.txt --output out
\b
  An ONNX graph, on text or on arrays of its inputs:
    aimet-ext quantize llama.onnx --tokenizer ./llama --calibration text.txt --output out
    aimet-ext quantize vision.onnx --technique gptq --calibration images.npz --output out
\b
  Stories and chats in equal shares; layers that GPTQ leaves to plain rounding:
    aimet-ext quantize ./llama --technique gptq --exclude "*.down_proj" \\
        --calibration stories.parquet --calibration chats.jsonl --output out
\b
  Ranges by SeqMSE, then rounding by GPTQ, with a setting of its own:
    aimet-ext quantize ./llama --technique seq_mse --technique gptq --set gptq.beams=4 \\
        --calibration text.txt --output out
""",
)
def quantize(
    ctx: typer.Context,
    model_dir: Model,
    output: Output,
    calibration: CalibrationOrRecipe = None,
    text_field: TextField = None,
    tokenizer: Tokenizer = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            autocompletion=complete_recipe,
            help="The options below in one, see aimet-ext recipes; those given beside it count.",
        ),
    ] = None,
    technique: Annotated[
        list[str] | None,
        typer.Option(
            show_default="omniquant",
            parser=technique_name,
            autocompletion=complete_technique,
            metavar="|".join(technique_names()),
            help="How to choose weights and ranges; again for one that follows. nearest is plain "
            "rounding.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="TECHNIQUE.FIELD=JSON",
            help="A setting of a technique, such as gptq.beams=4; again for more.",
        ),
    ] = None,
    weights: Annotated[
        Any, typer.Option(parser=width, metavar="WIDTH", help="int4 is symmetric, uint4 is not.")
    ] = "int4",
    block_size: Annotated[
        int | None, typer.Option(min=2, help="Input channels that share a range: blockwise.")
    ] = None,
    lpbq: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Low-power blockwise, N channels each.")
    ] = None,
    on_indivisible: Annotated[
        OnIndivisible, typer.Option(help="Layers whose width is no multiple of the block.")
    ] = OnIndivisible.ERROR,
    lm_head: Annotated[
        Any, typer.Option(parser=width, metavar="WIDTH", help="Output head and embedding.")
    ] = "int8",
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=WIDTH",
            help='Another width for some layers, such as "*.down_proj=int8"; again for more.',
        ),
    ] = None,
    exclude: Exclude = None,
    activations: Annotated[
        Any,
        typer.Option(
            parser=width_or_none, metavar="WIDTH", help="Activations; none: weights only."
        ),
    ] = "uint16",
    num_iterations: Annotated[
        int | None,
        typer.Option(
            min=1, show_default="800", help="Optimizer steps for each block, of OmniQuant alone."
        ),
    ] = None,
    seq_length: SeqLength = 256,
    num_batches: NumBatches = 16,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    hf_checkpoint: Annotated[
        bool, typer.Option("--hf-checkpoint", help="Also write a checkpoint of the rounded values.")
    ] = False,
    check_export: Annotated[
        bool,
        typer.Option(
            "--check-export/--no-check-export",
            help="Export the float model before anything else, to find out whether that works.",
        ),
    ] = True,
    checkpoint_dir: Annotated[
        Path | None, typer.Option(file_okay=False, help="Keep finished work here, to resume.")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(file_okay=False, help="Keep cached activations on disk, here.")
    ] = None,
) -> Result:
    """Quantize a model and export it."""
    plan = with_text(chosen_recipe(recipe, _options_of(ctx, recipe)), calibration, text_field)
    from aimet_ext.cli import graphs, jobs
    from aimet_ext.cli.summary import next_command, quality_lines, technique_lines

    files = [*map(Path, plan.calibration.files)]
    common: dict[str, Any] = {
        "recipe": as_written(plan, output),
        "widths": widths_of(recipe, plan),
        "checkpoint_dir": checkpoint_dir,
        "cache_dir": cache_dir,
    }
    if graphs.is_graph(model_dir):
        if hf_checkpoint:
            raise typer.BadParameter("--hf-checkpoint is for models of Hugging Face, got a graph")
        result = graphs.quantize(model_dir, files, output, tokenizer=tokenizer, **common)
    else:
        checks: dict[str, Any] = {"hf_checkpoint": hf_checkpoint, "check_export": check_export}
        result = jobs.quantize(model_dir, files, output, **checks, **common)
    for each in result.reports.values():
        _log.debug("%s", each)
    text = (
        *technique_lines(result.reports),
        f"{table(result.files)}\n",
        quality_lines(result.quality) if result.quality else "Not scored, for want of text.",
        f"Done in {result.seconds:.0f} s. Next:\n  {next_command(model_dir, output, plan)}",
    )
    return Result("\n".join(text), {"output": str(output), **result.to_dict()})


def _options_of(ctx: typer.Context, recipe: str | None) -> dict[str, Any]:
    """Return the options of ``quantize`` that make a recipe: with one, those that were given."""
    names = (
        *("technique", "settings", "weights", "block_size", "lpbq", "on_indivisible", "lm_head"),
        *(
            "override",
            "exclude",
            "activations",
            "num_iterations",
            "seq_length",
            "num_batches",
            "batch_size",
        ),
        "seed",
    )
    if recipe is None:
        technique = ctx.params["technique"] or ["omniquant"]
        return {**{name: ctx.params[name] for name in names}, "technique": technique}
    return {
        name: ctx.params[name]
        for name in names
        if getattr(ctx.get_parameter_source(name), "name", "") != "DEFAULT"
    }


command(app, epilog=RECIPES_EPILOG)(recipes)
command(app, epilog=WIDTHS_EPILOG)(assign_widths)


command(app, epilog=EVALUATE_EPILOG)(evaluate)


@command(
    app,
    epilog="""\b
Example:
  aimet-ext analyze ./llama-w4 --text held_out.txt --plot costs.svg
""",
)
def analyze(
    folder: Export,
    text: Annotated[Path, typer.Option(exists=True, dir_okay=False, help=f"Text to run: {TEXTS}.")],
    text_field: TextField = None,
    tokenizer: Tokenizer = None,
    seq_length: SeqLength = 256,
    num_windows: Annotated[int, typer.Option(min=1, help="Windows to run at most.")] = 16,
    batch_size: BatchSize = 4,
    top_k: Annotated[int, typer.Option(min=0, help="Quantizers to measure, not estimate.")] = 8,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Draw the costs to this .svg file.")
    ] = None,
) -> Result:
    """Print what each quantizer costs at the model's outputs."""
    check_plot(plot, ".svg")
    from aimet_ext.cli import jobs

    found = jobs.analyze(
        folder,
        text,
        text_field=text_field,
        tokenizer=tokenizer,
        seq_length=seq_length,
        num_windows=num_windows,
        batch_size=batch_size,
        top_k=top_k,
    )
    if plot is not None:
        found.plot(plot)
    return Result(str(found), found.to_dict())


command(app, epilog=INSPECT_EPILOG)(inspect)
command(app, name="olive-config", epilog=OLIVE_EPILOG)(olive_config)
command(app, epilog=REPORT_EPILOG)(report)
command(app, epilog=VERIFY_EPILOG)(verify)
command(app, epilog=DEMO_EPILOG)(demo)
app.add_typer(lora_app)


def main() -> None:
    """Run the command line; the entry point of ``aimet-ext``."""
    app()
