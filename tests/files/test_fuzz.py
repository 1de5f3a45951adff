"""Damaged files end in an error that names them, or in the result of the sound ones."""

from __future__ import annotations

import pathlib
import sys

import pytest

for module in ("aimet_torch", "aimet_onnx", "onnxruntime", "peft"):
    pytest.importorskip(module)

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))
import fuzz  # noqa: E402

SEED, COUNT = 1, 25
KINDS = ("torch", "onnx", "scales", "adapter", "model", "checkpoints")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Sound files of every kind, and what their readers make of them."""
    folder = tmp_path_factory.mktemp("fuzz")
    fuzz.build(folder, KINDS)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind: str, place: pathlib.Path) -> None:
    """The mutations are those of ``benchmarks/fuzz.py --seed 1 --only KIND``, without processes."""
    results = [fuzz.attempt(place, SEED, kind, number, slow=False) for number in range(COUNT)]
    assert [one for one in results if one["outcome"] in fuzz.FAILURES] == []
    assert sum(one["outcome"] == fuzz.REFUSED for one in results) >= COUNT // 3
