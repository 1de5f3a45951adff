"""Presets of every technique on a small trained model: what they gain, and what they take.

    python benchmarks/presets.py [--model stories260K-hf] [--windows 64]

Weights of 4 bits per channel; windows of 256 tokens of stories.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import load, quiet
from report import ASSETS, HERE, add_section, machine, named, print_table

import aimet_ext
from aimet_ext import QSpec
from aimet_ext.config import PRESETS

TECHNIQUES = ("seq_mse", "awq", "omniquant", "gptq", "adaround", "autoround")
HEAD = ("technique", "preset", "perplexity", "recovered %", "processor s")


def main() -> None:
    """Run all of them and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ASSETS / "stories260K-hf")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--techniques", nargs="+", default=list(TECHNIQUES))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "presets.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(options.model)
    stories = ASSETS / "tinystories"
    batches = aimet_ext.calibration_batches(
        tokenizer, stories / "calib.jsonl", 256, options.windows // 4, 4
    )
    scored = aimet_ext.calibration_batches(tokenizer, stories / "eval.jsonl", 256, 16, 4)

    def new_sim() -> Any:
        with quiet():
            return aimet_ext.create_sim(
                model,
                batches[0][:1],
                weights=QSpec(bitwidth=4),
                lm_head=None,
                embedding=None,
                activations=None,
            )

    exact = aimet_ext.evaluate_perplexity(model, scored)
    worst = aimet_ext.evaluate_perplexity(new_sim(), scored)
    rows: list[Sequence[Any]] = []
    for name in options.techniques:
        for preset in PRESETS:
            sim = new_sim()
            started = time.process_time()
            getattr(aimet_ext, f"apply_{name}")(sim, batches, preset=preset, progress=False)
            seconds = time.process_time() - started
            score = aimet_ext.evaluate_perplexity(sim, scored)
            rows.append((name, preset, score, 100 * (worst - score) / (worst - exact), seconds))
            print(f"  {name}, {preset}: perplexity {score:.3f}, {seconds:.1f} s", flush=True)
    title = f"{options.model.name}, W4, float {exact:.3f}, rounding {worst:.3f}"
    print_table(title, HEAD, rows)
    add_section(
        options.output,
        "presets",
        {"machine": machine(), "title": title, "rows": named(HEAD, rows)},
    )


if __name__ == "__main__":
    main()
