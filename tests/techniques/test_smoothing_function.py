"""AWQ and SmoothQuant leave the float function alone, on PyTorch and ONNX, stacked and fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from equivalence_reference import scale_of_entry
from torch import Tensor

import aimet_ext
from aimet_ext import QSpec
from aimet_ext.core.equivalence import transform
from aimet_ext.models.proof import Float64Casts
from aimet_ext.models.topology import find_blocks
from aimet_ext.sim.protocol import adapt

pytest.importorskip("aimet_torch")

KINDS = ("norm_qkv", "v_o", "norm_mlp", "up_down")
#: Grouped-query attention, biases, fused projections, norms that multiply by 1 + weight.
FAMILIES = ("llama", "qwen2", "phi3", "gemma2")
QUICK = {"progress": False}


def smoothed(sim: Any, data: Any) -> None:
    """All three that rescale, one after the other; AWQ leaves its ranges open."""
    aimet_ext.apply_smoothquant(sim, data, 0.8, **QUICK)
    aimet_ext.apply_awq(sim, data, 4, clip=False, **QUICK)
    aimet_ext.apply_omniquant(sim, data, 2, search_sweeps=1, **QUICK)


@pytest.fixture(scope="module", params=FAMILIES)
def stacked(request: Any, make_sim: Any, tiny_model: Any, ids: Callable[..., Tensor]) -> Any:
    """A family's original model, and its sim after all three."""
    sim = make_sim(request.param, QSpec(bitwidth=3))
    smoothed(sim, [ids(4, 24, 1)])
    return tiny_model(request.param, max_position_embeddings=64), sim


def test_each_of_them_rescaled(stacked: Any) -> None:
    _, sim = stacked
    assert sim.aimet_ext_ledger.techniques == ("smoothquant", "awq", "omniquant")
    for technique in ("smoothquant", "awq"):
        entries = [e for e in sim.aimet_ext_ledger.entries if e.technique == technique]
        assert {entry.kind for entry in entries} == set(KINDS)
        moved = [float((side.factor - 1).abs().max()) for e in entries for side in e.sides]
        assert max(moved) > 0.05


def test_the_float_function_in_float32(stacked: Any, ids: Callable[..., Tensor]) -> None:
    original, sim = stacked
    batch = ids(3, 32, 7)
    with torch.no_grad(), adapt(sim).disabled_quantizers():
        logits = sim.model(batch)
        reference = original(batch, use_cache=False).logits
    assert float((logits - reference).abs().max() / reference.abs().max()) <= 1e-5


def test_the_float_function_in_float64(stacked: Any, ids: Callable[..., Tensor]) -> None:
    """The ledger's scales, folded in float64 into the original weights: at most 1e-10."""
    original, sim = stacked
    double = copy.deepcopy(original).double()
    with torch.no_grad():
        for block in find_blocks(double):
            params = dict(double.get_submodule(block.name).named_parameters())
            pairs = {pair.name: pair for pair in block.pairs}
            chosen = [
                (pairs[entry.pair], scale_of_entry(pairs[entry.pair], entry))
                for entry in sim.aimet_ext_ledger.entries
                if entry.block.endswith(block.name)
            ]
            for name, value in transform(params, chosen).items():
                params[name].copy_(value)
    batch = ids(2, 32, 7)
    with torch.no_grad(), Float64Casts():
        reference = copy.deepcopy(original).double()(batch, use_cache=False).logits
        logits = double(batch, use_cache=False).logits
    assert logits.dtype == torch.float64
    assert float((logits - reference).abs().max() / reference.abs().max()) <= 1e-10


@pytest.mark.parametrize("name", ["qwen2", "genai"])
def test_the_float_function_of_a_graph(ids: Callable[..., Tensor], name: str) -> None:
    """Of one that torch exports, and of one with attention in one node; scales as on PyTorch."""
    pytest.importorskip("aimet_onnx")
    models = pytest.importorskip("onnx_models")
    from onnx_sims import build_sim

    batch = ids(2, 16, 1)
    mask = torch.ones_like(batch)
    if name == "genai":
        model, module = models.genai_llama()
        feed = models.genai_inputs(model, batch, mask)
    else:
        exported = models.exported_llama(family=name)
        model, module = exported.model, exported.module.model
        feed = {"input_ids": batch.numpy(), "attention_mask": mask.numpy()}
    before = models.run_onnx(model, feed)[0]
    sim = build_sim(model, QSpec(bitwidth=4), None, dummy_input=feed)
    theirs = aimet_ext.create_sim(
        copy.deepcopy(module),
        batch,
        weights=QSpec(bitwidth=4),
        lm_head=None,
        embedding=None,
        activations=None,
    )
    settings = {"modules_to_exclude": [], **QUICK}
    for each, data in ((sim, [feed]), (theirs, [{"input_ids": batch, "attention_mask": mask}])):
        aimet_ext.apply_smoothquant(each, data, **settings)
        aimet_ext.apply_awq(each, data, 4, **settings)
    graph = adapt(sim).graph
    float_model = graph.model(range(len(graph.nodes)), list(graph.inputs), [graph.outputs[0]])
    after = models.run_onnx(float_model, feed)[0]
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    mine = sim.aimet_ext_ledger.cumulative()
    same = theirs.aimet_ext_ledger.cumulative(lambda name: name.removeprefix("model."))
    assert set(mine) == set(same)
    close = [
        torch.allclose(scale, same[layer][axis], rtol=1e-3)
        for layer, axes in mine.items()
        for axis, scale in axes.items()
    ]
    assert sum(close) >= 0.9 * len(close)  # two exponents can be as good as each other


@pytest.mark.parametrize("activations", [8, None])
def test_the_alpha_that_is_searched(
    make_sim: Any, ids: Callable[..., Tensor], activations: int | None
) -> None:
    """The best of the grid for a pair, each alpha applied by itself: with activations quantized."""

    def loss(alpha: Any) -> float:
        sim = make_sim(layers=1, activations=activations)
        settings = {"pairs": ("norm_mlp",), **QUICK}
        report = aimet_ext.apply_smoothquant(sim, [ids(4, 24, 1)], alpha, **settings)
        (block,) = report.blocks
        assert block.kept == "smoothquant"
        return block.loss_after

    losses = [loss(alpha) for alpha in (0.25, 0.4, 0.5, 0.6, 0.75, 0.9)]
    assert loss("search") == pytest.approx(min(losses), rel=1e-5)
    assert max(losses) > 1.001 * min(losses)


def test_smoothing_is_for_coarse_activations(
    make_sim: Any, tiny_model: Any, ids: Callable[..., Tensor]
) -> None:
    """A channel of large activations: at 8 bits for both, the loss falls, and nothing is frozen."""
    sim = make_sim(layers=1, spec=QSpec(bitwidth=8), activations=8)
    with torch.no_grad():
        gain = sim.model.get_submodule("model.model.layers.0.post_attention_layernorm").weight
        gain[3] *= 60
        for name in ("gate_proj", "up_proj"):
            sim.model.get_submodule(f"model.model.layers.0.mlp.{name}").weight[:, 3] /= 60
    report = aimet_ext.apply_smoothquant(sim, [ids(4, 24, 1)], **QUICK)
    (block,) = report.blocks
    assert block.loss_after < 0.5 * block.loss_nearest
    assert not any(q.frozen for q in adapt(sim).weight_quantizers().values())
