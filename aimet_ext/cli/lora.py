"""``aimet-ext lora``: adapters for a model that was transformed and quantized."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import aimet_ext
from aimet_ext.cli.options import (
    BatchSize,
    Calibration,
    NumBatches,
    Output,
    SeqLength,
    TextField,
    folder_argument,
    model_path,
    weights_or_none,
    width_or_word,
)
from aimet_ext.cli.output import Result, command, table

if TYPE_CHECKING:
    from aimet_ext.lora import Adapter, LoraReport
    from aimet_ext.reporting.parts import TechniqueResult

_log = logging.getLogger(__name__)

_WORST = 3  # adapters that are shown

app = typer.Typer(
    name="lora",
    help="Fit LoRA adapters to a quantized model, and quantize them.",
    rich_markup_mode=None,
    no_args_is_help=True,
)


AdapterDir = Annotated[
    Path, folder_argument("ADAPTER", "Folder that PEFT wrote, with one adapter or several.")
]
Name = Annotated[str | None, typer.Option(help="Only this one of several adapters.")]


@command(
    app,
    epilog="""\b
Examples:
  aimet-ext lora fold ./poems --scales ./llama-w4 --output ./poems-w4
\b
  With a file of scales alone, and the original model to check that it is the adapter's:
    aimet-ext lora fold ./poems --scales scales.safetensors --base ./llama --output ./poems-w4
""",
)
def fold(
    adapter: AdapterDir,
    scales: Annotated[
        Path,
        typer.Option(
            exists=True,
            metavar="FILE",
            help="scales.safetensors, or the folder of the export that holds it (better: it says "
            "what was padded).",
        ),
    ],
    output: Output,
    name: Name = None,
    base: Annotated[
        Path | None,
        typer.Option(
            parser=model_path,
            metavar="MODEL",
            show_default="what the adapter names, if it is there",
            help="The original model; DoRA needs it.",
        ),
    ] = None,
) -> Result:
    """Make an adapter of the original model fit the transformed one."""
    from aimet_ext.lora import fold_adapter, fold_adapters

    if name is None:
        folded = fold_adapters(adapter, scales, output, base=base)
    else:
        folded = {name: fold_adapter(adapter, scales, output, name=name, base=base)}
    summary = {name: _summary(one) for name, one in folded.items()}
    return Result(_table(summary), summary)


@command(
    app,
    epilog="""\b
Examples:
  aimet-ext lora quantize ./poems ./llama-w4 --calibration poems.txt --output ./llama-w4-lora
\b
  Adapters in 8 bits whose activations stay float:
    aimet-ext lora quantize ./poems ./llama-w4 --calibration poems.txt --activations none \\
        --output ./llama-w4-lora
""",
)
def quantize(
    adapter: AdapterDir,
    export_dir: Annotated[
        Path, folder_argument("EXPORT", "The quantized base: what aimet-ext quantize wrote.")
    ],
    calibration: Calibration,
    output: Output,
    name: Name = None,
    weights: Annotated[
        Any,
        typer.Option(parser=weights_or_none, metavar="WIDTH", help="Adapter weights; none: float."),
    ] = "int8",
    activations: Annotated[
        Any,
        typer.Option(
            parser=width_or_word,
            metavar="WIDTH",
            help="Activations of adapters; auto: as the base has; none: float.",
        ),
    ] = "auto",
    seq_length: SeqLength = 256,
    num_batches: NumBatches = 16,
    batch_size: BatchSize = 4,
    text_field: TextField = None,
) -> Result:
    """Quantize adapters on a quantized base, which stays as it is, and export both."""
    from aimet_ext import lora
    from aimet_ext.cli import jobs
    from aimet_ext.files.folders import check_output
    from aimet_ext.files.manifest import relist_files
    from aimet_ext.models.cache import model_name
    from aimet_ext.reporting.writing import write_run

    check_output(output)
    record = aimet_ext.Recorder()
    source = adapter if name is None else lora.read_adapter(adapter, name)
    batches = aimet_ext.calibration_batches(
        jobs.load_tokenizer(export_dir),
        calibration,
        seq_length,
        num_batches,
        batch_size,
        text_field=text_field,
    )
    with record.phase("load the base"):
        sim = lora.create_sim(source, export_dir)
    with record.phase("quantize the adapters"):
        report = lora.quantize(
            sim,
            None,
            batches,
            weights=None if weights == "none" else weights,
            activations=None if activations == "none" else activations,
        )
    _log.debug("%s", report)
    results = _results(report)
    with record.phase("export"):
        lora.export(sim, output, jobs.PREFIX, batches[0][:1])
    facts: dict[str, Any] = {"model": model_name(export_dir), "recorder": record}
    write_run(output, sim, {each.name: each for each in results}, {}, **facts)
    relist_files(output)
    return Result("\n".join(_outcome(results, output)), report.to_dict())


def _results(report: LoraReport) -> list[TechniqueResult]:
    """Return the outcome of each adapter, of its modules by the change that they make."""
    from aimet_ext.reporting.parts import TechniqueResult, UnitResult

    return [
        TechniqueResult(
            name=adapter.name,
            measure="change of the module's weight",
            unit="module",
            units=tuple(
                UnitResult(name=name, sqnr_db=sqnr, grid=f"rank {adapter.ranks[name]}")
                for name, sqnr in adapter.change_sqnr_db.items()
            ),
            numbers={"SQNR of the logits in dB": adapter.logits_sqnr_db},
            settings={key: value for key, value in report.to_dict().items() if key != "adapters"},
            seconds=adapter.seconds,
        )
        for adapter in report.adapters
    ]


def _outcome(results: Sequence[TechniqueResult], output: Path) -> Iterator[str]:
    """Yield the adapters whose logits are furthest from the float ones, and the files."""
    from aimet_ext.cli import jobs
    from aimet_ext.reporting.text import technique

    worst = sorted(results, key=lambda each: min(each.numbers.values()))[:_WORST]
    for result in worst:
        yield from technique(result)
    if more := len(results) - len(worst):
        yield f"and {more} adapters with a higher SQNR of the logits; -v shows all"
    yield table(jobs.list_files(output))


def _summary(adapter: Adapter) -> dict[str, Any]:
    assert adapter.folded is not None
    return {
        "modules": len(adapter.modules),
        "scaled": len(adapter.folded["modules"]),
        "ranks": sorted({layer.rank for layer in adapter.layers.values()}),
        "techniques": adapter.folded["techniques"],
        "origin": adapter.folded["origin"],
    }


def _table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    rows = ["adapter                 modules  scaled  ranks     techniques"]
    for name, one in summary.items():
        ranks = ",".join(map(str, one["ranks"]))
        techniques = ", ".join(one["techniques"]) or "none"
        rows.append(f"{name:<24}{one['modules']:>7}{one['scaled']:>8}  {ranks:<10}{techniques}")
    return "\n".join(rows)
