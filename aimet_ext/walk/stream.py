"""The inputs of a model's blocks: captured at the first one, replayed block by block."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.data.batches import (
    ForwardFn,
    iterate_batches,
    map_leaves,
    module_device,
    token_ids,
)
from aimet_ext.data.cache import TensorCache
from aimet_ext.files.tensors import hash_tensors
from aimet_ext.walk.hooks import evaluating, first_calls, run_batch
from aimet_ext.walk.sides import Sides
from aimet_ext.walk.states import (
    are_states,
    hidden_state,
    is_hidden,
    real_tokens,
    tokens_first,
    tokens_inside,
)

BlockFn = Callable[..., Any]
Within = Callable[[int], AbstractContextManager[Any]]
Rows = Sequence[int] | Tensor | slice


@dataclass(frozen=True, eq=False)
class BlockCall:
    """One call of a block: its arguments and which tokens count.

    :param hidden: hidden states ``[batch, seq, hidden]``, one of the arguments;
        ``[batch, seq, ..., hidden]`` where the block takes several of them stacked.
    :param mask: bool ``[batch, seq]``, true for real tokens.
    :param args: positional arguments.
    :param kwargs: keyword arguments.
    """

    hidden: Tensor
    mask: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block_fn: BlockFn) -> Tensor:
        """Return the hidden states ``[batch, seq, ..., hidden]`` that ``block_fn`` gives."""
        args, kwargs = self.arguments()
        return tokens_first(hidden_state(block_fn(*args, **kwargs)))

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments as the block takes them."""
        inside = tokens_inside(self.hidden)

        def swap(leaf: Any) -> Any:
            return inside if leaf is self.hidden else leaf

        return map_leaves(swap, self.args), map_leaves(swap, self.kwargs)

    def with_hidden(self, hidden: Tensor) -> BlockCall:
        """Return the same call for other hidden states, such as those of another stream."""

        def swap(leaf: Any) -> Any:
            return hidden if leaf is self.hidden else leaf

        return BlockCall(
            hidden, self.mask, map_leaves(swap, self.args), map_leaves(swap, self.kwargs)
        )

    def to(self, dtype: torch.dtype) -> BlockCall:
        """Return the same call with all numbers in another type."""

        def cast(leaf: Any) -> Any:
            return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        hidden = cast(self.hidden)

        def swap(leaf: Any) -> Any:
            return hidden if leaf is self.hidden else cast(leaf)

        return BlockCall(
            hidden, self.mask, map_leaves(swap, self.args), map_leaves(swap, self.kwargs)
        )


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor in stored arguments; number -1 for the hidden states."""

    number: int


_HIDDEN = _Slot(-1)


@dataclass(frozen=True, eq=False)
class _Record:
    """The stored arguments of a block for one batch, slots in place of tensors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: _Slot
    shape: tuple[int, int]


@dataclass(frozen=True, eq=False)
class _Arguments:
    """The arguments beside the hidden states; equal tensors are stored once.

    :param records: Records of all batches by kind of block, ``""`` for that of the first block.
    """

    tensors: TensorCache
    records: dict[str, list[_Record]] = field(default_factory=lambda: {"": []})
    known: dict[str, _Slot] = field(default_factory=dict)

    def keep(self, tensor: Tensor) -> _Slot:
        digest = hash_tensors([("", tensor)])
        if digest not in self.known:
            self.known[digest] = _Slot(len(self.tensors))
            self.tensors.append(tensor)
        return self.known[digest]


class BlockStream:
    """The inputs of a block for every batch; new hidden states move it on to the next block.

    Invariant: beside the caches, at most the tensors of one batch are in memory.

    Blocks of several kinds, such as those with sliding and with full attention, are called with
    arguments of their own: those of :attr:`kind`.

    :param device: Device on which blocks are called. May be set to another one at any time.
    :param cache_dir: Folder for memory-mapped caches; None keeps them in RAM, on the CPU.
    """

    def __init__(self, device: torch.device | str, cache_dir: str | Path | None = None) -> None:
        self.device = torch.device(device)
        self.hidden = TensorCache(cache_dir, name="hidden")
        self.width = 0  # numbers in the hidden states of a token, once there are any
        self.kind = ""
        self._arguments = _Arguments(TensorCache(cache_dir, name="arguments"))
        # Most batches share masks and position embeddings: those of the last call stay loaded.
        self._loaded: dict[_Slot, Tensor] = {}
        self._loaded_on = self.device

    def append(
        self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor
    ) -> None:
        """Add a batch.

        :param hidden: ``[..., batch, seq, hidden]``, found by identity in ``args`` or ``kwargs``.
        :param args: positional arguments of the block.
        :param kwargs: keyword arguments of the block. Key-value caches are dropped.
        :param mask: bool ``[batch, seq]``, true for real tokens.
        """
        self.append_arguments("", hidden, args, kwargs, mask)
        hidden = tokens_first(hidden)
        self.width = math.prod(hidden.shape[2:])
        self.hidden.append(hidden)

    def append_arguments(
        self,
        kind: str,
        hidden: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        mask: Tensor,
    ) -> None:
        """Add a batch's arguments for a kind of block; see :meth:`append`."""

        def keep(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return _HIDDEN if leaf is hidden else self._arguments.keep(leaf)
            return None if hasattr(leaf, "get_seq_length") else leaf  # a key-value cache

        named = map_leaves(keep, kwargs)
        if named.get("use_cache"):
            named["use_cache"] = False
        batch, seq, *_ = tokens_first(hidden).shape
        shape = (batch, seq)
        record = _Record(map_leaves(keep, args), named, self._arguments.keep(mask), shape)
        self._arguments.records.setdefault(kind, []).append(record)

    @property
    def _records(self) -> list[_Record]:
        return self._arguments.records.get(self.kind) or self._arguments.records[""]

    def __len__(self) -> int:
        return len(self._arguments.records[""])

    def shape(self, index: int) -> tuple[int, int]:
        """Return the batch and sequence length of a batch."""
        return self._records[index].shape

    def mask(self, index: int) -> Tensor:
        """Return bool ``[batch, seq]`` on the CPU, true for real tokens."""
        return self._arguments.tensors[self._records[index].mask.number]

    def select(self, index: int, rows: Rows | None = None) -> BlockCall:
        """Return one batch, or some of its sequences, on :attr:`device`.

        Tensors whose first dimension is the batch are cut, those where it is 1 are left to
        broadcast. A vector as long as a sequence holds positions, not sequences.

        :param rows: Numbers of the sequences, all if None.
        """
        record = self._records[index]
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
        """Return what ``block_fn`` makes of a batch: states ``[batch, seq, ..., hidden]``."""
        return self.select(index, rows)(block_fn)

    def fork(self) -> BlockStream:
        """Return a second stream from the same point; the other arguments are shared."""
        twin = BlockStream.__new__(BlockStream)
        twin.device = self.device
        twin.hidden = self.new_cache("hidden")
        twin.width, twin.kind = self.width, self.kind
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
        mine, theirs = self._arguments.records[""], other._arguments.records[""]
        if [record.shape for record in mine] != [record.shape for record in theirs]:
            raise ValueError("streams of the same batches are required, their shapes differ")
        if [*self._arguments.known] == [*other._arguments.known]:
            self._arguments = other._arguments
            self._loaded = {}

    def new_cache(self, name: str = "outputs") -> TensorCache:
        """Return an empty cache of the kind this stream uses, for outputs of a block."""
        return TensorCache(self.hidden.cache_dir, name=name)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors of the stream, one at a time, for a hash of the data."""
        for index, record in enumerate(self._arguments.records[""]):
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


# ---- capture ------------------------------------------------------------------------------------


def capture_block_inputs(
    model: nn.Module,
    first_block_name: str,
    batches: Iterable[Any],
    forward_fn: ForwardFn | None = None,
    *,
    others: Sequence[str] = (),
    cache_dir: str | Path | None = None,
    device: torch.device | str | None = None,
    sides: Sides | None = None,
    within: Within | None = None,
) -> BlockStream:
    """Capture what the first block of ``model`` receives for every batch.

    The model runs where it is, in evaluation mode and without gradients or key-value caches, and
    only up to that block, or the last of ``others``. Of each batch, the first call is taken.

    :param first_block_name: Name of the block in ``model``, such as ``"model.layers.0"``.
    :param batches: Dataloader, or the batches of
        :func:`~aimet_ext.data.batches.iterate_batches`.
    :param forward_fn: Function called as ``forward_fn(model, batch)`` in place of the model itself.
    :param others: Names of blocks of other kinds, whose arguments are captured as well.
    :param cache_dir: Folder for memory-mapped caches; None keeps them in RAM.
    :param device: Device on which the blocks will be called, the block's own if None.
    :param sides: Whose tokens the blocks read, of an encoder-decoder.
    :param within: Function from the number of a batch to a context in which the model runs on it.
    :raises TypeError: a batch is of a wrong type.
    :raises ValueError: there are no batches; the block is unknown or was not called; a sequence
        exceeds the context; an input holds NaN or infinity.
    :raises RuntimeError: the forward pass of a batch failed.
    """
    block = _submodule(model, first_block_name)
    further = [_submodule(model, name) for name in others]
    config = nearest_config(model, first_block_name, "max_position_embeddings")
    context = getattr(config, "max_position_embeddings", None)
    checked = iterate_batches(batches, opaque=forward_fn is not None)
    stream = BlockStream(device if device is not None else module_device(block), cache_dir)
    sides = Sides(forward_fn=forward_fn) if sides is None else sides
    try:
        with evaluating(model), torch.no_grad():
            for number, batch in enumerate(checked):
                ids = token_ids(batch)
                if forward_fn is None:
                    _check_length(ids, context, number)
                run = partial(run_batch, model, batch, number, forward_fn)
                with nullcontext() if within is None else within(number):
                    calls = first_calls([block, *further], run)
                given = sides.mask(batch, model, first_block_name)
                _append(stream, block, ("", *others), calls, given, ids, number)
                _check_length(stream.mask(number), context, number)
    except BaseException:
        stream.close()
        raise
    return stream


def _append(
    stream: BlockStream,
    block: nn.Module,
    kinds: Sequence[str],
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
    given: Tensor | None,
    ids: Tensor | None,
    number: int,
) -> None:
    """Add a batch to a stream.

    :param block: First block.
    :param calls: Arguments of a block of each kind.
    :param given: Mask of the batch, if it has one.
    :param ids: Its token ids, if it has any.
    """
    if len(calls) < len(kinds):
        raise ValueError(
            f"the first block ({type(block).__name__}) must be called for every batch, it was not "
            f"for batch {number}; forward_fn must run the model it is given"
        )
    args, kwargs = calls[0]
    hidden = _hidden(args, kwargs, ids, number)
    attention = named_argument(block, "attention_mask", args, kwargs)
    mask = real_tokens(given, attention, hidden, number)
    if given is None and not is_hidden(block, hidden, args, kwargs, mask):
        mask = torch.ones_like(mask)
    stream.append(hidden, args, kwargs, mask)
    for kind, (args, kwargs) in zip(kinds[1:], calls[1:], strict=True):
        stream.append_arguments(kind, _hidden(args, kwargs, ids, number), args, kwargs, mask)


def named_argument(
    module: nn.Module, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Return the argument that a module's ``forward`` knows by a name, None without it."""
    if name in kwargs:
        return kwargs[name]
    parameters = list(inspect.signature(module.forward).parameters)
    place = parameters.index(name) if name in parameters else len(args)
    return args[place] if place < len(args) else None


def _hidden(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], ids: Tensor | None, number: int
) -> Tensor:
    hidden: Any = args[0] if args else kwargs.get("hidden_states")
    if not are_states(hidden, ids):
        came = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(
            "a block must receive hidden states [batch, seq, hidden] as its first argument or as "
            f"hidden_states, got {came} for batch {number}; name another first block"
        )
    if not bool(hidden.isfinite().all()):
        raise ValueError(
            f"the inputs of the first block must be finite, batch {number} gives NaN or infinity; "
            "check the embedding's weights and the batch"
        )
    return hidden


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"first_block_name must be the name of a submodule of {type(model).__name__}, got "
            f"{name!r}: {error}"
        ) from error


def nearest_config(model: nn.Module, name: str, entry: str) -> Any:
    """Return the config of the nearest module around another that has an entry; None without one.

    :param name: Name of the inner module.
    """
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        if hasattr(config, entry):
            return config
    return None


def _check_length(tokens: Tensor | None, context: Any, number: int) -> None:
    if tokens is not None and isinstance(context, int) and tokens.shape[1] > context:
        raise ValueError(
            f"sequences must fit the model's context of {context} tokens "
            f"(config.max_position_embeddings), batch {number} has {tokens.shape[1]}; cut it into "
            "shorter windows"
        )
