"""Whether all blocks of a model receive what the first one does, beside the hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.data.batches import map_leaves

__all__ = ["check_same_arguments"]


@torch.no_grad()
def check_same_arguments(
    model: nn.Module, blocks: Sequence[str], run: Callable[[], object]
) -> None:
    """Refuse blocks that cannot be called with the first block's arguments.

    :param blocks: full names, in order.
    :param run: runs the model once.
    :raises ValueError: a block's arguments differ; it is named, and the argument.
    """
    first: dict[str, Any] = {}
    with ExitStack() as hooks:
        for block in blocks:
            hook = _compare(block, blocks[0], first)
            module = model.get_submodule(block)
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        run()


def _compare(block: str, reference: str, first: dict[str, Any]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {f"argument {place}": value for place, value in enumerate(args)}
        named |= {f"argument {name!r}": value for name, value in kwargs.items()}
        hidden = "argument 0" if args else "argument 'hidden_states'"
        leaves = {name: _leaves(value) for name, value in named.items() if name != hidden}
        if block == reference:
            first.update(leaves)
            return
        for name in {**first, **leaves}:
            if not _equal(first.get(name), leaves.get(name)):
                raise ValueError(
                    f"{block} must receive what {reference} does beside the hidden states, but its "
                    f"{name} differs; blocks that are called in different ways are not supported"
                )

    return hook


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []

    def note(leaf: Any) -> Any:
        plain = leaf is None or isinstance(leaf, bool | int | float | str)
        if plain or isinstance(leaf, Tensor):
            found.append(leaf)  # anything else is a cache, which is dropped
        return leaf

    map_leaves(note, value)
    return found


def _equal(one: list[Any] | None, other: list[Any] | None) -> bool:
    if one is None or other is None or len(one) != len(other):
        return False
    return all(_same(a, b) for a, b in zip(one, other, strict=True))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and not isinstance(one, Tensor) and one == other
