"""Settings of a layer-wise technique, each on several draws of calibration text.

    python benchmarks/draws.py gptq '{"asym_strength": 1.0}' [--model box] [--bits 4 3 2]

Perplexity of windows of 256 tokens, weights of the blocks' linear layers alone, per channel. A draw
is 64 windows; the defaults are measured as well, on the same draws. Models are those of
``common.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import CALIBRATION, SCORED, Bench, Options, Subject, load
from report import ASSETS, HERE, add_section, machine, named, print_table

import aimet_ext
from aimet_ext import QSpec, examples

HEAD = ("bits", "settings", "perplexity", "each draw", "processor s")


def every_window(name: str) -> torch.Tensor:
    """All calibration windows of a model, ``[windows, 256]``."""
    if name == "box":
        folder, text = examples.model_dir(), examples.documents("calibration")
    else:
        folder, text = ASSETS / "stories260K-hf", ASSETS / "tinystories" / "calib.jsonl"
    return torch.cat(aimet_ext.calibration_batches(load(folder)[1], text, 256, None, 20))


def quantized(
    bench: Bench, subject: Subject, bits: int, technique: str, settings: dict[str, Any]
) -> tuple[float, float]:
    """Perplexity and processor seconds of one run."""
    sim = bench.sim(subject, QSpec(bitwidth=bits))
    apply: Any = getattr(aimet_ext, f"apply_{technique}")
    started = time.process_time()
    apply(sim, list(subject.calibration.split(4)), progress=False, **settings)
    seconds = time.process_time() - started
    return aimet_ext.evaluate_perplexity(sim, list(subject.scored.split(20))), seconds


def main() -> None:
    """Run all of them and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("technique", choices=("seq_mse", "gptq", "adaround"))
    parser.add_argument("settings", nargs="+", help="JSON, for example '{\"asym_strength\": 1.0}'")
    parser.add_argument("--model", choices=("stories260K", "box"), default="stories260K")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--scored", type=int, default=SCORED)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "draws.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(Options(assets=ASSETS))
    subject = bench.subject(options.model)
    subject = dataclasses.replace(subject, scored=subject.scored[: options.scored])
    draws = every_window(options.model).split(CALIBRATION)[: options.draws]
    rows = []
    for bits in options.bits:
        for text in ("{}", *options.settings):
            runs = [
                quantized(
                    bench,
                    dataclasses.replace(subject, calibration=draw),
                    bits,
                    options.technique,
                    json.loads(text),
                )
                for draw in draws
            ]
            scores = [score for score, _ in runs]
            each = " ".join(f"{score:.3f}" for score in scores)
            seconds = statistics.median(seconds for _, seconds in runs)
            rows.append((bits, text, statistics.fmean(scores), each, seconds))
            print(f"  W{bits} {text}: {each}", flush=True)
    title = f"{options.technique} on {options.model}, {len(draws)} draws"
    print_table(title, HEAD, rows)
    section = f"{options.technique} {options.model} {' '.join(options.settings)}"
    add_section(
        options.output,
        section,
        {"machine": machine(), "title": title, "rows": named(HEAD, rows)},
    )


if __name__ == "__main__":
    main()
