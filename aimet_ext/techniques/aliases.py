"""AIMET's order and names of arguments, understood by ours."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

__all__ = ["ALIASES", "accepts_aimet_arguments"]

F = TypeVar("F", bound=Callable[..., Any])

#: AIMET's names of our arguments, over all of its techniques.
ALIASES: Mapping[str, str] = {
    "quant_sim": "sim",
    "data_loader": "dataloader",
    "inputs": "dataloader",
    "nodes_to_exclude": "modules_to_exclude",
    "excluded_nodes": "modules_to_exclude",
    "op_types": "layers",
    "nodes_to_include": "layers",
}


def accepts_aimet_arguments(order: Sequence[str]) -> Callable[[F], F]:
    """Have a function understand a call that was written for AIMET's function of that name.

    A callable in third position is AIMET's ``forward_fn``. It and more positional arguments than
    ours takes are understood in AIMET's order. Keyword arguments may have AIMET's names.

    :param order: our names of AIMET's arguments, in AIMET's order.
    """

    def decorate(function: F) -> F:
        known = inspect.signature(function).parameters
        own = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in known.values())

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            named = dict(kwargs)
            third = len(args) > 2 and callable(args[2])
            if third or len(args) > own:
                names = order
                if third and "forward_fn" not in order[2:3]:
                    names = (*order[:2], "forward_fn")
                if len(args) > len(names):
                    raise TypeError(
                        f"{function.__name__}() takes at most {len(names)} positional arguments "
                        f"in AIMET's order {', '.join(names)}, got {len(args)}"
                    )
                for number in range(2, len(args)):
                    came_as = f"position {number + 1}"
                    _put(function, named, names[number], args[number], came_as)
                args = args[:2]
            for alias, name in ALIASES.items():
                if alias in named and alias not in known and name in known:
                    if name in list(known)[: len(args)]:
                        _twice(function, name, alias)
                    _put(function, named, name, named.pop(alias), alias)
            return function(*args, **named)

        return call  # type: ignore[return-value]

    return decorate


def _put(function: Any, named: dict[str, Any], name: str, value: Any, came_as: str) -> None:
    if name in named:
        _twice(function, name, came_as)
    named[name] = value


def _twice(function: Any, name: str, came_as: str) -> None:
    raise TypeError(
        f"{function.__name__}() got the argument {name!r} twice, the second time as {came_as!r}; "
        f"pass {name!r} alone"
    )
