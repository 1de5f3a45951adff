"""Progress of work in named steps, shown where it takes long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm

_bars: ContextVar[tuple[Any, ...]] = ContextVar("_bars", default=())


@contextmanager
def steps(title: str, total: int, shown: bool = True) -> Iterator[None]:
    """Show a bar over the steps that :func:`step` names meanwhile.

    :param title: What is done.
    :param total: Number of steps.
    :param shown: False for no bar.
    """
    with tqdm(total=total, desc=title, unit="step", disable=not shown, leave=False) as bar:
        token = _bars.set((*_bars.get(), bar))
        try:
            yield
        finally:
            _bars.reset(token)


def step(name: str) -> None:
    """Begin a step of the innermost work that is shown; nothing where none is."""
    for bar in _bars.get()[-1:]:
        bar.update(1)
        bar.set_postfix_str(name)
