"""Tokens that count by the model's loss: the numbers, the moments by them, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from layerwise_reference import IMAGES, faint, layer_inputs, net_sim
from token_weights_reference import token_weights_by_loop
from torch import Tensor

import aimet_ext
from aimet_ext import TransformRefused
from aimet_ext.config import SeqMSEParams
from aimet_ext.core.adaround import adaround_samples
from aimet_ext.core.affine import Grid
from aimet_ext.core.divergence import outcome_likelihood
from aimet_ext.sim.protocol import adapt
from aimet_ext.techniques.layerwise.token_weights import TokenWeights

pytest.importorskip("aimet_torch")

ON_MOMENTS = pytest.mark.techniques(where=lambda t: t.on_moments)
BLOCK = "model.model.layers.0."
SHARED = [f"{BLOCK}self_attn.{name}_proj" for name in "qkv"]


def padded(ids: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def counted(found: TokenWeights, layers: list[str], masks: list[Any]) -> Tensor:
    """What the tokens that count get, ``[groups, tokens]``."""
    parts = found.of(layers)
    assert parts is not None
    chosen = [p if m is None else p[:, m] for p, m in zip(parts, masks, strict=True)]
    return torch.cat([part.flatten(1) for part in chosen], 1)


def test_covariance_of_the_likelihoods_gradient_is_the_fisher_information() -> None:
    """``diag p − p pᵀ``, as for outcomes that are drawn."""
    row = torch.tensor([1.0, -0.5, 0.3, 2.0, -2.0], dtype=torch.float64)
    logits = row.expand(40_000, -1).clone().requires_grad_()
    likelihood = outcome_likelihood(logits, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(likelihood, logits)
    p = row.softmax(-1)
    expected = p.diag() - torch.outer(p, p)
    torch.testing.assert_close(gradient.T @ gradient / len(gradient), expected, rtol=0, atol=0.01)


def test_weights_of_tokens_against_the_loop(make_sim: Any, ids: Any) -> None:
    """Blocks are computed again on the way back, padding enters nothing."""
    sim = make_sim(layers=1, lm_head=aimet_ext.QSpec(bitwidth=4))
    layers = [*SHARED, f"{BLOCK}mlp.down_proj", "model.lm_head"]
    batches = [padded(ids(2, 12, 1)), padded(ids(1, 10, 2))]
    masks = [batch["attention_mask"].bool() for batch in batches]
    adaptor = adapt(sim)
    found = TokenWeights(adaptor, layers, batches)
    with adaptor.disabled_quantizers():
        expected = token_weights_by_loop(sim.model, layers, batches, masks, seed=0)
    for name in layers:
        (own,) = counted(found, [name], masks)
        assert own.max() > 2 * own.min() or name == "model.lm_head"
        torch.testing.assert_close(own, expected[name], rtol=1e-3, atol=1e-4)
    mean = torch.stack([expected[name] for name in SHARED]).mean(0)
    torch.testing.assert_close(counted(found, SHARED, masks)[0], mean, rtol=1e-3, atol=1e-4)


def test_an_onnx_graph_has_the_same() -> None:
    pytest.importorskip("aimet_onnx")
    onnx_pairs = pytest.importorskip("onnx_pairs")
    for kind in ("llama", "perceptron"):
        pair = onnx_pairs.PAIRS[kind]()
        theirs, ours = pair.sims(onnx_pairs.GRIDS["channel"])
        names, data = pair.names(ours), pair.arguments()
        found = [
            TokenWeights(adapt(sim), [*layers], adapt(sim).batches(batches))
            for sim, layers, batches in zip(
                (theirs, ours), (names, names.values()), data, strict=True
            )
        ]
        masks = [
            batch["attention_mask"].bool() if kind == "llama" else None for batch in pair.batches
        ]
        for name, node in names.items():
            one, two = counted(found[0], [name], masks), counted(found[1], [node], masks)
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.techniques(where=lambda t: t.name == "gptq")
def test_moments_are_weighted(technique: Any, problems: dict[str, Any]) -> None:
    """``Σ s x̂ x̂ᵀ / Σ s`` less its noise, by group of a convolution; ``Σ s x̂ eᵀ`` likewise."""
    sim, layers = net_sim(), ["stem", "shortcut", "grouped", "depthwise"]
    every = list(adapt(sim).weight_quantizers())
    found = TokenWeights(adapt(sim), every, IMAGES)
    with adapt(sim).disabled_quantizers():
        original = layer_inputs(sim.model, layers, IMAGES)
    report = technique.apply(sim, IMAGES, token_weights="loss", asym_strength=1.0)
    quantized = layer_inputs(sim.model, layers, IMAGES)
    for name in layers:
        moment = problems[name].moment
        x, e = quantized[name], original[name] - quantized[name]
        s = counted(found, [name], [None] * len(IMAGES)).double()
        assert s.shape == x.shape[:2] and s.max() > 1.5 * s.mean()
        second, kept = weighted_and_shrunk(x, s)
        cross = (s[..., None] * x).mT @ e / s.sum(1)[:, None, None] * kept[:, None, None]
        scale = second.abs().max()
        assert (moment.second.view_as(second) - second).abs().max() <= 1e-5 * scale, name
        weight = problems[name].weight
        assert moment.through == (len(x) == 1 and 2 * weight.shape[0] < weight.shape[1])
        if moment.through:
            cross = cross @ weight.mT
            scale = scale * weight.abs().sum(1).max()
        assert (moment.cross.view_as(cross) - cross).abs().max() <= 1e-5 * scale, name
        worth = (s.sum(1).square() / s.square().sum(1)).min()
        (entry,) = (each for each in report.layers if each.name == name)
        assert entry.effective_tokens == pytest.approx(float(worth), rel=1e-5)
        assert entry.effective_tokens < 0.8 * entry.tokens == 0.8 * x.shape[1]


def test_samples_that_count_for_nothing_are_not_learnt_from() -> None:
    """AdaRound behind a ReLU: whatever they are, codes are the same to the bit."""
    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(6, 8, generator=draw), torch.randn(6, generator=draw)
    scale = weight.abs().amax(1, keepdim=True) / 2
    grid = Grid(scale, torch.zeros_like(scale), -2, 1)
    mixing = torch.randn(8, 8, generator=draw)
    counts = (torch.arange(200)[None] % 2).float()
    codes = []
    for seed in (1, 2):
        rows = torch.randn(1, 200, 8, generator=torch.Generator().manual_seed(3)) @ mixing
        others = torch.randn(1, 200, 8, generator=torch.Generator().manual_seed(seed)) * 3
        rows = torch.where(counts[..., None] > 0, rows, others)
        targets = rows[0] @ weight.T + bias
        codes += [
            adaround_samples(weight, bias, grid, rows, targets, torch.relu, counts=each)
            for each in (counts, None)
        ]
    assert torch.equal(codes[0], codes[2])
    assert not torch.equal(codes[1], codes[3])


def weighted_and_shrunk(rows: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Moments less their noise, by loops over tokens; see ``shrunk_by_definition``."""
    found, shares = [], []
    worth = int((s.sum(1).square() / s.square().sum(1)).min() / 3)
    most = 1 - torch.finfo(torch.float64).eps ** 0.5
    for group, weights in zip(rows, s, strict=True):
        width, beside = group.shape[1], ~torch.eye(group.shape[1], dtype=torch.bool)
        mean, fourth = torch.zeros(2, width, width, dtype=torch.float64)
        for row, weight in zip(group, weights, strict=True):
            product = torch.outer(row, row)
            mean += weight * product / weights.sum()
            fourth += weight**2 * product.square() / weights.square().sum()
        own, alive = mean.diagonal(), mean.diagonal() > 0
        middle = own[alive].mean()
        products = squares = torch.tensor(most, dtype=torch.float64)
        if worth > 1:
            variance = (fourth - mean.square()) / (worth - 1)
            products = faint(variance[beside].sum() / mean[beside].square().sum()).clamp(max=most)
            apart = (own - middle)[alive].square().sum()
            squares = faint(variance.diagonal().sum() / apart).clamp(max=most)
        shrunk = mean * (1 - products)
        shrunk.diagonal().copy_(torch.where(alive, own + squares * (middle - own), own))
        found.append(shrunk)
        shares.append(1 - products)
    return torch.stack(found), torch.stack(shares)


@ON_MOMENTS
@pytest.mark.parametrize("kind", ["llama", "net"])
def test_weights_that_are_all_alike_change_nothing(
    technique: Any,
    make_sim: Any,
    ids: Any,
    result_of: Any,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit, behind a ReLU too."""

    def alike(self: TokenWeights, name: str, use: int, gradient: Tensor) -> None:
        self._batch[name, use].fill_(0.3)

    monkeypatch.setattr(TokenWeights, "_meet", alike)
    data = IMAGES if kind == "net" else [padded(ids(2, 16, 1)), ids(1, 12, 2)]
    reports, results = [], []
    for weights in ("none", "loss"):
        sim = net_sim() if kind == "net" else make_sim(layers=1)
        reports.append(technique.apply(sim, data, token_weights=weights, inp_symmetry="asym"))
        results.append(result_of(sim))
    assert results[0] == results[1]
    for one, two in zip(*(report.layers for report in reports), strict=True):
        assert dataclasses.replace(one, seconds=0) == dataclasses.replace(two, seconds=0)


@ON_MOMENTS
def test_weights_decide_and_a_checkpoint_brings_the_same(
    technique: Any, make_sim: Any, ids: Any, result_of: Any, tmp_path: Any
) -> None:
    data, results = [padded(ids(2, 16, 1)), padded(ids(2, 16, 2))], []
    for settings in ({}, {"token_weights": "loss"}, {"token_weights": "loss"}):
        sim = make_sim(layers=1)
        folder = {"checkpoint_dir": tmp_path} if settings else {}
        report = technique.apply(sim, data, **settings, **folder)
        results.append(result_of(sim))
    assert results[0] != results[1]
    assert results[1] == results[2]
    assert all(layer.resumed for layer in report.layers)


@ON_MOMENTS
def test_what_has_no_gradient_is_refused(refused: Any, ids: Any) -> None:
    def without(model: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            return model(batch)

    refused(
        ValueError,
        r'token_weights="loss": logits that depend on the layers.*token_weights="none"',
        [ids()],
        token_weights="loss",
        forward_fn=without,
    )


def test_an_onnx_graph_without_gradients_is_refused() -> None:
    pytest.importorskip("aimet_onnx")
    onnx_pairs = pytest.importorskip("onnx_pairs")
    pair = onnx_pairs.PAIRS["convolutions"]()
    _, sim = pair.sims(onnx_pairs.GRIDS["channel"])
    before = onnx_pairs.state_of(sim)
    with pytest.raises(TransformRefused, match=r'pass token_weights="none".*ai.onnx::Conv'):
        aimet_ext.apply_gptq(sim, pair.arguments()[1], token_weights="loss", progress=False)
    assert onnx_pairs.state_of(sim) == before


def test_compatible_mode_counts_all_alike() -> None:
    with pytest.raises(
        ValueError, match='all tokens count alike: token_weights="none" is required'
    ):
        SeqMSEParams(mode="compatible", token_weights="loss")
