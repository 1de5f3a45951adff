"""A LoRA adapter on a quantized base beside the float adapter on the float base.

    python benchmarks/lora_quality.py [--steps 1500] [--quick] [--output FILE]

A Llama that was trained on children's stories gets a LoRA adapter trained on an encyclopedia, in
float. The base is quantized to 4 bits with scales folded into its weights (OmniQuant), and knows
nothing of the encyclopedia; the adapter is folded, quantized to 8 bits and put on it. Perplexity
is taken on text that neither has seen.

It needs ``stories260K-hf``, ``tinystories`` and ``wikitext-2-raw`` in the folder that
``--assets`` names.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import CALIBRATION, LENGTH, SCORED, load, quiet
from report import ASSETS, HERE, add_section, bar, machine, named, print_table
from torch import Tensor

import aimet_ext
from aimet_ext import LPBQ, PerTensor, QSpec, lora

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_LPBQ = QSpec(bitwidth=4, granularity=LPBQ(32), on_indivisible="pad")
# Weights, and whether the base is calibrated on the adapter's kind of text too.
BASES = {
    "W4 A16": (QSpec(bitwidth=4), False),
    "W4 LPBQ 32 A16": (_LPBQ, False),
    "W4 LPBQ 32 A16, both texts": (_LPBQ, True),
}
RANK, ALPHA, RATE, BATCH = 8, 16, 3e-3, 8


def train(model: Any, windows: Tensor, steps: int, seed: int = 0) -> Any:
    """A ``PeftModel`` whose adapter was trained on windows ``[windows, length]``."""
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    adapted = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="encyclopedia")
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, RATE / 20)
    adapted.train()
    for step in range(steps):
        ids = windows[torch.randint(len(windows), (BATCH,))]
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"  step {step}: {loss.item():.4f}", flush=True)
    return adapted.eval()


def perplexity(model_or_sim: Any, windows: Tensor) -> float:
    """Of windows ``[windows, length]``."""
    return aimet_ext.evaluate_perplexity(model_or_sim, list(windows.split(20)))


def export_base(model: Any, spec: QSpec, windows: Tensor, steps: int, folder: Path) -> Any:
    """The base with OmniQuant's scales and ranges, calibrated on these windows."""
    with quiet():
        sim = aimet_ext.create_sim(model, windows[:1], weights=spec)
        aimet_ext.apply_omniquant(sim, list(windows.split(4)), steps, progress=False)
        sim.compute_encodings(lambda module: [module(ids) for ids in windows.split(8)])
        aimet_ext.export(sim, folder, "base", windows[:1])
    return sim


def measure(
    name: str, adapted: Any, folder: Path, texts: dict[str, Tensor], floats: dict[str, float]
) -> list[list[Any]]:
    """Perplexities of one base, alone and with the adapter in several forms."""
    with quiet():
        sim = lora.create_sim(adapted, folder)
    lora.switch(sim, None)
    base = perplexity(sim, texts["scored"])
    own = perplexity(sim, texts["stories"])
    loss = base / floats["base"] - 1
    rows = [
        [name, "base alone, stories", own, floats["stories"], own / floats["stories"] - 1, None],
        [name, "base alone", base, floats["base"], loss, None],
    ]
    forms: list[tuple[str, dict[str, Any]]] = [
        ("adapter float", {"weights": None, "activations": None}),
        ("adapter W8", {}),
        ("adapter W8 per tensor", {"weights": QSpec(bitwidth=8, granularity=PerTensor())}),
        ("adapter W8, sums on the base's ranges", {"sums": "base"}),
        ("adapter W4", {"weights": QSpec(bitwidth=4)}),
    ]
    for form, settings in forms:
        with quiet():
            report = lora.quantize(sim, None, list(texts["calibration"].split(8)), **settings)
        lora.switch(sim, "encyclopedia")
        value = perplexity(sim, texts["scored"])
        seconds = report.adapters[0].seconds
        print(f"  {name}, {form}: {value:.4f}, {seconds:.1f} s", flush=True)
        rows.append([name, form, value, floats["adapter"], value / floats["adapter"] - 1, seconds])
    return rows


def bars(rows: list[list[Any]]) -> list[dict[str, Any]]:
    """The loss of base and adapter together beside the base's own, on either text."""
    found = []
    for name in dict.fromkeys(row[0] for row in rows):
        losses = {row[1]: row[4] for row in rows if row[0] == name}
        loss = losses["adapter W8"]
        for form, text in (("base alone", "the same text"), ("base alone, stories", "its own")):
            allowed = losses[form] + 0.01
            found.append(
                bar(
                    f"{name}, adapter W8: loss {loss:.2%}, at most the base's own on {text} and "
                    f"1 %: {allowed:.2%}",
                    loss <= allowed,
                )
            )
        added = loss - losses["adapter float"]
        found.append(bar(f"{name}: of it by the adapter's 8 bits {added:.3%}", added <= 0.01))
    return found


def main() -> None:
    """Train, quantize, measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "lora.json")
    parser.add_argument("--steps", type=int, default=1500, help="of the adapter's training")
    parser.add_argument("--base-steps", type=int, default=100, help="of OmniQuant, for each block")
    parser.add_argument("--quick", action="store_true", help="check that it runs")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.base_steps = 20, 2

    model, tokenizer = load(options.assets / "stories260K-hf")
    raw = (options.assets / "wikitext-2-raw" / "wiki.test.raw").read_text(encoding="utf-8")
    cut = int(len(raw) * 0.85)

    def windows(text: Any) -> Tensor:
        return torch.cat(aimet_ext.calibration_batches(tokenizer, text, LENGTH, None, 20))

    stories = windows(options.assets / "tinystories" / "calib.jsonl")[:CALIBRATION]
    known = windows([raw[:cut]])
    texts = {
        "scored": windows([raw[cut:]])[:SCORED],
        "stories": windows(options.assets / "tinystories" / "eval.jsonl")[:SCORED],
        "calibration": known[:CALIBRATION],
    }
    if options.quick:
        texts = {key: value[:4] for key, value in texts.items()}

    started = time.perf_counter()
    adapted = train(model, known, options.steps)
    seconds = time.perf_counter() - started
    floats = {
        "base": perplexity(model, texts["scored"]),
        "stories": perplexity(model, texts["stories"]),
        "adapter": perplexity(adapted.get_base_model(), texts["scored"]),
    }
    print(f"float: {floats}, adapter trained in {seconds:.0f} s")

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (spec, both) in BASES.items():
            path = Path(folder) / name.replace(" ", "-")
            half = len(stories) // 2
            mixed = torch.cat([stories[:half], known[-half:]])
            export_base(model, spec, mixed if both else stories, options.base_steps, path)
            rows += measure(name, adapted, path, texts, floats)
    head = ["base", "form", "perplexity", "float", "loss", "seconds"]
    print_table("LoRA on a quantized base", head, rows)
    result = {
        "machine": machine("peft"),
        "training": {
            "steps": options.steps,
            "base_steps": options.base_steps,
            "seconds": seconds,
            "rank": RANK,
            "alpha": ALPHA,
            "targets": TARGETS,
        },
        "float": floats,
        "rows": named(head, rows),
        "bars": bars(rows),
    }
    if not options.quick:
        add_section(options.output, "lora_quality", result)


if __name__ == "__main__":
    main()
