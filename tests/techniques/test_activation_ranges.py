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
from aimet_ext.techniques.blockwise.ranges import BlockRanges

IDS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(0))
FEEDS = [{"input_ids": IDS.numpy()}]


def spoilt(model: Any) -> Any:
    """Logits that tell tokens apart, and a channel of values that hardly matter but are large."""
    model.lm_head.weight.data *= 8
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data *= 8
        layer.mlp.up_proj.weight.data[0] *= 40
        layer.mlp.down_proj.weight.data[:, 0] *= 1e-4
    return model


@functools.cache
def graph() -> Any:
    from onnx_models import exported_module, tiny_causal_lm

    model = spoilt(tiny_causal_lm("llama", num_hidden_layers=1))
    prepared = aimet_ext.prepare_model(model, mask_value=-100.0)
    return exported_module(prepared, (IDS,), ["input_ids"], ["logits"], None)


def onnx_sim(symmetric: bool = False) -> Any:
    pytest.importorskip("aimet_onnx")
    from onnx_sims import build_sim

    spec = QSpec(bitwidth=6, symmetric=symmetric)
    return build_sim(graph(), QSpec(bitwidth=8), spec, "htp_v81")


@pytest.fixture
def sim(tiny_model: Any) -> Any:
    """A torch simulation of 6-bit activations without ranges."""
    pytest.importorskip("aimet_torch")
    model = spoilt(tiny_model("llama", num_hidden_layers=1))
    return aimet_ext.create_sim(model, IDS, weights=QSpec(bitwidth=8), activations=6)


def apply(sim: Any, data: Any = None, **settings: Any) -> Any:
    given = {"progress": False, "least_share": 0.05, "objective": "output", **settings}
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
    assert report.settings == {"least_share": 0.05, "objective": "output"}
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


# -------------------------------------------------------------------- by the outputs of blocks


def torch_sim(tiny_model: Any, layers: int = 1, symmetric: bool = False) -> Any:
    pytest.importorskip("aimet_torch")
    model = spoilt(tiny_model("llama", num_hidden_layers=layers))
    spec = QSpec(bitwidth=6, symmetric=symmetric)
    return aimet_ext.create_sim(model, IDS, weights=QSpec(bitwidth=8), activations=spec)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("framework", ["torch", "onnx"])
def test_the_error_of_a_block_falls(tiny_model: Any, framework: str, symmetric: bool) -> None:
    on_torch = framework == "torch"
    sim = torch_sim(tiny_model, symmetric=symmetric) if on_torch else onnx_sim(symmetric)
    data: Any = [IDS] if on_torch else FEEDS
    report = apply(sim, data, objective="block", least_share=1e-3)
    assert report.kl_after < report.kl_before
    assert report.kl_after == pytest.approx(divergence(sim, data), rel=1e-3)
    inside = [entry for entry in report.ranges if entry.block is not None]
    assert any("mlp" in entry.name for entry in inside if entry.after != entry.before)
    losses = [loss for entry in inside for loss in (entry.loss_before, entry.loss_after)]
    assert losses[1:-1:2] == losses[2::2] and losses[-1] < losses[0]
    for entry in report.ranges:
        assert entry.share <= 1 and (entry.share < 1) == (entry.after != entry.before)
        assert entry.before[0] <= entry.after[0] <= entry.after[1] <= entry.before[1]
        if symmetric:
            assert entry.after[0] / entry.before[0] == pytest.approx(
                entry.after[1] / entry.before[1], rel=0.05
            )
    assert all(p.frozen for p in adapt(sim).points().values() if p.kind != "weight")


def test_the_loss_is_that_of_the_simulation(tiny_model: Any, block_outputs: Any) -> None:
    """Of the second block, behind the first one as it was quantized, on the float target."""
    sim = torch_sim(tiny_model, layers=2)
    adaptor = adapt(sim)
    with adaptor.disabled_quantizers():
        (target,) = block_outputs(sim.model, 1, [IDS])
    report = apply(sim, objective="block", least_share=0.02)
    assert report.kl_after < report.kl_before
    last = [entry for entry in report.ranges if entry.block and entry.block.endswith("layers.1")][
        -1
    ]
    points = adapt(sim).points()
    on = [n for n, p in points.items() if ".layers." in n or (p.kind == "weight" and "embed" in n)]
    with adaptor.running(on):
        (output,) = block_outputs(sim.model, 1, [IDS])
    loss = float((output - target).square().mean())
    assert last.loss_after == pytest.approx(loss, rel=1e-3)


def test_blocks_go_on_from_an_interrupt(
    tiny_model: Any, state_of: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    whole, sim, again = (torch_sim(tiny_model, layers=2) for _ in range(3))
    settings = {"objective": "block", "least_share": 0.02}
    report, before = apply(whole, **settings), state_of(sim)
    one, left = activation_ranges._one_block, iter(range(1))

    def interrupted(*args: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return one(*args)

    monkeypatch.setattr(activation_ranges, "_one_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply(sim, checkpoint_dir=tmp_path, **settings)
    assert state_of(sim) == before
    monkeypatch.undo()
    for resumed, blocks in ((sim, {0}), (again, {0, 1})):
        found = apply(resumed, checkpoint_dir=tmp_path, **settings)
        for entry, other in zip(found.ranges, report.ranges, strict=True):
            if entry.block is not None:
                assert entry.resumed == (int(entry.block[-1]) in blocks)
            assert (entry.name, entry.after, entry.share) == (other.name, other.after, other.share)
        assert ranges(resumed) == ranges(whole)


def test_ranges_that_make_the_outputs_worse_are_not_taken(sim: Any, monkeypatch: Any) -> None:
    losses = iter(range(1, 1000))
    monkeypatch.setattr(activation_ranges._Search, "measure", lambda self: float(next(losses)))
    report = apply(sim, objective="block", least_share=1e-3)
    assert report.ranges and all(entry.after == entry.before for entry in report.ranges)


def test_a_model_without_blocks_is_judged_by_its_outputs() -> None:
    pytest.importorskip("aimet_onnx")
    from onnx_models import mlp_model
    from onnx_sims import build_sim

    sim = build_sim(mlp_model(), QSpec(bitwidth=8), QSpec(bitwidth=4, symmetric=False))
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).numpy()
    report = apply(sim, [{"x": x}], objective="block", least_share=0)
    assert report.ranges and all(entry.block is None for entry in report.ranges)
    assert report.kl_after <= report.kl_before


def test_starts_leave_out_the_largest_values(sim: Any) -> None:
    adaptor = adapt(sim)
    point = next(p for p in adaptor.points().values() if p.name.endswith("up_proj"))
    work = BlockRanges(adaptor, None, None, {point.place: point}, {point.place: (-50.0, 100.0)})
    values = torch.linspace(-1, 3, 100_001)
    values[0], values[-1] = -50.0, 100.0
    found = work._percentiles(point.place, values)
    assert len(found) == 3
    for (low, high), tail in zip(found, (5e-5, 5e-4, 5e-3), strict=True):
        step = (high - low) / 63
        assert low == pytest.approx(-1 + 4 * tail, abs=step)
        assert high == pytest.approx(3 - 4 * tail, abs=step)
