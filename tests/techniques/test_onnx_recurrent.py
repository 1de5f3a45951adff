"""Layer-wise techniques on the weights of LSTM, GRU and RNN nodes in ONNX simulations."""

from __future__ import annotations

import copy
import itertools
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from recurrent_reference import run_by_steps
from torch import Tensor

import aimet_ext
from aimet_ext.integrity.check import check_integrity
from aimet_ext.techniques import gptq

aimet_onnx = pytest.importorskip("aimet_onnx")
onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # AIMET uses what it deprecated

STEPS, BATCH, IN, HIDDEN = 10, 8, 12, 16
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
MIX = np.random.default_rng(9).standard_normal((IN, IN)) * 0.15


def values(*shape: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def walks(*seeds: int) -> list[dict[str, Any]]:
    """Sequences whose steps resemble each other."""
    return [
        {
            "x": (values(STEPS, BATCH, IN, seed=seed).cumsum(0) @ MIX).astype(np.float32),
            "h0": values(2, BATCH, HIDDEN, seed=seed + 1) / 4,
        }
        for seed in seeds
    ]


DATA, HELD_OUT = walks(*range(8)), walks(*range(100, 104))


def model_of(
    kind: str, direction: str = "bidirectional", *, states: bool = True, **given: Any
) -> Any:
    """A recurrent node and a linear layer behind it, ``x [steps, batch, in]`` to ``y``."""
    count = 2 if direction == "bidirectional" else 1
    out = GATES[kind] * HIDDEN
    stored = {
        "w": values(count, out, IN) / 4,
        "r": values(count, out, HIDDEN, seed=2) / 5,
        "b": values(count, 2 * out, seed=3) / 8,
        "v": values(count * HIDDEN, 6, seed=4) / 4,
        "to": np.array([STEPS, BATCH, count * HIDDEN]),
    }
    initial = ["", "first"] if states else []
    nodes = [
        ("Slice", ["h0", *_ends(stored, 0, count)], ["first"], {}),
        (
            kind,
            ["x", "w", "r", "b", *initial],
            ["h"],
            {"hidden_size": HIDDEN, "direction": direction, **given},
        ),
        ("Transpose", ["h"], ["t"], {"perm": [0, 2, 1, 3]}),
        ("Reshape", ["t", "to"], ["f"], {}),
        ("MatMul", ["f", "v"], ["y"], {}),
    ]
    made = [
        helper.make_node(operator, reads, writes, f"{operator.lower()}_node", **settings)
        for operator, reads, writes, settings in nodes[0 if states else 1 :]
    ]
    inputs = {"x": [STEPS, BATCH, IN], **({"h0": [2, BATCH, HIDDEN]} if states else {})}
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [STEPS, BATCH, 6])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _ends(stored: dict[str, Any], begin: int, end: int) -> list[str]:
    stored |= {"begin": np.array([begin]), "end": np.array([end]), "axis": np.array([0])}
    return ["begin", "end", "axis"]


def fed(model: Any, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {value.name for value in model.graph.input}
    return [{name: batch[name] for name in batch if name in names} for batch in batches]


def build(model: Any, bits: int = 4) -> Any:
    """A simulation of weights alone."""
    sim = aimet_onnx.QuantizationSimModel(
        copy.deepcopy(model), param_type=aimet_onnx.qtype.int(bits), config_file="htp_v81"
    )
    for name, quantizer in sim.qc_quantize_op_dict.items():
        quantizer.enabled = quantizer.enabled and name in sim.param_names
    sim.compute_encodings(fed(model, DATA))
    return sim


def outputs(sim: Any, model: Any) -> Any:
    return np.concatenate([sim.session.run(None, feed)[0] for feed in fed(model, HELD_OUT)])


def error(sim: Any, model: Any) -> float:
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    exact = np.concatenate([session.run(None, feed)[0] for feed in fed(model, HELD_OUT)])
    return float(np.square(outputs(sim, model) - exact).sum())


def stored(sim: Any, name: str) -> Tensor:
    found = next(t for t in sim.model.model.graph.initializer if t.name == name)
    return torch.tensor(numpy_helper.to_array(found))


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "LSTM, backward": ("LSTM", {"direction": "reverse", "states": False}),
    "GRU": ("GRU", {}),
    "GRU, reset behind": ("GRU", {"linear_before_reset": 1}),
    "GRU, forward": ("GRU", {"direction": "forward", "states": False}),
    "RNN": ("RNN", {"activations": ["Tanh", "Tanh"]}),
}


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("name", ["gptq", "seq_mse"])
@pytest.mark.parametrize("form", ["LSTM", "GRU", "GRU, reset behind"])
def test_techniques_beat_rounding_on_sequences_not_seen(form: str, name: str, bits: int) -> None:
    kind, settings = FORMS[form]
    model = model_of(kind, **settings)
    sim = build(model, bits)
    plain = error(sim, model)
    report = getattr(aimet_ext, f"apply_{name}")(sim, fed(model, DATA), progress=False)
    assert report.skipped == {}
    node = f"{kind.lower()}_node"
    assert [layer.name for layer in report.layers] == [f"{node}.W", f"{node}.R", "matmul_node"]
    after = error(sim, model)
    assert after < 0.85 * plain
    sim.compute_encodings(fed(model, DATA))
    assert error(sim, model) == after  # ranges stay, values are on them


def rows_by_steps(
    kind: str, w: Tensor, r: Tensor, b: Tensor, batches: list[dict[str, Any]], given: dict[str, Any]
) -> list[list[Tensor]]:
    """What each gate of ``R`` multiplies by direction, ``[rows, hidden]``, in float64."""
    # From ONNX's order of gates to that of the reference.
    order = {"LSTM": [0, 2, 3, 1], "GRU": [1, 0, 2], "RNN": [0]}[kind]
    mode = {"RNN": "RNN_TANH"}.get(kind, kind)

    def sorted_gates(t: Tensor) -> Tensor:
        return torch.cat([t.double().chunk(len(order))[gate] for gate in order])

    found = []
    for direction in range(len(w)):
        backward = given.get("direction") == "reverse" or direction == 1
        matrices = [sorted_gates(t[direction]) for t in (w, r)]
        biases = [sorted_gates(half) for half in b[direction].chunk(2)]
        seen: list[list[Tensor]] = [[], []]
        for batch in batches:
            x = torch.tensor(batch["x"]).double()
            h = torch.tensor(batch["h0"][direction]).double()
            h = h if given.get("states", True) else torch.zeros_like(h)
            _, before, candidates = run_by_steps(
                mode,
                x.flip(0) if backward else x,
                h,
                torch.zeros_like(h),
                *matrices,
                *biases,
                reset_before=kind == "GRU" and not given.get("linear_before_reset"),
            )
            seen[0] += before
            seen[1] += candidates
        states, candidates = (torch.cat(part) if part else None for part in seen)
        gates = [states] * len(order)
        if candidates is not None:
            gates[-1] = candidates  # the last one in both orders
        found.append(gates)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_the_report_is_the_error_on_the_rows_of_a_loop(form: str) -> None:
    """In the float stream, and in the quantized one behind the W that was decided before."""
    kind, given = FORMS[form]
    model = model_of(kind, **given)
    for symmetry in ("symfp", "symqt"):
        sim = build(model, 3)
        floats = {name: stored(sim, name) for name in ("w", "r", "b")}
        report = aimet_ext.apply_gptq(sim, fed(model, DATA), inp_symmetry=symmetry, progress=False)
        by_name = {layer.name.rpartition(".")[2]: layer for layer in report.layers}
        lost = (stored(sim, "w") - floats["w"]).double().flatten(0, 1)
        x = torch.cat([torch.tensor(batch["x"]).double().flatten(0, 1) for batch in DATA])
        loss = float((x @ lost.T).square().sum(1).mean())
        assert by_name["W"].loss_after == pytest.approx(loss, rel=1e-3)
        w = floats["w"] if symmetry == "symfp" else stored(sim, "w")
        rows = rows_by_steps(kind, w, floats["r"], floats["b"], DATA, given)
        lost = (stored(sim, "r") - floats["r"]).double()
        loss = 0.0
        for direction, gates in enumerate(rows):
            for part, read in zip(lost[direction].chunk(len(gates)), gates, strict=True):
                loss += float((read @ part.T).square().sum(1).mean())
        assert by_name["R"].loss_after == pytest.approx(loss, rel=1e-3)
        assert by_name["R"].loss_after < 0.9 * by_name["R"].loss_nearest
        assert by_name["R"].tokens == len(DATA) * STEPS * BATCH
        assert (by_name["R"].rows, by_name["R"].inputs) == (lost.shape[0] * lost.shape[1], HIDDEN)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_graph_is_decided_as_the_model_that_it_was_written_of(
    kind: str, tmp_path: pathlib.Path
) -> None:
    """Two stacked layers in one direction, whose weights have a range of their own in both."""
    pytest.importorskip("aimet_torch")
    from aimet_torch import QuantizationSimModel

    torch.manual_seed(0)
    rnn = getattr(torch.nn, kind)(IN, HIDDEN, num_layers=2).eval()
    inputs = [torch.tensor(batch["x"]) for batch in DATA]
    torch.onnx.export(rnn, (inputs[0],), tmp_path / "m.onnx", dynamo=False, input_names=["x"])
    theirs = build(onnx.load(tmp_path / "m.onnx"), 3)
    ours = QuantizationSimModel(rnn, inputs[0], default_param_bw=3, default_output_bw=16)
    reports = [
        aimet_ext.apply_gptq(sim, data, progress=False)
        for sim, data in ((ours, inputs), (theirs, fed(theirs.model.model, DATA)))
    ]
    losses = [[layer.loss_after for layer in report.layers] for report in reports]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_decided_weights_are_what_is_exported(tmp_path: pathlib.Path) -> None:
    model = model_of("GRU")
    data = fed(model, DATA)
    sim = aimet_onnx.QuantizationSimModel(model, param_type="int4", config_file="htp_v81")
    aimet_ext.apply_gptq(sim, data, progress=False)
    sim.compute_encodings(data)
    for name in ("w", "r"):
        quantizer, value = sim.qc_quantize_op_dict[name], stored(sim, name).numpy()
        assert np.array_equal(quantizer.quantize_dequantize(value), value)
        assert quantizer.is_encoding_frozen() and len(np.unique(value)) <= 16
    aimet_ext.export(sim, tmp_path / "out", "m", data[0], progress=False)
    loaded = aimet_ext.load(tmp_path / "out", progress=False)
    assert np.array_equal(outputs(loaded, model), outputs(sim, model))
    assert check_integrity(tmp_path / "out") == []


def test_a_weight_of_more_bits_is_on_its_grid() -> None:
    """It is not decided, and the states are those that it makes."""
    model = model_of("LSTM")
    sim = build(model, 3)
    sim.qc_quantize_op_dict["w"].set_precision(aimet_onnx.qtype.int(5))
    sim.compute_encodings(fed(model, DATA))
    floats = {name: stored(sim, name) for name in ("w", "r", "b")}
    on_grid = torch.tensor(sim.qc_quantize_op_dict["w"].quantize_dequantize(floats["w"].numpy()))
    report = aimet_ext.apply_gptq(
        sim, fed(model, DATA), max_bitwidth=4, inp_symmetry="symqt", progress=False
    )
    assert report.skipped == {"lstm_node.W": "5 bits, max_bitwidth is 4"}
    rows = rows_by_steps("LSTM", on_grid, floats["r"], floats["b"], DATA, {})
    lost = (stored(sim, "r") - floats["r"]).double()
    squares = (rows[d][0] @ lost[d].T for d in range(2))
    loss = sum(float(part.square().sum(1).mean()) for part in squares)
    assert report.layers[0].loss_after == pytest.approx(loss, rel=1e-5)
    assert torch.equal(stored(sim, "w"), floats["w"])


def test_nodes_and_their_weights_can_be_left_out() -> None:
    model = model_of("LSTM")
    for excluded, left in (("lstm_node", 1), ("lstm_node.R", 2), ("*_node.W", 2)):
        report = aimet_ext.apply_gptq(
            build(model), fed(model, DATA), modules_to_exclude=[excluded], progress=False
        )
        assert len(report.layers) == left


def test_a_stored_initial_state_is_no_weight() -> None:
    """It is on its grid, as exporters store it, and nothing that a technique would decide."""
    model = model_of("LSTM", states=False)
    model.graph.initializer.append(numpy_helper.from_array(values(2, BATCH, HIDDEN), "zero"))
    model.graph.node[0].input.extend(["", "zero", "zero"])
    sim = build(model)
    assert sim.qc_quantize_op_dict["zero"] is not None
    report = aimet_ext.apply_gptq(sim, fed(model, DATA), progress=False)
    assert not report.skipped and len(report.layers) == 3


def test_what_cannot_be_decided_is_named() -> None:
    clipped = model_of("GRU", clip=3.0)
    report = aimet_ext.apply_gptq(build(clipped), fed(clipped, DATA), progress=False)
    assert report.skipped == {
        "gru_node": "a GRU with linear_before_reset=0 must be without clip",
    }
    lengths = model_of("LSTM", states=False)
    lengths.graph.initializer.append(
        numpy_helper.from_array(np.full(BATCH, STEPS, np.int32), "lens")
    )
    lengths.graph.node[0].input.append("lens")
    report = aimet_ext.apply_gptq(build(lengths), fed(lengths, DATA), progress=False)
    assert "sequence_lens" in report.skipped["lstm_node"]
    assert [layer.name for layer in report.layers] == ["matmul_node"]


def twice(model: Any) -> Any:
    """The same weights in a second node, which reads the sequence scaled."""
    model = copy.deepcopy(model)
    nodes, graph = list(model.graph.node), model.graph
    again = copy.deepcopy(nodes[0])
    again.name, again.input[0], again.output[0] = "again", "scaled", "h2"
    graph.initializer.append(numpy_helper.from_array(np.float32(0.5).reshape(1), "half"))
    more = [
        helper.make_node("Mul", ["x", "half"], ["scaled"], "mul"),
        again,
        helper.make_node("Add", ["h", "h2"], ["both"], "add"),
    ]
    nodes[1].input[0] = "both"
    del graph.node[:]
    graph.node.extend([nodes[0], *more, *nodes[1:]])
    return model


def test_two_nodes_with_the_same_weights_are_one_layer() -> None:
    """Decided on the inputs of both; one whose weight something else reads too is left alone."""
    model = twice(model_of("LSTM", states=False))
    sim = build(model, 3)
    plain = error(sim, model)
    report = aimet_ext.apply_gptq(sim, fed(model, DATA), progress=False)
    tokens = {layer.name: layer.tokens for layer in report.layers}
    once = len(DATA) * STEPS * BATCH
    assert tokens == {"lstm_node.W": 2 * once, "lstm_node.R": 2 * once, "matmul_node": once}
    assert error(sim, model) < 0.8 * plain
    other = twice(model_of("LSTM", states=False))
    other.graph.node[2].attribute.append(helper.make_attribute("clip", 2.0))
    report = aimet_ext.apply_gptq(build(other), fed(other, DATA), progress=False)
    assert report.skipped == {
        "lstm_node": "its weight 'w' is read by again too",
        "again": "its weight 'w' is read by lstm_node too",
    }


def test_a_failure_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("GRU")
    sim = build(model)
    before = sim.model.model.SerializeToString(deterministic=True)
    output = outputs(sim, model)
    decide, count = gptq.GPTQ.decide, itertools.count()

    def failing(solver: Any, problem: Any) -> Any:
        if next(count) == 2:
            raise RuntimeError("no more")
        return decide(solver, problem)

    monkeypatch.setattr(gptq.GPTQ, "decide", failing)
    with pytest.raises(RuntimeError, match="no more"):
        aimet_ext.apply_gptq(sim, fed(model, DATA), progress=False)
    assert np.array_equal(outputs(sim, model), output)
    assert sim.model.model.SerializeToString(deterministic=True) == before
    assert not any(q.is_encoding_frozen() for q in sim.qc_quantize_op_dict.values())
