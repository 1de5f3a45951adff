"""Graphs of unusual forms are exported by default settings, checked, and loaded again."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest

import aimet_ext
from aimet_ext.artifact.hand_off import write_qdq
from aimet_ext.integrity.check import check_integrity

aimet_onnx = pytest.importorskip("aimet_onnx")
onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def values(*shape: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / 3


def tensor(name: str, shape: Any, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def inner(kind: str, reads: list[str], made: str) -> Any:
    return helper.make_node(kind, reads, [made], f"{kind}_{made}")


def branches() -> dict[str, Any]:
    """A weight of its own in one branch, that of the graph around it in the other."""
    own = [numpy_helper.from_array(values(8, 8, seed=7), "u")]
    then = helper.make_graph(
        [inner("MatMul", ["m", "u"], "o1")], "a", [], [tensor("o1", None)], own
    )
    other = helper.make_graph([inner("MatMul", ["m", "w"], "o2")], "b", [], [tensor("o2", None)])
    return {"then_branch": then, "else_branch": other}


def body() -> dict[str, Any]:
    nodes = [
        inner("Identity", ["going"], "goes"),
        inner("MatMul", ["state", "w"], "product"),
        inner("Tanh", ["product"], "next"),
    ]
    takes = [tensor("i", [], TensorProto.INT64), tensor("going", [], TensorProto.BOOL)]
    gives = [tensor("goes", [], TensorProto.BOOL), tensor("next", [4, 8])]
    return {"body": helper.make_graph(nodes, "c", [*takes, tensor("state", [4, 8])], gives)}


# Nodes from m [4, 8] to h [4, 8], what they store, and the opset.
FORMS: dict[str, tuple[list[tuple[Any, ...]], dict[str, Any], int]] = {
    "GRU, both directions": (
        [
            ("Unsqueeze", ["m", "axis"], ["m3"]),
            (
                "GRU",
                ["m3", "g", "r", "gb"],
                ["g4"],
                {"hidden_size": 4, "direction": "bidirectional"},
            ),
            ("Transpose", ["g4"], ["g5"], {"perm": [0, 2, 1, 3]}),
            ("Reshape", ["g5", "to"], ["h"]),
        ],
        {
            "g": values(2, 12, 8),
            "r": values(2, 12, 4, seed=2),
            "gb": values(2, 24, seed=3),
            "axis": np.array([1]),
            "to": np.array([4, 8]),
        },
        17,
    ),
    "If": ([("If", ["yes"], ["h"], branches())], {"yes": np.array(True)}, 17),
    "Loop": (
        [("Loop", ["count", "yes", "m"], ["h"], body())],
        {"count": np.array(2), "yes": np.array(True)},
        17,
    ),
    "Softmax of opset 12 over two axes": (
        [
            ("Reshape", ["m", "to3"], ["m3"]),
            ("Softmax", ["m3"], ["s3"], {"axis": 1}),
            ("Reshape", ["s3", "to"], ["h"]),
        ],
        {"to3": np.array([4, 2, 4]), "to": np.array([4, 8])},
        12,
    ),
    "outputs of zeros": ([("Mul", ["m", "zeros"], ["h"])], {"zeros": np.zeros(8, np.float32)}, 17),
}


def model_of(form: str) -> Any:
    between, stored, opset = FORMS[form]
    rows = 4 if "to" in stored else -1  # as some exporters write a batch of any size
    nodes = [("MatMul", ["x", "w"], ["m"]), *between, ("MatMul", ["h", "v"], ["y"])]
    made = [
        helper.make_node(kind, reads, writes, f"node_{place}", **(rest[0] if rest else {}))
        for place, (kind, reads, writes, *rest) in enumerate(nodes)
    ]
    stored = {**stored, "w": values(8, 8, seed=8), "v": values(8, 6, seed=9)}
    graph = helper.make_graph(
        made,
        "g",
        [tensor("x", [rows, 8])],
        [tensor("y", [rows, 6])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize("form", FORMS)
def test_a_graph_is_exported_behind_a_technique(tmp_path: pathlib.Path, form: str) -> None:
    data = [{"x": values(4, 8, seed=seed)} for seed in range(20, 24)]
    sim = aimet_onnx.QuantizationSimModel(
        model_of(form), param_type="int4", activation_type="int16", config_file="htp_v81"
    )
    report = aimet_ext.apply_gptq(sim, data, progress=False)
    assert {layer.name for layer in report.layers} | set(report.skipped) >= {"node_0"}
    sim.compute_encodings(data)
    manifest = aimet_ext.export(sim, tmp_path / "out", "m", data[0])
    assert "m.qdq.onnx" in manifest["files"]
    loaded = aimet_ext.load(tmp_path / "out")
    for feed in data:
        assert np.array_equal(loaded.session.run(None, feed)[0], sim.session.run(None, feed)[0])
    assert check_integrity(tmp_path / "out") == []


def test_a_free_size_that_is_a_number_becomes_a_qdq_model(tmp_path: pathlib.Path) -> None:
    """Some files write -1 for it; the simulation's own model keeps that."""
    ort = pytest.importorskip("onnxruntime")
    data = [{"x": values(4, 8, seed=20)}]
    sim = aimet_onnx.QuantizationSimModel(model_of("outputs of zeros"), config_file="htp_v81")
    sim.compute_encodings(data)
    path = write_qdq(sim, tmp_path / "m.qdq.onnx")
    for rows in (4, 3):  # of any size
        feed = {"x": data[0]["x"][:rows]}
        (output,) = ort.InferenceSession(str(path)).run(None, feed)
        assert output.shape == (rows, 6)
    assert sim.model.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == -1
