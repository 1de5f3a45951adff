"""The places of quantizers in a torch model, emptied for the time of a context."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from aimet_ext.core.interrupts import uninterrupted


class Emptied:
    """Places of quantizers, in a context of :meth:`open` empty.

    :param root: Model.
    :param named: Quantizers in it by name, a shared one under all its names.
    """

    def __init__(self, root: nn.Module, named: Iterable[tuple[str, Any]]) -> None:
        # By layer, container and key; each place once, though its layer may have several names.
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        self._held: dict[tuple[nn.Module, str], Any] = {}
        containers: dict[str, nn.Module] = {}
        for name, quantizer in named:
            path, _, key = name.rpartition(".")
            if path not in containers:
                containers[path] = root.get_submodule(path)
            place = containers[path], key
            self._places.setdefault(path.rpartition(".")[0], []).append(place)
            self._held[place] = quantizer

    @contextmanager
    def open(self) -> Iterator[Emptied]:
        """Take the quantizers out; they are in their places again behind the context."""
        try:
            for container, key in self._held:
                setattr(container, key, None)
            yield self
        finally:
            with uninterrupted():
                for (container, key), quantizer in self._held.items():
                    setattr(container, key, quantizer)

    @contextmanager
    def back(self, layers: Iterable[str]) -> Iterator[None]:
        """Open a context in which layers have their quantizers, at a cost of these layers alone.

        What stands in their places at its end is what comes back later.

        :param layers: Names.
        """
        places = [place for layer in layers for place in self._places.get(layer, ())]
        try:
            for container, key in places:
                setattr(container, key, self._held[container, key])
            yield
        finally:
            with uninterrupted():
                for container, key in places:
                    self._held[container, key] = getattr(container, key)
                    setattr(container, key, None)
