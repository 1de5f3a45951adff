"""Experts in lists of code of one's own: the tokens that a router sends to each."""

from __future__ import annotations

import copy
from typing import Any

import block_reference
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import aimet_ext
from aimet_ext.walk.alternatives import alternative
from aimet_ext.walk.blocks import BlockWalk, find_stack
from aimet_ext.walk.walk import RerunWalk

WIDTH = block_reference.WIDTH
X = torch.randn(3, 6, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
MASK = torch.ones(3, 6, dtype=torch.long)
MASK[2, :4] = 0


@pytest.fixture
def model() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return block_reference.Experts().double().eval()


def walk_of(kind: Any, model: Any, batches: Any, **settings: Any) -> Any:
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if kind is BlockWalk:
        return BlockWalk(model, find_stack(model, layers), batches, layers, **settings)
    return RerunWalk(model, batches, layers, **settings)


def rounded(weight: Tensor) -> Tensor:
    return (weight.detach() * 2).round() / 2


@torch.no_grad()
def before(model: Any, place: int) -> Tensor:
    """Hidden states in front of a block, ``[tokens, WIDTH]``."""
    hidden = X
    for block in model.layers[:place]:
        hidden = block(hidden)
    return hidden.flatten(0, 1)


@torch.no_grad()
def expected(model: Any, name: str, x: Tensor) -> Tensor:
    _, place, _, number, part = name.split(".")
    expert = model.layers[int(place)].experts[int(number)]
    return functional.silu(expert.gate(x)) * expert.up(x) if part == "down" else x


@pytest.mark.parametrize("kind", [BlockWalk, RerunWalk])
@pytest.mark.parametrize("streams", ["quantized", "float", "both"])
def test_the_same_tokens_come_in_both_streams(model: Any, kind: Any, streams: str) -> None:
    """Those that the quantized one sends there; no padding is among them."""
    original, quantized = copy.deepcopy(model), copy.deepcopy(model)
    walk = walk_of(kind, model, [{"x": X, "attention_mask": MASK}], streams=streams)
    elsewhere = 0
    for stage in walk.stages():
        name = stage.layers[0]
        ((own, plain, mask),) = list(stage.batches()) or [(torch.empty(0, WIDTH), None, None)]
        if "experts" in name:
            place, number = int(name.split(".")[1]), int(name.split(".")[3])
            first = original if streams == "float" else quantized
            hidden = before(first, place)
            rows = first.layers[place].router(hidden).argmax(1) == number
            rows &= MASK.flatten().bool()
            others = original.layers[place].router(before(original, place)).argmax(1) == number
            elsewhere += int((rows & ~others).sum())
            for stream, found in ((quantized, own), (original, plain)):
                if found is not None and len(found):
                    x = expected(stream, name, before(stream, place)[rows])
                    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)
            assert mask is None or bool(mask.all())
            assert (own if own is not None else plain).shape[0] == rows.sum()
        for layer in stage.layers:
            new = rounded(model.get_submodule(layer).weight)
            walk.hold(layer)
            walk.decide(layer, new)
            quantized.get_submodule(layer).weight.data = new
    walk.close()
    assert elsewhere or streams != "both"  # the case is of use


@pytest.mark.parametrize("kind", [BlockWalk, RerunWalk])
def test_all_tokens_can_be_sent_to_one(model: Any, kind: Any) -> None:
    walk = walk_of(kind, model, [{"x": X, "attention_mask": MASK}], streams="both")
    for stage in walk.stages():
        assert (stage.pool is None) == ("router" in stage.layers[0])
        if stage.pool is not None and stage.layers[0].startswith("layers.0."):
            count, inputs = stage.pool.inputs(1000)
            ((own, plain, _),) = list(inputs)
            x = expected(model, stage.layers[0], before(model, 0)[MASK.flatten().bool()])
            assert count == MASK.sum()
            torch.testing.assert_close(own, x, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(plain, x, rtol=1e-12, atol=1e-12)
            ((few, _, _),) = list(stage.pool.inputs(5)[1])
            torch.testing.assert_close(few, x[::2], rtol=1e-12, atol=1e-12)
        for layer in stage.layers:
            walk.decide(layer, model.get_submodule(layer).weight.detach())
    walk.close()


def test_lists_without_a_router_are_none(model: Any) -> None:
    assert alternative(model, "layers.0.experts.1.up").routers == ("layers.0.router",)
    assert alternative(model, "layers.0.router") is None
    plain = block_reference.Plain()
    assert alternative(plain.blocks[0], "feed.up") is None


def test_an_expert_that_no_token_reaches() -> None:
    """It is decided by the tokens of the others, and the report says so."""
    pytest.importorskip("aimet_torch")
    torch.manual_seed(1)
    model = block_reference.Experts(depth=1).eval()
    with torch.no_grad():
        model.layers[0].router.weight[2] = 0
        model.layers[0].router.bias[2] = -1e3
    x = [X.float(), -X.float()]
    sim = aimet_ext.create_sim(model, (X.float(),), activations=None)
    report = aimet_ext.apply_gptq(sim, x, progress=False)
    layers = {layer.name: layer for layer in report.layers}
    for part in ("gate", "up", "down"):
        layer = layers[f"layers.0.experts.2.{part}"]
        assert (layer.tokens, layer.leaned) == (0, 1.0)
        assert layer.loss_after < layer.loss_nearest
        assert f"experts: {layer.name} saw 0" in str(report)
