"""Calibration batches: read in every form, checked, given to a model, and which tokens count."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ForwardFn = Callable[[nn.Module, Any], Any]

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_FIRST_PLACE = 0.9  # of few batches the last one is held out
_IDS, _MASK = "input_ids", "attention_mask"
TARGET_IDS, TARGET_MASK = "decoder_input_ids", "decoder_attention_mask"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def iterate_batches(dataloader: Any, *, opaque: bool = False) -> Iterator[Any]:
    """Yield the batches of a dataloader for a torch module, each one checked before.

    A batch is a tensor or array of ids ``[batch, seq]``, a tuple or list of positional arguments,
    or a mapping of keyword arguments such as a tokenizer of transformers returns (its ``labels``
    are ignored). Arrays become tensors.

    :param dataloader: list, tuple, torch DataLoader or any other iterable, which is walked through
        once; a function without arguments that returns one; or an object that makes one: Olive's
        data containers (``create_dataloader``) and onnxruntime's ``CalibrationDataReader``
        (``get_next``).
    :param opaque: True if batches are of the user's own type, for the user's ``forward_fn``; only
        their values are checked.
    :raises TypeError: ``dataloader`` is one batch or no iterable, or a batch is of another type.
    :raises ValueError: there is no batch at all, or one is empty, misshapen or holds NaN.
    """
    return _checked(numbered_batches(dataloader), opaque)


def _checked(batches: Iterable[tuple[int, Any]], opaque: bool) -> Iterator[Any]:
    for number, batch in batches:
        if not opaque:
            batch = as_tensors(batch)
            _check_form(batch, number)
        check_values(batch, number)
        yield batch


def call_model(model: nn.Module, batch: Any, forward_fn: ForwardFn | None = None) -> Any:
    """Return the model's output for one batch, which is moved to the model's device first.

    :param forward_fn: called as ``forward_fn(model, batch)`` in place of the model itself.
    :raises ValueError: the batch cannot be moved there.
    """
    device = module_device(model)
    batch = batch if forward_fn is not None else as_tensors(batch)
    try:
        if any(tensor.device != device for tensor in tensors_in(batch)):
            batch = map_tensors(lambda tensor: tensor.to(device), batch)
    except RuntimeError as error:
        raise ValueError(
            f"batches must be on the model's device ({device}) or movable to it: {error}"
        ) from error
    if forward_fn is not None:
        return forward_fn(model, batch)
    args, kwargs = call_arguments(batch)
    return model(*args, **kwargs)


def call_arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments of a model for one batch, without labels."""
    if isinstance(batch, Mapping):
        return (), {name: value for name, value in batch.items() if name != "labels"}
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,), {}


def module_device(module: nn.Module) -> torch.device:
    """Return the device of a module's first parameter or buffer, the CPU if it has none."""
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


# ------------------------------------------------------------------------------ tokens of a batch


def token_ids(batch: Any) -> Tensor | None:
    """Return the token ids ``[batch, seq]`` of a batch or feed, None where it does not tell them.

    They are ``input_ids``, the only value of a mapping, or the first positional argument.
    """
    if isinstance(batch, Mapping):
        batch = batch.get(_IDS, next(iter(batch.values())) if len(batch) == 1 else None)
    elif isinstance(batch, tuple | list):
        batch = batch[0] if batch else None
    ids = as_tensors(batch)
    is_ids = isinstance(ids, Tensor) and ids.ndim == 2 and ids.dtype in _INTEGERS
    return ids if is_ids else None


def token_mask(batch: Any, model: nn.Module | None = None, kind: str = _MASK) -> Tensor | None:
    """Return which tokens of a batch or feed are real, by its 2-D ``attention_mask``.

    :param model: module that takes the batch's positional arguments, to tell which one is the
        mask; None if a ``forward_fn`` decides that.
    :param kind: Name of the mask, :data:`TARGET_MASK` for what an encoder-decoder writes.
    :return: bool ``[batch, seq]``, or None where the batch does not say.
    """
    mask = as_tensors(_named(batch, model).get(kind))
    return mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None


def output_mask(batch: Any, model: nn.Module | None = None) -> Tensor | None:
    """Return which tokens of a model's output are real, the decoder's if there is one.

    See :func:`token_mask`.
    """
    writes_another = TARGET_IDS in _named(batch, model)
    return token_mask(batch, model, TARGET_MASK if writes_another else _MASK)


def with_tokens(
    batches: Sequence[Any], wanted: int, model: nn.Module | None = None
) -> Sequence[Any]:
    """Return batches from all over that have about so many real tokens, see :func:`_spread`.

    :param wanted: Tokens; all batches are returned where there are no more, or one tells none.
    :param model: See :func:`token_mask`.
    """
    counts = []
    for batch in batches:
        ids, mask = token_ids(batch), token_mask(batch, model)
        if ids is None:
            return batches
        counts.append(ids.numel() if mask is None else int(mask.sum()))
    size = math.ceil(len(batches) * wanted / max(1, sum(counts)))
    if size >= len(batches):
        return batches
    return [batches[place] for place in _spread(len(batches), size)]


def held_out(count: int) -> tuple[list[int], list[int]]:
    """Return the numbers of the batches to learn from, and of those to judge by, a quarter.

    Both have of each text, see :func:`_spread`. One batch alone is both.
    """
    held = _spread(count, max(1, count // 4))
    return [n for n in range(count) if n not in held] or held, held


def _spread(count: int, size: int) -> list[int]:
    """Return one number of each of ``size`` equal parts of a range, in order.

    Its place within a part is another each time, by the golden ratio: texts that take turns have
    their share as well as texts that follow one another.
    """
    places = ((_FIRST_PLACE + n * _GOLDEN_RATIO) % 1 for n in range(size))
    return [int((n + place) * count / size) for n, place in enumerate(places)]


def _named(batch: Any, model: nn.Module | None) -> Mapping[str, Any]:
    """Return the values of a batch by their names, as far as these are known."""
    if model is not None and isinstance(batch, tuple | list):
        try:
            return inspect.signature(model.forward).bind_partial(*batch).arguments
        except TypeError:  # too many arguments: calling the model says so better
            return {}
    return batch if isinstance(batch, Mapping) else {}


def attended_tokens(attention: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """Return which tokens are real, by the attention mask that a block received.

    A token is real if a query attends to it. Libraries let the queries of padding attend to
    everything so that their softmax is not empty: queries that look into the future are left out
    (the last one never does).

    :param attention: ``[batch or 1, heads or 1, seq, seq]``, bool (True: attends, or the other way
        round if more than half of the future is True) or added to the scores (large negative: does
        not), or ``[batch, seq]`` (nonzero: real).
    :param shape: batch and seq.
    :return: bool ``[batch, seq]``, or None for a mask of another shape.
    """
    if tuple(attention.shape) == shape:
        return attention != 0
    batch, seq = shape
    if attention.ndim != 4 or tuple(attention.shape[-2:]) != (seq, seq):
        return None
    if attention.is_floating_point():
        lowest = attention.amin()
        attention = attention > lowest / 2 if lowest < 0 else torch.ones_like(attention).bool()
    elif 4 * int((attention != 0).triu(1).sum()) > attention[..., 0, 0].numel() * seq * (seq - 1):
        attention = attention == 0
    attention = attention.bool()
    allowed = attention.any(1)  # [batch or 1, query, key]
    usual = ~allowed.triu(1).any(-1)  # [batch or 1, query]
    return (allowed & usual[:, :, None]).any(1).expand(batch, seq)


def seen_arguments(
    model: nn.Module, batches: Iterable[Any], forward_fn: Callable[[nn.Module, Any], Any]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a model is called with for batches of a type of the user's own.

    :returns: pairs of a name, with the plain values of the call in it, and a tensor.
    :raises ValueError: ``forward_fn`` does not call the model, so that nothing tells one batch
        from another.
    """
    calls: list[Any] = []
    plain: list[str] = []

    def note(leaf: Any) -> None:
        if not isinstance(leaf, Tensor):  # an object's text has its address in it
            known = leaf is None or isinstance(leaf, str | int | float)
            plain.append(repr(leaf) if known else type(leaf).__name__)

    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        for number, batch in enumerate(batches):
            calls.clear()
            plain.clear()
            forward_fn(model, batch)
            if not calls:
                raise ValueError(
                    "with checkpoint_dir, batches of a type of one's own are known by the model's "
                    f"arguments, but forward_fn does not call the model with batch {number}; "
                    "give batches of tensors, or leave checkpoint_dir out"
                )
            map_leaves(note, calls)
            for place, tensor in enumerate(tensors_in(calls)):
                yield f"{number}.{place} {plain}", tensor
    finally:
        hook.remove()


# ---------------------------------------------------------------------------------- nested values


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply ``function`` to every value in nested tuples, lists and mappings, into new ones."""
    if isinstance(tree, tuple | list):
        values = [map_leaves(function, item) for item in tree]
        if hasattr(tree, "_fields"):  # a named tuple
            return type(tree)(*values)
        return tuple(values) if isinstance(tree, tuple) else values
    if isinstance(tree, Mapping):
        items = {key: map_leaves(function, value) for key, value in tree.items()}
        if type(tree) is dict or not isinstance(tree, MutableMapping):
            return items
        copied = copy.copy(tree)  # keeps the type of a tokenizer's output
        copied.update(items)
        return copied
    return function(tree)


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply :func:`map_leaves` to the tensors only; all else stays."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def as_tensors(batch: Any) -> Any:
    """Return a batch with tensors in place of arrays of numbers; one without arrays as it is.

    Memory is shared; arrays that torch cannot take are copied.
    """
    arrays = []

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray) or leaf.dtype.kind not in "fiub":
            return leaf
        arrays.append(leaf)
        plain = np.ascontiguousarray(leaf).reshape(leaf.shape)
        plain = plain.astype(plain.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(plain if plain.flags.writeable else plain.copy())

    converted = map_leaves(convert, batch)
    return converted if arrays else batch


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in nested sequences and mappings, such as a batch or a model's output."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, tuple | list):
        return [tensor for item in tree for tensor in tensors_in(item)]
    return [tree] if isinstance(tree, Tensor) else []


# ------------------------------------------------------------------------------ sources and checks


def numbered_batches(dataloader: Any) -> Iterator[tuple[int, Any]]:
    """Return an iterator over the batches of a dataloader in any form, with their numbers.

    :raises TypeError: ``dataloader`` is one batch or no iterable.
    :raises ValueError: there is no batch, which shows at the end.
    """
    return _numbered(_source(dataloader))


def _source(dataloader: Any) -> Iterable[Any]:
    if isinstance(dataloader, Tensor | np.ndarray | Mapping | str | bytes):
        raise _no_iterable(dataloader, "put a single batch into a list")
    if hasattr(dataloader, "create_dataloader"):
        return _source(dataloader.create_dataloader())
    if hasattr(dataloader, "get_next"):
        return _read(dataloader)
    if hasattr(dataloader, "__iter__"):
        return dataloader
    if hasattr(dataloader, "__getitem__"):
        return _by_index(dataloader)
    if not callable(dataloader):
        raise _no_iterable(dataloader, "a function that returns one will do as well")
    made = dataloader()
    if made is None or callable(made):
        raise TypeError(
            "a dataloader that is a function must return an iterable of batches, got "
            f"{type(made).__name__}"
        )
    return _source(made)


def _no_iterable(dataloader: Any, remedy: str) -> TypeError:
    return TypeError(
        f"dataloader must be an iterable of batches, got {type(dataloader).__name__}; {remedy}"
    )


def _by_index(dataset: Any) -> Iterable[Any]:
    """Return the items of a data set, which is not asked beyond its length if it knows that."""
    if not hasattr(dataset, "__len__"):
        return iter(dataset)
    return (dataset[index] for index in range(len(dataset)))


def _read(reader: Any) -> Iterator[Any]:
    """Yield all that a reader has, from the beginning if it can be rewound."""
    if callable(getattr(reader, "rewind", None)):
        reader.rewind()
    while (item := reader.get_next()) is not None:
        yield item


def _numbered(source: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    number = -1
    for number, batch in enumerate(source):
        yield number, batch
    if number < 0:
        raise ValueError(
            "dataloader must yield at least one batch, it yielded none; a generator can be walked "
            "through only once, so pass a list, a torch DataLoader or a function that returns a "
            "generator"
        )


def _check_form(batch: Any, number: int) -> None:
    if not isinstance(batch, Tensor | tuple | list | Mapping):
        raise TypeError(
            f"batch {number} must be a tensor of ids, a tuple of positional arguments or a mapping "
            f"of keyword arguments, got {type(batch).__name__}; pass a forward_fn(model, batch) "
            "that calls the model with it"
        )
    args, kwargs = call_arguments(batch)
    tensors = tensors_in((args, kwargs))
    if not tensors:
        raise TypeError(
            f"batch {number} must hold at least one tensor, got {type(batch).__name__} of "
            f"{[type(value).__name__ for value in (*args, *kwargs.values())]}"
        )
    ids = kwargs.get(_IDS, tensors[0])
    if isinstance(ids, Tensor) and (ids.ndim < 2 or ids.numel() == 0):
        raise ValueError(
            f"batch {number} must be of shape [batch, seq] with at least one token, got "
            f"{list(ids.shape)}; a single sequence takes ids.unsqueeze(0)"
        )


def check_values(batch: Any, number: int) -> None:
    """Refuse a batch that holds NaN.

    :raises ValueError: it does.
    """
    items = batch.items() if isinstance(batch, Mapping) else [("", batch)]
    for name, values in items:
        for tensor in tensors_in(values):
            if tensor.is_floating_point() and not tensor.is_meta and bool(tensor.isnan().any()):
                place = f"input {name!r}" if name else "a tensor"
                raise ValueError(
                    f"batch {number} holds NaN in {place} of shape {list(tensor.shape)}; remove it "
                    "from the calibration data"
                )
