"""Weights that no technique decides are on their grids in the quantized stream."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

import aimet_ext

aimet_onnx = pytest.importorskip("aimet_onnx")
onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def values(*shape: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / 2


def ints(*numbers: int) -> Any:
    return np.array(numbers, np.int64)


# Nodes from x [16, 8] to h [16, 8], and what they store.
FORMS: dict[str, tuple[list[tuple[Any, ...]], dict[str, Any]]] = {
    "ConvTranspose": (
        [
            ("Reshape", ["x", "to3"], ["x3"]),
            ("ConvTranspose", ["x3", "w"], ["h3"], {"auto_pad": "SAME_UPPER"}),
            ("Reshape", ["h3", "to2"], ["h"]),
        ],
        {"w": values(8, 8, 1), "to3": ints(1, 8, 16), "to2": ints(16, 8)},
    ),
    "LSTM with lengths": (
        [
            ("Unsqueeze", ["x", "axis"], ["x3"]),
            ("LSTM", ["x3", "w", "r", "", "lens"], ["h4"], {"hidden_size": 8}),
            ("Reshape", ["h4", "to2"], ["h"]),
        ],
        {
            "w": values(1, 32, 8),
            "r": values(1, 32, 8, seed=2),
            "axis": ints(1),
            "to2": ints(16, 8),
            "lens": np.array([16], np.int32),
        },
    ),
    "GRU with clip": (
        [
            ("Unsqueeze", ["x", "axis"], ["x3"]),
            ("GRU", ["x3", "w", "r"], ["h4"], {"hidden_size": 8, "clip": 4.0}),
            ("Reshape", ["h4", "to2"], ["h"]),
        ],
        {"w": values(1, 24, 8), "r": values(1, 24, 8, seed=2), "axis": ints(1), "to2": ints(16, 8)},
    ),
    "left factor": ([("MatMul", ["w", "x"], ["h"])], {"w": values(16, 16)}),
    "batched": (
        [
            ("Reshape", ["x", "to3"], ["x3"]),
            ("MatMul", ["x3", "w"], ["h3"]),
            ("Reshape", ["h3", "to2"], ["h"]),
        ],
        {"w": values(2, 8, 8), "to3": ints(2, 8, 8), "to2": ints(16, 8)},
    ),
    "Gemm, alpha": ([("Gemm", ["x", "w"], ["h"], {"alpha": 0.5})], {"w": values(8, 8)}),
    "behind a cast": (
        [("Transpose", ["w"], ["t"]), ("Abs", ["t"], ["a"]), ("MatMul", ["x", "a"], ["h"])],
        {"w": values(8, 8)},
    ),
    "table of positions": (
        [("Gather", ["w", "places"], ["p"]), ("Add", ["x", "p"], ["h"])],
        {"w": values(20, 8), "places": ints(*range(16))},
    ),
    "table, columns": (
        [("Gather", ["w", "places"], ["p"], {"axis": 1}), ("MatMul", ["x", "p"], ["h"])],
        {"w": values(8, 12), "places": ints(*range(8))},
    ),
}


def model_of(form: str) -> Any:
    nodes, stored = FORMS[form]
    nodes = [*nodes, ("MatMul", ["h", "v"], ["y"])]
    made = [
        helper.make_node(kind, reads, writes, f"node_{place}", **(rest[0] if rest else {}))
        for place, (kind, reads, writes, *rest) in enumerate(nodes)
    ]
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [16, 8])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [16, w]) for n, w in _OUTPUTS],
        [numpy_helper.from_array(a, n) for n, a in {**stored, "v": values(8, 6, seed=9)}.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8)


_OUTPUTS = (("y", 6), ("h", 8))
DATA = [{"x": np.abs(values(16, 8, seed=seed))} for seed in range(20, 24)]


def sim_of(model: Any) -> Any:
    return aimet_onnx.QuantizationSimModel(
        copy.deepcopy(model), param_type="int4", activation_type="int8", config_file="htp_v81"
    )


def loss_in_the_simulation(model: Any, *, quantized: bool) -> float:
    """What rounding the last weight costs on what the session computes without activations."""
    sim = sim_of(model)
    sim.compute_encodings(DATA)
    weights = {"w", "r"} if quantized else set()
    for name, quantizer in sim.qc_quantize_op_dict.items():
        quantizer.enabled = quantizer.enabled and name in weights
    last = sim.qc_quantize_op_dict["v"]
    last.enabled = True
    weight = numpy_helper.to_array(model.graph.initializer[-1])
    lost = last.quantize_dequantize(weight) - weight
    last.enabled = False
    read = np.concatenate([sim.session.run(None, feed)[1] for feed in DATA])
    return float(np.square(read @ lost).sum(1).mean())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranges", [False, True])
def test_they_are_on_their_grids_as_in_the_session(form: str, ranges: bool) -> None:
    """The loss of the layer behind them is that of AIMET's session, activations off."""
    model = model_of(form)
    on_grid, in_float = (loss_in_the_simulation(model, quantized=q) for q in (True, False))
    assert abs(on_grid / in_float - 1) > 5e-4, "the test can tell both streams apart"
    sim = sim_of(model)
    if ranges:
        sim.compute_encodings(DATA)
    before = {name: q.is_initialized() for name, q in sim.qc_quantize_op_dict.items()}
    report = aimet_ext.apply_gptq(sim, DATA, inp_symmetry="symqt", progress=False)
    (layer,) = report.layers
    assert layer.loss_nearest == pytest.approx(on_grid, rel=1e-4)
    after = {name: q.is_initialized() for name, q in sim.qc_quantize_op_dict.items()}
    assert after == {**before, "v": True}
    both = aimet_ext.apply_gptq(sim_of(model), DATA, inp_symmetry="asym", progress=False)
    assert both.layers[0].loss_nearest != pytest.approx(in_float, rel=1e-4)
