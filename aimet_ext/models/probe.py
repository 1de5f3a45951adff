"""A block as a function of its parameters, on a short fixed input that shows its mistakes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.data.batches import map_tensors
from aimet_ext.walk.stream import hidden_state

__all__ = ["BlockFn", "probe", "probe_inputs"]

BlockFn = Callable[[Mapping[str, Tensor]], Tensor]

_MIN_BATCH, _MIN_LENGTH = 2, 8
# Which axis holds the positions, in what decoder blocks of transformers receive.
_SEQUENCE_AXES = {"position_embeddings": -2, "position_ids": -1, "cache_position": -1}
# A cache would carry the keys and values of one call into the next.
_CACHES = {"past_key_values": None, "past_key_value": None, "use_cache": False}


def probe(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BlockFn:
    """A ``block_fn`` that calls a module with other parameters, on a fixed input, in their dtype.

    Inputs, buffers and parameters that are not passed follow the dtype; dropout is off. Works on
    blocks of a simulation whose quantizers are off.

    :param args: positional arguments of the block, for example from :func:`probe_inputs`.
    :param kwargs: keyword arguments.
    """

    def block_fn(params: Mapping[str, Tensor]) -> Tensor:
        like = next(value for value in params.values() if value.is_floating_point())

        def cast(tensor: Tensor) -> Tensor:
            return tensor.detach().to(like.dtype) if tensor.is_floating_point() else tensor

        rest = map_tensors(cast, {**dict(block.named_parameters()), **dict(block.named_buffers())})
        inputs = map_tensors(cast, (tuple(args), dict(kwargs)))
        with _evaluating(block):
            return hidden_state(torch.func.functional_call(block, {**rest, **params}, *inputs))

    return block_fn


def probe_inputs(
    block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, length: int = 16
) -> dict[str, Any]:
    """What a block received, made fit for a proof: two short sequences, the second one padded.

    Positions are cut, a single sequence gets a reversed twin, and a parameter ``attention_mask``
    becomes a causal mask that hides the last quarter of the second sequence. Caches are dropped.

    :param args: positional arguments of a captured call, hidden states ``[batch, seq, hidden]``
        first unless they go by name.
    :param length: tokens to keep; all are kept if the block has tensor arguments of unknown names.
    :returns: all arguments by name.
    :raises ValueError: fewer than 8 tokens, or fewer than 8 to be kept.
    """
    named = _bind(block, args, kwargs)
    named.update({name: off for name, off in _CACHES.items() if name in named})
    first = next(iter(named))
    hidden = named[first]
    batch, seq = hidden.shape[:2]
    if min(length, seq) < _MIN_LENGTH:
        raise ValueError(
            f"a proof needs sequences of at least {_MIN_LENGTH} tokens, got {min(length, seq)}; "
            "calibrate with longer sequences"
        )
    unknown = named.keys() - {first, "attention_mask", *_SEQUENCE_AXES}
    length = seq if any(_has_tensors(named[name]) for name in unknown) else min(length, seq)

    def cut(tensor: Tensor, axis: int = -1, kept: int | None = None) -> Tensor:
        own = tensor.ndim > -axis and tensor.shape[0] == batch
        rows = tensor[:_MIN_BATCH] if own else tensor
        if kept is not None:
            return rows.narrow(axis, 0, kept)
        twice = own and batch == 1 and tensor.ndim > 1  # beside the twin of the hidden states
        return rows.expand(_MIN_BATCH, *rows.shape[1:]) if twice else rows

    for name, value in named.items():
        axis = _SEQUENCE_AXES.get(name)
        if axis is not None:
            named[name] = map_tensors(partial(cut, axis=axis, kept=length), value)
        elif name in unknown:
            named[name] = map_tensors(cut, value)
    hidden = hidden[:_MIN_BATCH, :length]
    named[first] = hidden if batch > 1 else torch.cat([hidden, hidden.flip(1)])
    if "attention_mask" in inspect.signature(block.forward).parameters:
        named["attention_mask"] = _padded_mask(named[first], named.get("attention_mask"))
    return named


def _bind(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, the first parameter first."""
    signature = inspect.signature(block.forward)
    named = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and named.pop(parameter.name, ()):
            raise ValueError(
                f"{type(block).__name__}.forward must name its parameters, got *{parameter.name}"
            )
    return named


def _padded_mask(hidden: Tensor, like: Any) -> Tensor:
    """A mask of the form of ``like`` that hides the last quarter of the second sequence."""
    batch, length = hidden.shape[:2]
    real = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
    real[1, length - length // 4 :] = False
    if isinstance(like, Tensor) and like.ndim == 2:
        return real.to(like.dtype)
    visible = real[:, None, None, :] & real.new_ones(length, length).tril()
    if isinstance(like, Tensor) and like.dtype is torch.bool:
        return visible  # [batch, 1, length, length]
    hidden_score = torch.finfo(hidden.dtype).min
    return torch.zeros_like(visible, dtype=hidden.dtype).masked_fill(~visible, hidden_score)


def _has_tensors(value: Any) -> bool:
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor), value)
    return bool(found)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; the flags of all submodules are put back."""
    flags = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in flags:
            child.training = training
