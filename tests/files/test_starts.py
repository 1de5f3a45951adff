"""Starts of OmniQuant in files: those of this package and those of LLMC, and nothing that runs."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor

from aimet_ext import CorruptFileError
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.scales import write_scales
from aimet_ext.files.starts import load_starts, write_clips

LAYER = "model.layers.0.self_attn.o_proj"


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """What AWQ leaves: scales and clips of one model."""
    ledger = Ledger(origin="abc")
    sides = [(LAYER, "in", torch.tensor([2.0, 4.0])), ("model.v", "out", torch.tensor([0.5, 0.25]))]
    ledger.record("awq", "model.layers.0", "v->o", "v_o", sides, size=2)
    write_scales(tmp_path, ledger)
    share = torch.tensor([[0.5], [1.0]])
    write_clips(tmp_path, {LAYER: (share, share)}, origin="abc")
    return tmp_path


def same(one: Tensor, other: list[float]) -> bool:
    return torch.allclose(one.flatten(), torch.tensor(other).float())


def test_what_was_written_is_read(folder: pathlib.Path) -> None:
    for place, columns, shares in (
        (folder, 1, 1),
        (folder / "scales.safetensors", 1, 0),
        (folder / "clips.safetensors", 0, 1),
    ):
        starts = load_starts(place)
        assert (len(starts.columns), len(starts.shares), starts.origin) == (columns, shares, "abc")
    starts = load_starts(folder)
    assert same(starts.columns[LAYER], [2, 4])
    assert all(same(share, [0.5, 1]) for share in starts.shares[LAYER])


@pytest.mark.parametrize("name", ["scales.safetensors", "clips.safetensors"])
def test_a_changed_file_is_refused(folder: pathlib.Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CorruptFileError, match=name):
        load_starts(folder)


def test_files_of_two_models_are_refused(folder: pathlib.Path) -> None:
    write_clips(folder, {}, origin="another")
    with pytest.raises(CorruptFileError, match="of one model"):
        load_starts(folder)


def test_a_folder_without_any_says_what_it_needs(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"scales.safetensors, clips.safetensors"):
        load_starts(tmp_path)


def test_shares_are_numbers_above_zero(tmp_path: pathlib.Path) -> None:
    write_clips(tmp_path, {LAYER: (torch.tensor([math.nan]), torch.ones(1))}, origin=None)
    with pytest.raises(CorruptFileError, match=r"clips.safetensors.*o_proj.low: finite numbers"):
        load_starts(tmp_path)


UP = "self_attn.o_proj.weight_quantizer.upbound_factor"
LOW = "self_attn.o_proj.weight_quantizer.lowbound_factor"


@pytest.mark.parametrize(
    ("clips", "name"),
    [
        ({0: {UP: torch.tensor([[0.0], [math.inf]]), LOW: None}}, "0.self_attn.o_proj"),
        ({LAYER: {"up_factor": torch.tensor([[0.0], [math.inf]]), "low_factor": None}}, LAYER),
    ],
    ids=["by block", "by layer"],
)
def test_files_of_llmc(tmp_path: pathlib.Path, clips: Any, name: str) -> None:
    """Multipliers, and logits of shares: an infinite one clips nothing."""
    torch.save({LAYER: torch.tensor([2.0, 4.0]).half()}, tmp_path / "scales.pth")
    torch.save(clips, tmp_path / "clips.pth")
    starts = load_starts(tmp_path)
    assert same(starts.columns[LAYER], [2, 4])
    assert list(starts.shares) == [name]
    assert all(same(share, [0.5, 1]) for share in starts.shares[name])


class Payload:
    """What runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (pathlib.Path("ran"),)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (Payload(), "could run code: not loaded"),
        ({LAYER: Payload()}, "could run code: not loaded"),
        ({}, "not laid out as LLMC's"),
        ([torch.ones(2)], "not laid out as LLMC's"),
        ({LAYER: torch.tensor([1.0, -1.0])}, "finite multipliers above 0"),
        ({LAYER: torch.ones(2, 2)}, "a vector"),
        ({0: {"self_attn.o_proj.other": torch.ones(2)}}, "not laid out as LLMC's"),
    ],
    ids=range(7),
)
def test_what_is_no_plain_tensor_is_not_loaded(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, content: Any, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "scales.pth")
    with pytest.raises(CorruptFileError, match=rf"scales\.pth.*{text}"):
        load_starts(tmp_path / "scales.pth")
    assert not (tmp_path / "ran").exists()
