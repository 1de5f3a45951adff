"""The protocol of walks from layer to layer, in the order in which data flows through a model.

A walk hands out stages, groups of layers that read one input. Once all layers of a stage are
decided it moves on, so that each later stage sees what the decided layers make of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor

__all__ = ["Activation", "Inputs", "ReadStage", "Stage", "Streams", "Walk", "stream_names"]

Streams: TypeAlias = Literal["quantized", "float", "both"]

# Input in the quantized and in the float stream (None if not asked for), and which tokens count:
# bool of the input's leading dimensions, None for all.
Inputs: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
Activation: TypeAlias = Callable[[Tensor], Tensor]


def stream_names(streams: Streams) -> tuple[str, ...]:
    """Return the names of the streams that are asked for."""
    return ("quantized", "float") if streams == "both" else (streams,)


class Stage(Protocol):
    """Layers that read one input."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Full names."""

    @property
    def activations(self) -> Mapping[str, Activation]:
        """The ReLU that alone reads a layer's output, by layer, where there is one."""

    def batches(self) -> Iterator[Inputs]:
        """Yield the layers' input, batch by batch; it is computed anew at each call."""


@dataclass(frozen=True, eq=False)
class ReadStage:
    """A :class:`Stage` whose inputs a function reads.

    :param read: Function that returns a new iterator over the layers' input.
    """

    layers: tuple[str, ...]
    activations: Mapping[str, Activation]
    read: Callable[[], Iterator[Inputs]]

    def batches(self) -> Iterator[Inputs]:
        """Yield the layers' input, batch by batch; it is computed anew at each call."""
        return self.read()


class Walk(Protocol):
    """All stages of a model in order."""

    def stages(self) -> Iterator[Stage]:
        """Yield each stage; all layers of one must be decided before the next is asked for."""

    def hold(self, layer: str) -> None:
        """Have the float stream go on with this layer's weight as it is now, for it will change."""

    def decide(self, layer: str, weight: Tensor) -> None:
        """Have the quantized stream use this weight from now on, of the layer's shape."""

    @property
    def cost(self) -> dict[str, Any]:
        """Kind of the walk and the work that it took, for the report."""

    def close(self) -> None:
        """Drop all caches."""
