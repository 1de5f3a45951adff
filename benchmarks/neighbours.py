"""Techniques of the neighbours on a model of real size: ours and theirs in one process, in turn.

    python benchmarks/neighbours.py awq --model SmolLM2-135M-Instruct [--windows 16] [--blocks 6]

Perplexity of windows of 512 tokens of wikitext: the first ones calibrate, the last 40 score.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import load, quiet
from peers import llm_compressor
from report import ASSETS, HERE, add_section, machine, named, print_table
from torch import Tensor, nn

import aimet_ext
from aimet_ext import Blockwise, QSpec

LENGTH, SCORED = 512, 40
HEAD = ("grid", "method", "perplexity", "recovered %", "processor s")
GRIDS = {
    "W4 per channel": QSpec(bitwidth=4),
    "W4 group 64": QSpec(bitwidth=4, granularity=Blockwise(64)),
}
# Techniques in order, with their settings.
OURS: dict[str, Sequence[tuple[str, dict[str, Any]]]] = {
    "rounding": (),
    "HQQ": (("hqq", {}),),
    "AWQ": (("awq", {}),),
    "GPTQ": (("gptq", {}),),
    "GPTQ, fast": (("gptq", {"preset": "fast"}),),
    "AWQ (scales) + GPTQ": (("awq", {"clip": False}), ("gptq", {})),
    "R1 + R2": (("rotation", {}),),
    "R1 + R2 + GPTQ": (("rotation", {}), ("gptq", {})),
    "R1 + R2 + AWQ (scales) + GPTQ": (
        ("rotation", {}),
        ("awq", {"clip": False}),
        ("gptq", {}),
    ),
}
SECTIONS = {
    "awq": ("rounding", "llm-compressor awq", "AWQ", "HQQ"),
    "rotation": ("rounding", "R1 + R2", "GPTQ", "R1 + R2 + GPTQ"),
    "gptq": ("rounding", "llm-compressor gptq", "GPTQ, fast", "GPTQ"),
    "all": ("llm-compressor awq", "llm-compressor gptq", *OURS),
}


@dataclass(frozen=True)
class Subject:
    """A model with its windows ``[windows, 512]``."""

    model: nn.Module
    calibration: Tensor
    scored: Tensor

    def perplexity(self, quantized: Any) -> float:
        """Score a model or a simulation."""
        return aimet_ext.evaluate_perplexity(quantized, list(self.scored.split(1)))

    def sim(self, spec: QSpec) -> Any:
        """Return a simulation with the linear layers of the blocks quantized."""
        with quiet():
            return aimet_ext.create_sim(
                self.model,
                self.calibration[:1, :64],
                weights=spec,
                lm_head=None,
                embedding=None,
                activations=None,
            )


def subject(folder: Path, text: Path, windows: int, blocks: int | None) -> Subject:
    """Read a model and its text; of the model the first blocks, if their number is given."""
    model, tokenizer = load(folder)
    if blocks is not None:
        model.model.layers = model.model.layers[:blocks]
        model.config.num_hidden_layers = blocks
    if text.suffix == ".jsonl":
        every = torch.cat(aimet_ext.calibration_batches(tokenizer, text, LENGTH, None))
    else:
        ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
        every = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return Subject(model, every[:windows], every[-SCORED:])


def quantized(this: Subject, method: str, spec: QSpec) -> tuple[Any, float]:
    """Return what a method makes of the model, and its processor seconds."""
    if method.startswith("llm-compressor "):
        started = time.process_time()
        found = llm_compressor(method.split()[1], this.model, this.calibration, spec)
        return found, time.process_time() - started
    sim = this.sim(spec)
    started = time.process_time()
    for name, settings in OURS[method]:
        apply: Callable[..., Any] = getattr(aimet_ext, f"apply_{name}")
        data = () if name in ("hqq", "rtn", "rotation") else (list(this.calibration.split(1)),)
        apply(sim, *data, progress=False, **settings)
    return sim, time.process_time() - started


def main() -> None:
    """Run a section and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, default=ASSETS / "wikitext-2-raw/wiki.test.raw")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "neighbours.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    this = subject(options.model, options.text, options.windows, options.blocks)
    exact = this.perplexity(this.model)
    print(f"float: perplexity {exact:.2f}")
    rows: list[Sequence[Any]] = []
    for grid in options.grids:
        worst = this.perplexity(this.sim(GRIDS[grid]))
        for method in SECTIONS[options.section]:
            found, seconds = quantized(this, method, GRIDS[grid])
            score = this.perplexity(found)
            rows.append((grid, method, score, 100 * (worst - score) / (worst - exact), seconds))
            print(f"  {grid}, {method}: perplexity {score:.2f}, {seconds:.0f} s", flush=True)
    title = f"{options.model.name}, {options.windows} windows of {LENGTH}, float {exact:.2f}"
    print_table(title, HEAD, rows)
    add_section(
        options.output,
        options.section,
        {"machine": machine(), "title": title, "rows": named(HEAD, rows)},
    )


if __name__ == "__main__":
    main()
