"""Layer-wise techniques on ONNX simulations: what is left behind, all or nothing."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import aimet_ext
from aimet_ext.core.affine import fake_quantize
from aimet_ext.sim.protocol import adapt
from aimet_ext.specs import LPBQ, PerChannel, PerTensor, QSpec

aimet_onnx = pytest.importorskip("aimet_onnx")
onnx = pytest.importorskip("onnx")
onnx_models = pytest.importorskip("onnx_models")
onnx_pairs = pytest.importorskip("onnx_pairs")

GRIDS, MLP = onnx_pairs.GRIDS, onnx_pairs.MLP
onnx_sim, outputs, state_of = onnx_pairs.onnx_sim, onnx_pairs.outputs, onnx_pairs.state_of
encodings = onnx_pairs.encodings
LAYER_WISE = pytest.mark.techniques(where=lambda t: not t.by_blocks)
SEARCHES = pytest.mark.techniques(where=lambda t: not t.by_blocks and t.name != "lpbq")
ROUNDING = pytest.mark.techniques(where=lambda t: t.rounds and not t.by_blocks)


# What is left behind.


@pytest.fixture
def mlp() -> Any:
    return onnx_pairs.PAIRS["perceptron"]()


@ROUNDING
@pytest.mark.parametrize("kind", GRIDS)
def test_rounded_weights_stay_as_they_are(technique: Any, kind: str) -> None:
    """AIMET's own operator leaves them alone, in the session too; biases stay float."""
    pair = onnx_pairs.PAIRS["perceptron"]()
    _, sim = pair.sims(GRIDS[kind])
    settings = {"activation_aware": False} if technique.name == "adaround" else {}
    technique.apply(sim, pair.arguments()[1], **settings)
    adaptor = adapt(sim)
    found = outputs(sim, pair.batches)
    for node in pair.names(onnx_sim(pair.model, {})).values():
        layer = adaptor.layers[node]
        weight = adaptor.graph.array(layer.weight)
        quantizer = sim.qc_quantize_op_dict[layer.weight]
        assert (quantizer.quantize_dequantize(weight) == weight).all()
        assert quantizer.is_encoding_frozen()
    with adaptor.disabled_quantizers():
        for one, two in zip(outputs(sim, pair.batches), found, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    assert sim.aimet_ext_ledger.runs[-1].technique == technique.name


@SEARCHES
def test_activation_quantizers_stay_and_calibration_keeps_what_was_decided(
    technique: Any, mlp: Any
) -> None:
    """AIMET's AdaRound needs them uncalibrated; ours computes in float meanwhile, whatever."""
    spec = QSpec(bitwidth=8, symmetric=False, granularity=PerTensor())
    nodes = mlp.names(onnx_sim(mlp.model, {})).values()
    sims = [onnx_sim(mlp.model, dict.fromkeys(nodes, GRIDS["channel"]), a) for a in (None, spec)]
    data = mlp.arguments()[1]
    sims[1].compute_encodings(data)
    before = {name: encodings(q) for name, q in sims[1].qc_quantize_op_dict.items()}
    names = set(sims[1].activation_names)
    for sim in sims:
        technique.apply(sim, data)
    weights = set(sims[0].qc_quantize_op_dict) - names
    for name in weights:
        one, two = (sim.qc_quantize_op_dict[name] for sim in sims)
        assert encodings(one) == encodings(two)
        assert one.is_encoding_frozen() == two.is_encoding_frozen()
    live = sims[1].qc_quantize_op_dict
    assert all(encodings(live[name]) == before[name] for name in names)
    assert any(live[name].enabled for name in names)
    decided = {name: encodings(live[name]) for name in weights if live[name].enabled}
    sims[1].compute_encodings(data)
    assert all(encodings(live[name]) == kept for name, kept in decided.items())


@LAYER_WISE
def test_a_failure_in_the_middle_leaves_nothing_behind(
    technique: Any, mlp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aimet_ext.techniques.layerwise import loop as layerwise

    _, sim = mlp.sims(GRIDS["channel"])
    before, quantized = state_of(sim), outputs(sim, mlp.batches)
    data = mlp.arguments()[1]
    deploy, calls = layerwise.deploy, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return deploy(*args)

    with monkeypatch.context() as patch:
        patch.setattr(layerwise, "deploy", failing)
        with pytest.raises(KeyboardInterrupt):
            technique.apply(sim, data, **options(technique))
    assert state_of(sim) == before
    assert all(map(torch.equal, outputs(sim, mlp.batches), quantized))
    technique.apply(sim, data, **options(technique))
    assert state_of(sim) != before


def options(technique: Any) -> dict[str, Any]:
    """For LPBQ: blocks that divide the widths."""
    return {"block_size": 8, "layers": [nn.Linear]} if technique.name == "lpbq" else {}


@LAYER_WISE
def test_it_goes_on_from_a_checkpoint(
    technique: Any, mlp: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from aimet_ext.techniques.layerwise import loop as layerwise

    (_, whole), (_, sim) = mlp.sims(GRIDS["channel"]), mlp.sims(GRIDS["channel"])
    data = mlp.arguments()[1]
    technique.apply(whole, data, **options(technique))
    deploy, calls = layerwise.deploy, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("power failure")
        return deploy(*args)

    settings = {**options(technique), "checkpoint_dir": tmp_path}
    with monkeypatch.context() as patch:
        patch.setattr(layerwise, "deploy", failing)
        with pytest.raises(RuntimeError, match="power failure"):
            technique.apply(sim, data, **settings)
    report = technique.apply(sim, data, **settings)
    assert technique.resumed(report) == [True, True, False]
    one, two = state_of(sim), state_of(whole)
    assert {k: v for k, v in one.items() if k != "ledger"} == {
        k: v for k, v in two.items() if k != "ledger"
    }


@SEARCHES
def test_excluded_nodes_by_aimets_name(technique: Any, mlp: Any) -> None:
    _, sim = mlp.sims(GRIDS["channel"])
    nodes = list(mlp.names(sim).values())
    before = state_of(sim)
    report = technique.apply(sim, mlp.arguments()[1], nodes_to_exclude=[nodes[1]])
    assert [layer.name for layer in report.layers] == [nodes[0], nodes[2]]
    weight = adapt(sim).layers[nodes[1]].weight
    after = state_of(sim)
    assert after[weight] == before[weight]
    assert after[f"quantizer {weight}"] == before[f"quantizer {weight}"]
    with pytest.raises(ValueError, match=r"not found: '/9/Gemm'"):
        technique.apply(mlp.sims(GRIDS["channel"])[1], [], nodes_to_exclude=["/9/Gemm"])


@LAYER_WISE
def test_the_ledger_refuses_the_second_time(technique: Any, mlp: Any, tmp_path: Any) -> None:
    _, sim = mlp.sims(GRIDS["channel"])
    data = mlp.arguments()[1]
    kept = copy.deepcopy(data)
    report = technique.apply(sim, data, output_path=tmp_path / "out", **options(technique))
    assert all((a[k] == b[k]).all() for a, b in zip(data, kept, strict=True) for k in a)
    assert (tmp_path / "out" / "report.json").exists()
    assert str(getattr(report, "search", report).layers[0].name) in str(report)
    before = state_of(sim)
    with pytest.raises(ValueError):  # each says it in its own words
        technique.apply(sim, data, **options(technique))
    assert state_of(sim) == before


def test_lpbq_and_adaround_stack(mlp: Any) -> None:
    """AIMET's AdaRound stops at an AssertionError on LPBQ."""
    _, sim = mlp.sims(GRIDS["channel"])
    data = mlp.arguments()[1]
    names = list(mlp.names(sim).values())
    aimet_ext.apply_lpbq(sim, data, 8, layers=names, progress=False)
    grids = {name: adapt(sim).weight_quantizer(name).grid() for name in names}
    report = aimet_ext.apply_adaround(sim, data, 20, progress=False)
    assert [layer.name for layer in report.layers] == names
    for name, grid in grids.items():
        quantizer = adapt(sim).weight_quantizer(name)
        assert quantizer.spec().granularity == LPBQ(8)
        assert torch.equal(quantizer.grid().scale, grid.scale)
        assert torch.equal(fake_quantize(quantizer.weight, grid), quantizer.weight)
    assert [run.technique for run in sim.aimet_ext_ledger.runs] == ["lpbq", "adaround"]


# Data.


@pytest.mark.techniques(where=lambda t: not t.by_blocks and t.from_data)
def test_bad_data_changes_nothing(technique: Any, mlp: Any) -> None:
    _, sim = mlp.sims(GRIDS["channel"])
    before = state_of(sim)
    good = mlp.arguments()[1]
    x = good[0]["x"]
    bad = x.copy()
    bad[3, 2] = float("nan")
    for data, error, text in (
        ([], ValueError, "batch"),
        ([{"z": x}], ValueError, "x"),
        ([{"x": x[:, :5]}], ValueError, "x"),
        ([{"x": x.astype("int64")}], (TypeError, ValueError), "x"),
        ([*good, {"x": bad}], ValueError, "NaN|finite"),
    ):
        with pytest.raises(error, match=text):
            technique.apply(sim, data, **options(technique))
        assert state_of(sim) == before
    with pytest.raises(TypeError, match="forward_fn"):
        technique.apply(sim, good, forward_fn=lambda model, batch: None, **options(technique))
    assert state_of(sim) == before


@pytest.mark.parametrize("form", ["generator", "factory", "loader", "tensors"])
def test_forms_of_data(mlp: Any, form: str) -> None:
    (_, one), (_, two) = mlp.sims(GRIDS["channel"]), mlp.sims(GRIDS["channel"])
    data = mlp.arguments()[1]
    forms = {
        "generator": lambda: (batch for batch in data),
        "factory": lambda: lambda: iter(data),
        "loader": lambda: torch.utils.data.DataLoader(data, batch_size=None),
        "tensors": lambda: mlp.batches,
    }
    aimet_ext.apply_seq_mse(one, data, progress=False)
    aimet_ext.apply_seq_mse(two, forms[form](), progress=False)
    ledgers = [state_of(sim).pop("ledger") is not None for sim in (one, two)]
    assert ledgers == [True, True]
    states = [{k: v for k, v in state_of(sim).items() if k != "ledger"} for sim in (one, two)]
    assert states[0] == states[1]


def test_per_channel_is_what_aimet_has_by_default(mlp: Any) -> None:
    """Any simulation of AIMET will do, not only those that this package built."""
    model = onnx_models.mlp_model(MLP, bias="add")
    sim = aimet_onnx.QuantizationSimModel(model, param_type="int4", activation_type="int16")
    data = mlp.arguments()[1]
    report = aimet_ext.apply_seq_mse(sim, data, progress=False)
    assert len(report.layers) == 3
    adaptor = adapt(sim)
    assert {q.spec().granularity for q in adaptor.weight_quantizers().values()} == {PerChannel()}
    sim.compute_encodings(data)
    assert all(torch.isfinite(y).all() for y in outputs(sim, mlp.batches))


def test_layers_go_by_the_names_of_aimets_fusions() -> None:
    """AIMET fuses a MatMul and the Add of its bias into a node of another name."""
    sim = aimet_onnx.QuantizationSimModel(onnx_models.mlp_model(bias="add"), param_type="int4")
    data = [{"x": np.float32(np.random.default_rng(0).standard_normal((64, 8)))}]
    fused = [name for name in adapt(sim).graph.fused if "fc1" in name or "1" in name]
    report = aimet_ext.apply_gptq(sim, data, nodes_to_exclude=fused[:1], progress=False)
    assert [layer.name for layer in report.layers] == ["fc0", "fc2"]


def test_what_cannot_be_worked_on_is_in_the_report() -> None:
    model = onnx_models.mlp_model(bias="gemm")
    alpha = next(node for node in model.graph.node if node.name == "fc1")
    alpha.attribute.append(onnx.helper.make_attribute("alpha", 2.0))
    sim = aimet_onnx.QuantizationSimModel(model, param_type="int4")
    data = [{"x": np.float32(np.random.default_rng(0).standard_normal((64, 8)))}]
    report = aimet_ext.apply_gptq(sim, data, progress=False)
    assert report.skipped == {"fc1": "Gemm with alpha=1 is required, got 2"}
    assert "fc1" in str(report)
