"""Modules that a block calls several times, of which AIMET's graph takes one call alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn


class Inlined(nn.Module):
    """A module that computes as a part of what calls it: as it has no call, it has no quantizers.

    :param module: Module with parameters and without children.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module computes."""
        return self.module.forward(*args, **kwargs)

    forward = __call__


def inline(model: nn.Module, names: Iterable[str]) -> None:
    """Make modules a part of what calls them, in place."""
    for name in names:
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, Inlined(model.get_submodule(name)))


@contextmanager
def noted_repeats(model: nn.Module) -> Iterator[dict[str, None]]:
    """Yield the modules with parameters that a run calls twice in one call of the module around.

    :returns: their names, in a mapping that is filled while the model runs.
    """
    leaves = {
        name: module
        for name, module in model.named_modules()
        if not list(module.children()) and list(module.parameters())
    }
    calls: list[Counter[str]] = [Counter()]
    found: dict[str, None] = {}

    def enter(_: nn.Module, args: Any) -> None:
        calls.append(Counter())

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        found.update(dict.fromkeys(name for name, count in calls.pop().items() if count > 1))

    def note(name: str, _: nn.Module, args: Any) -> None:
        calls[-1][name] += 1

    with ExitStack() as hooks:
        for module in model.modules():
            if list(module.children()):
                hooks.callback(module.register_forward_pre_hook(enter).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
        for name, module in leaves.items():
            hooks.callback(module.register_forward_pre_hook(partial(note, name)).remove)
        yield found
