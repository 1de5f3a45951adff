"""Scales files: what they hold, and that no byte of them changes unnoticed."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import safetensors.torch
import torch

from aimet_ext.errors import CorruptFileError
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.scales import AIMET_FILE, SCALES_FILE, load_scales, write_scales
from aimet_ext.files.tensors import write_sealed

NORM, V, OUT = "m.norm", "m.v_proj", "m.o_proj"


def save(folder: pathlib.Path, ledger: Ledger, **options: Any) -> pathlib.Path:
    """Write the scales of a ledger and return their file."""
    write_scales(folder, ledger, **options)
    return folder / SCALES_FILE


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger(origin="ab" * 32)
    s, t = torch.rand(6) + 0.5, (torch.rand(2) + 0.5).repeat(2)
    ledger.record(
        "omniquant",
        "m",
        "norm->v",
        "norm_qkv",
        [(NORM, "out", 1 / s), (V, "in", s)],
        size=6,
        source=NORM,
    )
    ledger.record(
        "omniquant", "m", "v->o", "v_o", [(V, "out", 1 / t), (OUT, "in", t)], size=2, source=V
    )
    ledger.log_run("omniquant", [NORM, V, OUT])
    return ledger


def test_a_file_holds_the_cumulative_scales(tmp_path: pathlib.Path, ledger: Ledger) -> None:
    path = save(tmp_path, ledger, rename=lambda name: name[2:])
    scales = load_scales(path)
    assert list(scales) == ["norm", "o_proj", "v_proj"] and len(scales) == 3
    expected = ledger.cumulative()
    assert torch.equal(scales["v_proj"].input, expected[V]["input"])
    assert torch.equal(scales["v_proj"].output, expected[V]["output"])
    assert scales["norm"].input is None and scales["o_proj"].output is None
    assert scales.techniques == ("omniquant",) and scales.origin == "ab" * 32
    assert scales.pairs[1]["source"] == "v_proj" and scales.pairs[1]["size"] == 2
    assert scales.pairs[1]["sides"] == [["v_proj", "out", 4], ["o_proj", "in", 4]]
    # Plain safetensors for whoever does not have aimet_ext.
    assert torch.equal(safetensors.torch.load_file(path)["o_proj.input"], expected[OUT]["input"])


def test_a_folder_is_read_by_its_path(tmp_path: pathlib.Path, ledger: Ledger) -> None:
    for _ in range(2):
        save(tmp_path, ledger)
    assert [path.name for path in tmp_path.iterdir()] == [SCALES_FILE]
    assert len(load_scales(tmp_path)) == 3


def test_a_ledger_without_scales_can_be_written(tmp_path: pathlib.Path) -> None:
    scales = load_scales(save(tmp_path, Ledger()))
    assert len(scales) == 0 and scales.origin is None


def test_aimet_keys_divide_and_multiply(tmp_path: pathlib.Path, ledger: Ledger) -> None:
    save(tmp_path, ledger, aimet_keys=True)
    tensors = safetensors.torch.load_file(tmp_path / AIMET_FILE)
    assert set(tensors) == {f"{NORM}.prev", f"{V}.foll", f"{V}.prev", f"{OUT}.foll"}
    torch.testing.assert_close(1 / tensors[f"{V}.prev"], ledger.cumulative()[V]["output"])
    assert torch.equal(tensors[f"{V}.foll"], ledger.cumulative()[V]["input"])


def test_any_changed_byte_is_noticed(tmp_path: pathlib.Path, ledger: Ledger) -> None:
    path = save(tmp_path, ledger)
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(CorruptFileError):
            load_scales(path)


@pytest.mark.parametrize("length", [0, 7, 8, 100, -4])
def test_a_truncated_file_is_refused(tmp_path: pathlib.Path, ledger: Ledger, length: int) -> None:
    path = save(tmp_path, ledger)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CorruptFileError, match=r"scales\.safetensors"):
        load_scales(path)


def test_a_foreign_file_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"m.v_proj.input": torch.ones(3)}, path, {"format": "pt"})
    with pytest.raises(CorruptFileError, match="no hash of aimet_ext"):
        load_scales(path)


def test_a_sealed_file_of_another_kind_is_refused(tmp_path: pathlib.Path, ledger: Ledger) -> None:
    from aimet_ext.files.tensors import write_sealed

    write_sealed(tmp_path / "l.safetensors", "aimet_ext.ledger/1", {}, {})
    with pytest.raises(CorruptFileError, match=r"aimet_ext\.ledger/1"):
        load_scales(tmp_path / "l.safetensors")


def test_an_absent_file_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_scales(tmp_path / "nothing.safetensors")


def test_aimet_applies_its_file_as_we_fold(tmp_path: pathlib.Path, ledger: Ledger) -> None:
    """AIMET's own loader of `.prev/.foll` turns the original weights into ours."""
    pytest.importorskip("peft")
    omniquant = pytest.importorskip("aimet_torch.experimental.omniquant.omniquant_optimizer")
    model = torch.nn.Module()
    model.m = torch.nn.Module()
    model.m.norm = torch.nn.LayerNorm(6)
    model.m.v_proj = torch.nn.Linear(6, 4, bias=False)
    model.m.o_proj = torch.nn.Linear(4, 6, bias=False)
    expected = {}
    for name, axes in ledger.cumulative().items():
        weight = model.get_submodule(name).weight.detach()
        rows = axes.get("output", torch.ones(len(weight)))
        expected[name] = weight * rows.reshape(-1, *[1] * (weight.ndim - 1))
        if "input" in axes:
            expected[name] = expected[name] * axes["input"]
    save(tmp_path, ledger, aimet_keys=True)
    omniquant.update_base_model_with_omniquant_metadata(model, tmp_path / AIMET_FILE)
    for name, weight in expected.items():
        torch.testing.assert_close(model.get_submodule(name).weight.detach(), weight)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("m.v_proj.inputs", torch.ones(6), "inputs"),
        ("m.v_proj.input", torch.zeros(6), "finite multipliers above 0"),
        ("m.v_proj.input", torch.tensor([1.0, float("inf")]), "finite multipliers above 0"),
        ("m.v_proj.input", torch.ones(2, 3), "a vector of"),
        ("m.v_proj.input", torch.ones(6, dtype=torch.int64), "a vector of"),
    ],
)
def test_vectors_that_scale_nothing_are_refused(
    tmp_path: pathlib.Path, ledger: Ledger, name: str, values: torch.Tensor, message: str
) -> None:
    """Sealed as the file is, so that its hash is right."""
    path = save(tmp_path, ledger)
    with safetensors.safe_open(path, framework="pt") as file:
        fields = {key: text for key, text in file.metadata().items() if key != "sha256"}
    write_sealed(path, fields.pop("schema"), {name: values}, fields)
    with pytest.raises(CorruptFileError, match=rf"scales\.safetensors: .*{message}"):
        load_scales(path)
