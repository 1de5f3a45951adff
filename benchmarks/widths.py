"""Mixed widths at a budget against one width: divergence and perplexity on held-out text.

    python benchmarks/widths.py [--packaged | --model FOLDER] [--text TEXT] [--held-out TEXT]

Weights of the block linears alone, one range a row, rounded to nearest and by GPTQ. Bits count
scales. A uniform width has the bits that it has; the same number is a budget of the assigned ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import load, quiet
from report import ASSETS, HERE, add_section, machine, named, print_table

import aimet_ext
from aimet_ext import QSpec, examples

CHOICES = ("int2", "int3", "int4", "int5", "int6", "int8")
HEAD = ("weights", "bits", "estimated KL", "KL", "perplexity", "KL, GPTQ", "perplexity, GPTQ")


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ASSETS / "stories260K-hf")
    parser.add_argument("--text", type=Path, default=ASSETS / "tinystories/calib.jsonl")
    parser.add_argument("--held-out", type=Path, default=ASSETS / "tinystories/eval.jsonl")
    parser.add_argument("--packaged", action="store_true", help="the model of the package")
    parser.add_argument("--windows", type=int, default=32, help="to calibrate on, and to score")
    parser.add_argument("--budgets", nargs="+", type=float, default=[3.5, 4.5, 5.0])
    parser.add_argument("--uniform", nargs="+", default=["int3", "int4", "int5"])
    parser.add_argument("--output", type=Path, default=HERE / "results" / "widths.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts: tuple[Any, Any] = (options.text, options.held_out)
    if options.packaged:
        options.model = examples.model_dir()
        texts = (examples.documents("calibration"), examples.documents("evaluation"))
    model, tokenizer = load(options.model)
    batches, scored = (
        aimet_ext.calibration_batches(tokenizer, text, 256, options.windows // 4, 4)
        for text in texts
    )
    reference = aimet_ext.float_logits(model, scored)

    def measured(weights: QSpec, overrides: Mapping[str, QSpec]) -> list[float]:
        with quiet():
            sim = aimet_ext.create_sim(
                model,
                batches[0][:1],
                weights=weights,
                lm_head=None,
                embedding=None,
                activations=None,
                overrides=overrides,
            )
        found = []
        for number in range(2):
            if number:
                aimet_ext.apply_gptq(sim, batches, progress=False)
            found += [
                aimet_ext.evaluate_divergence(sim, scored, reference).kl,
                aimet_ext.evaluate_perplexity(sim, scored),
            ]
        return found

    rows: list[Sequence[Any]] = []
    started = time.process_time()
    first = aimet_ext.assign_widths(model, batches, 8.5, CHOICES, progress=False)
    seconds = time.process_time() - started
    for name in options.uniform:
        bits, kl = first.uniform()[name]
        rows.append((f"all {name}", bits, kl, *measured(QSpec.parse(name), {})))
    for budget in sorted({*options.budgets, *(row[1] for row in rows)}):
        report = aimet_ext.assign_widths(model, batches, budget, CHOICES, progress=False)
        row = ("assigned", report.average_bits, report.kl)
        rows.append((*row, *measured(QSpec(), report.overrides)))
    rows.sort(key=lambda row: (row[1], row[0]))
    exact = aimet_ext.evaluate_perplexity(model, scored)
    title = (
        f"{options.model.name}, {options.windows} windows of 256 tokens, float perplexity "
        f"{exact:.3f}, {seconds:.1f} processor s for the estimate"
    )
    print_table(title, HEAD, rows)
    content = {"machine": machine(), "title": title, "rows": named(HEAD, rows)}
    add_section(options.output, options.model.name, content)


if __name__ == "__main__":
    main()
