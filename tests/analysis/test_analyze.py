"""The analysis measures what it says, estimates near it, names what is bad, and changes nothing."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import aimet_ext
from aimet_ext import QSpec, analyze
from aimet_ext.errors import TransformRefused
from aimet_ext.sim.protocol import adapt

IDS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(0))
FEEDS = [{"input_ids": IDS.numpy()}]


def torch_sim(tiny_model: Any, bits: int = 8) -> Any:
    pytest.importorskip("aimet_torch")
    model = tiny_model("llama", num_hidden_layers=1)
    # Random logits are nearly equal, whatever is done to them.
    model.lm_head.weight.data *= 8
    sim = aimet_ext.create_sim(model, IDS, weights=QSpec(bitwidth=8), activations=bits)
    sim.compute_encodings(lambda quantized: quantized(IDS))
    return sim


@functools.cache
def graph() -> Any:
    from onnx_models import exported_module, tiny_causal_lm

    model = tiny_causal_lm("llama", num_hidden_layers=1)
    model.lm_head.weight.data *= 8
    prepared = aimet_ext.prepare_model(model, mask_value=-100.0)
    return exported_module(prepared, (IDS,), ["input_ids"], ["logits"], None)


def onnx_sim(bits: int = 8) -> Any:
    pytest.importorskip("aimet_onnx")
    from onnx_sims import build_sim

    activations = QSpec(bitwidth=bits, symmetric=False)
    sim = build_sim(graph(), QSpec(bitwidth=8), activations, "htp_v81")
    sim.compute_encodings(FEEDS)
    return sim


@pytest.fixture(params=["torch", "onnx"])
def case(request: Any, tiny_model: Any) -> tuple[Any, list[Any]]:
    """A calibrated simulation of 8 bits, and its data."""
    if request.param == "torch":
        return torch_sim(tiny_model), [IDS]
    sim = onnx_sim()
    return sim, FEEDS


def measured(sim: Any, batch: Any, names: Any) -> float:
    """KL of a simulation with these quantizers alone, by its formula."""
    adaptor = adapt(sim)
    (batch,) = adaptor.batches([batch])
    with adaptor.running(()) as run:
        expected = run(batch).double().softmax(-1)
    with adaptor.running(names) as run:
        found = run(batch).double().softmax(-1)
    return float((expected * (expected.log() - found.log())).sum(-1).mean())


def test_what_is_measured_is_the_divergence(case: Any) -> None:
    sim, data = case
    report = analyze(sim, data, top_k=3, progress=False)
    every = [entry.name for entry in report.quantizers]
    assert set(every) == set(adapt(sim).points())
    assert report.kl == pytest.approx(measured(sim, data[0], every), rel=1e-3)
    exact = [entry for entry in report.quantizers if entry.exact]
    assert len(exact) == 3
    for entry in exact:
        others = [name for name in every if name != entry.name]
        assert entry.kl_alone == pytest.approx(measured(sim, data[0], [entry.name]), rel=1e-2)
        removed = report.kl - measured(sim, data[0], others)
        assert entry.kl_removed == pytest.approx(removed, abs=1e-2 * report.kl)


def test_estimates_are_near_what_is_measured(case: Any) -> None:
    sim, data = case
    estimated = analyze(sim, data, top_k=0, progress=False)
    exact = analyze(sim, data, top_k=len(estimated.quantizers), progress=False)
    assert not any(entry.exact for entry in estimated.quantizers)
    largest = exact.quantizers[:8]
    ratios = [math.log(estimated[e.name].kl_alone / e.kl_alone) for e in largest]
    assert abs(sum(ratios) / len(ratios)) < 0.5
    assert max(map(abs, ratios)) < 1.5
    assert {e.name for e in largest[:3]} <= {e.name for e in estimated.quantizers[:8]}


def test_a_ruined_range_comes_first(case: Any) -> None:
    sim, data = case
    adaptor = adapt(sim)
    point = next(p for n, p in adaptor.points().items() if "down_proj" in n and p.kind != "weight")
    adaptor.write_range(point, point.low / 8, point.high / 8)
    report = analyze(sim, data, top_k=1, progress=False)
    first = report.quantizers[0]
    assert first.name == point.name
    assert first.exact
    assert first.kl_removed > 0.5 * report.kl


def test_the_simulation_is_left_as_it_was(case: Any) -> None:
    sim, data = case
    adaptor = adapt(sim)
    before = {n: (p.low, p.high, p.frozen) for n, p in adaptor.points().items()}
    with adaptor.running(before) as run:
        output = run(adaptor.batches(data)[0])
    analyze(sim, data, top_k=1, progress=False)
    assert {n: (p.low, p.high, p.frozen) for n, p in adaptor.points().items()} == before
    with adaptor.running(before) as run:
        assert torch.equal(run(adaptor.batches(data)[0]), output)


def test_padding_does_not_count(tiny_model: Any) -> None:
    sim = torch_sim(tiny_model)

    def padded(fill: int) -> dict[str, Tensor]:
        ids = torch.cat([IDS, torch.full((4, 5), fill)], 1)
        return {"input_ids": ids, "attention_mask": (torch.arange(17) < 12).long().expand(4, 17)}

    plain = analyze(sim, [IDS], top_k=0, progress=False)
    for fill in (2, 99):
        report = analyze(sim, [padded(fill)], top_k=0, progress=False)
        assert report.rows == IDS.numel()
        assert report.kl == pytest.approx(plain.kl, rel=1e-3)


def test_a_graph_without_gradients_is_measured_whole(monkeypatch: Any) -> None:
    sim = onnx_sim()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise TransformRefused("no gradient")

    monkeypatch.setattr(type(adapt(sim)), "looking", refuse)
    report = analyze(sim, FEEDS, top_k=0, progress=False)
    assert all(entry.exact for entry in report.quantizers)


def test_the_report_is_readable_saved_and_drawn(tiny_model: Any, tmp_path: Path) -> None:
    report = analyze(torch_sim(tiny_model), [IDS], top_k=1, progress=False)
    text = str(report)
    worst = report.quantizers[0]
    assert f"{report.kl:.4g} nats" in text and worst.name in text and "KL removed" in text
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == report.to_dict()
    report.plot(tmp_path / "report.svg")
    drawing = (tmp_path / "report.svg").read_text("utf-8")
    assert drawing.startswith("<svg") and worst.name[-40:] in drawing
    with pytest.raises(ValueError, match=r"must end in \.svg.*got .*\.png"):
        report.plot(tmp_path / "report.png")
    with pytest.raises(KeyError):
        report["nothing"]


def test_what_cannot_be_analyzed_is_said(tiny_model: Any) -> None:
    sim = torch_sim(tiny_model)
    with pytest.raises(ValueError, match="top_k must be 0 or more, got -1"):
        analyze(sim, [IDS], top_k=-1)
    with pytest.raises(ValueError, match=r"outputs \[..., classes\].*shape \[4\]"):
        analyze(sim, [IDS], forward_fn=lambda model, ids: model(ids).sum((1, 2)), progress=False)
    adaptor = adapt(sim)
    adaptor.reset_encodings(list(adaptor.activation_quantizers())[:1])
    with pytest.raises(ValueError, match=r"quantizers with ranges are required.*compute_encodings"):
        analyze(sim, [IDS], progress=False)
