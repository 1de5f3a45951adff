"""How much memory there is, and tensors in files."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from aimet_ext.data import cache
from aimet_ext.data.cache import available_bytes, mapped_zeros


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Writes what the system says of its memory, None for nothing."""

    def say(available=None, limit=None, used=0, cached=0):
        monkeypatch.setattr(cache, "_PROC", tmp_path / "meminfo")
        monkeypatch.setattr(cache, "_CGROUP", tmp_path)
        if available is not None:
            text = f"MemTotal: 99999 kB\nMemAvailable:   {available} kB\nBuffers: 7 kB\n"
            (tmp_path / "meminfo").write_text(text)
        if limit is not None:
            (tmp_path / "memory.max").write_text(f"{limit}\n")
            (tmp_path / "memory.current").write_text(f"{used}\n")
            (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nslab 9\n")
        return available_bytes()

    return say


def test_what_the_machine_has(machine):
    assert machine(available=2000) == 2000 * 1024
    assert machine(available=2000, limit="max") == 2000 * 1024


def test_limit_of_the_container(machine):
    assert machine(available=2000, limit=10_000, used=7_000, cached=500) == 3_500
    assert machine(available=2000, limit=10_000, used=12_000) == 0
    assert machine(available=2, limit=10_000, used=7_000) == 2 * 1024


def test_nobody_knows(machine):
    assert machine() is None


def test_mapped_zeros_leave_no_file(tmp_path):
    tensor = mapped_zeros((3, 4), torch.float64, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    assert torch.equal(tensor, torch.zeros(3, 4, dtype=torch.float64))
    tensor += 1
    assert tensor.sum() == 12
    assert mapped_zeros((0, 4), torch.float32).shape == (0, 4)


def test_disk_without_room(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"room for 8\.0 MiB, got .* \(No space left on device\)"):
        mapped_zeros((1024, 1024), torch.float64, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cache_dir must be a folder that can be written"):
        mapped_zeros((2,), torch.float32, tmp_path / "file")
