"""Gains and biases that an ONNX graph stores once for several places, as exporters do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aimet_ext.onnx.blocks.flow import Flow

__all__ = ["Reading", "SharedVector", "shared_vector", "to_copy"]

_SAME = frozenset(("Cast", "Dropout", "Identity"))


@dataclass(frozen=True)
class Reading:
    """One input of a node.

    :param node: name of the node.
    :param output: first tensor that it makes.
    :param place: number of the input.
    """

    node: str
    output: str
    place: int


@dataclass(frozen=True)
class SharedVector:
    """A stored vector that a block would rescale and others read as well.

    :param stored: its name in the graph.
    :param role: module of the block that it belongs to.
    :param name: what a copy for the block alone may be called.
    :param reading: the input through which only this module reads it, None where there is none:
        then no copy can be put in its place.
    :param readings: how many inputs, and outputs of the graph, it goes to.
    """

    stored: str
    role: str
    name: str
    reading: Reading | None
    readings: int


def shared_vector(
    flow: Flow, stored: str, made: str, *, role: str, name: str
) -> SharedVector | None:
    """A stored vector as one that is shared, None if it has one reader.

    :param stored: name of the vector.
    :param made: tensor that the node makes which uses it.
    :param role: see :class:`SharedVector`, as ``name``.
    """
    graph = flow.graph
    readings = int(stored in graph.outputs)
    for index in graph.consumers.get(stored, ()):
        readings += max(1, list(graph.nodes[index].input).count(stored))
    reading = _reading(flow, stored, made)
    if readings == 1 and reading is not None:
        return None
    return SharedVector(stored, role, name, reading, readings)


def to_copy(shared: Iterable[SharedVector]) -> list[SharedVector]:
    """Of shared vectors that are to be rescaled, those that need a copy, each reading once.

    Where nothing but these reads a vector, the first of them keeps it.
    """
    groups: dict[str, dict[Reading, SharedVector]] = {}
    for vector in shared:
        if vector.reading is not None:
            groups.setdefault(vector.stored, {}).setdefault(vector.reading, vector)
    found: list[SharedVector] = []
    for group in groups.values():
        vectors: Sequence[SharedVector] = list(group.values())
        found += vectors[1:] if len(vectors) == vectors[0].readings else vectors
    return found


def _reading(flow: Flow, stored: str, made: str) -> Reading | None:
    """The input behind which nothing but the node that makes a tensor uses a stored vector."""
    graph = flow.graph
    index = graph.producer[made]
    place = _place(flow, index, stored)
    while place is not None:
        node = graph.nodes[index]
        name = node.input[place]
        if name == stored:
            return Reading(node.name, node.output[0], place)
        if name in graph.outputs or len(graph.consumers[name]) != 1:
            return None
        index = graph.producer[name]
        place = 0 if graph.nodes[index].op_type in _SAME else _place(flow, index, stored)
    return None


def _place(flow: Flow, index: int, stored: str) -> int | None:
    """The one input of a node that has a stored vector's values, or these and an offset."""
    places = [i for i, name in enumerate(flow.graph.nodes[index].input) if _has(flow, name, stored)]
    return places[0] if len(places) == 1 else None


def _has(flow: Flow, name: str, stored: str) -> bool:
    if not name:
        return False
    origin = flow.origin(name)
    node = flow.graph.node(origin)
    if origin == stored or node is None or node.op_type != "Add":
        return origin == stored
    sources = [flow.origin(other) for other in node.input]
    return stored in sources and all(flow.graph.is_stored(other) for other in sources)
