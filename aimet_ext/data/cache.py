"""Lists of tensors that need not fit into memory."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from aimet_ext.files.folders import atomic_path, writable_folder
from aimet_ext.files.tensors import copy_to_cpu

__all__ = ["TensorCache"]


class TensorCache:
    """A list of tensors, in RAM or each in a memory-mapped safetensors file of its own.

    Invariants: what goes in is copied and what comes out is a copy, so that nobody changes an
    entry by accident; on disk, no tensor is in memory except while it is written or read, and
    every file is a complete safetensors file at any moment.

    On disk the cache lives in a new folder under ``cache_dir``, which :meth:`close`, garbage
    collection or the end of the program removes.

    :param cache_dir: folder for the files, created if need be; None keeps the tensors in RAM.
    :param name: first part of the name of the folder created in ``cache_dir``.
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
        self._folder: Path | None = None
        self._remove = lambda: None
        if self.cache_dir is not None:
            writable_folder(self.cache_dir, "cache_dir")
            self._folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.cache_dir))
            self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    @property
    def folder(self) -> Path | None:
        """Where the files of this cache are, None for a cache in RAM."""
        return self._folder

    def append(self, tensor: Tensor) -> None:
        """Add a copy of ``tensor`` at the end."""
        self._store(self._length, tensor)
        self._length += 1

    def read(self, index: int, device: torch.device | str = "cpu") -> Tensor:
        """Return a fresh copy of one tensor on ``device``.

        :raises IndexError: there is no such tensor.
        """
        index = self._position(index)
        if self._folder is None:
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget all tensors and remove their files; closing twice does no harm."""
        self._memory.clear()
        self._length = 0
        self._remove()

    def _store(self, index: int, tensor: Tensor) -> None:
        if self._folder is not None:
            # Scratch data: safe from a half-written file, but not worth waiting for the disk.
            with atomic_path(self._file(index), durable=False) as temporary:
                save_file({"tensor": tensor.detach().cpu().contiguous()}, temporary)
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
        assert self._folder is not None
        return self._folder / f"{index:06d}.safetensors"
