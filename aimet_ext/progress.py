"""Progress of long work: bars with an estimate, which logs get as a line now and then."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import std
from tqdm.auto import tqdm

DELAY = 2.0
"""Seconds before a bar's first line, where there is no terminal."""

EVERY = 30.0
"""Seconds between its further lines."""

_log = logging.getLogger(__name__)
_bars: ContextVar[tuple[Any, ...]] = ContextVar("_bars", default=())
_hidden: ContextVar[bool] = ContextVar("_hidden", default=False)


def bar(
    iterable: Iterable[Any] | None = None,
    desc: str = "",
    *,
    total: float | None = None,
    shown: bool = True,
    **options: Any,
) -> Any:
    """Return tqdm's bar over work that may take long.

    A terminal or notebook gets a bar; anything else, such as a file, gets a line after
    :data:`DELAY` seconds, one every :data:`EVERY` seconds, and one at the end.

    :param iterable: Work to pass on item by item; None for a bar that its user updates.
    :param desc: Name of the work.
    :param total: Number of items; None for the length of ``iterable``.
    :param shown: False for no bar.
    :param options: Further options of tqdm.
    """
    given = {"desc": f"{desc}: ", "total": total, "disable": not shown or _hidden.get(), **options}
    return (tqdm if is_live() else _Lines)(iterable, **given)


@contextmanager
def hidden() -> Iterator[None]:
    """Open a context without any bar."""
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)


def write(text: str) -> None:
    """Write a line to stderr, above the bars that are shown."""
    tqdm.write(text, file=sys.stderr)


def is_live() -> bool:
    """Return True if a line that was written can be written over: in a terminal or notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class _Lines(std.tqdm):
    """A bar as lines, each of which stays."""

    leave: bool | None

    def __init__(self, *args: Any, **options: Any) -> None:
        form = "{desc}{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        fixed = {"file": _Stream(), "delay": DELAY, "mininterval": DELAY, "miniters": 1}
        super().__init__(*args, **{**options, **fixed, "bar_format": form})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line, and the next one much later."""
        self.mininterval = EVERY
        self._written = self.n
        super().display(msg, pos)

    def close(self) -> None:
        """Write how it ended, if there was a line and it did not say so."""
        ended = not (self.disable or self.leave is False)
        if ended and getattr(self, "_written", self.n) != self.n:
            self.display()
        self.leave = False
        super().close()

    def set_postfix_str(self, s: str = "", refresh: bool = False) -> None:
        """Say in the next line what is done."""
        super().set_postfix_str(s, refresh=False)


class _Stream:
    """Stream to what stderr is at the time, without what moves a cursor."""

    def write(self, text: str) -> None:
        """Write a line, if anything is left."""
        if line := text.replace("\x1b[A", "").strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        """Flush the stream."""
        sys.stderr.flush()


@contextmanager
def steps(title: str, total: int, shown: bool = True) -> Iterator[None]:
    """Show a bar over the steps that :func:`step` names meanwhile, with the time so far.

    :param title: Name of the work.
    :param total: Number of steps.
    :param shown: False for no bar.
    """
    start = time.perf_counter()
    with bar(desc=title, total=total, shown=shown, unit="step", leave=False) as own:
        token = _bars.set((*_bars.get(), own))
        try:
            with _ticking(own):
                yield
        finally:
            _bars.reset(token)
    _log.debug("%s: done in %.1f s", title, time.perf_counter() - start)


def step(name: str) -> None:
    """Begin a step of the innermost work that is shown; nothing where none is."""
    _log.debug("step: %s", name)
    for own in _bars.get()[-1:]:
        own.n += bool(getattr(own, "postfix", None))  # the one before is done
        own.set_postfix_str(name, refresh=False)
        own.refresh()


@contextmanager
def _ticking(own: Any) -> Iterator[None]:
    """Show the time of a step that cannot tell how far it is."""
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(1.0 if is_live() else EVERY):
            own.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    if not own.disable:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()
