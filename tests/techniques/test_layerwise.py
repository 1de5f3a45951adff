"""Layer-wise techniques: which layers they decide, and what is on the grid afterwards."""

from __future__ import annotations

import copy
import functools
import json
import math
from typing import Any

import pytest
import torch
from layerwise_reference import (
    LINEAR_GRIDS,
    as_simulated,
    grids,
    mlp,
    random,
    same,
    seeded,
    simulate,
    weights,
)
from torch import Tensor, nn

import aimet_ext
from aimet_ext import CorruptFileError, QSpec
from aimet_ext.core.affine import fake_quantize
from aimet_ext.files.reading import read_safetensors
from aimet_ext.files.tensors import write_tensors
from aimet_ext.sim.protocol import adapt

pytest.importorskip("aimet_torch")

LAYER_WISE = pytest.mark.techniques(where=lambda t: not t.by_blocks and t.name != "lpbq")
ON_MOMENTS = pytest.mark.techniques(where=lambda t: t.on_moments)
ROUNDING = pytest.mark.techniques(where=lambda t: t.rounds)
BLOCK = "model.model.layers.0."
Q_PROJ, O_PROJ, UP, DOWN = (
    BLOCK + name
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
)
HEAD, EMBED = "model.lm_head", "model.model.embed_tokens"


def narrowed(sim: Any, *names: str) -> dict[str, Any]:
    """Freeze layers on ranges that nobody else would choose; their grids."""
    for name in names:
        quantizer = adapt(sim).weight_quantizer(name)
        quantizer.set_scale(quantizer.grid().scale * 0.71)
        quantizer.freeze()
    return {name: grids(sim)[name] for name in names}


# Which layers, and what the earlier ones froze.


@ROUNDING
def test_frozen_ranges_are_rounded_on(technique: Any, sim: Any, batches: list[Tensor]) -> None:
    before, kept = weights(sim), narrowed(sim, Q_PROJ, DOWN)
    report = technique.apply(sim, batches)
    if not technique.by_blocks:
        assert {Q_PROJ, DOWN} <= {layer.name for layer in report.layers}
    assert {Q_PROJ, DOWN} <= set(sim.aimet_ext_ledger.runs[-1].modules)
    for name, grid in kept.items():
        assert same(grids(sim)[name], grid)
        assert not torch.equal(weights(sim)[name], before[name])
        assert torch.equal(as_simulated(sim, name), weights(sim)[name])


def test_seq_mse_leaves_frozen_ranges_alone(sim: Any, batches: list[Tensor]) -> None:
    before, kept = weights(sim), narrowed(sim, Q_PROJ, DOWN)
    report = aimet_ext.apply_seq_mse(sim, batches, progress=False)
    assert report.skipped == dict.fromkeys((Q_PROJ, DOWN), "an earlier technique froze its range")
    assert not {Q_PROJ, DOWN} & {layer.name for layer in report.layers}
    assert all(same(grids(sim)[name], grid) for name, grid in kept.items())
    assert all(torch.equal(weights(sim)[name], weight) for name, weight in before.items())
    assert f"left alone: {Q_PROJ}: an earlier" in str(report)


def test_nothing_is_left_for_seq_mse(sim: Any, batches: list[Tensor]) -> None:
    narrowed(sim, *grids(sim))
    with pytest.raises(ValueError, match=r"must remain.*q_proj: an earlier technique froze"):
        aimet_ext.apply_seq_mse(sim, batches, progress=False)


@LAYER_WISE
def test_an_output_layer_tied_to_the_embedding(
    technique: Any, tiny_model: Any, batches: list[Tensor]
) -> None:
    model = tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=True)
    sim = aimet_ext.create_sim(model, batches[0], activations=None)
    before = weights(sim)[EMBED]
    report = technique.apply(sim, batches)
    assert report.skipped == {HEAD: f"shares its weight with the embedding {EMBED}"}
    assert not any(HEAD in note for note in report.notes)  # nothing is wrong
    (info,) = report.infos
    assert info.startswith(f"{HEAD} shares its weight") and info in str(report).splitlines()
    assert torch.equal(weights(sim)[EMBED], before)
    assert len(report.layers) == 7


class Twins(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.relu(self.two(torch.relu(self.one(x)))))


@LAYER_WISE
def test_two_layers_of_one_weight(technique: Any) -> None:
    """They are decided as one layer, which bears the first one's name."""
    x = random(32, 8)
    sim = simulate(seeded(Twins), x)
    report = technique.apply(sim, [x])
    assert [layer.name for layer in report.layers] == ["one", "three"] and not report.skipped
    one, two = adapt(sim).weight_quantizers(["one", "two"]).values()
    assert two.weight is one.weight and two.quantizer is one.quantizer and one.frozen
    if technique.on_moments:
        assert [layer.tokens for layer in report.layers] == [64, 32]


@LAYER_WISE
def test_two_layers_of_one_weight_with_grids_of_their_own_are_refused(technique: Any) -> None:
    x = random(32, 8)
    sim = simulate(seeded(Twins), x)
    sim.model.two.param_quantizers["weight"] = copy.deepcopy(sim.model.one.param_quantizers.weight)
    with pytest.raises(ValueError, match=r"one and two share one weight.*modules_to_exclude"):
        technique.apply(sim, [x])
    report = technique.apply(sim, [x], modules_to_exclude=["two", "one"])
    assert [layer.name for layer in report.layers] == ["three"]


@LAYER_WISE
def test_wider_weights_can_be_left_alone(
    technique: Any, make_sim: Any, batches: list[Tensor]
) -> None:
    sim = make_sim(layers=1, lm_head=QSpec(bitwidth=8))
    before = weights(sim)
    report = technique.apply(sim, batches, max_bitwidth=4)
    assert report.skipped == {HEAD: "8 bits, max_bitwidth is 4"}
    assert torch.equal(weights(sim)[HEAD], before[HEAD])
    assert not adapt(sim).weight_quantizer(HEAD).frozen


@LAYER_WISE
def test_exclusion_by_name_and_by_module(
    technique: Any, make_sim: Any, batches: list[Tensor], result_of: Any
) -> None:
    by_name, by_module = make_sim(layers=1), make_sim(layers=1)
    before, ranges = weights(by_name), grids(by_name)
    report = technique.apply(by_name, batches, modules_to_exclude=[Q_PROJ, UP])
    modules = [by_module.model.get_submodule(name) for name in (Q_PROJ, UP)]
    technique.apply(by_module, batches, modules_to_exclude=modules)
    assert modules == [by_module.model.get_submodule(name) for name in (Q_PROJ, UP)]
    assert result_of(by_name) == result_of(by_module)
    assert len(report.layers) == 5
    for name in (Q_PROJ, UP):
        assert torch.equal(weights(by_name)[name], before[name])
        assert same(grids(by_name)[name], ranges[name])
        assert not adapt(by_name).weight_quantizer(name).frozen


@LAYER_WISE
def test_exclusion_of_what_is_not_there(
    technique: Any, sim: Any, batches: list[Tensor], state_of: Any
) -> None:
    before = state_of(sim)
    stranger = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=rf"such as '{Q_PROJ}'; not found: 'lm_heat', Linear"):
        technique.apply(sim, batches, modules_to_exclude=["lm_heat", stranger, Q_PROJ])
    with pytest.raises(ValueError, match=r"none does \(there is none, or all are excluded"):
        technique.apply(sim, batches, modules_to_exclude=list(grids(sim)))
    assert state_of(sim) == before


class Unused(nn.Module):
    """One layer is not called after the simulation was made."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.uses_both = True

    def forward(self, x: Tensor) -> Tensor:
        return self.used(self.unused(x) if self.uses_both else x)


@ON_MOMENTS
@pytest.mark.parametrize("opaque", [False, True], ids=["graph", "forward_fn"])
def test_a_layer_without_data_is_named(technique: Any, state_of: Any, opaque: bool) -> None:
    x = random(32, 8)
    sim = simulate(seeded(Unused), x)
    sim.model.uses_both = False
    before = state_of(sim)
    forward_fn = (lambda model, batch: model(batch)) if opaque else None
    with pytest.raises(ValueError, match=r"unused.*never|never received data: unused"):
        technique.apply(sim, [x], forward_fn=forward_fn)
    assert state_of(sim) == before
    technique.apply(sim, [x], forward_fn=forward_fn, modules_to_exclude=["unused"])


# Data that is hard on the algebra.


@ON_MOMENTS
def test_dead_channels_and_few_tokens(technique: Any, problems: dict[str, Any]) -> None:
    """H of rank 3 with empty rows: no NaN, dead columns are rounded to nearest, none is worse."""
    x = random(3, 32)
    x[:, [0, 5, 31]] = 0
    sim = simulate(mlp(32, 24, 8), x)
    original = weights(sim)["0"]
    report = technique.apply(sim, [x])
    assert all(math.isfinite(layer.loss_after) for layer in report.layers)
    assert report.layers[0].loss_after <= report.layers[0].loss_nearest
    values, grid = as_simulated(sim, "0"), grids(sim)["0"]
    dead = torch.tensor([0, 5, 31])
    assert torch.equal(values[:, dead], fake_quantize(original, grid)[:, dead])
    assert bool(values.isfinite().all())


class Logarithm(nn.Module):
    """Its middle is NaN for negative inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.log(self.first(x)))


@ON_MOMENTS
def test_activations_that_are_not_finite_name_the_layer(technique: Any, state_of: Any) -> None:
    x = random(32, 8)
    sim = simulate(seeded(Logarithm), x)
    before = state_of(sim)
    with pytest.raises(ValueError, match=r"^second: .*(NaN|finite)"):
        technique.apply(sim, [x])
    assert state_of(sim) == before


# What is on the grid afterwards.


@functools.cache
def _mlp_sim(dtype: torch.dtype, grid: str, bits: int) -> Any:
    granularity, symmetric = LINEAR_GRIDS[grid]
    spec = QSpec(bitwidth=bits, symmetric=symmetric, granularity=granularity)
    return simulate(mlp(32, 16, 8, dtype=dtype), random(2, 32).to(dtype), spec)


@LAYER_WISE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", LINEAR_GRIDS)
def test_every_grid(
    technique: Any, problems: dict[str, Any], name: str, dtype: torch.dtype
) -> None:
    """Rounded weights are AIMET's own to the bit; no row (or tensor) is above plain rounding."""
    x = (random(200, 32) @ random(32, 32, seed=1)).to(dtype)
    settings = {"activation_aware": False} if technique.name == "adaround" else {}
    for bits in (2, 3, 4, 8):
        sim = copy.deepcopy(_mlp_sim(dtype, name, bits))
        technique.apply(sim, [x], **settings)
        for layer, problem in problems.items():
            values = as_simulated(sim, layer)
            if technique.rounds:
                assert torch.equal(values, weights(sim)[layer]), (bits, layer)
            else:
                assert torch.equal(problem.stored, weights(sim)[layer])
            plain = fake_quantize(problem.stored, problem.nearest_grid())
            found, nearest = (technique.errors(problem, each) for each in (values, plain))
            room = 1e-5 * nearest.abs() + 1e-9
            if "tensor" in name:
                found, nearest, room = found.sum(), nearest.sum(), room.sum()
            assert bool((found <= nearest + room).all()), (bits, layer)
        problems.clear()


def test_adaround_behind_a_relu(problems: dict[str, Any]) -> None:
    """The layer before the ReLU is better behind it than one that was judged before it."""
    x = random(400, 32) @ random(32, 32, seed=1)
    errors = {}
    for aware in (True, False):
        sim = copy.deepcopy(_mlp_sim(torch.float32, "channel", 3))
        first = sim.model.get_submodule("0")
        with torch.no_grad():
            first.bias.sub_(2.0)  # most outputs are cut off
            target = torch.relu(nn.functional.linear(x, first.weight, first.bias))
        report = aimet_ext.apply_adaround(sim, [x], activation_aware=aware, progress=False)
        assert (problems["0"].samples is not None) == aware
        assert problems["2"].samples is None
        with torch.no_grad():
            errors[aware] = float((torch.relu(first(x)) - target).square().mean(0).sum())
        if aware:
            assert report.layers[0].loss_after == pytest.approx(errors[True], rel=1e-3)
        assert report.layers[0].loss_after <= report.layers[0].loss_nearest
    assert errors[True] < errors[False]


def test_compatible_mode_asks_for_the_whole_of_aimets_target(
    make_sim: Any, batches: list[Tensor], result_of: Any
) -> None:
    """Whatever ``asym_strength`` says: less would be another search than AIMET's."""
    results = {}
    for mode in ("compatible", "best"):
        for strength in (0.5, 1.0):
            sim = make_sim()
            aimet_ext.apply_seq_mse(
                sim,
                batches,
                mode=mode,
                inp_symmetry="asym",
                asym_strength=strength,
                progress=False,
            )
            results[mode, strength] = result_of(sim)
    assert results["compatible", 0.5] == results["compatible", 1.0]
    assert results["best", 0.5] != results["best", 1.0]


def test_a_checkpoint_does_not_mix_with_other_frozen_ranges(
    make_sim: Any, batches: list[Tensor], tmp_path: Any
) -> None:
    for candidates in (20, 3):
        sim = make_sim()
        aimet_ext.apply_seq_mse(sim, batches, candidates, mode="compatible", progress=False)
        settings = {"checkpoint_dir": tmp_path, "progress": False}
        if candidates == 20:
            aimet_ext.apply_gptq(sim, batches, **settings)
            continue
        with pytest.raises(ValueError, match="belongs to another run: ranges was"):
            aimet_ext.apply_gptq(sim, batches, **settings)


def test_a_checkpoint_that_takes_a_range_away_is_named(
    make_sim: Any, batches: list[Tensor], tmp_path: Any
) -> None:
    """Its hash is right: a decided layer has a range all the same."""
    settings = {"checkpoint_dir": tmp_path, "progress": False, "num_candidates": 2, "sweeps": 2}
    aimet_ext.apply_seq_mse(make_sim(layers=1), batches, **settings)
    file = tmp_path / "block_00003.safetensors"
    tensors, fields = read_safetensors(file)
    meta = json.loads(fields["meta"])
    for state in meta["meta"]["states"][DOWN]["quantizers"].values():
        state["initialized"] = False
    write_tensors(file, tensors, meta)
    with pytest.raises(CorruptFileError, match=r"block_00003\.safetensors.*down_proj.*range"):
        aimet_ext.apply_seq_mse(make_sim(layers=1), batches, **settings)


@ON_MOMENTS
def test_a_bound_of_tokens_leaves_out_batches_evenly(
    technique: Any, make_sim: Any, ids: Any, result_of: Any
) -> None:
    """As if only these were given; where there are fewer, or only a forward_fn knows, all are."""
    widest = max(q.weight.shape[1] for q in adapt(make_sim()).weight_quantizers().values())
    data = [ids(1, 16, number) for number in range(8)]
    masked = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in data]
    for batch in masked[4:]:
        batch["attention_mask"][:, 8:] = 0
    bound = 48 / widest
    found = []
    for batches, settings in (
        (data, {"tokens_per_input": bound}),  # 3 of 8 batches have 48 tokens
        ([data[n] for n in (2, 4, 5)], {}),
        (masked, {"tokens_per_input": bound}),  # 4 of 8, by the mask
        ([masked[n] for n in (1, 3, 4, 7)], {"tokens_per_input": 10.0}),
        (masked, {"tokens_per_input": bound, "forward_fn": lambda model, batch: model(**batch)}),
        (masked, {}),
    ):
        sim = make_sim()
        technique.apply(sim, batches, **settings)
        found.append(result_of(sim))
    assert found[0] == found[1] and found[2] == found[3] and found[4] == found[5]
    assert found[0] != found[2] != found[4]
