"""Ranges of activations: chosen by the outputs, under the contract that all techniques keep."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import aimet_ext
from aimet_ext import QSpec, apply_activation_ranges
from aimet_ext.analysis.divergence import Reference
from aimet_ext.sim.protocol import adapt
from aimet_ext.techniques import activation_ranges

IDS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(0))
FEEDS = [{"input_ids": IDS.numpy()}]


def spoilt(model: Any) -> Any:
    """Logits that tell tokens apart, and a channel of values that hardly matter but are large."""
    model.lm_head.weight.data *= 8
    mlp = model.model.layers[0].mlp
    mlp.down_proj.weight.data *= 8
    mlp.up_proj.weight.data[0] *= 40
    mlp.down_proj.weight.data[:, 0] *= 1e-4
    return model


@functools.cache
def graph() -> Any:
    from onnx_models import exported_module, tiny_causal_lm

    model = spoilt(tiny_causal_lm("llama", num_hidden_layers=1))
    prepared = aimet_ext.prepare_model(model, mask_value=-100.0)
    return exported_module(prepared, (IDS,), ["input_ids"], ["logits"], None)


def onnx_sim() -> Any:
    pytest.importorskip("aimet_onnx")
    from onnx_sims import build_sim

    return build_sim(graph(), QSpec(bitwidth=8), QSpec(bitwidth=6, symmetric=False), "htp_v81")


@pytest.fixture
def sim(tiny_model: Any) -> Any:
    """A torch simulation of 6-bit activations without ranges."""
    pytest.importorskip("aimet_torch")
    model = spoilt(tiny_model("llama", num_hidden_layers=1))
    return aimet_ext.create_sim(model, IDS, weights=QSpec(bitwidth=8), activations=6)


def apply(sim: Any, data: Any = None, **settings: Any) -> Any:
    given = {"progress": False, "least_share": 0.05, **settings}
    return apply_activation_ranges(sim, [IDS] if data is None else data, **given)


def ranges(sim: Any) -> dict[str, Any]:
    points = adapt(sim).points().values()
    return {p.place: (p.low, p.high) for p in points if p.kind != "weight"}


def divergence(sim: Any, data: Any) -> float:
    adaptor = adapt(sim)
    batches = adaptor.batches(data)
    with adaptor.running(()) as run:
        reference = Reference(run, batches)
    with adaptor.running(adaptor.points()) as run:
        return reference.divergence(run)


@pytest.mark.parametrize("framework", ["torch", "onnx"])
def test_the_divergence_falls_and_is_that_of_the_simulation(request: Any, framework: str) -> None:
    on_torch = framework == "torch"
    sim = request.getfixturevalue("sim") if on_torch else onnx_sim()
    data: Any = [IDS] if on_torch else FEEDS
    report = apply(sim, data)
    assert report.kl_after < 0.95 * report.kl_before
    assert report.kl_after == pytest.approx(divergence(sim, data), rel=1e-3)
    for entry in report.ranges:
        assert entry.kl_after <= entry.kl_before
        assert (entry.kl_after < entry.kl_before) == (entry.after != entry.before)
        assert entry.before[0] <= entry.after[0] <= entry.after[1] <= entry.before[1]
    changed = [entry.name for entry in report.ranges if entry.after != entry.before]
    assert any("mlp" in name for name in changed)
    assert all(name in str(report) for name in changed)
    found = ranges(sim)
    for point in adapt(sim).points().values():
        assert point.frozen or point.kind == "weight"
    if on_torch:
        sim.compute_encodings(lambda model: model(IDS * 0 + 5))
    else:
        sim.compute_encodings([{"input_ids": IDS.numpy() * 0 + 5}])
    assert ranges(sim) == found


def test_ranges_that_an_operator_fixes_stay() -> None:
    sim = onnx_sim()
    report = apply(sim, FEEDS, least_share=0)
    fixed = [name for name in ranges(sim) if "Softmax" in name or "Sigmoid" in name]
    assert fixed and not {entry.name for entry in report.ranges} & set(fixed)
    assert all(ranges(sim)[name] == pytest.approx((0.0, 1.0), abs=0.02) for name in fixed)


def test_frozen_and_excluded_ranges_stay(sim: Any) -> None:
    excluded = "model.model.layers.0.self_attn"
    frozen = adapt(sim).points()["model.model.layers.0.mlp.down_proj"]
    adapt(sim).write_range(frozen, -0.25, 0.5)
    before = ranges(sim)[frozen.place]
    report = apply(sim, modules_to_exclude=[excluded], least_share=0)
    names = [entry.name for entry in report.ranges]
    assert names and frozen.name not in names
    assert not any(name.startswith(excluded) for name in names)
    assert ranges(sim)[frozen.place] == before
    with pytest.raises(ValueError, match=r"such as .*; not found: nowhere"):
        apply(copy.deepcopy(sim), modules_to_exclude=["nowhere"])


def test_modules_with_one_quantizer_have_one_range(sim: Any) -> None:
    layer = sim.model.model.model.layers[0].mlp
    layer.up_proj.output_quantizers[0] = layer.gate_proj.output_quantizers[0]
    report = apply(sim, least_share=0)
    names = [entry.name for entry in report.ranges]
    assert len([name for name in names if "gate_proj" in name or "up_proj" in name]) == 1


def test_a_cache_has_one_range_going_in_and_coming_out(monkeypatch: Any) -> None:
    """Pairs that must quantize alike are searched together."""
    sim = onnx_sim()
    adaptor = adapt(sim)
    facts = adaptor.lint_facts()
    one, other = [a for a in facts.activations if a.name.endswith("proj/MatMul_output_0")][:2]
    tied = type(facts)(**{**vars(facts), "tied": ((one, other, "past", "present"),)})
    monkeypatch.setattr(type(adaptor), "lint_facts", lambda self: tied)
    apply(sim, FEEDS, least_share=0)
    adaptor = adapt(sim)
    found = ranges(sim)
    assert found[one.name] == found[other.name]


def test_a_failure_leaves_the_simulation_alone(
    sim: Any, state_of: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    before, calls = state_of(sim), []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    search = activation_ranges._Search.search
    monkeypatch.setattr(
        activation_ranges._Search, "search", lambda *a: (failing(*a), search(*a))[1]
    )
    with pytest.raises(KeyboardInterrupt):
        apply(sim, least_share=0, checkpoint_dir=tmp_path / "checkpoints")
    assert state_of(sim) == before
    monkeypatch.undo()
    report = apply(sim, least_share=0, checkpoint_dir=tmp_path / "checkpoints")
    assert [entry.resumed for entry in report.ranges[:3]] == [True, True, False]


def test_a_failure_leaves_an_onnx_simulation_alone(monkeypatch: Any) -> None:
    from onnx_pairs import state_of

    sim = onnx_sim()
    before = state_of(sim)

    def failing(*args: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(activation_ranges._Search, "search", failing)
    with pytest.raises(RuntimeError, match="broken"):
        apply(sim, FEEDS)
    assert state_of(sim) == before


def test_it_follows_what_rounds_and_comes_once(sim: Any, tmp_path: Path) -> None:
    aimet_ext.apply_gptq(sim, [IDS], scale_candidates=0, refine_sweeps=0, progress=False)
    report = apply(sim, output_path=tmp_path / "out")
    assert (tmp_path / "out" / "report.json").is_file()
    assert report.settings == {"least_share": 0.05}
    assert [run.technique for run in sim.aimet_ext_ledger.runs] == ["gptq", "activation_ranges"]
    assert not sim.aimet_ext_ledger.runs[-1].rounds
    aimet_ext.export(sim, tmp_path / "exported", "model", IDS, progress=False)
    again = aimet_ext.load(tmp_path / "exported", progress=False)
    assert ranges(again) == ranges(sim)
    with pytest.raises(ValueError, match="a technique is applied once"):
        for point in adapt(sim).points().values():
            point.own.allow_overwrite(True)
        apply(sim)


def test_calls_of_other_forms(sim: Any) -> None:
    twin = copy.deepcopy(sim)
    one = apply_activation_ranges(
        sim, [IDS], lambda model, batch: model(batch), progress=False, least_share=0.2
    )
    two = apply_activation_ranges(
        quant_sim=twin, data_loader=[{"input_ids": IDS}], progress=False, least_share=0.2
    )
    assert [entry.after for entry in one.ranges] == [entry.after for entry in two.ranges]
    assert ranges(sim) == ranges(twin)


def test_a_simulation_without_activations_is_refused(make_sim: Any) -> None:
    with pytest.raises(ValueError, match=r"quantizers of activations is required.*activations=8"):
        apply(make_sim())
