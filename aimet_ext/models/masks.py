"""Attention masks that can be traced, in place of those that transformers computes.

A model of transformers asks the functions of its ``masking_utils`` for its masks: causal ones, with
a window, in chunks, and of padding alone for layers that keep a state. Their code decides by values
and cannot be traced. What is asked for is computed here instead, so that nothing about the layers
of a model has to be known.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils


@dataclass(frozen=True)
class MaskAsked:
    """A mask that a model asks for.

    :param padding: What the model was given: padding ``[batch, seq]``, 0 for it, or a mask that
        is added to the scores.
    :param dtype: Dtype of the hidden states.
    :param window: Tokens that a query sees, itself included; None for all before it.
    :param chunk: Tokens of a chunk, beyond which a query does not look; None for no chunks.
    """

    padding: Tensor
    dtype: torch.dtype
    window: int | None = None
    chunk: int | None = None

    def added(self, lowest: float) -> Tensor:
        """Return the term added to the scores, ``[batch, 1, seq, seq]``.

        :param lowest: Number added for what is not seen.
        """
        if self.padding.dim() > 2:
            return self.padding
        device = self.padding.device
        order = torch.arange(self.padding.shape[-1], device=device)
        distance = order[:, None] - order[None, :]  # [query, key]
        allowed = (distance >= 0) & self.padding.bool()[:, None, None, :]
        if self.window is not None:
            allowed = allowed & (distance < self.window)
        if self.chunk is not None:  # counted from the first real token
            ahead = (self.padding.cumsum(-1) == 0).sum(-1, keepdim=True)  # [batch, 1]
            place = (order - ahead).div(self.chunk, rounding_mode="floor")  # [batch, seq]
            allowed = allowed & (place[:, None, :, None] == place[:, None, None, :])
        zero = torch.zeros((), dtype=self.dtype, device=device)
        return zero.masked_fill(~allowed, lowest)


Answer = Callable[[MaskAsked], Any]

# What a mask is, beside causal, by the function that a model asks; settings by their names in the
# model's config. Masks of layers that keep a state are the padding itself.
_KINDS: Mapping[str, Mapping[str, str]] = {
    "create_causal_mask": {},
    "create_sliding_window_causal_mask": {"window": "sliding_window"},
    "create_chunked_causal_mask": {"chunk": "attention_chunk_size"},
}
_PADDING = "create_recurrent_attention_mask"
# Arguments with which a mask is another one, which transformers is left to compute.
_FURTHER = ("or_mask_function", "and_mask_function", "block_sequence_ids")


class MaskCalls:
    """The places in a model's code that ask for masks.

    :param model: Model of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        known = {getattr(masking_utils, name, None): name for name in (*_KINDS, _PADDING)}
        libraries = {kind.__module__ for module in model.modules() for kind in type(module).__mro__}
        # (library, name in it, name of transformers' function)
        self._places: list[tuple[str, str, str]] = [
            (library, name, known[value])
            for library in sorted(libraries)
            for name, value in vars(sys.modules[library]).items()
            if isinstance(value, FunctionType) and value in known
        ]

    @contextmanager
    def answered(self, answer: Answer) -> Iterator[None]:
        """Return a context in which a model of the same code is given other masks.

        :param answer: Returns the mask that is added to the scores, for one that is asked for.
        """
        with ExitStack() as stack:
            for library, name, function in self._places:
                own = vars(sys.modules[library])
                stack.callback(own.__setitem__, name, own[name])
                own[name] = partial(_reply, function, answer)
            yield


def _reply(
    function: str,
    answer: Answer,
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    position_ids: Any = None,
    **further: Any,
) -> Any:
    """Return a mask in place of a function of transformers, whose arguments these are."""
    if attention_mask is None or any(further.get(name) is not None for name in _FURTHER):
        own = getattr(masking_utils, function)
        arguments = (config, inputs_embeds, attention_mask, past_key_values, position_ids)
        return own(*arguments, **further)
    if function == _PADDING:
        return attention_mask if attention_mask.dim() == 2 else None
    settings = {key: getattr(config, name) for key, name in _KINDS[function].items()}
    return answer(MaskAsked(attention_mask, inputs_embeds.dtype, **settings))
