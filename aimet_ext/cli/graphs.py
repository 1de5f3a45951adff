"""The jobs of commands on ONNX graphs, see :mod:`aimet_ext.cli.jobs` for models of torch."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import aimet_ext
from aimet_ext.cli import jobs
from aimet_ext.cli.windows import read_windows
from aimet_ext.data.text import shares
from aimet_ext.errors import require
from aimet_ext.files.folders import check_output, replace_folder, write_json
from aimet_ext.files.manifest import is_export, read_export, relist_files
from aimet_ext.files.reading import naming
from aimet_ext.progress import step, steps
from aimet_ext.recipes.recipe import Recipe
from aimet_ext.registry import TECHNIQUES
from aimet_ext.reporting.writing import write_run
from aimet_ext.sim.protocol import adapt

if TYPE_CHECKING:
    from torch import Tensor

    from aimet_ext.data.feeds import Feed, InputSpec
    from aimet_ext.recipes.recipe import CalibrationPlan
    from aimet_ext.reporting.parts import Budget

_log = logging.getLogger(__name__)

ARRAYS = (".npz", ".npy")
"""Files with inputs of a graph."""


def is_graph(path: Path) -> bool:
    """Return True for an ONNX file; a folder may have such a name too."""
    return path.suffix.lower() == ".onnx" and path.is_file()


def exported_folder(path: Path) -> Path:
    """Return the folder of an export, also of an ONNX file in it.

    :raises ValueError: an ONNX file that is in none.
    """
    if not is_graph(path):
        return path
    if not is_export(path.parent):
        raise ValueError(
            f"{path}: an ONNX file of an export is required, with the quantizers beside it; "
            "quantize the graph first"
        )
    return path.parent


def tokenizer_of(path: Path, given: Path | None) -> Any:
    """Return the tokenizer in a folder, or else the one beside a graph or in a model's folder.

    :raises ValueError: none is given, and a graph has none beside it.
    """
    place = path.parent if path.is_file() else path
    beside = any(file.is_file() for file in place.glob("tokenizer*"))
    if given is None and path.is_file() and not beside:
        raise ValueError(
            f"{path}: a tokenizer is required to read text, and none is beside the graph; give its "
            f"folder by --tokenizer DIR, or the graph's inputs as arrays ({', '.join(ARRAYS)})"
        )
    return jobs.load_tokenizer(given or place)


@steps("quantize", 8)
def quantize(
    path: Path,
    calibration: Sequence[Path],
    output: Path,
    *,
    recipe: Recipe,
    tokenizer: Path | None,
    widths: Budget | None = None,
    **folders: Any,
) -> jobs.Quantized:
    """Quantize a graph and export the result to a folder, with the recipe.

    :param calibration: Texts, or arrays of the graph's inputs; only with text is it scored.
    :param tokenizer: Folder of the tokenizer; None for that of the graph.
    :param widths: Choice of widths that the recipe came from.
    :param folders: ``checkpoint_dir``, ``cache_dir``.
    """
    from aimet_ext.onnx.reading import read_model

    start, record = time.perf_counter(), aimet_ext.Recorder()
    check_output(output)
    _hush()
    inputs, plan = _inputs(path), recipe.calibration
    quality: dict[str, Any] = {}
    held_out: list[Tensor] = []
    step("read the data")
    if arrays := _are_arrays(calibration):
        feeds = _array_feeds(calibration, inputs, plan)
    else:
        read = tokenizer_of(path, tokenizer)
        length, size = _sizes(inputs, plan)
        windows = aimet_ext.calibration_batches(
            read, calibration, length, plan.num_batches, size, text_field=plan.text_field
        )
        feeds = token_feeds(windows, inputs)
        used = dataclasses.replace(
            plan, files=[*map(str, calibration)], seq_length=length, batch_size=size
        )
        found = read_windows(read, None, length, plan=used, size=fixed_shape(path)[0] or 1)
        held_out = found.batches()
        with jobs.part(record, "score the float model"):
            session = open_graph(path)
            quality["float"] = aimet_ext.evaluate_perplexity(session, held_out)
            reference = aimet_ext.float_logits(session, held_out)
    with jobs.part(record, "make the simulation"):
        sim = recipe.create_sim(read_model(path), None, in_place=True)
    divergences = {}
    if not arrays:
        rounding = adapt(sim).disabled_quantizers(weights=False)
        with jobs.part(record, "score plain rounding"), rounding:
            quality["rounding"] = aimet_ext.evaluate_perplexity(sim, held_out)
            divergences["rounding"] = aimet_ext.evaluate_divergence(sim, held_out, reference)
    step("apply the techniques")
    compares = any(TECHNIQUES[name].reference for name in recipe.params())
    float_model = open_graph(path) if compares else None
    reports = recipe.apply(sim, feeds, reference=float_model, watch=record.phase, **folders)
    with jobs.part(record, "calibrate"):
        sim.compute_encodings(feeds)
    if not arrays:
        with jobs.part(record, "score the result"):
            quality["quantized"] = aimet_ext.evaluate_perplexity(sim, held_out)
            divergences["quantized"] = aimet_ext.evaluate_divergence(sim, held_out, reference)
        quality["divergence"] = {name: dataclasses.asdict(d) for name, d in divergences.items()}
        quality |= {"windows": sum(map(len, held_out)), "seq_length": held_out[0].shape[1]}
        quality["text"] = found.text
    with replace_folder(output) as folder:
        with jobs.part(record, "export"):
            aimet_ext.export(sim, folder, jobs.PREFIX, feeds[0])
        for name, report in reports.items():
            report.save(folder / jobs.REPORTS / f"{name}.json")
        recipe.save(folder / jobs.RECIPE)
        if quality:
            read.save_pretrained(folder)
            (folder / jobs.REPORTS).mkdir(exist_ok=True)
            write_json(folder / jobs.REPORTS / "quality.json", quality)
        facts = {"recipe": recipe, "recorder": record, "widths": widths}
        write_run(folder, sim, reports, quality, model=path.name, **facts)
        relist_files(folder)
    seconds = time.perf_counter() - start
    return jobs.Quantized(reports, quality, jobs.list_files(output), seconds)


def assign_widths(
    path: Path,
    calibration: Sequence[Path],
    budget: str,
    choices: Sequence[str],
    *,
    tokenizer: Path | None,
    plan: CalibrationPlan,
    **options: Any,
) -> Any:
    """Return the report of widths of a graph under a budget."""
    from aimet_ext.onnx.reading import read_model

    _hush()
    inputs = _inputs(path)
    if _are_arrays(calibration):
        feeds = _array_feeds(calibration, inputs, plan)
    else:
        length, size = _sizes(inputs, plan)
        windows = aimet_ext.calibration_batches(
            tokenizer_of(path, tokenizer),
            calibration,
            length,
            plan.num_batches,
            size,
            text_field=plan.text_field,
        )
        feeds = token_feeds(windows, inputs)
    step("make the simulation")
    sim = Recipe(activations="none").create_sim(read_model(path), None, in_place=True)
    step("weigh the layers")
    return aimet_ext.assign_widths(sim, feeds, budget, choices, **options)


def open_graph(path: Path) -> Any:
    """Return a session that computes a graph.

    :raises CorruptFileError: the file is damaged, or holds what onnxruntime does not take.
    """
    from aimet_ext.onnx.session import open_session

    _inputs(path)  # which says more of a damaged file
    with naming(path, problem="a graph that onnxruntime can run is required"):
        return open_session(path)


def fixed_shape(*paths: Path) -> tuple[int | None, int | None]:
    """Return windows of a batch and tokens of a window that graphs take, None where free.

    :param paths: Graphs, exports of graphs, or other models; the first fixed size counts.
    """
    size, length = None, None
    for path in paths:
        if not is_graph(path):
            manifest = read_export(path, verify=False) if is_export(path) else {}
            if manifest.get("framework") != "onnx":
                continue
            path = path / f"{manifest['prefix']}.onnx"
        own = _shape(_inputs(path))
        size, length = size or own[0], length or own[1]
    return size, length


def is_quantized(path: Path) -> bool:
    """Return True if a graph holds quantized tensors."""
    from aimet_ext.onnx.reading import read_model

    nodes = read_model(path, external=False).graph.node
    return any(node.op_type == "DequantizeLinear" for node in nodes)


# ------------------------------------------------------------------------------------------ inputs


def token_feeds(windows: Sequence[Tensor], inputs: Mapping[str, InputSpec]) -> list[Feed]:
    """Return windows of token ids as inputs of a graph, with a mask and positions where it asks.

    :raises ValueError: the graph has other inputs too.
    """
    from aimet_ext.data.feeds import check_inputs, filled_batches

    feeds = []
    for number, filled in filled_batches(windows, inputs):
        batch = {
            name: tensor.to(inputs[name].dtype) if inputs[name].dtype else tensor
            for name, tensor in filled.items()
            if name in inputs
        }
        if other := [name for name in inputs if name not in batch]:
            raise ValueError(
                f"a graph of token ids, mask and positions is required to read text, but it takes "
                f"{', '.join(other)} too; give its inputs as arrays: --calibration FILE.npz"
            )
        check_inputs(batch, inputs, number)
        feeds.append({name: tensor.numpy() for name, tensor in batch.items()})
    return feeds


def _array_feeds(
    files: Sequence[Path], inputs: Mapping[str, InputSpec], plan: CalibrationPlan
) -> list[Feed]:
    """Return batches of the arrays in files, as many of each file, in turn.

    :raises ValueError: a file lacks an input, an input has another type or shape, there are more
        files than batches, or one of several has fewer batches than its share.
    """
    fixed = {spec.sizes[0] for spec in inputs.values() if spec.sizes and spec.sizes[0] is not None}
    size = min(fixed, default=plan.batch_size)
    if plan.num_batches < len(files):
        raise ValueError(
            f"a batch of each file is required at least, got {plan.num_batches} batches for "
            f"{len(files)} files; ask for more, or give fewer files"
        )
    if len(files) == 1:
        return _file_feeds(files[0], inputs, size, plan.num_batches)
    parts = []
    for file, share in zip(files, shares(plan.num_batches, len(files)), strict=True):
        parts.append(_file_feeds(file, inputs, size, share))
        if len(parts[-1]) < share:
            raise ValueError(
                f"{file}, whose share is equal to that of each other file: arrays for {share} "
                f"batches of {size} samples are required, got enough for {len(parts[-1])}; give "
                "more samples, or ask for fewer or smaller batches"
            )
    taken = (f"{len(part)} of {file}" for part, file in zip(parts, files, strict=True))
    _log.info("batches of at most %d samples: %s", size, ", ".join(taken))
    return [feed for turn in zip_longest(*parts) for feed in turn if feed is not None]


def _file_feeds(file: Path, inputs: Mapping[str, InputSpec], size: int, most: int) -> list[Feed]:
    """Return at most so many batches of a file; the first dimension of its arrays counts samples.

    A rest that fills no batch is left out, unless there is nothing else.
    """
    from aimet_ext.data.batches import as_tensors
    from aimet_ext.data.feeds import check_inputs

    arrays = _arrays(file, inputs)
    counts = {name: len(array) for name, array in arrays.items() if array.ndim}
    first, samples = next(iter(counts.items()), ("", 1))
    for name, count in counts.items():
        if count != samples:
            raise ValueError(
                f"{file}: arrays of as many samples, their first dimension, are required, got "
                f"{samples} of {first!r} and {count} of {name!r}"
            )
    starts = range(0, max(1, samples - size + 1), size)[:most]
    if len(starts) < most and (left := samples % size) and samples > size:
        _log.info("%s: the last %d of %d samples fill no batch, left out", file, left, samples)
    feeds = []
    for number, start in enumerate(starts):
        feed = {n: a[start : start + size] if a.ndim else a for n, a in arrays.items()}
        try:
            check_inputs({n: as_tensors(a) for n, a in feed.items()}, inputs, number)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        feeds.append(feed)
    return feeds


def _arrays(file: Path, inputs: Mapping[str, InputSpec]) -> dict[str, Any]:
    """Return the arrays of a file by input."""
    with naming(file, problem="arrays that numpy.savez or numpy.save wrote are required"):
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {next(iter(inputs)): loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files if name in inputs}


def _are_arrays(files: Sequence[Path]) -> bool:
    kinds = {file.suffix.lower() in ARRAYS for file in files}
    if len(kinds) > 1:
        raise ValueError("texts or arrays (.npz, .npy) are required to calibrate on, got both")
    return kinds == {True}


def _inputs(path: Path) -> dict[str, InputSpec]:
    require("onnx", "onnx")
    from aimet_ext.onnx.values import read_input_specs

    return read_input_specs(path)


def _sizes(inputs: Mapping[str, InputSpec], plan: CalibrationPlan) -> tuple[int, int]:
    """Return length and number of windows of a batch: the graph's, where these are fixed."""
    size, length = _shape(inputs)
    return length or plan.seq_length, size or plan.batch_size


def _shape(inputs: Mapping[str, InputSpec]) -> tuple[int | None, ...]:
    return next((s.sizes for s in inputs.values() if len(s.sizes) == 2), (None, None))


def _hush() -> None:
    """Let onnxruntime, which logs past Python, report errors alone in sessions of AIMET's."""
    require("onnxruntime", "onnx").set_default_logger_severity(3)
