"""Values by batch and key, their tensors cached: what a walk keeps between two stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from aimet_ext.data.batches import map_leaves, map_tensors
from aimet_ext.data.cache import TensorCache

__all__ = ["StoredBatches", "ValueCache", "keep_batches"]

Key = TypeVar("Key", bound=Hashable)


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
        """Values of a batch, their tensors fresh copies on ``device``."""
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
        """Forget values of a batch, if they are there, and what only they held."""
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

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(self._length))

    def close(self) -> None:
        """Forget the batches and remove their files."""
        self._length = 0
        self._cache.close()


def keep_batches(batches: Iterable[Any], cache_dir: str | Path | None = None) -> Sequence[Any]:
    """Batches that can be read again and again: lists as they are, anything else stored.

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
    """All slots in a stored value, as often as they stand there."""
    found: list[_Slot] = []
    map_leaves(lambda leaf: found.append(leaf) if isinstance(leaf, _Slot) else None, value)
    return found
