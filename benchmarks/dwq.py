"""DWQ behind other techniques: perplexity and divergence on text that nothing was learnt on.

    python benchmarks/dwq.py --model FOLDER --calibration FILE --text FILE --technique gptq

Calibrates on the first 64 windows of 256 tokens of one text and scores the first 200 of another, or
what --windows and --scored say. Weights of the blocks alone are quantized, one range a channel.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import aimet_ext
from aimet_ext import QSpec

sys.path.insert(0, str(Path(__file__).parent))
from common import quiet


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--technique", default="gptq")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--scored", type=int, default=200)
    return parser.parse_args()


def main() -> None:
    """Print a line for each state of each width."""
    given = options()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    count = given.windows // given.batch_size
    batches = aimet_ext.calibration_batches(
        tokenizer, given.calibration, 256, count, given.batch_size
    )
    scored = aimet_ext.calibration_batches(tokenizer, given.text, 256, given.scored // 4, 4)
    reference = aimet_ext.float_logits(model, scored)
    print(f"float: perplexity {aimet_ext.evaluate_perplexity(model, scored):.4f}")

    def show(name: str, sim: Any, started: float) -> None:
        perplexity = aimet_ext.evaluate_perplexity(sim, scored)
        found = aimet_ext.evaluate_divergence(sim, scored, reference)
        print(
            f"{name}: perplexity {perplexity:.4f}, {found}; {time.perf_counter() - started:.0f} s"
        )

    for bits in given.bits:
        with quiet():
            sim = aimet_ext.create_sim(
                model,
                batches[0],
                weights=QSpec(bitwidth=bits),
                activations=None,
                lm_head=None,
                embedding=None,
            )
        started = time.perf_counter()
        apply = getattr(aimet_ext, f"apply_{given.technique}")
        apply(sim, batches, progress=False)
        sim.compute_encodings(lambda quantized: quantized(batches[0]))
        show(f"W{bits} {given.technique}", sim, started)
        started = time.perf_counter()
        report = aimet_ext.apply_dwq(sim, batches, given.steps, reference=model, progress=False)
        show(f"W{bits} {given.technique}, dwq ({report.kept})", sim, started)


if __name__ == "__main__":
    main()
