"""Ranges of activations by the error of blocks' outputs, by the model's outputs, and as calibrated.

    python benchmarks/activation_ranges.py FOLDER --calibration TEXT --evaluation TEXT

Prints perplexity, divergence of the outputs on the calibration windows, and processor seconds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import load, quiet

import aimet_ext
from aimet_ext import QSpec

CALIBRATED = "calibrated"


def measured(model: Any, batches: Any, scored: Any, objective: str, options: Any) -> list[str]:
    """Return a row: objective, perplexity, divergence before and after, processor seconds."""
    asymmetric = QSpec(bitwidth=options.activations, symmetric=False)
    symmetric = QSpec(bitwidth=options.activations)
    with quiet():
        sim = aimet_ext.create_sim(
            model,
            batches[0],
            weights=QSpec(bitwidth=options.weights),
            lm_head=QSpec(bitwidth=8),
            activations=symmetric if options.symmetric else asymmetric,
        )
    if options.gptq:
        aimet_ext.apply_gptq(sim, batches, progress=False)
    started, divergence = time.process_time(), "–"
    if objective == CALIBRATED:
        sim.compute_encodings(lambda quantized: [quantized(batch) for batch in batches])
    else:
        report = aimet_ext.apply_activation_ranges(
            sim, batches, objective=objective, progress=False
        )
        divergence = f"{report.kl_before:.5f} → {report.kl_after:.5f}"
    seconds = time.process_time() - started
    with torch.no_grad():
        perplexity = aimet_ext.evaluate_perplexity(sim, scored)
    return [objective, f"{perplexity:.4f}", divergence, f"{seconds:.1f}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--scored", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--blocks", type=int, help="keep the first blocks alone")
    parser.add_argument("--weights", type=int, default=8)
    parser.add_argument("--activations", type=int, default=8)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--gptq", action="store_true", help="round the weights first")
    parser.add_argument("--objectives", nargs="+", default=[CALIBRATED, "output", "block"])
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    if options.blocks:
        model.model.layers = model.model.layers[: options.blocks]
        model.config.num_hidden_layers = options.blocks
    texts = [
        aimet_ext.calibration_batches(tokenizer, file, options.length, count, 4)
        for file, count in (
            (options.calibration, options.windows),
            (options.evaluation, options.scored),
        )
    ]
    print(f"float {aimet_ext.evaluate_perplexity(model, texts[1]):.4f}")
    for objective in options.objectives:
        print("  ".join(measured(model, *texts, objective, options)), flush=True)


if __name__ == "__main__":
    main()
