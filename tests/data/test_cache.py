"""Caches of tensors: the same values in RAM and on disk, without ever filling the memory."""

from __future__ import annotations

import gc
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from aimet_ext.data import cache as cache_module
from aimet_ext.data.cache import TensorCache


@pytest.fixture(params=["memory", "disk"])
def cache(request, tmp_path):
    with TensorCache(tmp_path if request.param == "disk" else None) as cache:
        yield cache


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_values_come_back_bit_for_bit(cache, dtype):
    """Whatever the dtype, the shape and the strides."""
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    for tensor in (values, values.T, values[:1].expand(4, 3), values[0, 0], values[:0]):
        cache.append(tensor)
        assert cache[-1].dtype == dtype
        assert torch.equal(cache[-1], tensor)
    assert len(cache) == len(list(cache)) == 5


def test_nobody_shares_memory_with_an_entry(cache):
    """Changing what went in or what came out leaves the entry as it is."""
    source = torch.zeros(3)
    cache.append(source)
    source += 1
    cache[0].add_(1)
    assert torch.equal(cache[0], torch.zeros(3))


def test_what_comes_out_is_aligned_as_usual(cache):
    """Matrix products may differ in the last bit on data that is not: 64 bytes."""
    cache.append(torch.randn(5, 7))
    assert cache[0].data_ptr() % 64 == 0


def test_replacing_and_indexing(cache):
    """An entry may change its shape; what is beyond the end is an error."""
    cache.append(torch.zeros(2, requires_grad=True))
    cache[0] = torch.ones(3)
    assert cache[-1].tolist() == [1, 1, 1]
    assert not cache[0].requires_grad
    for index in (1, -2):
        with pytest.raises(IndexError, match="holds 1 tensors"):
            cache[index]
    with pytest.raises(IndexError):
        cache[1] = torch.ones(1)


def test_files_are_complete_at_any_moment_and_go_with_the_cache(tmp_path):
    """Each entry is a safetensors file of its own; nothing is left after close."""
    cache = TensorCache(tmp_path / "new" / "folder")
    for value in range(3):
        cache.append(torch.tensor([value]))
        files = sorted(cache.folder.iterdir())
        assert [int(load_file(file)["tensor"]) for file in files] == list(range(value + 1))
    other = TensorCache(cache.cache_dir)
    other.append(torch.ones(1))
    cache.close()
    cache.close()
    assert len(cache) == 0
    assert list(cache.cache_dir.iterdir()) == [other.folder]
    del other
    gc.collect()
    assert list(cache.cache_dir.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_entry(tmp_path, monkeypatch):
    """A full disk or Ctrl-C in the middle of a file: the entry before it, and no other file."""
    cache = TensorCache(tmp_path)
    cache.append(torch.zeros(2))

    def interrupted(tensors, path):
        path.write_bytes(b"half a f")
        raise KeyboardInterrupt

    monkeypatch.setattr("aimet_ext.data.cache.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache[0] = torch.ones(2)
    assert torch.equal(cache[0], torch.zeros(2))
    assert len(list(cache.folder.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    """The parameter, the path and the reason."""
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cache_dir must be a folder that can be written.*file"):
        TensorCache(tmp_path / "file" / "inside")


MEASURE = """
import sys, torch
from aimet_ext.data import cache as cache_module
from aimet_ext.data.cache import TensorCache

def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) // 1024

for folder in (sys.argv[1], None):
    cache = TensorCache(folder)
    cache.append(torch.ones(1 << 20))
    before = memory("VmRSS")
    for _ in range(64):
        cache.append(torch.ones(1 << 20))
    for index in range(64):
        cache[index] = cache[index] + 1
    print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_on_disk_does_not_grow_with_the_number_of_tensors(tmp_path):
    """64 tensors are 256 MiB: in RAM they are all there, on disk a few at a time."""
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    # Freed tensors go back to the system at once: what glibc keeps of them is no part of a cache.
    held = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    environment = {**os.environ, **held}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    on_disk, in_memory = (int(line) for line in done.stdout.split())
    assert on_disk < 64
    assert in_memory > 200


KILLED = """
import os, signal, sys, torch
from aimet_ext.data import cache as cache_module
from aimet_ext.data.cache import TensorCache

cache = TensorCache(sys.argv[1])
cache.append(torch.ones(2))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_goes_with_the_next(tmp_path):
    mine = TensorCache(tmp_path)
    mine.append(torch.ones(2))
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(cache_module.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, check=False)
    assert len(list(tmp_path.iterdir())) == 2
    other = TensorCache(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted((mine.folder, other.folder))
    assert torch.equal(mine[0], torch.ones(2))
