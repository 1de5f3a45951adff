"""The inputs of a block, batch by batch: hidden states that move on, and arguments that stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aimet_ext.data.batches import map_leaves
from aimet_ext.data.cache import TensorCache
from aimet_ext.files.tensors import hash_tensors

__all__ = ["BlockCall", "BlockStream", "hidden_state"]

BlockFn = Callable[..., Any]
Rows = Sequence[int] | Tensor | slice


@dataclass(frozen=True, eq=False)
class BlockCall:
    """One call of a block: its arguments and which tokens count.

    :param hidden: hidden states ``[batch, seq, hidden]``, one of the arguments.
    :param mask: bool ``[batch, seq]``, true for real tokens.
    :param args: positional arguments.
    :param kwargs: keyword arguments.
    """

    hidden: Tensor
    mask: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block_fn: BlockFn) -> Tensor:
        """Return the hidden states ``[batch, seq, hidden]`` that ``block_fn`` gives."""
        return hidden_state(block_fn(*self.args, **self.kwargs))

    def with_hidden(self, hidden: Tensor) -> BlockCall:
        """The same call for other hidden states, such as those of another stream."""

        def swap(leaf: Any) -> Any:
            return hidden if leaf is self.hidden else leaf

        return BlockCall(
            hidden, self.mask, map_leaves(swap, self.args), map_leaves(swap, self.kwargs)
        )


def hidden_state(output: Any) -> Tensor:
    """The hidden states in a block's output: the output itself, or the first of a tuple.

    :raises TypeError: it is neither.
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise TypeError(
            "a block must return its hidden states, or a tuple that starts with them, got "
            f"{type(output).__name__}"
        )
    return first


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor in stored arguments; number -1 for the hidden states."""

    number: int


_HIDDEN = _Slot(-1)


@dataclass(frozen=True, eq=False)
class _Record:
    """The stored arguments of one batch, slots in place of tensors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: _Slot
    shape: tuple[int, int]


@dataclass(frozen=True, eq=False)
class _Arguments:
    """What does not change from block to block; equal tensors are stored once."""

    tensors: TensorCache
    records: list[_Record] = field(default_factory=list)
    known: dict[str, _Slot] = field(default_factory=dict)

    def keep(self, tensor: Tensor) -> _Slot:
        digest = hash_tensors([("", tensor)])
        if digest not in self.known:
            self.known[digest] = _Slot(len(self.tensors))
            self.tensors.append(tensor)
        return self.known[digest]


class BlockStream:
    """What a block receives for every batch; :meth:`advance` moves it on to the next block.

    Invariant: beside the caches, at most the tensors of one batch are in memory.

    :param device: where blocks are called. May be set to another device at any time.
    :param cache_dir: folder for memory-mapped caches; None keeps them in RAM, on the CPU.
    """

    def __init__(self, device: torch.device | str, cache_dir: str | Path | None = None) -> None:
        self.device = torch.device(device)
        self.hidden = TensorCache(cache_dir, name="hidden")
        self.width = 0  # of the hidden states, once there are any
        self._arguments = _Arguments(TensorCache(cache_dir, name="arguments"))
        # Most batches share masks and position embeddings: those of the last call stay loaded.
        self._loaded: dict[_Slot, Tensor] = {}
        self._loaded_on = self.device

    def append(
        self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor
    ) -> None:
        """Add a batch.

        :param hidden: ``[batch, seq, hidden]``, found by identity in ``args`` or ``kwargs``.
        :param args: positional arguments of the block.
        :param kwargs: keyword arguments of the block. Key-value caches are dropped.
        :param mask: bool ``[batch, seq]``, true for real tokens.
        """

        def keep(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return _HIDDEN if leaf is hidden else self._arguments.keep(leaf)
            return None if hasattr(leaf, "get_seq_length") else leaf  # a key-value cache

        self.width = hidden.shape[-1]
        named = map_leaves(keep, kwargs)
        if named.get("use_cache"):
            named["use_cache"] = False
        shape = (hidden.shape[0], hidden.shape[1])
        record = _Record(map_leaves(keep, args), named, self._arguments.keep(mask), shape)
        self.hidden.append(hidden)
        self._arguments.records.append(record)

    def __len__(self) -> int:
        return len(self._arguments.records)

    def shape(self, index: int) -> tuple[int, int]:
        """Batch and sequence length of a batch."""
        return self._arguments.records[index].shape

    def mask(self, index: int) -> Tensor:
        """Bool ``[batch, seq]`` on the CPU, true for real tokens."""
        return self._arguments.tensors[self._arguments.records[index].mask.number]

    def select(self, index: int, rows: Rows | None = None) -> BlockCall:
        """One batch, or some of its sequences, on :attr:`device`.

        Tensors whose first dimension is the batch are cut, those where it is 1 are left to
        broadcast. A vector as long as a sequence holds positions, not sequences.

        :param rows: which sequences of the batch, all if None.
        """
        record = self._arguments.records[index]
        batch, seq = record.shape
        where = rows if rows is None or isinstance(rows, slice) else torch.as_tensor(rows)

        def cut(tensor: Tensor) -> Tensor:
            per_row = tensor.ndim > 1 or (tensor.ndim == 1 and batch != seq)
            if where is None or not per_row or tensor.shape[0] != batch:
                return tensor
            return tensor[where]

        tensors = {slot: cut(tensor) for slot, tensor in self._load(record).items()}
        tensors[_HIDDEN] = cut(self.hidden.read(index, self.device))

        def fill(leaf: Any) -> Any:
            return tensors[leaf] if isinstance(leaf, _Slot) else leaf

        return BlockCall(
            tensors[_HIDDEN],
            tensors[record.mask],
            map_leaves(fill, record.args),
            map_leaves(fill, record.kwargs),
        )

    def call(self, block_fn: BlockFn, index: int, rows: Rows | None = None) -> Tensor:
        """Return what ``block_fn`` makes of a batch: hidden states ``[batch, seq, hidden]``."""
        return self.select(index, rows)(block_fn)

    def advance(self, block_fn: BlockFn, out: TensorCache | None = None) -> None:
        """Pass every batch through ``block_fn``, without gradients.

        :param out: empty cache that takes the outputs, in which case the stream stays where it is;
            if None, they replace :attr:`hidden`. A stream whose ``advance`` failed is lost.
        :raises ValueError: ``out`` is not empty.
        """
        if out is not None and len(out):
            raise ValueError(
                f"out must be an empty cache, it holds {len(out)} tensors; pass a new one"
            )
        with torch.no_grad():
            for index in range(len(self)):
                output = self.call(block_fn, index)
                if out is None:
                    self.hidden[index] = output
                else:
                    out.append(output)

    def fork(self) -> BlockStream:
        """A second stream from the same point; the other arguments are shared."""
        twin = BlockStream.__new__(BlockStream)
        twin.device = self.device
        twin.hidden = self.new_cache("hidden")
        twin.width = self.width
        for tensor in self.hidden:
            twin.hidden.append(tensor)
        twin._arguments = self._arguments
        twin._loaded = {}
        twin._loaded_on = self.device
        return twin

    def share_arguments(self, other: BlockStream) -> None:
        """Use the arguments of another stream, captured from the same batches, beside own states.

        Where these are the same: what layers before the blocks made may differ.

        :raises ValueError: the batches differ in number or shape.
        """
        mine, theirs = self._arguments.records, other._arguments.records
        if [record.shape for record in mine] != [record.shape for record in theirs]:
            raise ValueError("streams of the same batches are required, their shapes differ")
        if [*self._arguments.known] == [*other._arguments.known]:
            self._arguments = other._arguments
            self._loaded = {}

    def new_cache(self, name: str = "outputs") -> TensorCache:
        """An empty cache of the kind this stream uses, for outputs of a block."""
        return TensorCache(self.hidden.cache_dir, name=name)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the stream, one at a time, for a hash of the data."""
        for index, record in enumerate(self._arguments.records):
            yield f"{index}.hidden", self.hidden[index]
            yield f"{index}.mask", self._arguments.tensors[record.mask.number]
        for number, tensor in enumerate(self._arguments.tensors):
            yield f"argument.{number}", tensor

    def close(self) -> None:
        """Drop the caches and their files; arguments shared with a fork stay as long as it does."""
        self._loaded = {}
        self.hidden.close()
        self._arguments = _Arguments(TensorCache())

    def _load(self, record: _Record) -> dict[_Slot, Tensor]:
        slots = {record.mask}
        map_leaves(
            lambda leaf: slots.add(leaf) if isinstance(leaf, _Slot) else None,
            (record.args, record.kwargs),
        )
        recent = self._loaded if self._loaded_on == self.device else {}
        self._loaded_on = self.device
        self._loaded = {
            slot: recent[slot]
            if slot in recent
            else self._arguments.tensors.read(slot.number, self.device)
            for slot in slots - {_HIDDEN}
        }
        return self._loaded
