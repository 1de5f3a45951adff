"""Proof that a model calls its repeated blocks one after another, and with which arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.data.batches import map_leaves, map_tensors
from aimet_ext.walk.states import are_states, hidden_state
from aimet_ext.walk.stream import nearest_config

# Values of each argument of a block but the hidden states, by the argument's name.
_Arguments = dict[str, list[Any]]


class NotInSequence(ValueError):
    """A model does more between its blocks than to hand the hidden states on."""


@torch.no_grad()
def block_kinds(
    model: nn.Module,
    blocks: Sequence[str],
    run: Callable[[], object],
    ids: Tensor | None = None,
) -> tuple[int, ...]:
    """Return for each block the number of the first one that is called with the same arguments.

    Layers of one type in ``config.layer_types`` may share arguments, those of two types may not:
    what windows hide depends on the length of a batch.

    :param blocks: Full names, in order.
    :param run: Function that runs the model on one batch.
    :param ids: Token ids ``[batch, seq]`` of this batch, as far as they are known.
    :raises NotInSequence: A block is not called once and in order, or does not receive what the
        one before returns, bit for bit; or other arguments depend on what blocks before returned.
    """
    found = _calls(model, blocks, run, ids)
    config = nearest_config(model, blocks[0], "layer_types")
    types = getattr(config, "layer_types", None) or ()
    if len(types) != len(blocks):
        types = [""] * len(blocks)
    kinds: list[int] = []
    for number, own in enumerate(found):
        same = (k for k in kinds if types[k] == types[number] and _differing(found[k], own) is None)
        kinds.append(next(same, number))
    if len(set(kinds)) > 1:
        # Arguments are kept from the float model: they must not come from the blocks.
        with ExitStack() as hooks:
            first = model.get_submodule(blocks[0])
            hooks.callback(first.register_forward_hook(_other_output).remove)
            again = _calls(model, blocks, run, ids)
        for block, before, after in zip(blocks, found, again, strict=True):
            if (name := _differing(before, after)) is not None:
                raise NotInSequence(
                    f"{block} must receive arguments that do not depend on the blocks before it, "
                    f"but its {name} does"
                )
    return tuple(kinds)


def _calls(
    model: nn.Module, blocks: Sequence[str], run: Callable[[], object], ids: Tensor | None
) -> list[_Arguments]:
    """Return the arguments of each block's call.

    :raises NotInSequence: see :func:`block_kinds`.
    """
    found: list[_Arguments] = []
    output: list[Any] = []

    def before(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if number != len(found):
            raise NotInSequence(
                f"blocks must be called once each and in order, but {blocks[number]} follows "
                f"{blocks[len(found) - 1] if found else 'nothing'}; take a layer-wise technique, "
                "such as GPTQ, which decides a layer on the inputs of all its calls"
            )
        named = {f"argument {place}": value for place, value in enumerate(args)}
        named |= {f"argument {name!r}": value for name, value in kwargs.items()}
        hidden: Any = named.pop("argument 0" if args else "argument 'hidden_states'", None)
        if not are_states(hidden, ids):
            came = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise NotInSequence(
                f"{blocks[number]} must receive hidden states [batch, seq, hidden], got {came}"
            )
        if output and not _same(hidden, output[-1]):
            raise NotInSequence(
                f"{blocks[number]} must receive what {blocks[number - 1]} returns, but the model "
                "does something to it in between"
            )
        own = {name: _leaves(value) for name, value in named.items()}
        # One copy of what blocks share: masks of long sequences are large.
        alike = (other for other in found if _differing(other, own) is None)
        shared: _Arguments | None = next(iter(alike), None)
        found.append(_copied(own) if shared is None else shared)

    def after(result: Any) -> None:
        try:
            output[:] = [hidden_state(result).detach().clone()]
        except TypeError as error:
            raise NotInSequence(f"{blocks[len(found) - 1]}: {error}") from error

    with ExitStack() as hooks:
        for number, block in enumerate(blocks):
            module = model.get_submodule(block)

            def pre(_: Any, args: Any, kwargs: Any, number: int = number) -> None:
                before(number, args, kwargs)

            hooks.callback(module.register_forward_pre_hook(pre, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(lambda *call: after(call[2])).remove)
        run()
    if not found:
        raise ValueError(f"{blocks[0]} must be called, but the model does not call it")
    if len(found) < len(blocks):
        raise NotInSequence(f"{blocks[len(found)]} must be called, but the model does not call it")
    return found


def _other_output(_: nn.Module, args: Any, output: Any) -> Any:
    """Return an output with other hidden states."""
    hidden = hidden_state(output)
    changed = hidden.flip(-1) + 1
    return map_leaves(lambda leaf: changed if leaf is hidden else leaf, output)


def _copied(arguments: _Arguments) -> _Arguments:
    return {name: map_tensors(Tensor.clone, leaves) for name, leaves in arguments.items()}


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            found.append(leaf.detach())
        elif leaf is None or isinstance(leaf, bool | int | float | str):
            found.append(leaf)  # anything else is a cache, which is dropped
        return leaf

    map_leaves(note, value)
    return found


def _differing(one: _Arguments, other: _Arguments) -> str | None:
    """Return the name of an argument that differs, None without one."""
    if one is other:
        return None
    for name in {**one, **other}:
        mine, theirs = one.get(name), other.get(name)
        if mine is None or theirs is None or len(mine) != len(theirs):
            return name
        if not all(_same(a, b) for a, b in zip(mine, theirs, strict=True)):
            return name
    return None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return torch.equal(one.nan_to_num(), other.nan_to_num())  # NaN is refused elsewhere
    return type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other)
