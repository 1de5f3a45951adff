"""The hidden states of a block: those in its output, and the real tokens of its input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.data.batches import attended_tokens, map_leaves


def hidden_state(output: Any) -> Tensor:
    """Return the hidden states in a block's output: the output itself, or the first of a tuple.

    :raises TypeError: it is neither.
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise TypeError(
            "a block must return its hidden states, or a tuple that starts with them, got "
            f"{type(output).__name__}"
        )
    return first


def are_states(value: Any, ids: Tensor | None) -> bool:
    """Return True for hidden states ``[batch, seq, hidden]``, or several of them stacked.

    :param ids: Token ids ``[batch, seq]`` of the batch, by which a stack is known; None without.
    """
    if not isinstance(value, Tensor) or value.dim() < 3:
        return False
    return value.dim() == 3 or (ids is not None and value.shape[-3:-1] == ids.shape)


def tokens_first(hidden: Tensor) -> Tensor:
    """Return hidden states ``[..., batch, seq, hidden]`` as ``[batch, seq, ..., hidden]``."""
    return hidden if hidden.dim() == 3 else hidden.movedim((-3, -2), (0, 1))


def tokens_inside(hidden: Tensor) -> Tensor:
    """Return hidden states ``[batch, seq, ..., hidden]`` as a block takes them."""
    return hidden if hidden.dim() == 3 else hidden.movedim((0, 1), (-3, -2))


def real_tokens(mask: Tensor | None, attention: Any, hidden: Tensor, number: int) -> Tensor:
    """Return bool ``[batch, seq]`` from the batch's mask, else from the block's, else all true.

    :param mask: Mask of the batch; one of another shape is passed over.
    :param attention: Attention mask that the block receives, if any.
    :param hidden: Hidden states ``[..., batch, seq, hidden]``.
    :param number: Number of the batch.
    :raises ValueError: the batch is masked whole.
    """
    batch, seq, *_ = tokens_first(hidden).shape
    shape = (batch, seq)
    if mask is None or tuple(mask.shape) != shape:
        mask = attended_tokens(attention, shape) if isinstance(attention, Tensor) else None
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool)
    if not bool(mask.any()):
        raise ValueError(
            f"batch {number} must hold a token that is not masked, its attention_mask masks all "
            f"{mask.numel()}; remove the batch"
        )
    return mask


def is_hidden(
    block: nn.Module,
    hidden: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    mask: Tensor,
) -> bool:
    """Return True if real tokens do not see the others: a mask of True for hidden ones fails.

    :param block: Block that is run.
    :param hidden: Its hidden states ``[..., batch, seq, hidden]``, found by identity in its
        arguments.
    :param mask: Mask to prove, bool ``[batch, seq]``.
    """
    mask = mask.to(hidden.device)
    if bool(mask.all()):
        return True
    changed = torch.where(mask[..., None], hidden, hidden.flip(-1) + 1)
    outputs = []
    for states in (hidden, changed):

        def fill(leaf: Any, states: Tensor = states) -> Any:
            leaf = states if leaf is hidden else leaf
            return None if hasattr(leaf, "get_seq_length") else leaf  # a key-value cache

        result = block.forward(*map_leaves(fill, args), **map_leaves(fill, dict(kwargs)))
        outputs.append(tokens_first(hidden_state(result))[mask])
    one, other = outputs
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
