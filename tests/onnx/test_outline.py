"""Files are read without their large values, and written from tensors that nobody copies."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from aimet_ext.errors import CorruptFileError
from aimet_ext.integrity.stored import StoredGraph
from aimet_ext.onnx import writing
from aimet_ext.onnx.reading import read_outline
from aimet_ext.onnx.writing import write_with_values

WIDTH = 64


def arrays() -> dict[str, Any]:
    numbers = np.random.default_rng(0)
    large = {f"large{n}": numbers.normal(size=(WIDTH, WIDTH)).astype(np.float32) for n in range(3)}
    return {"small": numbers.normal(size=4).astype(np.float32), **large}


def model(values: dict[str, Any]) -> onnx.ModelProto:
    """A chain of products by the matrices."""
    nodes = [
        helper.make_node("MatMul", [f"x{n}", f"large{n}"], [f"x{n + 1}"], f"node{n}")
        for n in range(3)
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, WIDTH]) for n in ("x0", "x3")]
    tensors = [numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def test_values_are_read_from_their_places_in_the_file(tmp_path: pathlib.Path) -> None:
    values, path = arrays(), tmp_path / "model.onnx"
    onnx.save(model(values), path)
    found = read_outline(path)
    assert found.ByteSize() < 2000 < path.stat().st_size
    assert [t.name for t in found.graph.initializer] == list(values)
    assert list(found.graph.node) == list(model(values).graph.node)
    graph = StoredGraph(path)
    for name, value in values.items():
        assert np.array_equal(graph.value(name), value)
        assert not graph.constants[name].raw_data or name == "small"
    assert not graph.incomplete


def test_another_name_of_the_file_is_read_too(tmp_path: pathlib.Path) -> None:
    """onnx reads no external data from links."""
    values, path = arrays(), tmp_path / "model.onnx"
    onnx.save(model(values), path)
    for name, link in (("hard", pathlib.Path.hardlink_to), ("soft", pathlib.Path.symlink_to)):
        link(tmp_path / name, path)
        assert np.array_equal(StoredGraph(tmp_path / name).value("large1"), values["large1"])


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_file_cut_short_is_refused(kept: float, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.onnx"
    content = model(arrays()).SerializeToString()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CorruptFileError, match=r"model\.onnx"):
        read_outline(path)


@pytest.mark.parametrize("beside", [False, True])
def test_tensors_are_written_as_onnx_would(
    beside: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view among them, in pieces, inside the file and, where that is too large, beside it."""
    monkeypatch.setattr(writing, "_PIECE", 1 << 10)
    if beside:
        monkeypatch.setattr(writing, "EXTERNAL_LIMIT", 1000)
    values, path = arrays(), tmp_path / "model.onnx"
    given = {name: torch.from_numpy(v) for name, v in values.items() if name != "small"}
    given["large1"] = torch.from_numpy(values["large1"].T.copy()).T
    bare = model(values)
    for tensor in bare.graph.initializer:
        if tensor.name in given:
            tensor.ClearField("raw_data")
    write_with_values(bare, path, given)
    assert path.with_name("model.onnx.data").exists() is beside
    found = onnx.load(path)
    assert list(found.graph.node) == list(bare.graph.node)
    assert {t.name: t.data_type for t in found.graph.initializer} == dict.fromkeys(values, 1)
    for tensor in found.graph.initializer:
        assert np.array_equal(numpy_helper.to_array(tensor), values[tensor.name])
    onnx.checker.check_model(str(path))
