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
}


def accepts_aimet_arguments(order: Sequence[str]) -> Callable[[F], F]:
    """Have a function understand a call that was written for AIMET's function of that name.

    A callable in third position is AIMET's ``forward_fn``: positional arguments are then taken in
    AIMET's order. Keyword arguments may have AIMET's names.

    :param order: our names of AIMET's arguments, in AIMET's order.
    """

    def decorate(function: F) -> F:
        known = inspect.signature(function).parameters

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            named = dict(kwargs)
            if len(args) > 2 and callable(args[2]):
                if len(args) > len(order):
                    raise TypeError(
                        f"{function.__name__}() takes at most {len(order)} positional arguments "
                        f"in AIMET's order {', '.join(order)}, got {len(args)}"
                    )
                for name, value in zip(order[2:], args[2:], strict=False):
                    _put(function, named, name, value, f"position {order.index(name) + 1}")
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
