"""Weights and activations of few bits on a small trained model: the paper's second table in shape.

    python benchmarks/omniquant_activations.py [--model stories260K-hf] [--preset fast]

Activations are static, per tensor and asymmetric, those of all operators that an NPU quantizes.
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

WIDTHS = ((8, 8), (6, 6), (4, 8), (4, 4))
METHODS: dict[str, dict[str, Any] | None] = {
    "rounding": None,
    "smoothquant": {},
    "omniquant": {"quantize_activations": True},
}
HEAD = ("widths", "method", "perplexity", "processor s")


def main() -> None:
    """Run the widths and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ASSETS / "stories260K-hf")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "neighbours.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(options.model)
    stories = ASSETS / "tinystories"
    batches = aimet_ext.calibration_batches(
        tokenizer, stories / "calib.jsonl", 256, options.windows // 4, 4
    )
    scored = aimet_ext.calibration_batches(tokenizer, stories / "eval.jsonl", 256, 16, 4)

    def run(model: Any) -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    exact = aimet_ext.evaluate_perplexity(model, scored)
    rows: list[Sequence[Any]] = []
    for weights, activations in WIDTHS:
        for method, settings in METHODS.items():
            with quiet():
                sim = aimet_ext.create_sim(
                    model,
                    batches[0][:1],
                    weights=QSpec(bitwidth=weights),
                    activations=QSpec(bitwidth=activations, symmetric=False),
                )
            started = time.process_time()
            if settings is not None:
                extra = {"preset": options.preset} if method == "omniquant" else {}
                apply = getattr(aimet_ext, f"apply_{method}")
                apply(sim, batches, progress=False, **extra, **settings)
            seconds = time.process_time() - started
            with quiet():
                sim.compute_encodings(run)
            score = aimet_ext.evaluate_perplexity(sim, scored)
            rows.append((f"W{weights}A{activations}", method, score, seconds))
            print(f"  W{weights}A{activations}, {method}: {score:.3f}, {seconds:.0f} s", flush=True)
    title = f"{options.model.name}, {options.windows} windows, float {exact:.3f}"
    print_table(title, HEAD, rows)
    add_section(
        options.output,
        "widths of activations",
        {"machine": machine(), "title": title, "rows": named(HEAD, rows)},
    )


if __name__ == "__main__":
    main()
