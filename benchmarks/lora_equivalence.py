"""Base with adapter against transformed base with folded adapter, after stacked techniques.

    python benchmarks/lora_equivalence.py [--quick]

Every family with as many key-value heads as heads, with fewer and with one; two techniques that
scale all pairs, and OmniQuant followed by such a technique; LoRA, rank-stabilised LoRA with biases,
and DoRA. In float64 with the models' own casts widened, and in float32 as they are. Prints a table,
and as its last line JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from contextlib import nullcontext
from typing import Any

import peft
import torch
from random_families import FAMILIES, random_model
from report import bar, named, print_table
from torch import Tensor, nn

import aimet_ext
from aimet_ext import PerTensor, QSpec
from aimet_ext.core.equivalence import expand, transform
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.scales import ModuleScales, Scales
from aimet_ext.lora import attach_adapter, fold_adapter
from aimet_ext.models.proof import Float64Casts, random_scale
from aimet_ext.models.topology import find_blocks

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA, biases": {"use_rslora": True, "bias": "all", "alpha_pattern": {"o_proj": 32}},
    "DoRA": {"use_dora": True},
}
LEARNT = ("llama", "qwen2", "qwen3", "mistral", "phi3")  # families that AIMET can simulate
OMNIQUANT = {"num_iterations": 5, "init": "ones", "let_lr": 0.03, "progress": False}
HEAD = ("family", "biases", "heads", "adapter", "techniques", "float64", "float32", "unfolded")


def fold_pair(
    model: nn.Module, ledger: Ledger, technique: str, block: str, pair: Any, s: Tensor
) -> None:
    """Multiply a scale into its pair, in place, and note it."""
    params = dict(model.get_submodule(block).named_parameters())
    with torch.no_grad():
        for name, value in transform(params, [(pair, s)]).items():
            params[name].copy_(value)
    sides = []
    for side in pair.sides:
        width = params[f"{side.module}.weight"].shape[0 if side.axis == "out" else 1]
        sides.append((f"{block}.{side.module}", side.axis, expand(side, s, width)))
    ledger.record(technique, block, pair.name, pair.kind, sides, size=pair.size)


def random_technique(model: nn.Module, ledger: Ledger, technique: str) -> None:
    """Random scales for all pairs."""
    dtype = next(model.parameters()).dtype
    for number, block in enumerate(find_blocks(model)):
        for place, pair in enumerate(block.pairs):
            scale = random_scale(pair.size, 100 * number + place + len(technique)).to(dtype)
            fold_pair(model, ledger, technique, block.name, pair, scale)


def omniquant(model: nn.Module) -> list[tuple[str, str, Tensor]]:
    """Block, pair and scale of everything that OmniQuant learnt on a float32 model."""
    ids = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(1))
    spec = QSpec(bitwidth=3, granularity=PerTensor())
    sim = aimet_ext.create_sim(model, ids, weights=spec, activations=None)
    aimet_ext.apply_omniquant(sim, [ids], **OMNIQUANT)
    pairs = {(b.name, p.name): p for b in find_blocks(model) for p in b.pairs}
    found = []
    for entry in sim.aimet_ext_ledger.entries:
        block = entry.block.removeprefix("model.")
        pair = pairs[block, entry.pair]
        number = next(i for i, side in enumerate(pair.sides) if side.power == 1)
        side, multiplier = pair.sides[number], entry.sides[number].factor
        start, stop = side.rows or (0, len(multiplier))
        scale = torch.ones(pair.size)
        index = torch.arange(pair.size) if side.index is None else side.index
        scale[index] = multiplier[start:stop]
        found.append((block, entry.pair, scale))
    return found


def table_of(ledger: Ledger, dtype: torch.dtype) -> Scales:
    """The cumulated scales, in float32 as a file holds them, or in float64."""
    product: dict[str, dict[str, Tensor]] = {}
    for side in (side for entry in ledger.entries for side in entry.sides):
        axes = product.setdefault(side.module, {})
        key = "output" if side.axis == "out" else "input"
        axes[key] = axes.get(key, torch.ones((), dtype=torch.float64)) * side.factor.double()
    modules = {
        module: ModuleScales(**{axis: value.to(dtype) for axis, value in axes.items()})
        for module, axes in product.items()
    }
    return Scales(modules, ledger.techniques, (), None, aimet_ext.__version__)


def adapted(model: nn.Module, settings: dict[str, Any]) -> Any:
    """A PeftModel of a copy, with a random adapter on all linear layers."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(0)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return wrapped.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Logits of two texts, one with padding, which is left out."""
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    wide = next(model.parameters()).dtype == torch.float64
    with Float64Casts() if wide else nullcontext():
        output: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return output[mask.bool()]


def compare(
    model: nn.Module, settings: dict[str, Any], learnt: list[Any] | None, dtype: torch.dtype
) -> tuple[float, float]:
    """max|Δ|/max|logits| on the transformed base: of the folded adapter, of the one as it was."""
    original = copy.deepcopy(model).to(dtype)
    changed, ledger = copy.deepcopy(original), Ledger()
    if learnt is None:
        random_technique(changed, ledger, "first")
    else:
        pairs = {(b.name, p.name): p for b in find_blocks(changed) for p in b.pairs}
        for block, name, scale in learnt:
            pair = pairs[block, name]
            fold_pair(changed, ledger, "omniquant", block, pair, scale.to(dtype))
    random_technique(changed, ledger, "second one")
    wrapped = adapted(original, settings)
    reference = logits(wrapped)
    as_it_was = fold_adapter(wrapped, Scales({}, (), (), None, ""), base=original)
    folded = fold_adapter(wrapped, table_of(ledger, dtype), base=original)
    deviations = []
    for adapter in (folded, as_it_was):
        found = logits(attach_adapter(copy.deepcopy(changed), adapter))
        deviations.append(float((found - reference).abs().max() / reference.abs().max()))
    return deviations[0], deviations[1]


def main() -> None:
    """Measure all combinations."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one family: a smoke test")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    rows = []
    for family, changes in FAMILIES[:1] if quick else FAMILIES:
        for heads, number in HEADS.items():
            model = random_model(family, num_key_value_heads=number, **changes)
            stacks: dict[str, Any] = {"two": None}
            if family in LEARNT:
                stacks["OmniQuant, another"] = omniquant(copy.deepcopy(model))
            for stack, learnt in stacks.items():
                for name, settings in ADAPTERS.items():
                    exact, unfolded = compare(model, settings, learnt, torch.float64)
                    single, _ = compare(model, settings, learnt, torch.float32)
                    biases = bool(changes) or family == "qwen2"
                    rows.append((family, biases, heads, name, stack, exact, single, unfolded))
    print_table("max|change| / max|logits|", HEAD, rows)
    bars = []
    for column, (dtype, bound) in zip((5, 6), BOUNDS.items(), strict=True):
        worst = max(row[column] for row in rows)
        text = f"{len(rows)} combinations in {dtype}: {worst:.1e}, at most {bound:.0e}"
        bars.append(bar(text, worst <= bound))
    print(json.dumps({"rows": named(HEAD, rows), "bars": bars}))


if __name__ == "__main__":
    main()
