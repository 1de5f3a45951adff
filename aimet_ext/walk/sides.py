"""Source or target: the tokens that a layer of an encoder-decoder reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.data.batches import TARGET_IDS, TARGET_MASK, ForwardFn, call_model, token_mask
from aimet_ext.walk.hooks import layer_input


@dataclass(frozen=True)
class Sides:
    """The mask of tokens that fits a layer's or block's input.

    :param target: Names of those that read what the decoder makes of its ids; None for a model
        that reads one sequence.
    :param forward_fn: Function that calls the model with a batch, if there is one.
    """

    target: frozenset[str] | None = None
    forward_fn: ForwardFn | None = None

    def mask(self, batch: Any, model: nn.Module, name: str) -> Tensor | None:
        """Return which tokens of a batch count for a layer or block; None if it does not say."""
        of_target = self.target is not None and name in self.target
        named_by = None if self.forward_fn else model
        return token_mask(batch, named_by, *((TARGET_MASK,) if of_target else ()))

    def differ(self, one: str, other: str) -> bool:
        """Return True if two of the names read tokens of different sequences."""
        return self.target is not None and (one in self.target) != (other in self.target)


@torch.no_grad()
def find_sides(
    model: nn.Module, names: Iterable[str], batches: Sequence[Any], forward_fn: ForwardFn | None
) -> Sides:
    """Return whose tokens modules read: what changes with the decoder's ids is the target's.

    The model runs twice on the first batch if its ``forward`` takes ``decoder_input_ids``.

    :param names: Names of layers and blocks, each called with a tensor first.
    """
    if not batches or TARGET_IDS not in inspect.signature(model.forward).parameters:
        return Sides(forward_fn=forward_fn)
    names = list(names)
    passes: list[dict[str, Tensor]] = []
    changed: list[bool] = []
    try:
        for change in (False, True):
            seen: dict[str, Tensor] = {}
            with ExitStack() as hooks:
                for name in names:
                    hook = partial(_note, seen, name)
                    module = model.get_submodule(name)
                    hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                if change:
                    hook = partial(_other_ids, changed)
                    hooks.callback(model.register_forward_pre_hook(hook, with_kwargs=True).remove)
                call_model(model, batches[0], forward_fn)
            passes.append(seen)
    except Exception:  # noqa: BLE001  (of the batch: the walk says more)
        return Sides(forward_fn=forward_fn)
    if not any(changed):  # the ids came another way
        return Sides(forward_fn=forward_fn)
    before, after = passes
    moved = (n for n in before if n in after and not torch.equal(before[n], after[n]))
    return Sides(frozenset(moved), forward_fn)


def _note(seen: dict[str, Tensor], name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
    """Note a number of each token that a module is called with."""
    x = layer_input(args, kwargs) if args or "input" in kwargs else kwargs.get("hidden_states")
    if isinstance(x, Tensor) and x.dim() > 1:
        # Not its mean or norm, which a norm layer leaves the same for all.
        ramp = torch.linspace(1, 2, x.shape[-1], dtype=torch.float64, device=x.device)
        seen[name] = x.double() @ ramp


def _other_ids(changed: list[bool], model: nn.Module, args: Any, kwargs: Any) -> Any:
    """Return the arguments of a model with other ids for the decoder at every place."""
    call: Callable[..., Any] = model.forward
    bound = inspect.signature(call).bind(*args, **kwargs)
    ids = bound.arguments.get(TARGET_IDS)
    if not isinstance(ids, Tensor):
        return None
    low, high = ids.amin(), ids.amax()
    high = torch.where(low < high, high, torch.where(low > 0, low - 1, low + 1))
    bound.arguments[TARGET_IDS] = torch.where(ids == low, high, low)
    changed.append(True)
    return bound.args, bound.kwargs
