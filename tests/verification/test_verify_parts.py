"""The parts of a verification: windows, layers of a QDQ model, causes, the report."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from aimet_ext.data.feeds import InputSpec, graph_feeds, random_feeds
from aimet_ext.errors import Finding
from aimet_ext.verification.layers import (
    LayerFacts,
    compared_layers,
    culprit,
    dropped_bias,
    known_cause,
    pattern_cause,
)
from aimet_ext.verification.report import (
    LayerCheck,
    Measures,
    StepResult,
    Thresholds,
    TopOne,
    VerifyReport,
    array_sqnr,
    perplexity,
    top_one,
)
from aimet_ext.verification.steps import CpuSession
from aimet_ext.verification.verify import exported_length

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from aimet_ext.onnx.values import read_input_specs  # noqa: E402

helper, numpy_helper = onnx.helper, onnx.numpy_helper

RANDOM = np.random.default_rng(0)


def facts(**fields: Any) -> LayerFacts:
    given = {"name": "l", "nodes": ("l",), "op_type": "MatMul", "tensor": "y", **fields}
    return LayerFacts(**given)


# ------------------------------------------------------------------------------------------ windows


def inputs(**shapes: Sequence[int | str]) -> dict[str, Any]:
    return {name: InputSpec(tuple(shape), torch.int64) for name, shape in shapes.items()}


def test_longer_batches_are_cut_into_windows_in_order() -> None:
    ids = torch.arange(22).reshape(2, 11)
    feeds = graph_feeds([ids], inputs(input_ids=[1, 5]))
    assert [feed["input_ids"].tolist() for feed in feeds] == [
        [[0, 1, 2, 3, 4]],
        [[5, 6, 7, 8, 9]],
        [[11, 12, 13, 14, 15]],
        [[16, 17, 18, 19, 20]],
    ]


def test_windows_are_gathered_to_the_graphs_batch() -> None:
    batches = [torch.full((1, 4), value) for value in (1, 2, 3)]
    feeds = graph_feeds(batches, inputs(input_ids=[2, 4]))
    assert [feed["input_ids"][:, 0].tolist() for feed in feeds] == [[1, 2]]


def test_a_mask_is_cut_alike_and_made_where_there_is_none() -> None:
    taken = inputs(input_ids=[1, 2], attention_mask=[1, 2])
    ids, mask = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 1, 1, 1]])
    masked, whole = graph_feeds([{"input_ids": ids, "attention_mask": mask}], taken)
    assert masked["attention_mask"].tolist() == [[0, 1]]
    assert whole["attention_mask"].tolist() == [[1, 1]]
    assert graph_feeds([ids], taken)[0]["attention_mask"].tolist() == [[1, 1]]


def test_too_short_a_batch_is_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\[1, 8\], got \[1, 4\]"):
        graph_feeds([torch.zeros(1, 4, dtype=torch.long)], inputs(input_ids=[1, 8]))


def test_too_few_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="2 x 4 tokens"):
        graph_feeds([torch.zeros(1, 4, dtype=torch.long)], inputs(input_ids=[2, 4]))


def test_made_up_inputs_are_the_same_each_time_and_need_a_shape() -> None:
    taken = inputs(input_ids=[1, 6], position_ids=[1, 6])
    one, two = (random_feeds(taken, 2, 10) for _ in range(2))
    assert all(
        np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, two, strict=True)
    )
    assert not np.array_equal(one[0]["input_ids"], one[1]["input_ids"])
    assert one[0]["position_ids"].tolist() == [list(range(6))]
    with pytest.raises(ValueError, match="fixed shape"):
        random_feeds(inputs(input_ids=[1, "length"]), 1, 10)


def test_the_exported_length_needs_a_fixed_one(tmp_path: pathlib.Path) -> None:
    for name, shape in {"fixed": [1, 7], "free": [1, "length"]}.items():
        value = helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, shape)
        node = helper.make_node("Identity", ["input_ids"], ["y"])
        graph = helper.make_graph([node], "g", [value], [helper.make_empty_tensor_value_info("y")])
        onnx.save(helper.make_model(graph), str(tmp_path / f"{name}.onnx"))
    assert exported_length(tmp_path / "fixed.onnx") == 7
    assert list(read_input_specs(tmp_path / "fixed.onnx")) == ["input_ids"]
    with pytest.raises(ValueError, match="dynamic axes"):
        exported_length(tmp_path / "free.onnx")


# ------------------------------------------------------------------------------------------ numbers


def test_perplexity_is_exp_of_the_mean_loss_and_skips_what_a_mask_hides() -> None:
    """Uniform logits over n tokens have perplexity n, whatever is hidden."""
    ids, mask = np.array([[1, 2, 3, 0]]), np.array([[0, 1, 1, 1]])
    logits = np.zeros((1, 4, 5), np.float32)
    feed = {"input_ids": ids, "attention_mask": mask}
    assert perplexity([logits], [feed]) == pytest.approx(5)
    logits[0, 0, 2] = 50  # predicts a token whose predecessor is hidden
    assert perplexity([logits], [feed]) == pytest.approx(5)
    logits[0, 1, 3] = 50
    assert perplexity([logits], [feed]) == pytest.approx(math.sqrt(5))
    assert perplexity([logits[0]], [feed]) is None
    assert perplexity([logits], [{"pixels": np.zeros((1, 4), np.float32)}]) is None


def _compare_places(outputs: list[Any], targets: list[Any], feeds: list[dict[str, Any]]) -> TopOne:
    found = top_one(outputs, targets, feeds)
    assert found is not None
    return found


def test_top1_counts_tokens_that_are_real() -> None:
    one, two = np.eye(3, dtype=np.float32)[None], np.eye(3, dtype=np.float32)[None].copy()
    two[0, 0] = [0, 1, 0]
    feeds = [{"input_ids": np.array([[0, 1, 2]]), "attention_mask": np.array([[0, 1, 1]])}]
    assert _compare_places([one], [two], feeds).agreement == 1
    del feeds[0]["attention_mask"]
    assert _compare_places([one], [two], feeds).agreement == pytest.approx(2 / 3)
    assert top_one([one[None]], [two[None]], feeds) is None


def test_near_ties_are_no_fault_and_decided_tokens_are() -> None:
    """Of 128 tokens two are near-ties that noise of 40 dB turns, or two are decided otherwise."""
    generator = np.random.default_rng(0)
    target = generator.normal(size=(1, 128, 50)).astype(np.float32)
    order = np.argsort(target, -1)
    first, second = (np.take_along_axis(target, order[..., -n:][..., :1], -1) for n in (1, 2))
    np.put_along_axis(target, order[..., -1:], np.maximum(first, second + 0.5), -1)
    feeds = [{"input_ids": np.zeros((1, 128), np.int64)}]
    limits = Thresholds()
    for margin, faults in ((0.01, 0), (0.5, 2)):
        close, output = target.copy(), target.copy()
        for token in (3, 70):
            best, next_ = order[0, token, -1], order[0, token, -2]
            close[0, token, best] = close[0, token, next_] + margin
            output[0, token] = close[0, token]
            output[0, token, next_] = close[0, token, best] + 0.01
        places = _compare_places([output], [close], feeds)
        assert places.agreement == pytest.approx(126 / 128)
        assert len(places.beyond(limits.enough_db)) == faults
        assert (faults > limits.flips_allowed(places.tokens)) == bool(faults)


def test_logits_that_are_not_finite_are_no_near_ties() -> None:
    target = np.eye(4, dtype=np.float32)[None]
    feeds = [{"input_ids": np.zeros((1, 4), np.int64)}]
    assert len(_compare_places([np.full_like(target, np.nan)], [target], feeds).beyond(40.0)) == 3
    assert len(_compare_places([np.roll(target, 1, -1)], [target], feeds).beyond(40.0)) == 4


def test_the_flips_that_are_allowed_are_a_share_one_at_least() -> None:
    assert [Thresholds().flips_allowed(n) for n in (10, 128, 300)] == [1, 1, 3]
    assert Thresholds(top1=1).flips_allowed(1000) == 0


def test_the_ratio_of_what_is_not_finite_is_the_worst() -> None:
    target = np.ones((2, 2))
    assert array_sqnr(target, target) == math.inf
    assert array_sqnr(np.full((2, 2), np.nan), target) == -math.inf
    assert array_sqnr([1.1 * target, target], [target, target]) == pytest.approx(
        10 * math.log10(200)
    )


# ------------------------------------------------------------------------------------------ causes


def test_a_dropped_bias_is_told_from_any_other_error() -> None:
    bias = RANDOM.standard_normal(8)
    right = RANDOM.standard_normal((2, 4, 8)) + bias
    layer = facts(bias=bias, bias_type="float32", op_type="MatMul+Add")
    noise = 1e-2 * RANDOM.standard_normal(right.shape)
    cause = dropped_bias(layer, right - bias + noise, right)
    assert cause is not None
    assert "float32" in cause.message
    for wrong in (right + noise, right + bias, right - 3 * bias, -right, 0 * right):
        assert dropped_bias(layer, wrong, right) is None
    assert dropped_bias(facts(), right - bias, right) is None
    assert dropped_bias(facts(bias=bias[:3]), right - bias, right) is None


def test_a_convolutions_bias_lies_along_its_second_axis() -> None:
    bias = RANDOM.standard_normal(3)
    right = RANDOM.standard_normal((1, 3, 5, 3)) + bias[:, None, None]
    layer = facts(bias=bias, bias_type="int32", op_type="Conv")
    assert dropped_bias(layer, right - bias[:, None, None], right) is not None
    assert dropped_bias(layer, right - bias, right) is None


def test_a_fallback_comes_before_other_causes() -> None:
    value = RANDOM.standard_normal((2, 4))
    layer = facts(bits=4, block_size=24, nodes=("a", "b"))
    cause = known_cause(layer, value, value, fallbacks=["b"])
    assert cause is not None
    assert "CPU" in cause.message
    cause = known_cause(layer, value, value)
    assert cause is not None
    assert "block size 24" in cause.message


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (facts(bits=3), "3 bits"),
        (facts(bits=4, block_size=24, lpbq=True), "block size 24"),
        (facts(bits=4, block_size=32, kernel=(3, 3), op_type="Conv"), "3x3 convolution"),
        (facts(bits=4, block_size=32, kernel=(1, 1), op_type="Conv", lpbq=True), "no convolution"),
        (facts(bits=4, block_size=32, lpbq=True, op_type="Gemm", bias_type="float32"), "one oper"),
        (
            facts(bits=4, block_size=32, lpbq=True, op_type="MatMul+Add", fused=True),
            "one operator",
        ),
        (facts(bits=4, block_size=32, op_type="Conv", bias_type="float32"), "bias is float32"),
        (facts(factor_type="uint16"), "product of two activations"),
        (facts(bits=4, block_size=32, op_type="Conv", bias_type="int32"), None),
        (facts(bits=4, block_size=64, lpbq=True), None),
        (facts(bits=4, block_size=32, lpbq=True, op_type="MatMul+Add", bias_type="uint16"), None),
        (facts(bits=8, op_type="Gemm", bias_type="float32"), None),
        (facts(factor_type="int16"), None),
    ],
)
def test_what_htp_does_not_take_is_known_by_its_looks(
    layer: LayerFacts, message: str | None
) -> None:
    cause = pattern_cause(layer)
    assert (cause is None) == (message is None)
    if cause is not None:
        assert message is not None
        assert message in cause.message


def test_the_culprit_is_where_most_is_lost_and_not_where_it_shows() -> None:
    """A mask's -100 hides the error of the scores, which the softmax brings back."""
    tensors = {
        "k": ((), 65.0),
        "other": ((), 5.0),
        "scores": (("k",), 28.0),
        "masked": (("scores",), 50.0),
        "softmax": (("masked",), 21.0),
    }
    layers = [facts(tensor=name, parents=parents) for name, (parents, _) in tensors.items()]
    ratios = [ratio for _, ratio in tensors.values()]
    assert list(tensors)[culprit(layers, ratios, 4)] == "scores"
    assert culprit(layers, ratios, 1) == 1


# ------------------------------------------------------------------------------------------ layers


def quantized(name: str, nodes: list[Any], stored: list[Any], kind: str = "uint16") -> str:
    """Quantize and dequantize a tensor; the name of what its readers read."""
    stored += [
        numpy_helper.from_array(np.float32(0.5), f"{name}_scale"),
        numpy_helper.from_array(np.zeros((), kind), f"{name}_zero"),
    ]
    given = [f"{name}_scale", f"{name}_zero"]
    nodes += [
        helper.make_node("QuantizeLinear", [name, *given], [f"{name}_q"], f"{name}_q"),
        helper.make_node("DequantizeLinear", [f"{name}_q", *given], [f"{name}_dq"], f"{name}_dq"),
    ]
    return f"{name}_dq"


def weight(name: str, value: np.ndarray[Any, Any], nodes: list[Any], stored: list[Any]) -> str:
    stored += [
        numpy_helper.from_array(value, f"{name}_q"),
        numpy_helper.from_array(np.float32(0.25), f"{name}_scale"),
    ]
    nodes.append(
        helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_scale"], [f"{name}_dq"], name)
    )
    return f"{name}_dq"


@pytest.fixture(scope="module")
def qdq() -> Any:
    """Quantized: x · w + b, apart; its product with itself; a Gemm with an int32 bias."""
    nodes: list[Any] = []
    stored: list[Any] = []
    x = quantized("x", nodes, stored)
    w = weight("w", np.ones((4, 4), np.int8), nodes, stored)
    b = weight("b", np.arange(4, dtype=np.int32), nodes, stored)
    nodes.append(helper.make_node("MatMul", [x, w], ["m"], "mat"))
    m = quantized("m", nodes, stored)
    nodes.append(helper.make_node("Add", [b, m], ["a"], "add"))
    a = quantized("a", nodes, stored)
    nodes.append(helper.make_node("Transpose", [a], ["t"], "turn"))
    t = quantized("t", nodes, stored, "int16")
    nodes.append(helper.make_node("MatMul", [a, t], ["s"], "scores"))
    s = quantized("s", nodes, stored)
    nodes.append(helper.make_node("Gemm", [s, w, b], ["g"], "gem"))
    quantized("g", nodes, stored)
    nodes.append(helper.make_node("Mul", [s, s], ["float"], "not quantized"))
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4, 4])
    outputs = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4, 4])
        for name in ("g_dq", "float")
    ]
    graph = helper.make_graph(nodes, "g", [value], outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_layers_of_a_qdq_model(qdq: Any) -> None:
    found = {layer.name: layer for layer in compared_layers(qdq, {"w": "proj"})}
    assert [layer.op_type for layer in compared_layers(qdq, {})] == ["MatMul+Add", "MatMul", "Gemm"]
    linear, scores = found["proj"], found["scores"]
    assert linear.tensor == "g", "a name that two layers share is that of the last one"
    apart = compared_layers(qdq)[0]
    assert (apart.nodes, apart.tensor, apart.bits, apart.fused) == (("mat", "add"), "a", 8, False)
    assert (apart.bias_type, apart.step) == ("int32", 0.5)
    assert apart.bias is not None
    assert apart.bias.tolist() == [0, 0.25, 0.5, 0.75]
    assert (scores.bits, scores.factor_type, scores.parents) == (None, "int16", ("a",))
    assert found["proj"].parents == ("s",)


def test_the_cpu_shows_inner_tensors(qdq: Any, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(qdq, str(path))
    session = CpuSession(path, ["a", "s"])
    x = np.ones((4, 4), np.float32)
    *own, a, s = session.run({"x": x})
    assert len(own) == 2
    assert a[0].tolist() == [1, 1, 1.5, 2], "x w + b = 1 + b, on a grid of halves"
    assert s.shape == (4, 4)
    session.close()


# ------------------------------------------------------------------------------------------ report


def report(**fields: Any) -> VerifyReport:
    return VerifyReport(folder="out", target="htp_v75", backend="HTP simulation", **fields)


def test_one_failed_or_skipped_step_or_finding_is_a_failure() -> None:
    steps = (StepResult(name="files", status="passed"), StepResult(name="outputs", status="passed"))
    finding = Finding("output", "logits", "low", "look")
    assert report(steps=steps).passed
    assert not report(steps=(*steps, StepResult(name="layers", status="not run"))).passed
    failed = report(steps=steps, findings=(finding,))
    assert not failed.passed
    assert str(failed).endswith("FAILED: 1 fault")
    assert report(steps=steps, hints=(finding,)).passed


def test_a_report_is_json_even_where_a_ratio_is_infinite(tmp_path: pathlib.Path) -> None:
    layers = (
        LayerCheck(name="a", node="a", op_type="Add", sqnr_db=math.inf),
        LayerCheck(name="b", node="b", op_type="Add", sqnr_db=-math.inf),
    )
    full = report(layers=layers, measures=Measures(device_sim_db=math.inf, top1=1.0))
    full.save(tmp_path / "r.json")
    read = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert read == full.to_json()
    assert [layer["sqnr_db"] for layer in read["layers"]] == ["Infinity", "-Infinity"]
    assert read["passed"] is True
    assert "100.00%" in str(full)


def test_a_report_says_what_the_sim_was_compared_with() -> None:
    measures = Measures(sim_float_db=20.0, perplexity_float=4.0)
    own, original = (str(report(measures=measures, reference=given)) for given in (False, True))
    assert "sim against quantizers off" in own and "perplexity with quantizers off" in own
    assert "--reference MODEL" in own and "of the original model" not in own
    assert "sim against the original model" in original and "--reference" not in original
    assert "quantizers off" not in original and max(map(len, own.splitlines())) <= 100


def test_thresholds_follow_what_the_sim_loses_itself() -> None:
    asked = Thresholds(margin_db=15, enough_db=40)
    assert asked.output_db(12) == 27
    assert asked.output_db(90) == 40
    assert asked.near_enough(10, 0.5), "less than a step of the grid is nothing"
    assert not asked.near_enough(10, 2)
    assert not asked.near_enough(10, None)
    assert asked.near_enough(26, 100)
