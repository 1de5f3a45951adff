"""A model with texts to calibrate and to score it, and its distance from the float one."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import load
from report import ASSETS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import aimet_ext
from aimet_ext.core.divergence import Divergence, TopProbabilities
from aimet_ext.data.batches import call_model
from aimet_ext.evaluation.perplexity import model_of, perplexity_of
from aimet_ext.models.padding import pad_mlp
from aimet_ext.models.topology import find_blocks
from aimet_ext.sim.points import first_output
from aimet_ext.walk.hooks import evaluating

# Calibration text, held-out text; the end of a text that has no other half is held out.
TEXTS = {
    "tinystories": ("tinystories/calib.jsonl", "tinystories/eval.jsonl"),
    "wikitext": ("wikitext-2-raw/wiki.test.raw", None),
}
TOP_K = 256


class Subject(NamedTuple):
    """A model with its windows ``[windows, length]``, those to score by text."""

    model: nn.Module
    calibration: Tensor
    scored: Mapping[str, Tensor]


def read_subject(
    folder: Path,
    texts: Sequence[str],
    *,
    windows: int,
    length: int,
    scored: int,
    blocks: int | None = None,
    draw: int = 0,
) -> Subject:
    """Read a model and its texts.

    Inner widths of MLPs become multiples of 64, with channels that are zero: the function is the
    same, and all block sizes divide them, as some libraries need it.

    :param windows: To calibrate, of all texts: equal shares, or all of a text that has fewer.
    :param scored: Windows of each text to score.
    :param blocks: The first blocks of the model that are kept; None for all.
    """
    model, tokenizer = load(folder)
    if blocks is not None:
        model.model.layers = model.model.layers[:blocks]
        model.config.num_hidden_layers = blocks
    model.config.intermediate_size = max(pad_mlp(model, each, 64) for each in find_blocks(model))
    found, held_out = {}, {}
    for text in texts:
        own, other = (
            name and torch.cat(windows_of(tokenizer, name, length)) for name in TEXTS[text]
        )
        if other is None:
            own, other = own[:-scored], own[-scored:]
        found[text], held_out[text] = own, other[:scored]
    calibration = {}
    for number, text in enumerate(sorted(texts, key=lambda text: len(found[text]))):
        own, left = found[text], windows - sum(map(len, calibration.values()))
        wanted = left // (len(texts) - number)
        generator = torch.Generator().manual_seed(draw)
        order = torch.randperm(len(own), generator=generator) if draw else torch.arange(len(own))
        calibration[text] = own[order[:wanted]]
    if sum(map(len, calibration.values())) < windows:
        raise ValueError(f"{windows} windows are required, got {sum(map(len, found.values()))}")
    return Subject(model, torch.cat([calibration[text] for text in texts]), held_out)


def windows_of(tokenizer: Any, name: str, length: int) -> list[Tensor]:
    """Return all windows of a text."""
    return aimet_ext.calibration_batches(tokenizer, ASSETS / name, length, None)


def scores(
    model_or_sim: Any, texts: Mapping[str, Tensor], outputs: Iterator[TopProbabilities]
) -> dict[str, Any]:
    """Score a quantized model, in one pass over the windows.

    The same as :func:`aimet_ext.evaluate_perplexity` and :func:`aimet_ext.evaluate_divergence`.

    :param outputs: Those of the float model, window by window.
    """
    model, losses, flips, found = model_of(model_or_sim), [], [], {}

    def seen(windows: Tensor) -> Iterator[tuple[Tensor, Tensor, None]]:
        for window in windows.split(1):
            logits = first_output(call_model(model, window))
            rows, own = logits.flatten(0, -2).float(), next(outputs)
            losses.append(own.divergence(rows))
            flips.append(rows.argmax(-1) != own.likeliest)
            yield logits, window, None

    with evaluating(model), torch.no_grad():
        for text, windows in texts.items():
            found[text] = perplexity_of(seen(windows))
    far = Divergence.of(torch.cat(losses), torch.cat(flips))
    return {
        "perplexity": statistics.geometric_mean(found.values()),  # the texts are of one length
        "texts": found,
        "kl": far.kl,
        "kl_high": far.kl_high,
        "flips": far.flips,
    }


def save_outputs(this: Subject, path: Path) -> dict[str, Any]:
    """Write the float model's outputs; its perplexities."""
    kept: dict[str, list[Tensor]] = {"logs": [], "classes": [], "rest": []}

    def seen(windows: Tensor) -> Iterator[tuple[Tensor, Tensor, None]]:
        for window in windows.split(1):
            logits = first_output(call_model(this.model, window))
            top = TopProbabilities.of(logits.flatten(0, -2), TOP_K)
            for name, values in kept.items():
                if getattr(top, name) is not None:
                    values.append(getattr(top, name))
            yield logits, window, None

    with torch.no_grad():
        found = {text: perplexity_of(seen(windows)) for text, windows in this.scored.items()}
    save_file({name: torch.stack(values) for name, values in kept.items() if values}, path)
    return {"perplexity": statistics.geometric_mean(found.values()), "texts": found}


def load_outputs(path: str) -> Iterator[TopProbabilities]:
    """Yield the float model's outputs, window by window."""
    kept = load_file(path)
    for number in range(len(kept["logs"])):
        yield TopProbabilities(**{name: values[number] for name, values in kept.items()})
