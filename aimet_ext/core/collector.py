"""Python's search for cycles put off while objects are made that stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Iterator[None]:
    """Open a context in which Python does not search for cycles, if it did before.

    Each search visits all objects. Where a graph is built these only grow, so that a block of a
    deep model would cost more than one of a shallow model.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
