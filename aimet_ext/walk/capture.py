"""What flows into a model's blocks: captured once, replayed block by block, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.data.batches import (
    ForwardFn,
    attended_tokens,
    call_model,
    iterate_batches,
    module_device,
    token_mask,
)
from aimet_ext.walk.stream import BlockCall, BlockStream

__all__ = ["BlockCall", "BlockStream", "capture_block_inputs"]


class _Captured(BaseException):
    """Ends a forward pass; no Exception, so that a ``forward_fn`` does not catch it by mistake."""


def capture_block_inputs(
    model: nn.Module,
    first_block_name: str,
    batches: Iterable[Any],
    forward_fn: ForwardFn | None = None,
    *,
    cache_dir: str | Path | None = None,
    device: torch.device | str | None = None,
) -> BlockStream:
    """What the first block of ``model`` receives for every batch.

    The model runs where it is, in evaluation mode and without gradients or key-value caches, and
    only up to that block. Of each batch, the first call of the block is taken.

    :param first_block_name: name of the block in ``model``, such as ``"model.layers.0"``.
    :param batches: dataloader, or what :func:`~aimet_ext.data.batches.iterate_batches` yields.
    :param forward_fn: called as ``forward_fn(model, batch)`` in place of the model itself.
    :param cache_dir: folder for memory-mapped caches; None keeps them in RAM.
    :param device: where the blocks will be called, the block's own device if None.
    :raises TypeError: a batch is of a wrong type.
    :raises ValueError: there are no batches; the block is unknown, was not called or blocks differ
        in what they receive; a sequence exceeds the context; an input holds NaN or infinity.
    :raises RuntimeError: the forward pass of a batch failed.
    """
    block = _submodule(model, first_block_name)
    config = _text_config(model, first_block_name)
    _check_uniform(config)
    context = getattr(config, "max_position_embeddings", None)
    checked = iterate_batches(batches, opaque=forward_fn is not None)
    stream = BlockStream(device if device is not None else module_device(block), cache_dir)
    try:
        with _undisturbed(model), torch.no_grad():
            for number, batch in enumerate(checked):
                if forward_fn is None:
                    _check_length(_ids(batch), context, number)
                args, kwargs = _first_call(model, block, batch, forward_fn, number)
                hidden = _hidden(args, kwargs, number)
                _check_length(hidden[..., 0], context, number)
                known = None if forward_fn is not None else model
                mask = _real_tokens(token_mask(batch, known), hidden, args, kwargs, number)
                stream.append(hidden, args, kwargs, mask)
    except BaseException:
        stream.close()
        raise
    return stream


def _first_call(
    model: nn.Module, block: nn.Module, batch: Any, forward_fn: ForwardFn | None, number: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the first call of ``block`` in a forward pass."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, dict(kwargs)))
        raise _Captured

    hook = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        call_model(model, batch, forward_fn)
    except _Captured:
        pass
    except Exception as error:
        who = "forward_fn" if forward_fn is not None else "the model's forward pass"
        raise RuntimeError(
            f"{who} failed on batch {number} with {type(error).__name__}: {error}"
        ) from error
    finally:
        hook.remove()
    if not calls:
        raise ValueError(
            f"the first block ({type(block).__name__}) must be called for every batch, it was not "
            f"for batch {number}; forward_fn must run the model it is given"
        )
    return calls[0]


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int) -> Tensor:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
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


def _real_tokens(
    mask: Tensor | None,
    hidden: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    number: int,
) -> Tensor:
    """Bool ``[batch, seq]`` from the batch's mask, else from the block's, else all true."""
    shape = (hidden.shape[0], hidden.shape[1])
    if mask is None or tuple(mask.shape) != shape:
        attention = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        mask = attended_tokens(attention, shape) if isinstance(attention, Tensor) else None
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool)
    if not bool(mask.any()):
        raise ValueError(
            f"batch {number} must hold a token that is not masked, its attention_mask masks all "
            f"{mask.numel()}; remove the batch"
        )
    return mask


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"first_block_name must be the name of a submodule of {type(model).__name__}, got "
            f"{name!r}: {error}"
        ) from error


def _text_config(model: nn.Module, block_name: str) -> Any:
    """The config with a context length that is nearest around the block, None without one."""
    parts = block_name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        if hasattr(config, "max_position_embeddings"):
            return config
    return None


def _check_uniform(config: Any) -> None:
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if len(kinds) > 1:
        raise ValueError(
            "all blocks must receive the same attention mask and position embeddings, but this "
            f"model's config.layer_types mixes {' and '.join(kinds)}; such models are not supported"
        )


def _ids(batch: Any) -> Tensor | None:
    """The ids of a batch ``[batch, seq]`` where they are known before the model runs."""
    if isinstance(batch, Mapping):
        batch = batch.get("input_ids")
    elif isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    is_ids = isinstance(batch, Tensor) and batch.ndim == 2 and not batch.is_floating_point()
    return batch if is_ids else None


def _check_length(tokens: Tensor | None, context: Any, number: int) -> None:
    if tokens is not None and isinstance(context, int) and tokens.shape[1] > context:
        raise ValueError(
            f"sequences must fit the model's context of {context} tokens "
            f"(config.max_position_embeddings), batch {number} has {tokens.shape[1]}; cut it into "
            "shorter windows"
        )


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without key-value caches; every flag is put back at the end."""
    training = [(module, module.training) for module in model.modules()]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caching = [(c, c.use_cache) for c in configs.values() if hasattr(c, "use_cache")]
    try:
        model.eval()
        for config, _ in caching:
            config.use_cache = False
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for config, value in caching:
            config.use_cache = value
