"""The jobs of the commands, as functions that return their results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aimet_ext
from aimet_ext.errors import require
from aimet_ext.files.folders import check_output, is_ours, relist_files, replace_folder
from aimet_ext.registry import TECHNIQUES, load

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from aimet_ext.config import QSpec

PREFIX = "model"
"""Name of the exported files, before their endings."""

REPORTS = "reports"
"""Folder for the techniques' reports, in the exported one."""


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Result of ``quantize``: reports by technique, in order, and files with their sizes."""

    reports: dict[str, Any]
    files: list[tuple[str, str]]


def quantize(
    model_dir: Path,
    calibration: Path,
    output: Path,
    *,
    techniques: Mapping[str, Any],
    weights: QSpec,
    outer: QSpec,
    activations: QSpec | None,
    seq_length: int,
    num_batches: int,
    batch_size: int,
    hf_checkpoint: bool,
    **folders: Any,
) -> Quantized:
    """Quantize a model folder and export the result to another.

    :param techniques: Settings of the techniques to apply, in order; empty for plain rounding.
    :param outer: Grid of the output head; the token embedding has as many bits.
    :param folders: ``checkpoint_dir``, ``cache_dir``.
    """
    check_output(output)
    model, tokenizer = load_model(model_dir)
    batches = cut_batches(tokenizer, calibration, seq_length, num_batches, batch_size)
    sim = aimet_ext.create_sim(
        model, batches[0], weights=weights, lm_head=outer, activations=activations
    )
    reports = _apply(sim, batches, techniques, **folders)
    with replace_folder(output) as folder:
        aimet_ext.export(sim, folder, PREFIX, batches[0][:1], hf_checkpoint=hf_checkpoint)
        for name, report in reports.items():
            report.save(folder / REPORTS / f"{name}.json")
        relist_files(folder)
    return Quantized(reports, list_files(output))


def evaluate(folder: Path, text: Path, *, seq_length: int, num_windows: int) -> dict[str, Any]:
    """Measure the perplexity of a model folder, or of an export with quantization simulated."""
    if is_ours(folder):
        model: Any = aimet_ext.load(folder)
        tokenizer = load_tokenizer(folder)
    else:
        model, tokenizer = load_model(folder)
    batches = cut_batches(tokenizer, text, seq_length, None, batch_size=1)[:num_windows]
    return {
        "perplexity": aimet_ext.evaluate_perplexity(model, batches),
        "windows": sum(len(batch) for batch in batches),
        "seq_length": seq_length,
        "quantized": is_ours(folder),
    }


def cut_batches(
    tokenizer: PreTrainedTokenizerBase, text: Any, length: int, number: int | None, batch_size: int
) -> list[Tensor]:
    """Cut text into batches; a tokenizer without BOS, as Qwen's, starts documents with its EOS."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else None
    return aimet_ext.calibration_batches(
        tokenizer, text, length, number, batch_size, bos_token_id=start
    )


def _apply(
    sim: Any,
    batches: Sequence[Tensor],
    techniques: Mapping[str, Any],
    *,
    checkpoint_dir: Path | None = None,
    cache_dir: Path | None = None,
) -> dict[str, Any]:
    """Apply techniques in order, then compute the encodings that are still open.

    :param checkpoint_dir: each technique has a folder of its own in it.
    """
    import torch

    reports: dict[str, Any] = {}
    for name, params in techniques.items():
        reports[name] = load(TECHNIQUES[name].function)(
            sim,
            batches,
            params=params,
            checkpoint_dir=None if checkpoint_dir is None else checkpoint_dir / name,
            cache_dir=cache_dir,
        )

    def run(model: nn.Module) -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    sim.compute_encodings(run)
    return reports


def load_model(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in float32, and its tokenizer, without a network.

    :raises ValueError: the folder holds no such model.
    """
    transformers = require("transformers", "torch")
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: the folder of a Hugging Face model is required, but it has no config.json"
        )
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="float32", local_files_only=True
        )
    except OSError as error:
        raise ValueError(f"{folder}: the model could not be loaded: {error}") from error
    return model.eval(), load_tokenizer(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, without a network.

    :raises ValueError: the folder holds none.
    """
    transformers = require("transformers", "torch")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise ValueError(f"{folder}: the tokenizer could not be loaded: {error}") from error


def list_files(folder: Path) -> list[tuple[str, str]]:
    """Return each file below a folder by its relative name, with its size."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), size(path.stat().st_size)) for path in files]


def size(count: int) -> str:
    """Return a number of bytes for people: ``"1.5 MB"``."""
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"
