"""Files are read bounded and validated, and each error names the file."""

from __future__ import annotations

import pathlib

import pytest
import torch
from safetensors.torch import save_file

from aimet_ext.errors import CorruptFileError, MissingExtraError
from aimet_ext.files.reading import TensorFile, naming, read_json, read_safetensors, read_text

READERS = [read_json, read_safetensors, read_text]


@pytest.mark.parametrize("read", READERS)
def test_places_without_a_file(tmp_path: pathlib.Path, read) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        read(tmp_path / "absent")
    for path in ("/dev/zero", tmp_path):
        with pytest.raises(CorruptFileError, match="a regular file is required"):
            read(path)
    (tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(CorruptFileError, match="link: a regular file"):
        read(tmp_path / "link")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b'{"a": ', "not JSON"),
        (b"\xff\xff", "not JSON"),
        (b"[1]", "does not hold what it must"),
        (b'{"a": "\\ud800"}', "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
    ],
)
def test_damaged_json(tmp_path: pathlib.Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=rf"a\.json.*{message}"):
        read_json(path)


def test_tensors_are_read_one_by_one(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(8, 2), "y": torch.zeros(3)}, path, {"note": "1"})
    file = TensorFile(path)
    assert dict(file).keys() == {"x", "y"} and file.metadata == {"note": "1"} and len(file) == 2
    assert "x" in file and "z" not in file and file.get("z") is None
    first = file["x"]
    first.zero_()
    assert torch.equal(file["x"], torch.ones(8, 2))


def test_damaged_tensors(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(8)}, path, {"note": "1"})
    tensors, metadata = read_safetensors(path)
    assert torch.equal(tensors["x"], torch.ones(8)) and metadata == {"note": "1"}
    content = path.read_bytes()
    for length in range(0, len(content), 5):
        path.write_bytes(content[:length])
        with pytest.raises(CorruptFileError, match=r"a\.safetensors"):
            read_safetensors(path)
    path.write_bytes(content[:8].replace(content[:1], b"\xff") + content[8:])
    with pytest.raises(CorruptFileError, match=r"a\.safetensors"):
        read_safetensors(path)


@pytest.mark.parametrize("error", [KeyError("k"), TypeError("t"), RuntimeError("r"), IndexError()])
def test_whatever_content_leads_to_names_the_file(tmp_path: pathlib.Path, error: Exception) -> None:
    raised = pytest.raises(CorruptFileError, match=rf"a.json: .*\({type(error).__name__}: ")
    with raised as found, naming(tmp_path / "a.json"):
        raise error
    assert found.value.__cause__ is error


def test_errors_about_something_else_go_through(tmp_path: pathlib.Path) -> None:
    for error in (MemoryError(), MissingExtraError(), FileNotFoundError(), ZeroDivisionError()):
        with pytest.raises(type(error)) as raised, naming(tmp_path, ZeroDivisionError):
            raise error
        assert raised.value is error
    unnamed = pytest.raises(CorruptFileError, match=r"a\.json: field x is no number$")
    with unnamed, naming(tmp_path / "a.json"):
        raise CorruptFileError("field x is no number")
