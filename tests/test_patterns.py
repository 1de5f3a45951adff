"""Patterns of names: what fits, what is near, and layers that techniques leave alone by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from onnx_models import exported_llama
from onnx_sims import build_sim
from torch import Tensor, nn

import aimet_ext
from aimet_ext import QSpec
from aimet_ext.patterns import fits, near, scopes
from aimet_ext.sim.protocol import adapt

NAMES = [f"model.layers.{n}.mlp.{kind}_proj" for n in (0, 1) for kind in ("up", "gate", "down")]


def test_a_name_fits_itself_whatever_is_in_it() -> None:
    assert fits("/conv[0]/MatMul", "/conv[0]/MatMul")
    assert fits("*.down_proj", "other", NAMES[2]) and not fits("*.down_proj", NAMES[0])
    assert not fits("*.Down_proj", NAMES[2])


def test_scopes_are_what_a_name_is_in() -> None:
    assert list(scopes("/a/b/MatMul")) == ["/a/b/MatMul", "/a", "/a/b"]
    assert list(scopes("a.b")) == ["a.b", "a"]


@pytest.mark.parametrize("pattern", ["*.down_prj", "model.layers.0.mlp.dwn_proj", "down"])
def test_near_names_begin_with_the_most_alike(pattern: str) -> None:
    text = near(pattern, NAMES)
    assert text.startswith("; did you mean '") and "0.mlp.down_proj'" in text.partition(" or ")[0]


def test_nothing_is_near_what_is_of_another_kind() -> None:
    assert near("*.conv7x7", NAMES) == ""


@pytest.fixture
def sim(tiny_model: Callable[..., Any]) -> Any:
    return aimet_ext.create_sim(tiny_model("llama"), torch.arange(8)[None], activations=None)


def weights(sim: Any) -> dict[str, Tensor]:
    adaptor = adapt(sim)
    return {name: q.weight.clone() for name, q in adaptor.weight_quantizers().items()}


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ("*.down_proj", ".down_proj"),
        ("model.layers.0.mlp", ".0.mlp."),  # a name of the checkpoint, and all in it
        ("*.self_attn", ".self_attn."),
    ],
)
def test_a_technique_leaves_alone_what_fits(sim: Any, entry: str, part: str) -> None:
    before = weights(sim)
    aimet_ext.apply_rtn(sim, modules_to_exclude=[entry], progress=False)
    changed = {n for n, weight in weights(sim).items() if not torch.equal(weight, before[n])}
    blocks = {name for name in before if ".layers." in name}
    left = {name for name in blocks if part in f"{name}."[:-1] or name.endswith(part)}
    assert left and changed & blocks == blocks - left


def test_a_block_wise_technique_takes_patterns_and_layers_outside(sim: Any) -> None:
    before = weights(sim)
    data = [torch.arange(32).view(2, 16)]
    excluded = ["*.down_proj", "lm_head", next(m for m in sim.model.modules() if _is_layer(m))]
    aimet_ext.apply_autoround(
        sim, data, num_iterations=1, modules_to_exclude=excluded, progress=False
    )
    after = weights(sim)
    for name, weight in before.items():
        if name.endswith(".down_proj"):
            assert torch.equal(weight, after[name]), name
    assert any(not torch.equal(weight, after[name]) for name, weight in before.items())


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


@pytest.mark.parametrize("technique", ["rtn", "autoround", "lpbq"])
def test_a_pattern_that_fits_nothing_names_near_ones(sim: Any, technique: str) -> None:
    with pytest.raises(ValueError, match=r"'\*\.down_prj'; did you mean '[\w.]*\.down_proj'"):
        getattr(aimet_ext, f"apply_{technique}")(
            sim, [torch.arange(16)[None]], modules_to_exclude=["*.down_prj"], progress=False
        )


def test_an_override_that_fits_nothing_names_near_ones(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"did you mean 'model\.layers\.0\.mlp\.down_proj'"):
        aimet_ext.create_sim(
            tiny_model("llama"), torch.arange(8)[None], overrides={"*.down_prj": None}
        )


def test_a_graph_knows_layers_by_the_same_patterns() -> None:
    sim = build_sim(exported_llama().model, QSpec(bitwidth=4), None)
    report = aimet_ext.apply_rtn(sim, modules_to_exclude=["*.down_proj"], progress=False)
    names = [layer.name for layer in report.layers]
    assert names and not any("down_proj" in name for name in names)
    with pytest.raises(ValueError, match=r"did you mean '[^']*up_proj"):
        aimet_ext.apply_rtn(sim, modules_to_exclude=["*.up_prj"], progress=False)
