"""The adaptor to aimet_onnx: names, contexts, copies and ways back, and that algorithms run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
aimet_onnx = pytest.importorskip("aimet_onnx")
from onnx import helper, numpy_helper  # noqa: E402
from onnx_models import exported_llama, mlp_model, run_onnx  # noqa: E402

import aimet_ext  # noqa: E402
from aimet_ext.core.affine import fake_quantize  # noqa: E402
from aimet_ext.onnx.shells import insert_module  # noqa: E402
from aimet_ext.sim.onnx.adaptor import OnnxSim  # noqa: E402
from aimet_ext.sim.onnx.blocks import OnnxPart  # noqa: E402
from aimet_ext.sim.onnx.quantizers import live_quantizer  # noqa: E402
from aimet_ext.sim.protocol import adapt, calibrated  # noqa: E402

WIDTHS = (8, 16, 16, 4)


def simulation(model=None, **settings):
    copied = onnx.ModelProto()
    copied.CopyFrom(mlp_model(WIDTHS, bias="add") if model is None else model)
    return aimet_onnx.QuantizationSimModel(
        copied, **{"param_type": "int4", "activation_type": "int8", **settings}
    )


def batches(count: int = 4, rows: int = 32) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [{"x": random.standard_normal((rows, 8)).astype(np.float32)} for _ in range(count)]


@pytest.fixture
def sim():
    return simulation()


@pytest.fixture
def calibrated_sim(sim):
    sim.compute_encodings(batches())
    return sim


def output(sim) -> np.ndarray:
    return sim.session.run(None, batches(1)[0])[0]


def encodings(sim) -> dict[str, list[tuple[float, ...]] | None]:
    return {
        name: None if (found := q.get_encodings()) is None else [(e.min, e.max) for e in found]
        for name, q in sim.qc_quantize_op_dict.items()
    }


# ------------------------------------------------------------------------------ names


def test_layers_stand_in_the_model_under_their_names(sim) -> None:
    adaptor = adapt(sim)
    assert isinstance(adaptor, OnnxSim) and adaptor.sim is sim
    assert list(adaptor.weight_quantizers()) == ["fc0", "fc1", "fc2"]
    for name, quantizer in adaptor.weight_quantizers().items():
        module = adaptor.model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        assert torch.equal(module.weight, quantizer.weight)
        assert module.bias.shape == module.weight.shape[:1]
    assert adaptor.float_parameters("fc0") == {}
    with pytest.raises(ValueError, match=r"a layer of the ONNX model is required, got 'other'"):
        adaptor.weight_quantizer("other")


def test_a_quantizer_that_is_off_is_none(sim) -> None:
    adaptor = adapt(sim)
    sim.qc_quantize_op_dict["fc1.weight"].enabled = False
    assert adaptor.weight_quantizer("fc1") is None
    assert list(adaptor.weight_quantizers()) == ["fc0", "fc2"]
    with pytest.raises(ValueError, match="has none: fc1; leave them out"):
        adaptor.weight_quantizers(["fc0", "fc1"])


def test_folded_weights_have_no_quantizer(calibrated_sim) -> None:
    calibrated_sim.fold_param_quantizers()
    assert adapt(calibrated_sim).weight_quantizers() == {}


def test_the_ledger_and_the_settings_are_on_the_sim(sim) -> None:
    adaptor = adapt(sim)
    assert adaptor.ledger is None and adaptor.settings is None
    adaptor.ledger, adaptor.settings = "ledger", {"a": 1}
    assert (adapt(sim).ledger, adapt(sim).settings) == ("ledger", {"a": 1})


def test_float_weights_are_found_by_name_one_at_a_time(sim) -> None:
    state = adapt(sim).float_state()
    assert len(state) == 6 and sorted(state)[0] == "fc0.bias"
    model = mlp_model(WIDTHS, bias="add")
    for tensor in model.graph.initializer:
        np.testing.assert_array_equal(state[tensor.name], numpy_helper.to_array(tensor))
    assert "fc0_out" not in state


def test_layers_that_share_a_weight_name_each_other() -> None:
    """AIMET itself refuses a weight that an embedding and a linear layer share."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "there"),
        helper.make_node("Transpose", ["w"], ["turned"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["h", "turned"], ["y"], "back"),
    ]
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", 4]) for n in "xy")
    weight = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    graph = helper.make_graph(nodes, "tied", [x], [y], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    adaptor = adapt(simulation(model))
    both = ["there", "back"]
    assert adaptor.shared_weights() == {"there": both, "back": both}
    quantizers = adaptor.weight_quantizers()
    np.testing.assert_array_equal(quantizers["there"].weight, weight.T)
    np.testing.assert_array_equal(quantizers["back"].weight, weight)
    assert quantizers["there"].quantizer is quantizers["back"].quantizer
    data = [{"x": np.ones((3, 4), np.float32)}]
    with pytest.raises(ValueError, match="there and back share one weight"):
        aimet_ext.apply_gptq(adaptor.sim, data, progress=False)


# ------------------------------------------------------------------------------ contexts


def test_quantizers_are_off_in_a_context_and_on_after_it(calibrated_sim) -> None:
    sim, adaptor = calibrated_sim, adapt(calibrated_sim)
    quantized = output(sim)
    expected = run_onnx(mlp_model(WIDTHS, bias="add"), batches(1)[0])[0]
    with adaptor.disabled_quantizers():
        np.testing.assert_allclose(output(sim), expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(KeyError), adaptor.disabled_quantizers():
            raise KeyError
        assert not any(q.enabled for q in sim.qc_quantize_op_dict.values())
    np.testing.assert_array_equal(output(sim), quantized)


def test_some_quantizers_stay_on(calibrated_sim) -> None:
    adaptor, every = adapt(calibrated_sim), calibrated_sim.qc_quantize_op_dict

    def on() -> set[str]:
        return {name for name, quantizer in every.items() if quantizer.enabled}

    weights = {"fc0.weight", "fc1.weight", "fc2.weight"}
    before = on()
    with adaptor.disabled_quantizers(activations=False):
        assert on() == before - weights
    with adaptor.disabled_quantizers(weights=False):
        assert on() == weights
    with adaptor.disabled_quantizers(keep=["fc1"]):
        assert on() == {"fc1.weight"}
    with adaptor.disabled_quantizers("fc0", activations=False):
        assert on() == before - {"fc0.weight"}
    assert on() == before


def test_the_session_follows_the_weights_at_the_end_of_the_context(calibrated_sim) -> None:
    sim, adaptor = calibrated_sim, adapt(calibrated_sim)
    before, session = output(sim), sim.session
    with adaptor.preserved_state():
        pass
    assert sim.session is session  # nothing changed
    with adaptor.preserved_state():
        quantizer = adaptor.weight_quantizers()["fc2"]
        quantizer.set_weight(torch.zeros_like(quantizer.weight))
        np.testing.assert_array_equal(output(sim), before)
    assert np.abs(output(sim) - before).max() > 0.1
    bias = adaptor.graph.array("fc2.bias")
    with adaptor.disabled_quantizers():
        np.testing.assert_allclose(output(sim), np.tile(bias, (32, 1)), rtol=1e-6)


def test_weights_are_written_after_aimet_rebuilt_its_nodes(calibrated_sim) -> None:
    sim, adaptor = calibrated_sim, adapt(calibrated_sim)
    quantizer = adaptor.weight_quantizers()["fc2"]
    sim.to_onnx_qdq()
    sim._rebuild_session()
    with adaptor.preserved_state():
        quantizer.set_weight(torch.zeros_like(quantizer.weight))
    np.testing.assert_array_equal(adapt(sim).weight_quantizers()["fc2"].weight, 0)
    with adaptor.disabled_quantizers():
        assert np.ptp(output(sim), axis=0).max() == 0


def test_ranges_for_the_while_are_gone_afterwards(sim) -> None:
    adaptor = adapt(sim)
    quantizers = adaptor.weight_quantizers()
    quantizers["fc0"].calibrate()
    own = quantizers["fc0"].grid().scale
    with calibrated([quantizers["fc0"], quantizers["fc1"]]):
        assert quantizers["fc1"].initialized and not quantizers["fc2"].initialized
    assert not quantizers["fc1"].initialized
    assert torch.equal(quantizers["fc0"].grid().scale, own)
    output(sim)  # AIMET takes the quantizer without a range as it was when it built it
    sim.compute_encodings(batches())
    assert quantizers["fc1"].initialized


def test_dropped_ranges_are_filled_by_the_next_calibration(calibrated_sim) -> None:
    sim, adaptor = calibrated_sim, adapt(calibrated_sim)
    found = adaptor.activation_quantizers()
    assert set(found) >= {"x", "relu0_out"} and not set(found) & set(sim.param_names)
    assert set(adaptor.activation_quantizers("fc1")) <= {"relu0_out", "fc1_out"}
    before = encodings(sim)
    found["x"].freeze_encodings()
    assert adaptor.reset_encodings(["x", "relu0_out"]) == ["x", "relu0_out"]
    assert adaptor.reset_encodings(["x"]) == []
    assert encodings(sim)["x"] is None
    sim.compute_encodings(batches())
    assert encodings(sim) == before


# ------------------------------------------------------------------------------ copies


@pytest.mark.parametrize("name", ["fc1", ""])
def test_a_snapshot_is_put_back_whole(calibrated_sim, name) -> None:
    sim, adaptor = calibrated_sim, adapt(calibrated_sim)
    quantizer = adaptor.weight_quantizers()["fc1"]
    quantizer.freeze()
    grid, weight, before, known = quantizer.grid(), quantizer.weight, output(sim), encodings(sim)
    tensors, meta = adaptor.snapshot(name)
    meta = json.loads(json.dumps(meta))
    quantizer.freeze(False)
    quantizer.set_scale(grid.scale * 2)
    quantizer.set_weight(weight * 2)
    with adaptor.preserved_state():
        adaptor.restore(name, tensors, meta)
    assert torch.equal(quantizer.weight, weight) and quantizer.frozen
    assert torch.equal(quantizer.grid().scale, grid.scale)
    assert encodings(sim) == known
    np.testing.assert_array_equal(output(sim), before)


def test_a_snapshot_without_weights_leaves_them_alone(calibrated_sim) -> None:
    adaptor = adapt(calibrated_sim)
    quantizer = adaptor.weight_quantizers()["fc1"]
    tensors, meta = adaptor.snapshot("fc1", weights=False)
    changed = quantizer.weight * 2
    quantizer.set_weight(changed)
    adaptor.restore("fc1", tensors, meta)
    assert torch.equal(quantizer.weight, changed)
    assert all("value" not in name for name in tensors)


# ------------------------------------------------------------------------------ blocks in torch


class _Doubled(nn.Module):
    """A block with a parameter, whose tensors may be watched."""

    observer = None

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4, 16), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = 2 * x
        return y if self.observer is None else self.observer("relu0_out", y)


def test_a_part_has_parameters_and_is_watched(calibrated_sim) -> None:
    adaptor = adapt(calibrated_sim)
    block, calls = _Doubled(), []
    insert_module(adaptor.model, "blocks.0", block)
    adaptor.parts["blocks.0"] = OnnxPart(
        layers={"role": adaptor.layers["fc2"]},
        stored=["fc2.weight"],
        tensors=["relu0_out"],
        commit=lambda: calls.append("commit"),
        reload=lambda: calls.append("reload"),
    )
    assert adaptor.model.get_submodule("blocks.0") is block
    assert list(adaptor.float_parameters("blocks.0")) == ["weight"]
    quantizer = adaptor.weight_quantizer("blocks.0.role")
    assert quantizer is not None
    assert torch.equal(quantizer.weight, adaptor.weight_quantizers()["fc2"].weight)
    x = torch.linspace(0, 3, 7)
    assert adaptor.tensor_ranges("blocks.0", lambda: block(x)) == {"relu0_out": (0.0, 6.0)}
    with adaptor.live_activations("blocks.0"):
        assert len(block(torch.linspace(0, 3, 1000)).unique()) == 256
    assert torch.equal(block(x), 2 * x)
    adaptor.commit("blocks.0")
    tensors, meta = adaptor.snapshot("blocks.0")
    adaptor.restore("blocks.0", tensors, meta)
    assert calls == ["commit", "reload"]
    with pytest.raises(ValueError, match="a decoder block of the ONNX model is required"):
        adaptor.tensor_ranges("fc0", lambda: None)


@pytest.mark.parametrize("symmetric", [False, True])
def test_live_ranges_are_those_that_calibration_would_set(sim, symmetric) -> None:
    quantizer = sim.qc_quantize_op_dict["x"]
    quantizer.use_symmetric_encodings = symmetric
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) + 1
    quantizer.reset_encoding_stats()
    quantizer.update_encoding_stats(x.numpy())
    quantizer.compute_encodings()
    expected = torch.from_numpy(quantizer.quantize_dequantize(x.numpy()))
    step = quantizer.get_encodings()[0].delta
    difference = (live_quantizer(quantizer)(x) - expected).abs()
    assert difference.max() <= step * 1.001
    assert (difference > step / 100).float().mean() < 0.01


# ------------------------------------------------------------------------------ algorithms


def test_a_forward_fn_has_no_place(sim) -> None:
    with pytest.raises(TypeError, match="forward_fn must be left out for an ONNX simulation"):
        aimet_ext.apply_gptq(sim, batches(), forward_fn=lambda model, batch: model(batch))


@pytest.mark.parametrize("technique", ["apply_gptq", "apply_seq_mse", "apply_adaround"])
def test_techniques_decide_every_layer_and_what_they_wrote_is_what_aimet_computes(
    technique,
) -> None:
    model = exported_llama().model
    random = np.random.default_rng(0)
    data = [
        {
            "input_ids": random.integers(0, 64, (2, 12)),
            "attention_mask": np.ones((2, 12), np.int64),
        }
        for _ in range(3)
    ]
    sim = simulation(model, activation_type="int16")
    settings = {"num_iterations": 100} if technique == "apply_adaround" else {}
    report = getattr(aimet_ext, technique)(sim, data, progress=False, **settings)
    adaptor = adapt(sim)
    quantizers = adaptor.weight_quantizers()
    assert {layer.name for layer in report.layers} == set(quantizers)
    assert len(quantizers) == 2 * 7 + 1
    assert sum(r.loss_after for r in report.layers) < sum(r.loss_nearest for r in report.layers)
    grids = {}
    for name, quantizer in quantizers.items():
        assert quantizer.frozen
        grids[name] = quantizer.grid().scale
        rounded = quantizer.quantizer.quantize_dequantize(
            adaptor.graph.array(quantizer.layer.weight)
        )
        ours = fake_quantize(quantizer.weight, quantizer.grid())
        np.testing.assert_array_equal(ours.T if quantizer.layer.transposed else ours, rounded)
    sim.compute_encodings(data)
    assert all(torch.equal(q.grid().scale, grids[name]) for name, q in quantizers.items())
    logits = run_onnx(model, data[0])[0]
    assert np.abs(sim.session.run(None, data[0])[0] - logits).max() < np.abs(logits).max()
    with pytest.raises(ValueError, match="applied"):
        getattr(aimet_ext, technique)(sim, data, progress=False, **settings)


def test_a_run_that_fails_leaves_no_trace(calibrated_sim, monkeypatch) -> None:
    from aimet_ext.techniques.layerwise import loop as layerwise

    sim, before, known = calibrated_sim, output(calibrated_sim), encodings(calibrated_sim)
    weights = {name: tensor.clone() for name, tensor in adapt(sim).float_state().items()}
    deploy, calls = layerwise.deploy, []

    def failing(*args):
        calls.append(args[0].name)
        outcome = deploy(*args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return outcome

    monkeypatch.setattr(layerwise, "deploy", failing)
    with pytest.raises(KeyboardInterrupt):
        aimet_ext.apply_gptq(sim, batches(), progress=False)
    assert calls == ["fc0", "fc1"]
    adaptor = adapt(sim)
    assert adaptor.ledger is None and encodings(sim) == known
    assert not any(q.frozen for q in adaptor.weight_quantizers().values())
    for name, tensor in adaptor.float_state().items():
        assert torch.equal(tensor, weights[name])
    np.testing.assert_array_equal(output(sim), before)


def test_excluded_nodes_are_left_alone(sim) -> None:
    adaptor = adapt(sim)
    before = adaptor.weight_quantizers()["fc1"].weight
    report = aimet_ext.apply_gptq(sim, batches(), nodes_to_exclude=["fc1"], progress=False)
    assert [layer.name for layer in report.layers] == ["fc0", "fc2"]
    assert torch.equal(adaptor.weight_quantizers()["fc1"].weight, before)
    assert not adaptor.weight_quantizers()["fc1"].frozen
