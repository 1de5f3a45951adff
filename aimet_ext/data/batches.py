"""Calibration batches: checked, given to a model, and which of their tokens count.

A batch is a tensor of ids ``[batch, seq]``, a tuple or list of positional arguments, or a mapping
of keyword arguments such as a Hugging Face tokenizer returns (its ``labels`` are ignored).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "ForwardFn",
    "attended_tokens",
    "call_model",
    "iterate_batches",
    "map_leaves",
    "map_tensors",
    "module_device",
    "token_mask",
]

ForwardFn = Callable[[nn.Module, Any], Any]


def iterate_batches(
    dataloader: Iterable[Any], *, max_batches: int | None = None, opaque: bool = False
) -> Iterator[Any]:
    """The batches of a dataloader, each one checked before it is handed on.

    :param dataloader: iterable of batches.
    :param max_batches: how many to take at most, all if None.
    :param opaque: batches are of the user's own type, for the user's ``forward_fn``; only their
        values are checked.
    :raises TypeError: ``dataloader`` is one batch or no iterable, or a batch is of another type.
    :raises ValueError: there is no batch at all, or one is empty, misshapen or holds NaN; or
        ``max_batches`` is below 1.
    """
    if isinstance(dataloader, Tensor | Mapping | str | bytes) or not _is_iterable(dataloader):
        raise TypeError(
            f"dataloader must be an iterable of batches, got {type(dataloader).__name__}; "
            "put a single batch into a list"
        )
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1 or None, got {max_batches}")
    return _checked(dataloader, max_batches, opaque)


def _checked(dataloader: Iterable[Any], max_batches: int | None, opaque: bool) -> Iterator[Any]:
    number = -1
    for number, batch in enumerate(dataloader):
        if not opaque:
            _check_form(batch, number)
        _check_values(batch, number)
        yield batch
        if number + 1 == max_batches:
            return
    if number < 0:
        raise ValueError(
            "dataloader must yield at least one batch, it yielded none; a generator can be walked "
            "through only once, so pass a list or a torch DataLoader"
        )


def _is_iterable(value: object) -> bool:
    return hasattr(value, "__iter__") or hasattr(value, "__getitem__")


def _check_form(batch: Any, number: int) -> None:
    if not isinstance(batch, Tensor | tuple | list | Mapping):
        raise TypeError(
            f"batch {number} must be a tensor of ids, a tuple of positional arguments or a mapping "
            f"of keyword arguments, got {type(batch).__name__}; pass a forward_fn(model, batch) "
            "that calls the model with it"
        )
    args, kwargs = _arguments(batch)
    tensors = _tensors((args, kwargs))
    if not tensors:
        raise TypeError(
            f"batch {number} must hold at least one tensor, got {type(batch).__name__} of "
            f"{[type(value).__name__ for value in (*args, *kwargs.values())]}"
        )
    ids = kwargs.get("input_ids", tensors[0])
    if isinstance(ids, Tensor) and (ids.ndim < 2 or ids.numel() == 0):
        raise ValueError(
            f"batch {number} must be of shape [batch, seq] with at least one token, got "
            f"{list(ids.shape)}; a single sequence takes ids.unsqueeze(0)"
        )


def _check_values(batch: Any, number: int) -> None:
    for tensor in _tensors(batch):
        if tensor.is_floating_point() and not tensor.is_meta and bool(tensor.isnan().any()):
            raise ValueError(
                f"batch {number} holds NaN in a tensor of shape {list(tensor.shape)}; remove it "
                "from the calibration data"
            )


def call_model(model: nn.Module, batch: Any, forward_fn: ForwardFn | None = None) -> Any:
    """The model's output for one batch, which is moved to the model's device first.

    :param forward_fn: called as ``forward_fn(model, batch)`` in place of the model itself.
    :raises ValueError: the batch cannot be moved there.
    """
    device = module_device(model)
    try:
        if any(tensor.device != device for tensor in _tensors(batch)):
            batch = map_tensors(lambda tensor: tensor.to(device), batch)
    except RuntimeError as error:
        raise ValueError(
            f"batches must be on the model's device ({device}) or movable to it: {error}"
        ) from error
    if forward_fn is not None:
        return forward_fn(model, batch)
    args, kwargs = _arguments(batch)
    return model(*args, **kwargs)


def module_device(module: nn.Module) -> torch.device:
    """The device of a module's first parameter or buffer, the CPU if it has none."""
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def token_mask(batch: Any, model: nn.Module | None = None) -> Tensor | None:
    """Which tokens of a batch are real, by its 2-D ``attention_mask``.

    :param model: module that takes the batch's positional arguments, to tell which one is the
        mask; None if a ``forward_fn`` decides that.
    :return: bool ``[batch, seq]``, or None where the batch does not say.
    """
    named: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {}
    if model is not None and isinstance(batch, tuple | list):
        try:
            named = inspect.signature(model.forward).bind_partial(*batch).arguments
        except TypeError:  # too many arguments: calling the model says so better
            named = {}
    mask = named.get("attention_mask")
    return mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None


def attended_tokens(attention: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """Which tokens are real, by the attention mask that a block received.

    A token is real if a query attends to it. Libraries let the queries of padding attend to
    everything, lest their softmax be empty: queries that look into the future are left out (the
    last one never does).

    :param attention: ``[batch or 1, heads or 1, seq, seq]``, bool (True: attends) or added to the
        scores (large negative: does not), or ``[batch, seq]`` (nonzero: real).
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
    allowed = attention.bool().any(1)  # [batch or 1, query, key]
    usual = ~allowed.triu(1).any(-1)  # [batch or 1, query]
    return (allowed & usual[:, :, None]).any(1).expand(batch, seq)


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
    """:func:`map_leaves` for the tensors only; all else stays."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _tensors(tree: Any) -> list[Tensor]:
    """All tensors of a tree, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, tree)
    return found


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a model for one batch."""
    if isinstance(batch, Mapping):
        return (), {name: value for name, value in batch.items() if name != "labels"}
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,), {}
