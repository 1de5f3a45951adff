"""Recipes of the package on a model: what they gain, and what they take.

    python benchmarks/recipes.py --model FOLDER --text TEXT [--held-out TEXT] [--recipes NAME ...]

Prints what belongs in the field ``measured`` of each.
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

HEAD = ("recipe", "float", "rounding", "quantized", "recovered %", "processor s")


def main() -> None:
    """Run the recipes and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ASSETS / "stories260K-hf")
    parser.add_argument("--text", type=Path, default=ASSETS / "tinystories/calib.jsonl")
    parser.add_argument("--held-out", type=Path, default=ASSETS / "tinystories/eval.jsonl")
    parser.add_argument("--windows", type=int, default=64, help="to score")
    parser.add_argument("--recipes", nargs="+", default=aimet_ext.recipe_names())
    parser.add_argument("--output", type=Path, default=HERE / "results" / "recipes.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(options.model)
    rows: list[Sequence[Any]] = []
    for name in options.recipes:
        recipe = aimet_ext.read_recipe(name)
        plan = recipe.calibration
        batches = aimet_ext.calibration_batches(
            tokenizer, options.text, plan.seq_length, plan.num_batches, plan.batch_size
        )
        scored = aimet_ext.calibration_batches(
            tokenizer, options.held_out, plan.seq_length, options.windows
        )

        def run(model: Any, batches: Sequence[Any] = batches) -> None:
            with torch.no_grad():
                for batch in batches:
                    model(batch)

        with quiet():
            rounded = recipe.create_sim(model, batches[0][:1])
            rounded.compute_encodings(run)
            sim = recipe.create_sim(model, batches[0][:1])
        worst = aimet_ext.evaluate_perplexity(rounded, scored)
        del rounded
        started = time.process_time()
        recipe.apply(sim, batches, reference=model, progress=False)
        seconds = time.process_time() - started
        sim.compute_encodings(run)
        exact = aimet_ext.evaluate_perplexity(model, scored)
        score = aimet_ext.evaluate_perplexity(sim, scored)
        share = 100 * (worst - score) / (worst - exact)
        rows.append((name, exact, worst, score, share, seconds))
        print(
            f"  {name}: {worst:.3f} -> {score:.3f} (float {exact:.3f}), {seconds:.0f} s", flush=True
        )
    title = f"{options.model.name}, {options.windows} windows scored"
    print_table(title, HEAD, rows)
    add_section(
        options.output,
        options.model.name,
        {"machine": machine(), "title": title, "rows": named(HEAD, rows)},
    )


if __name__ == "__main__":
    main()
