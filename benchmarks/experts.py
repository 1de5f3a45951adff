"""Experts that few tokens reach: their errors on other text, against plain rounding.

    python benchmarks/experts.py [--tokens 256 1024] [--experts 16] [--bits 4] [--seeds 3]
                                 [--technique autoround]

The MLPs of stories260K become mixtures: each expert is the MLP with noise of a third of its size,
and a random router sends a token to two of them. Errors of a layer's output are those on the tokens
that other text sends to the expert, as shares of plain rounding's, geometric mean over layers.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from common import load, quiet
from report import ASSETS
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import aimet_ext
from aimet_ext import QSpec
from aimet_ext.core.objective import SecondMoment
from aimet_ext.walk.routing import is_routed

BOUNDS = (0, 1, 16, 64, 256, 1 << 30)
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {"inp_symmetry": "symqt"},
    "autoround": {"num_iterations": 100},
    "omniquant": {"num_iterations": 100, "let": False},
}


def mixture(experts: int, seed: int) -> Any:
    """Return stories260K with mixtures in place of its MLPs, routers that favour some experts."""
    dense: Any = load(ASSETS / "stories260K-hf")[0]
    same = {k: v for k, v in dense.config.to_dict().items() if hasattr(MixtralConfig(), k)}
    for key in ("architectures", "model_type"):
        same.pop(key, None)
    config = MixtralConfig(**same, num_local_experts=experts, num_experts_per_tok=2)
    model = MixtralForCausalLM(config).eval()
    state = dense.state_dict()
    generator = torch.Generator().manual_seed(seed)

    def noisy(weight: Tensor) -> Tensor:
        noise = torch.randn(experts, *weight.shape, generator=generator)
        return weight + noise * weight.std() / 3

    model.load_state_dict({k: v for k, v in state.items() if ".mlp." not in k}, strict=False)
    for number, layer in enumerate(model.model.layers):
        own = {
            p: state[f"model.layers.{number}.mlp.{p}_proj.weight"] for p in ("gate", "up", "down")
        }
        layer.mlp.experts.gate_up_proj.data = noisy(torch.cat([own["gate"], own["up"]]))
        layer.mlp.experts.down_proj.data = noisy(own["down"])
        router = torch.randn(experts, config.hidden_size, generator=generator)
        layer.mlp.gate.weight.data = router * torch.linspace(0.3, 1.5, experts)[:, None]
    return model


@contextmanager
def alone() -> Iterator[None]:
    """Have each expert decide on its own tokens alone."""
    leaning: Any = SecondMoment.leaning
    try:
        SecondMoment.leaning = lambda own, pool, among: own  # type: ignore[method-assign]
        yield
    finally:
        SecondMoment.leaning = leaning  # type: ignore[method-assign]


@torch.no_grad()
def inputs(sim: Any, windows: Tensor) -> dict[str, Tensor]:
    """Return what reaches the layers of experts in float."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    hooks = []
    for name, module in sim.model.named_modules():
        if isinstance(module, nn.Linear) and is_routed(sim.model, name):

            def note(_: nn.Module, args: Any, name: str = name) -> None:
                found[name].append(args[0].as_subclass(Tensor))

            hooks.append(module.register_forward_pre_hook(note))
    for batch in windows.split(8):
        sim.model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def simulation(model: Any, windows: Tensor, spec: QSpec | None) -> Any:
    """Return a simulation in which the layers of blocks have a spec and all else is float."""
    with quiet():
        return aimet_ext.create_sim(
            model, windows[:1], weights=spec, lm_head=None, embedding=None, activations=None
        )


def weight(sim: Any, name: str) -> Tensor:
    layer = sim.model.get_submodule(name)
    quantizer = getattr(layer, "param_quantizers", {"weight": None})["weight"]
    own = layer.weight.detach() if quantizer is None else quantizer(layer.weight.detach())
    return own.as_subclass(Tensor)


@torch.no_grad()
def divergence(original: Any, sim: Any, windows: Tensor) -> float:
    p, q = (s.model(windows).as_subclass(Tensor).log_softmax(-1) for s in (original, sim))
    return float((p.exp() * (p - q)).sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--technique", choices=[*SETTINGS], default="gptq")
    options = parser.parse_args()
    tokenizer = load(ASSETS / "stories260K-hf")[1]
    text = [ASSETS / "tinystories" / name for name in ("calib.jsonl", "eval.jsonl")]
    calib, scored = (
        torch.cat(aimet_ext.calibration_batches(tokenizer, path, 128, None, 8)) for path in text
    )
    spec, held = QSpec(bitwidth=options.bits), scored[:24]
    for tokens in options.tokens:
        ratios: dict[tuple[str, int], list[float]] = defaultdict(list)
        divergences: dict[str, list[float]] = defaultdict(list)
        for seed in range(options.seeds):
            model = mixture(options.experts, seed)
            windows = calib[seed * tokens // 128 :][: max(1, tokens // 128)]
            original, plain = (simulation(model, windows, each) for each in (None, spec))
            aimet_ext.apply_rtn(plain, progress=False)
            seen = inputs(original, held)
            counts = {name: len(x) for name, x in inputs(original, windows).items()}
            divergences["plain"].append(divergence(original, plain, held))
            # Without a moment of their own, block-wise techniques leave experts on plain rounding.
            for kind in ("alone", "leaning") if options.technique == "gptq" else ("leaning",):
                sim = simulation(model, windows, spec)
                with alone() if kind == "alone" else nullcontext():
                    apply = getattr(aimet_ext, f"apply_{options.technique}")
                    apply(sim, [windows], progress=False, **SETTINGS[options.technique])
                divergences[kind].append(divergence(original, sim, held))
                for name, x in seen.items():
                    ours, theirs = (
                        float((x @ (weight(s, name) - weight(original, name)).T).square().sum())
                        for s in (sim, plain)
                    )
                    place = max(bound for bound in BOUNDS if bound <= counts.get(name, 0))
                    part = "down" if "down" in name else "up"
                    ratios[f"{kind} {part}", place].append(math.log(ours / theirs))
        print(f"{tokens} tokens, {options.experts} experts, {options.bits} bits")
        for (kind, place), logs in sorted(ratios.items()):
            mean = math.exp(sum(logs) / len(logs))
            print(f"  {kind:12} experts of {place:>3} tokens and more: {mean:.3f} ({len(logs)})")
        print("  KL:", {kind: round(sum(v) / len(v), 4) for kind, v in divergences.items()})


if __name__ == "__main__":
    main()
