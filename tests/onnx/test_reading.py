"""ONNX files that are damaged are refused by their name, whatever the damage."""

from __future__ import annotations

import pathlib
import shutil

import numpy as np
import pytest

from aimet_ext import CorruptFileError

onnx = pytest.importorskip("onnx")

from aimet_ext.onnx.reading import read_model  # noqa: E402


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    weight = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [value("x", onnx.TensorProto.FLOAT, [1, 64])],
        [value("y", onnx.TensorProto.FLOAT, [1, 64])],
        [weight],
    )
    file = tmp_path / "model.onnx"
    settings = {"save_as_external_data": True, "location": "model.data", "size_threshold": 0}
    onnx.save_model(onnx.helper.make_model(graph), file, **settings)
    return file


def test_a_sound_file(path: pathlib.Path) -> None:
    assert read_model(path).graph.initializer[0].raw_data
    assert not read_model(path, external=False).graph.initializer[0].raw_data


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 64, b"\x08"])
def test_what_is_no_model(path: pathlib.Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"model\.onnx"):
        read_model(path)


def test_a_file_that_was_cut_off(path: pathlib.Path) -> None:
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(CorruptFileError, match=r"model\.onnx"):
            read_model(path)


@pytest.mark.parametrize("fault", ["absent", "short", "elsewhere", "device"])
def test_values_beside_it(path: pathlib.Path, fault: str) -> None:
    data = path.with_name("model.data")
    if fault == "absent":
        data.unlink()
    elif fault == "short":
        data.write_bytes(data.read_bytes()[:100])
    elif fault == "elsewhere":
        (path.parent.parent / "model.data").unlink(missing_ok=True)
        shutil.move(data, path.parent.parent / "model.data")
        model = onnx.load(path, load_external_data=False)
        for entry in model.graph.initializer[0].external_data:
            if entry.key == "location":
                entry.value = "../model.data"
        path.write_bytes(model.SerializeToString())
    else:
        data.unlink()
        data.symlink_to("/dev/zero")
    with pytest.raises(CorruptFileError, match=r"model\.onnx"):
        read_model(path)


def test_no_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        read_model(tmp_path / "model.onnx")
    with pytest.raises(CorruptFileError, match="regular file"):
        read_model("/dev/zero")
