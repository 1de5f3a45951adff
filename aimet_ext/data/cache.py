"""Tensors that need not fit into memory: cached lists and values, and memory-mapped zeros."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from aimet_ext.data.batches import map_leaves, map_tensors
from aimet_ext.files.folders import writable_folder
from aimet_ext.files.scratch import make_scratch, remove_scratch, scratch
from aimet_ext.files.tensors import copy_to_cpu

Key = TypeVar("Key", bound=Hashable)

_PROC = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")  # that of the container, as a process in one sees it


class TensorCache:
    """A list of tensors, in RAM or each in a memory-mapped safetensors file of its own.

    Invariants: what goes in is copied and what comes out is a copy, so that nobody changes an
    entry by accident; on disk, no tensor is in memory except while it is written or read, and
    every file is a complete safetensors file at any moment.

    On disk the cache lives in a new folder under ``cache_dir``, which :meth:`close`, garbage
    collection or the end of the program removes; what a killed one left, the next one does.

    :param cache_dir: folder for the files, created if need be; None keeps the tensors in RAM.
    :param name: first part of the name of the folder created in ``cache_dir``.
    :ivar folder: folder of the files of this cache, None for a cache in RAM.
    :raises ValueError: ``cache_dir`` cannot be written.

    >>> cache = TensorCache()
    >>> cache.append(torch.ones(2))
    >>> cache[0]
    tensor([1., 1.])
    """

    def __init__(self, cache_dir: str | Path | None = None, *, name: str = "tensors") -> None:
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._memory: list[Tensor] = []
        self._length = 0
        self.folder: Path | None = None
        self._remove = lambda: None
        if self.cache_dir is not None:
            home = writable_folder(self.cache_dir, "cache_dir")
            self.folder = make_scratch(home, f"aimet_ext-{name}")
            self._remove = weakref.finalize(self, remove_scratch, self.folder)

    def has_room(self, size: int) -> bool:
        """Return True if ``size`` bytes more take at most a quarter of what is free."""
        if self.folder is not None:
            return size <= shutil.disk_usage(self.folder).free // 4
        free = available_bytes()
        return free is not None and size <= free // 4

    def append(self, tensor: Tensor) -> None:
        """Add a copy of ``tensor`` at the end."""
        self._store(self._length, tensor)
        self._length += 1

    def read(self, index: int, device: torch.device | str = "cpu") -> Tensor:
        """Return a fresh copy of one tensor on ``device``.

        :raises IndexError: there is no such tensor.
        """
        index = self._position(index)
        if self.folder is None:
            return self._memory[index].to(device, copy=True)
        with safe_open(self._file(index), framework="pt") as file:
            # The copy is aligned as every other tensor is: results of matrix products can depend
            # on the alignment. It also lets go of the mapped pages.
            return file.get_tensor("tensor").to(device, copy=True)

    def __getitem__(self, index: int) -> Tensor:
        return self.read(index)

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        self._store(self._position(index), tensor)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Tensor]:
        return (self.read(index) for index in range(self._length))

    def __enter__(self) -> TensorCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget all tensors and remove their files; closing twice does no harm."""
        self._memory.clear()
        self._length = 0
        self._remove()

    def _store(self, index: int, tensor: Tensor) -> None:
        if self.folder is not None:
            # Scratch data: safe from a half-written file, but not worth waiting for the disk.
            begun = self.folder / "next"
            try:
                save_file({"tensor": tensor.detach().cpu().contiguous()}, begun)
                begun.replace(self._file(index))
            finally:
                begun.unlink(missing_ok=True)
        elif index == len(self._memory):
            self._memory.append(copy_to_cpu(tensor))
        else:
            self._memory[index] = copy_to_cpu(tensor)

    def _position(self, index: int) -> int:
        position = index + self._length if index < 0 else index
        if not 0 <= position < self._length:
            raise IndexError(f"the cache holds {self._length} tensors, index {index} is beyond it")
        return position

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{index:06d}.safetensors"


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor in a stored value."""

    number: int


class ValueCache:
    """Nested tuples, lists and mappings of tensors and plain values, by batch and key.

    Invariant: a tensor that stands in several values of a batch is stored once, and is one tensor
    again when they are read together; in-place changes reach what they did before.

    :param cache_dir: folder for memory-mapped tensors; None keeps them in RAM, on the CPU.
    """

    def __init__(self, cache_dir: str | Path | None = None) -> None:
        self._tensors = TensorCache(cache_dir, name="values")
        self._values: dict[tuple[int, Hashable], Any] = {}
        self._uses: Counter[_Slot] = Counter()
        self._bytes: dict[_Slot, int] = {}
        self._free: list[_Slot] = []

    @property
    def bytes(self) -> int:
        """Size of all tensors in the cache."""
        return sum(self._bytes.values())

    def put(self, batch: int, values: Mapping[Any, Any]) -> None:
        """Store values of a batch, in place of those they had."""
        self.drop(batch, values)
        slots: dict[int, _Slot] = {}

        def keep(tensor: Tensor) -> _Slot:
            if id(tensor) not in slots:
                slots[id(tensor)] = self._store(tensor)
            self._uses[slots[id(tensor)]] += 1
            return slots[id(tensor)]

        for key, value in values.items():
            kept = map_tensors(keep, value)
            self._values[batch, key] = kept if _slots(kept) else value

    def read(
        self, batch: int, keys: Iterable[Key], device: torch.device | str = "cpu"
    ) -> dict[Key, Any]:
        """Return values of a batch, their tensors fresh copies on ``device``."""
        tensors: dict[_Slot, Tensor] = {}

        def fill(leaf: Any) -> Any:
            if not isinstance(leaf, _Slot):
                return leaf
            if leaf not in tensors:
                tensors[leaf] = self._tensors.read(leaf.number, device)
            return tensors[leaf]

        stored = {key: self._values[batch, key] for key in keys}
        return {
            key: map_leaves(fill, value) if _slots(value) else value
            for key, value in stored.items()
        }

    def drop(self, batch: int, keys: Iterable[Hashable]) -> None:
        """Forget values of a batch, if they are there, and the tensors that only they held."""
        for key in keys:
            for slot in _slots(self._values.pop((batch, key), None)):
                self._uses[slot] -= 1
                if not self._uses[slot]:
                    del self._bytes[slot]
                    self._tensors[slot.number] = torch.empty(0)
                    self._free.append(slot)

    def close(self) -> None:
        """Forget everything and remove the files."""
        self._values.clear()
        self._bytes.clear()
        self._tensors.close()

    def _store(self, tensor: Tensor) -> _Slot:
        if self._free:
            slot = self._free.pop()
            self._tensors[slot.number] = tensor
        else:
            slot = _Slot(len(self._tensors))
            self._tensors.append(tensor)
        self._bytes[slot] = tensor.numel() * tensor.element_size()
        return slot


class StoredBatches(Sequence[Any]):
    """The batches of an iterable that can be walked through once, or shuffles.

    :param batches: taken one at a time.
    :param cache_dir: folder for memory-mapped tensors; None keeps them in RAM.
    """

    def __init__(self, batches: Iterable[Any], cache_dir: str | Path | None = None) -> None:
        self._cache = ValueCache(cache_dir)
        self._length = 0
        for batch in batches:
            self._cache.put(self._length, {"batch": batch})
            self._length += 1

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._length:
            raise IndexError(f"there are {self._length} batches, index {index} is beyond them")
        return self._cache.read(index, ["batch"])["batch"]

    def close(self) -> None:
        """Forget the batches and remove their files."""
        self._length = 0
        self._cache.close()


def keep_batches(batches: Iterable[Any], cache_dir: str | Path | None = None) -> Sequence[Any]:
    """Return batches that can be read repeatedly: lists as they are, anything else stored.

    :raises ValueError: there is no batch.
    """
    kept = batches
    if not isinstance(batches, list | tuple | StoredBatches):
        kept = StoredBatches(batches, cache_dir)
    assert isinstance(kept, Sequence)
    if not len(kept):
        raise ValueError("batches must hold at least one batch, got none; pass calibration data")
    return kept


def _slots(value: Any) -> list[_Slot]:
    """Return all slots in a stored value, as often as they occur."""
    found: list[_Slot] = []
    map_leaves(lambda leaf: found.append(leaf) if isinstance(leaf, _Slot) else None, value)
    return found


def available_bytes(device: torch.device | str = "cpu") -> int | None:
    """Return the bytes that can still be allocated without swapping; None if that is unknown.

    On the CPU that is what Linux says, or what is left of the container's limit if that is less.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = [amount for amount in (_machine_bytes(), _container_bytes()) if amount is not None]
    return min(known, default=None)


def _machine_bytes() -> int | None:
    try:
        lines = _PROC.read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _container_bytes() -> int | None:
    """Return the rest of the control group's limit (version 2), None where there is none."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        details = (_CGROUP / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no control group, or "max"
        return None
    # Cached files count as used, though they go when memory is short.
    cached = sum(int(line.split()[1]) for line in details if line.startswith("inactive_file "))
    return max(0, limit - used + cached)


def mapped_zeros(
    shape: Sequence[int], dtype: torch.dtype, folder: str | Path | None = None
) -> Tensor:
    """Return zeros in a memory-mapped file, which the system pages in and out.

    The file has no name any more when this returns, and goes with the tensor or the process.

    :param folder: where the file is, the system's folder for temporary files if None.
    :raises ValueError: ``folder`` cannot be written.
    :raises OSError: it has no room.
    """
    place = writable_folder(tempfile.gettempdir() if folder is None else folder, "cache_dir")
    elements = math.prod(shape)
    size = elements * dtype.itemsize
    if size == 0:
        return torch.zeros(tuple(shape), dtype=dtype)
    with scratch(place, "aimet_ext-mapped") as home:
        name = home / "zeros"
        try:
            with name.open("wb") as file:
                _reserve(file.fileno(), size)
            flat = torch.from_file(str(name), shared=True, size=elements, dtype=dtype)  # [elements]
        except OSError as error:
            raise OSError(
                f"cache_dir must have room for {size / 2**20:,.1f} MiB, got {str(place)!r} "
                f"({error.strerror or error}); pass a folder on a larger disk"
            ) from error
    return flat.view(*shape)


def _reserve(handle: int, size: int) -> None:
    """Make a file of zeros. A full disk shows here, not at some later write to the mapping."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)
