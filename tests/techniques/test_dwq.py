"""Scales polished on the model's outputs: integers stay, and the contract that techniques keep."""

from __future__ import annotations

import copy
import functools
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import aimet_ext
from aimet_ext import LPBQ, Blockwise, PerTensor, QSpec, apply_dwq, apply_rtn
from aimet_ext.core.affine import dequantize, quantize
from aimet_ext.evaluation.divergence import float_logits
from aimet_ext.sim.protocol import adapt
from aimet_ext.techniques.polished import Polished, blocks_of

IDS = [torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(n)) for n in range(4)]
FEEDS = [{"input_ids": ids.numpy()} for ids in IDS]
GRIDS = {
    "per channel": QSpec(bitwidth=3),
    "per tensor": QSpec(bitwidth=4, granularity=PerTensor()),
    "asymmetric": QSpec(bitwidth=3, symmetric=False),
    "blockwise": QSpec(bitwidth=3, granularity=Blockwise(16)),
    "LPBQ": QSpec(bitwidth=3, granularity=LPBQ(16)),
}


def spoilt(model: Any) -> Any:
    """Logits that tell tokens apart, and gains that are not all alike."""
    model.lm_head.weight.data *= 8
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model


@functools.cache
def graph() -> Any:
    from onnx_models import exported_module, tiny_causal_lm

    model = spoilt(tiny_causal_lm("llama", num_hidden_layers=2))
    prepared = aimet_ext.prepare_model(model, mask_value=-100.0)
    return exported_module(prepared, (IDS[0],), ["input_ids"], ["logits"], None)


def onnx_sim(spec: QSpec) -> Any:
    pytest.importorskip("aimet_onnx")
    from onnx_sims import build_sim

    sim = build_sim(graph(), spec, None)
    blocks = [name for name in adapt(sim).weight_quantizers() if "lm_head" not in name]
    return build_sim(graph(), dict.fromkeys(blocks, spec), None)


@pytest.fixture
def make(make_sim: Any) -> Any:
    """From a framework and a grid to a simulation, its data and the float model's outputs."""

    def of(
        framework: str = "torch", grid: str = "per channel", count: int = len(IDS), **settings: Any
    ) -> Any:
        if framework == "onnx":
            sim, data = onnx_sim(GRIDS[grid]), FEEDS
        else:
            sim, data = make_sim(spec=GRIDS[grid], **settings), IDS
            spoilt(getattr(sim.model, "model", sim.model))
        data = data[:count]
        reference = float_logits(sim, data, top_k=40)
        apply_rtn(sim)
        return sim, data, reference

    return of


def apply(sim: Any, data: Any, reference: Any, steps: int = 6, **settings: Any) -> Any:
    given = {"progress": False, "learning_rate": 5e-3, "evaluations": 3, **settings}
    return apply_dwq(sim, data, steps, reference=reference, **given)


def codes(sim: Any) -> dict[str, Tensor]:
    found = adapt(sim).weight_quantizers().items()
    return {name: quantize(q.weight.detach(), q.grid()) for name, q in found if q.initialized}


def scales(sim: Any) -> dict[str, Tensor]:
    found = adapt(sim).weight_quantizers().items()
    return {name: q.grid().scale for name, q in found if q.initialized}


def logits(sim: Any, number: int = 0) -> Tensor:
    if adapt(sim).framework == "onnx":
        return torch.from_numpy(sim.session.run(None, FEEDS[number])[0])
    with torch.no_grad():
        return sim.model(IDS[number])


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning"
)  # of AIMET's export
@pytest.mark.parametrize(
    ("framework", "grid"),
    [*(("torch", grid) for grid in GRIDS), ("onnx", "per channel"), ("onnx", "LPBQ")],
)
def test_integers_stay_and_the_divergence_falls(
    make: Any, framework: str, grid: str, tmp_path: Path
) -> None:
    sim, data, reference = make(framework, grid)
    before, start, ranges = logits(sim), codes(sim), scales(sim)
    report = apply(sim, data, reference)
    assert report.kept == "learnt" and report.after.kl < report.before.kl
    assert report.after.rows == IDS[0].numel()
    now = codes(sim)
    assert len(now) == 14 and all(torch.equal(now[name], start[name]) for name in now)
    assert all(not torch.equal(scales(sim)[name], ranges[name]) for name in now)
    assert report.num_layers == 14 and report.scales_moved > 0 and report.gains_moved > 0
    assert report.num_norms == (5 if framework == "torch" else 4)
    quantizers = adapt(sim).weight_quantizers(now)
    assert all(quantizer.frozen for quantizer in quantizers.values())
    found = logits(sim)
    assert not torch.equal(found, before)
    # What was learnt is what the simulation computes, and the file of it.
    held = float(reference.loss(3, logits(sim, 3))) / reference.tokens(3)
    assert report.after.kl == pytest.approx(held, rel=1e-3)
    if framework == "torch":
        sim.compute_encodings(lambda model: model(IDS[0] * 0 + 5))
        assert torch.equal(logits(sim), found)
        sample = IDS[0]
    else:
        sample = FEEDS[0]
    aimet_ext.export(sim, tmp_path / "out", "tiny", sample, progress=False)
    again = aimet_ext.load(tmp_path / "out", progress=False)
    assert all(torch.equal(codes(again)[name], start[name]) for name in start)
    torch.testing.assert_close(
        logits(again), found, rtol=0, atol=0 if framework == "torch" else 1e-5
    )


@pytest.mark.parametrize("framework", ["torch", "onnx"])
def test_gradients_are_those_of_the_simulation(make: Any, framework: str) -> None:
    """At the start the model learnt on is the simulation; its gradients are slopes of the loss."""
    sim, data, reference = make(framework, "LPBQ")
    adaptor = adapt(sim)
    with adaptor.own_parameters(("norm_qkv", "norm_mlp"), None):
        norms = adaptor.norm_gains(blocks_of(adaptor, None))
    polished = Polished.of(adaptor, adaptor.weight_quantizers(codes(sim)), norms)
    batches = adaptor.batches(data)
    logs = {name: log.requires_grad_() for name, log in polished.start().items()}
    with polished.running(logs, None) as run:
        torch.testing.assert_close(run(batches[0]).detach(), logits(sim), rtol=1e-5, atol=2e-5)
        reference.loss(0, run(batches[0])).backward()
    generator = torch.Generator().manual_seed(0)
    moves = {n: torch.randn(log.shape, generator=generator) for n, log in logs.items()}
    for kind in (polished.codes, polished.gains):
        slope = sum(float((logs[name].grad * moves[name]).sum()) for name in kind)
        ends = []
        for size in (1e-3, -1e-3):
            there = {n: log.detach() + size * moves[n] * (n in kind) for n, log in logs.items()}
            with torch.no_grad(), polished.running(there, None) as run:
                ends.append(float(reference.loss(0, run(batches[0]))))
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=0.03)


@pytest.mark.parametrize(
    ("framework", "grid"), [*(("torch", grid) for grid in GRIDS), ("onnx", "per channel")]
)
def test_integers_are_learnt(make: Any, framework: str, grid: str) -> None:
    """On their grids, and further than with scales alone, by one batch to learn and to judge."""
    alone = apply(*make(framework, grid, 1), 60, patience=9)
    sim, data, reference = make(framework, grid, 1)
    start = codes(sim)
    report = apply(sim, data, reference, 60, learn_integers=True, integer_rate=2e-2)
    assert report.kept == "learnt" and report.after.kl < alone.after.kl
    assert len(report.stages) == 3 and len({stage.rate for stage in report.stages}) == 1
    now, quantizers = codes(sim), adapt(sim).weight_quantizers(start)
    turned = sum(int((now[name] != start[name]).sum()) for name in start)
    assert report.integers_moved == turned / sum(each.numel() for each in start.values()) > 0
    assert f"{report.integers_moved:.2%} of the integers" in str(report)
    assert alone.integers_moved == 0
    for name, quantizer in quantizers.items():
        assert quantizer.frozen
        values = dequantize(now[name], quantizer.grid())
        torch.testing.assert_close(quantizer.weight.detach(), values, rtol=1e-6, atol=0)
    held = float(reference.loss(0, logits(sim))) / reference.tokens(0)
    assert report.after.kl == pytest.approx(held, rel=1e-3)


def test_both_frameworks_learn_the_same(make: Any, tiny_model: Any) -> None:
    """The same model, data and steps: losses as near as two ways to compute them are."""
    one, other = make("torch"), make("onnx")
    reports = [apply(*case, norm_gains=False, autocast=False) for case in (one, other)]
    for field in ("loss", "kl"):
        losses = [[getattr(stage, field) for stage in report.stages] for report in reports]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_block_is_computed_again_for_its_gradients(make: Any) -> None:
    sim, data, reference = make()
    calls = []
    layer = sim.model.get_submodule("model.model.layers.0.mlp.gate_proj")
    layer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    apply(sim, data, reference, 1)
    assert calls.count(True) == 2  # one step, forth and back


def test_nothing_better_leaves_the_simulation_alone(
    make: Any, state_of: Any, tmp_path: Path
) -> None:
    sim, data, reference = make()
    before = state_of(sim)
    report = apply(sim, data, reference, learning_rate=3.0, output_path=tmp_path / "out")
    assert report.kept == "start" and report.after == report.before
    assert (report.scales_moved, report.gains_moved) == (0.0, 0.0)
    assert state_of(sim) == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json", "report.json",
    ]  # fmt: skip


def test_learning_ends_when_it_is_of_no_more_use(make: Any) -> None:
    sim, data, reference = make()
    report = apply(sim, data, reference, 20, learning_rate=3.0, evaluations=10, patience=2)
    assert [stage.name for stage in report.stages] == ["2", "4"]


def test_steps_that_cost_much_are_taken_back_at_a_lower_rate(make: Any, tmp_path: Path) -> None:
    """At a rate that is too high by far something is gained nevertheless, by a lower one."""
    sim, data, reference = make()
    twin = copy.deepcopy(sim)
    given = {"learning_rate": 0.5, "evaluations": 9, "patience": 9}
    report = apply(sim, data, reference, 18, checkpoint_dir=tmp_path / "c", **given)
    rates = [stage.rate for stage in report.stages]
    scores = [report.before.kl, *(stage.kl for stage in report.stages)]
    assert scores[1] > scores[0] and report.kept == "learnt"
    assert report.after.kl == pytest.approx(min(scores), rel=1e-3)
    costs = [score / min(scores[:n]) - 1 for n, score in enumerate(scores) if n]
    taken_back = [two < one for one, two in pairwise(rates)]
    for number, (back, cost) in enumerate(zip(taken_back, costs[:-1], strict=True)):
        assert rates[number + 1] == pytest.approx(rates[number] / (3 if back else 1))
        if cost <= 0:
            assert not back
        if cost > 0.05:  # the most that the documentation allows
            assert back
        # What was too much at a rate is too much at each later and lower one.
        assert back or all(cost < costs[n] for n in range(number) if taken_back[n])
        if back:  # the steps behind it start from the best state
            assert scores[number + 2] < scores[number + 1]
    assert len({*rates}) > 2 and any(one == two for one, two in pairwise(rates))
    assert "rate" in str(report) and f"{rates[-1]:.2g}" in str(report)
    again = apply(twin, data, reference, 18, checkpoint_dir=tmp_path / "c", **given)
    assert [(s.kl, s.rate) for s in again.stages] == [(s.kl, s.rate) for s in report.stages]
    assert again.after == report.after


def interrupted(sim: Any, case: Any, monkeypatch: Any, steps: int = 5, **settings: Any) -> None:
    """Apply it, with Ctrl-C behind some steps."""
    done, step = [], torch.optim.Adam.step

    def stop(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        done.append(step(optimizer, *args, **kwargs))
        if len(done) == steps:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            apply(sim, *case, **settings)


@pytest.mark.parametrize(
    "given",
    [{}, {"learning_rate": 0.02}, {"learn_integers": True, "integer_rate": 0.2}],
    ids=["scales", "a stage taken back", "integers"],
)
def test_an_interrupted_run_leaves_no_trace_and_is_resumed_to_the_bit(
    make: Any, state_of: Any, result_of: Any, monkeypatch: Any, tmp_path: Path, given: Any
) -> None:
    sim, *case = make()
    whole, before = copy.deepcopy(sim), state_of(sim)
    interrupted(sim, case, monkeypatch, checkpoint_dir=tmp_path / "c", **given)
    assert state_of(sim) == before
    assert len(list((tmp_path / "c").glob("block_*"))) == 2
    torch.rand(3)
    again = apply(sim, *case, checkpoint_dir=tmp_path / "c", cache_dir=tmp_path / "cache", **given)
    report = apply(whole, *case, **given)
    assert [stage.resumed for stage in again.stages] == [True, True, False]
    assert [stage.kl for stage in again.stages] == [stage.kl for stage in report.stages]
    assert again.after == report.after
    assert result_of(sim) == result_of(whole)
    other, *_ = make()
    with pytest.raises(ValueError, match=r"belongs to another run.*settings\.learning_rate"):
        apply(other, *case, checkpoint_dir=tmp_path / "c", **{**given, "learning_rate": 1e-4})


def test_a_failure_at_the_very_end_leaves_no_trace(
    make: Any, state_of: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    from aimet_ext.files import folders

    sim, *case = make()
    before = state_of(sim)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "_sync", full)
    with pytest.raises(OSError, match="No space left"):
        apply(sim, *case, output_path=tmp_path / "out")
    assert state_of(sim) == before
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_an_onnx_simulation_alone(make: Any, monkeypatch: Any) -> None:
    from onnx_pairs import state_of

    sim, *case = make("onnx")
    before = state_of(sim)
    with monkeypatch.context() as patch:
        patch.setattr(aimet_ext.Ledger, "log_run", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            apply(sim, *case)
    assert state_of(sim) == before


def test_what_it_follows_and_what_follows_it(make: Any) -> None:
    sim, data, reference = make()
    fresh = copy.deepcopy(sim)
    apply(sim, data, reference)
    assert sim.aimet_ext_ledger.techniques == ("rtn", "dwq")
    with pytest.raises(ValueError, match="dwq was already applied"):
        apply(sim, data, reference)
    with pytest.raises(ValueError, match=r"gptq needs float weights, but \w+ already rounded"):
        aimet_ext.apply_gptq(sim, data, progress=False)
    with pytest.raises(ValueError, match=r"reference must be the float model, or .*float_logits"):
        apply(fresh, data, None)
    with pytest.raises(ValueError, match=r"reference must be of the batches given, in their order"):
        apply(fresh, data[::-1], reference)
    with pytest.raises(ValueError, match=r"rtn rounded weights of this simulation"):
        float_logits(fresh, data)


def test_float_weights_are_refused_and_rounded_ones_among_them_learnt(make_sim: Any) -> None:
    sim = make_sim(spec=GRIDS["per channel"])
    reference = float_logits(sim, IDS)
    with pytest.raises(ValueError, match=r"none does .*not rounded yet by a technique such as"):
        apply(sim, IDS, reference)
    left = "model.model.layers.0.mlp.up_proj"
    apply_rtn(sim, modules_to_exclude=[left])
    report = apply(sim, IDS, reference)
    assert report.num_layers == 13 and left in report.skipped and left in str(report)


def test_gains_may_stay(make: Any) -> None:
    sim, data, reference = make()
    before = {n: p.clone() for n, p in sim.model.named_parameters() if "norm" in n}
    report = apply(sim, data, reference, norm_gains=False)
    assert report.num_norms == 0 and not sim.aimet_ext_ledger.entries
    assert all(torch.equal(p, before[n]) for n, p in sim.model.named_parameters() if n in before)


def test_an_adapter_adds_what_it_did(make: Any, tmp_path: Path) -> None:
    """A layer's input is its norm's output times the change of the gains, which A takes back."""
    sim, data, reference = make()
    norm = sim.model.get_submodule("model.model.layers.1.input_layernorm")
    x = torch.randn(5, norm.weight.shape[0], generator=torch.Generator().manual_seed(0))
    before = norm(x).detach()
    apply(sim, data, reference, output_path=tmp_path / "out")
    found = aimet_ext.load_scales(tmp_path / "out")
    for reader in ("q_proj", "k_proj", "v_proj"):
        factors = found[f"model.layers.1.self_attn.{reader}"]
        assert factors.output is None
        a = torch.randn(2, x.shape[1], generator=torch.Generator().manual_seed(1))
        folded = factors.fold_input(a, 1)
        torch.testing.assert_close(norm(x).detach() @ folded.T, before @ a.T, rtol=1e-4, atol=1e-4)
        assert not torch.equal(folded, a)
    assert "model.layers.1.self_attn.o_proj" not in found
    assert "lm_head" in found


def test_forms_of_a_call_give_one_result(make: Any, result_of: Any, tiny_model: Any) -> None:
    sim, data, reference = make()
    twins = [copy.deepcopy(sim) for _ in range(3)]
    settings = {"progress": False, "learning_rate": 5e-3, "evaluations": 3, "reference": reference}
    apply(sim, data, reference)
    apply_dwq(twins[0], data, lambda model, batch: model(batch), num_iterations=6, **settings)
    apply_dwq(quant_sim=twins[1], data_loader=iter(data), num_iterations=6, **settings)
    with torch.no_grad():
        masked = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in data]
        apply_dwq(twins[2], masked, 6, **settings)
    assert result_of(sim) == result_of(twins[0]) == result_of(twins[1]) == result_of(twins[2])


def test_padding_counts_nowhere(make: Any, result_of: Any) -> None:
    results = []
    for fill in (3, 90):
        sim, *_ = make()
        data = []
        for ids in IDS:
            mask = torch.ones_like(ids)
            mask[1, 8:] = 0
            data.append({"input_ids": torch.where(mask == 1, ids, fill), "attention_mask": mask})
        model = copy.deepcopy(sim)
        adapt(model).ledger = None  # what the rounded weights compute will do as a float model
        reference = float_logits(model, data)
        assert reference.count == 4 * (3 * 12 - 4)
        with torch.no_grad():
            for quantizer in adapt(sim).weight_quantizers().values():
                integers = quantize(quantizer.weight, quantizer.grid())
                quantizer.set_scale(quantizer.grid().scale * 1.02)
                quantizer.set_weight(dequantize(integers, quantizer.grid()))
        report = apply(sim, data, reference)
        assert report.kept == "learnt"
        results.append((report.before, report.after, result_of(sim)))
    assert results[0] == results[1]


def test_new_gains_reset_the_ranges_that_no_longer_fit(make: Any) -> None:
    sim, data, reference = make(activations=16)
    sim.compute_encodings(lambda model: [model(ids) for ids in data])
    report = apply(sim, data, reference, learning_rate=2e-2)
    assert any("input_layernorm.output" in name for name in report.reset_encodings)
    unset = [n for n, q in adapt(sim).activation_quantizers().items() if not q.is_initialized()]
    assert unset and set(unset) <= set(report.reset_encodings)
    start = codes(sim)
    sim.compute_encodings(lambda model: [model(ids) for ids in data])
    assert all(torch.equal(codes(sim)[name], start[name]) for name in start)
