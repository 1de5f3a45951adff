"""Damaged files end in an error that names them, or in the result of the sound ones."""

from __future__ import annotations

import pathlib
import random
import sys

import pytest
import torch
from safetensors.torch import save_file

for module in ("aimet_torch", "aimet_onnx", "onnxruntime", "peft"):
    pytest.importorskip(module)

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))
import fuzz  # noqa: E402
import mutations  # noqa: E402

SEED, COUNT = 1, 25
KINDS = ("torch", "onnx", "scales", "rotation", "starts", "llmc", "adapter", "model", "checkpoints")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Sound files of every kind, and what their readers make of them."""
    folder = tmp_path_factory.mktemp("fuzz")
    fuzz.build(folder, KINDS)
    return folder


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_header_can_be_damaged_again(seed: int, tmp_path: pathlib.Path) -> None:
    path, draw = tmp_path / "x.safetensors", random.Random(seed)
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(4)}
    save_file(tensors, path, {"format": "x", "pairs": '[{"scale": [1]}]'})
    for _ in range(12):
        assert mutations.of_header(path, draw)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind: str, place: pathlib.Path) -> None:
    """The mutations are those of ``benchmarks/fuzz.py --seed 1 --only KIND``, without processes."""
    results = [fuzz.attempt(place, SEED, kind, number, slow=False) for number in range(COUNT)]
    assert [one for one in results if one["outcome"] in fuzz.FAILURES] == []
    assert sum(one["outcome"] == fuzz.REFUSED for one in results) >= COUNT // 3
