"""The jobs of the commands, as functions that return their results."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aimet_ext
from aimet_ext.cli.windows import read_windows
from aimet_ext.drawing.page import size
from aimet_ext.errors import require
from aimet_ext.files.folders import check_output, replace_folder, write_json
from aimet_ext.files.manifest import is_export, read_export, relist_files
from aimet_ext.models.cache import model_name
from aimet_ext.progress import bar, step, steps
from aimet_ext.recipes.recipe import CalibrationPlan
from aimet_ext.registry import TECHNIQUES
from aimet_ext.reporting.writing import write_run
from aimet_ext.sim.protocol import adapt

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from aimet_ext.recipes.recipe import Recipe
    from aimet_ext.reporting.parts import Budget
    from aimet_ext.reporting.recorder import Recorder

PREFIX = "model"
"""Name of the exported files, before their endings."""

REPORTS = "reports"
"""Folder for the techniques' reports, in the exported one."""

RECIPE = "recipe.yaml"
"""Recipe that repeats the work, in the exported folder."""


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Result of ``quantize``.

    :param reports: Reports by technique, in order.
    :param quality: Perplexities of the float model, of plain rounding of its weights, and as
        deployed, divergences of the latter two from the float model, and the text that they were
        measured on.
    :param files: Files with their sizes.
    :param seconds: Seconds of all the work.
    """

    reports: dict[str, Any]
    quality: dict[str, Any]
    files: list[tuple[str, str]]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        reports = {name: report.to_dict() for name, report in self.reports.items()}
        return {**vars(self), "reports": reports, "files": dict(self.files)}


@steps("quantize", 10)
def quantize(
    model_dir: Path,
    calibration: Path | Sequence[Path],
    output: Path,
    *,
    recipe: Recipe,
    hf_checkpoint: bool,
    check_export: bool = True,
    widths: Budget | None = None,
    **folders: Any,
) -> Quantized:
    """Quantize a model folder and export the result to another, with the recipe.

    :param check_export: Export the float model before the techniques run, to find out whether the
        result can be exported.
    :param widths: Choice of widths that the recipe came from.
    :param folders: ``checkpoint_dir``, ``cache_dir``.
    """
    start = time.perf_counter()
    check_output(output)
    record = aimet_ext.Recorder()
    with part(record, "load the model"):
        model, tokenizer = load_model(model_dir)
    plan = recipe.calibration
    step("read the text")
    batches = aimet_ext.calibration_batches(
        tokenizer,
        calibration,
        plan.seq_length,
        plan.num_batches,
        plan.batch_size,
        text_field=plan.text_field,
    )
    files = [calibration] if isinstance(calibration, Path) else calibration
    used = dataclasses.replace(plan, files=[*map(str, files)])
    found = read_windows(tokenizer, None, plan.seq_length, plan=used)
    held_out = found.batches()
    check_ids(model_dir, model, [*batches, *held_out])
    with part(record, "score the float model"):
        quality: dict[str, Any] = {"float": aimet_ext.evaluate_perplexity(model, held_out)}
        reference = aimet_ext.float_logits(model, held_out)
    # The float model is needed again by techniques that compare with it, and by no others.
    in_place = not any(TECHNIQUES[name].reference for name in recipe.params())
    with part(record, "make the simulation"):
        sim = recipe.create_sim(model, batches[0], in_place=in_place)
        float_model = None if in_place else model
        del model
    if check_export:
        with part(record, "try the export"):
            _check_export(sim, batches[0])
    with part(record, "score plain rounding"), adapt(sim).disabled_quantizers(weights=False):
        quality["rounding"] = aimet_ext.evaluate_perplexity(sim, held_out)
        divergences = {"rounding": aimet_ext.evaluate_divergence(sim, held_out, reference)}
    step("apply the techniques")
    reports = recipe.apply(sim, batches, reference=float_model, watch=record.phase, **folders)
    with part(record, "calibrate"):
        sim.compute_encodings(partial(_run, batches=batches))  # what is still open
    with part(record, "score the result"):
        quality["quantized"] = aimet_ext.evaluate_perplexity(sim, held_out)
        divergences["quantized"] = aimet_ext.evaluate_divergence(sim, held_out, reference)
    quality["divergence"] = {name: dataclasses.asdict(d) for name, d in divergences.items()}
    quality |= {"windows": sum(map(len, held_out)), "seq_length": held_out[0].shape[1]}
    quality["text"] = found.text
    with replace_folder(output) as folder:
        with part(record, "export"):
            aimet_ext.export(sim, folder, PREFIX, batches[0][:1], hf_checkpoint=hf_checkpoint)
        for name, report in reports.items():
            report.save(folder / REPORTS / f"{name}.json")
        recipe.save(folder / RECIPE)
        (folder / REPORTS).mkdir(exist_ok=True)
        write_json(folder / REPORTS / "quality.json", quality)
        facts = {"recipe": recipe, "recorder": record, "widths": widths}
        write_run(folder, sim, reports, quality, model=model_name(model_dir), **facts)
        relist_files(folder)
    return Quantized(reports, quality, list_files(output), time.perf_counter() - start)


@contextmanager
def part(record: Recorder, name: str) -> Iterator[None]:
    """Open a context with a part of a job, which is shown and recorded."""
    step(name)
    with record.phase(name):
        yield


def _check_export(sim: Any, ids: Tensor) -> None:
    try:
        aimet_ext.check_export(sim, ids)
    except RuntimeError as error:
        raise RuntimeError(
            f"{error}. Nothing was quantized: the result could not be exported; "
            "--no-check-export quantizes all the same"
        ) from error


def analyze(
    folder: Path,
    text: Path,
    *,
    seq_length: int,
    num_windows: int,
    batch_size: int,
    top_k: int,
    text_field: str | None = None,
    tokenizer: Path | None = None,
) -> Any:
    """Return the report of what each quantizer of an export costs on a text.

    :raises ValueError: the folder is no export of a language model.
    """
    if not is_export(folder):
        raise ValueError(f"{folder}: a folder that aimet-ext quantize or export wrote is required")
    prefix = read_export(folder, verify=False)["prefix"]
    windows = aimet_ext.calibration_batches(
        load_tokenizer(tokenizer or folder),
        text,
        seq_length,
        None,
        batch_size,
        text_field=text_field,
    )
    sim = aimet_ext.load(folder)
    batches: list[Any] = windows[: -(-num_windows // batch_size)]
    if adapt(sim).framework == "onnx":
        from aimet_ext.cli.graphs import token_feeds
        from aimet_ext.onnx.values import read_input_specs

        batches = token_feeds(batches, read_input_specs(folder / f"{prefix}.onnx"))
    return aimet_ext.analyze(sim, batches, top_k=top_k)


@steps("assign-widths", 2)
def assign_widths(
    model_dir: Path,
    calibration: Sequence[Path],
    budget: str,
    choices: Sequence[str],
    *,
    text_field: str | None = None,
    tokenizer: Path | None = None,
    **options: Any,
) -> tuple[Any, Recipe]:
    """Return the report of widths under a budget, and the recipe with the calibration used.

    :param options: ``seq_length``, ``num_batches``, ``batch_size``, and those of the function.
    """
    from aimet_ext.cli import graphs

    cut = {name: options.pop(name) for name in ("seq_length", "num_batches", "batch_size")}
    if graphs.is_graph(model_dir):
        plan = CalibrationPlan(**cut, text_field=text_field)
        report = graphs.assign_widths(
            model_dir, calibration, budget, choices, tokenizer=tokenizer, plan=plan, **options
        )
    else:
        step("load the model")
        model, own = load_model(model_dir)
        batches = aimet_ext.calibration_batches(
            own, calibration, *cut.values(), text_field=text_field
        )
        check_ids(model_dir, model, batches)
        step("weigh the layers")
        report = aimet_ext.assign_widths(model, batches, budget, choices, **options)
    made = report.recipe
    return report, dataclasses.replace(
        made,
        calibration=dataclasses.replace(made.calibration, **cut, text_field=text_field),
    )


def check_ids(folder: Path, model: Any, batches: Sequence[Tensor]) -> None:
    """Refuse a folder with the tokenizer of another model."""
    if not hasattr(model, "get_input_embeddings"):
        return  # a graph or simulation, whose tokenizer was given with it
    from aimet_ext.models.huggingface import check_token_ids

    try:
        check_token_ids(model, *batches)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _run(model: nn.Module, batches: Sequence[Tensor]) -> None:
    import torch

    with torch.no_grad():
        for batch in bar(batches, "calibrate", leave=False):
            model(batch)


def load_model(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in float32, and its tokenizer, without a network.

    :raises ValueError: the folder holds no such model.
    :raises CorruptFileError: a file is damaged.
    """
    require("transformers", "torch")
    from aimet_ext.models.folders import read_causal_lm

    return read_causal_lm(folder, dtype="float32"), load_tokenizer(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, without a network.

    :raises CorruptFileError: the folder holds none, or a file is damaged.
    """
    require("transformers", "torch")
    from aimet_ext.models.folders import read_tokenizer

    return read_tokenizer(folder)


def list_files(folder: Path) -> list[tuple[str, str]]:
    """Return each file below a folder by its relative name, with its size."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), size(path.stat().st_size)) for path in files]
