"""The index of an ONNX graph: stored values, what makes and what reads a tensor; and edits."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx
from onnx import NodeProto, TensorProto, helper

#: Floating-point types of ONNX tensors.
FLOATS = frozenset(
    (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
)

#: Operators that move values about and compute none.
MOVES = frozenset(
    (
        *("Cast", "Expand", "Flatten", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze"),
        *("Tile", "Transpose", "Unsqueeze"),
    )
)


def attributes(node: NodeProto) -> dict[str, Any]:
    """Return the attributes of a node as Python values (str in place of bytes)."""
    return {each.name: _python(each) for each in node.attribute}


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Return one attribute of a node, see :func:`attributes`."""
    return next((_python(each) for each in node.attribute if each.name == name), default)


def _python(found: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(found)
    return value.decode() if isinstance(value, bytes) else value


def bodies(node: NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the subgraphs of a node."""
    for found in node.attribute:
        if found.HasField("g"):
            yield found.g
        yield from found.graphs


def reads(node: NodeProto) -> Iterator[str]:
    """Yield the tensors that a node reads; of a subgraph, those that it takes from outside."""
    yield from filter(None, node.input)
    for graph in bodies(node):
        own = {t.name for t in graph.initializer} | {v.name for v in graph.input}
        own |= {name for inner in graph.node for name in inner.output}
        for inner in graph.node:
            yield from (name for name in reads(inner) if name not in own)
        yield from (v.name for v in graph.output if v.name not in own)


def inner_nodes(node: NodeProto) -> Iterator[NodeProto]:
    """Yield the nodes of a node's subgraphs, and of the subgraphs of these."""
    for graph in bodies(node):
        for inner in graph.node:
            yield inner
            yield from inner_nodes(inner)


def elements(tensor: TensorProto) -> int:
    """Return the number of elements of a stored value."""
    return math.prod(tensor.dims)


def stored_value(node: NodeProto) -> TensorProto | None:
    """Return the tensor of a Constant node, None for other nodes and kinds of values."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    return next((each.t for each in node.attribute if each.name == "value"), None)


def stored_values(graph: onnx.GraphProto) -> dict[str, TensorProto]:
    """Return initializers and values of Constant nodes by name; nothing is copied."""
    return {**{tensor.name: tensor for tensor in graph.initializer}, **_constants(graph.node)}


def _constants(nodes: Iterable[NodeProto]) -> dict[str, TensorProto]:
    pairs = ((node, stored_value(node)) for node in nodes)
    return {node.output[0]: value for node, value in pairs if value is not None}


class GraphIndex:
    """Nodes of a graph, found by the tensors that they make and read.

    Made once: changes of the graph's nodes are not seen.

    :param graph: Graph of a model.
    :param nodes: Nodes in place of the graph's own.
    """

    def __init__(self, graph: onnx.GraphProto, nodes: Iterable[NodeProto] | None = None) -> None:
        self.initializers: dict[str, TensorProto] = {t.name: t for t in graph.initializer}
        #: Inputs that are no stored values.
        self.inputs: dict[str, onnx.ValueInfoProto] = {
            value.name: value for value in graph.input if value.name not in self.initializers
        }
        self.outputs: tuple[str, ...] = tuple(value.name for value in graph.output)
        self.set_nodes(graph.node if nodes is None else nodes)

    def set_nodes(self, nodes: Iterable[NodeProto]) -> None:
        """Index other nodes in place of those before."""
        self.nodes: tuple[NodeProto, ...] = tuple(nodes)
        #: Initializers and values of Constant nodes.
        self.stored: dict[str, TensorProto] = {**self.initializers, **_constants(self.nodes)}
        #: Index of the node that makes a tensor, and indices of those that read it.
        self.producer: dict[str, int] = {}
        self.consumers: dict[str, list[int]] = {}
        #: Tensors that each node reads, see :func:`reads`.
        self.reads = tuple(tuple(dict.fromkeys(reads(node))) for node in self.nodes)
        for index, node in enumerate(self.nodes):
            self.producer.update((name, index) for name in node.output if name)
            for name in self.reads[index]:
                self.consumers.setdefault(name, []).append(index)

    def __contains__(self, name: str) -> bool:
        return name in self.stored or name in self.producer or name in self.inputs

    def constant(self, name: str) -> TensorProto | None:
        """Return a stored value: an initializer's or a Constant node's, None for other tensors."""
        return self.stored.get(name)

    def is_stored(self, name: str) -> bool:
        """Return True for a tensor with a stored value."""
        return name in self.stored

    def node(self, name: str) -> NodeProto | None:
        """Return the node that makes a tensor, None for inputs and initializers."""
        index = self.producer.get(name)
        return None if index is None else self.nodes[index]

    def readers(self, name: str) -> list[NodeProto]:
        """Return the nodes that read a tensor, each once."""
        return [self.nodes[index] for index in self.consumers.get(name, ())]

    def readings(self, name: str) -> int:
        """Return how many inputs of nodes and outputs of the graph read a tensor."""
        counts = (max(1, list(node.input).count(name)) for node in self.readers(name))
        return sum(counts) + self.outputs.count(name)

    def source(self, name: str, through: Collection[str] = ("Identity",)) -> str:
        """Return the tensor behind some nodes: Identities, by which exporters share equal values.

        :param through: Operators that hand the values of their first input on.
        """
        while (node := self.node(name)) is not None and node.op_type in through:
            name = node.input[0]
        return name

    def behind(
        self, tensors: Iterable[str], enter: Callable[[str, NodeProto], bool] = lambda *_: True
    ) -> Iterator[str]:
        """Yield the tensors that some tensors depend on, those themselves first.

        :param enter: True for a tensor and its node if what the node reads counts too.
        """
        todo = list(tensors)
        seen = set(todo)
        while todo:
            name = todo.pop()
            yield name
            index = self.producer.get(name)
            if index is not None and enter(name, self.nodes[index]):
                fresh = [other for other in self.reads[index] if other not in seen]
                seen.update(fresh)
                todo += fresh

    def beyond(
        self, tensors: Iterable[str], enter: Callable[[NodeProto], bool] = lambda _: True
    ) -> set[str]:
        """Return the tensors that are computed from some tensors, those themselves too.

        :param enter: True for a node whose outputs count.
        """
        todo = list(tensors)
        found = set(todo)
        while todo:
            for node in self.readers(todo.pop()):
                if enter(node):
                    fresh = [name for name in node.output if name and name not in found]
                    found.update(fresh)
                    todo += fresh
        return found


def in_order(nodes: Sequence[NodeProto], given: Collection[str]) -> tuple[NodeProto, ...]:
    """Return nodes in topological order, in their own as far as that is one.

    :param given: Names of inputs and initializers.
    :raises ValueError: The nodes form a cycle, or one reads a tensor that nothing makes.
    """
    producer = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    waits = [{producer[n] for n in reads(node) if n in producer} for node in nodes]
    for node in nodes:
        missing = [n for n in reads(node) if n not in producer and n not in given]
        if missing:
            raise ValueError(
                f"every tensor of an ONNX graph must be made by a node or given, but "
                f"{node.op_type} {node.name!r} reads {missing[0]!r}; check the model with "
                "onnx.checker"
            )
    readers: dict[int, list[int]] = {}
    for index, needed in enumerate(waits):
        for other in needed:
            readers.setdefault(other, []).append(index)
    open_ = [len(needed) for needed in waits]
    ready = [index for index, count in enumerate(open_) if not count]
    order: list[NodeProto] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(nodes[index])
        for reader in readers.get(index, ()):
            open_[reader] -= 1
            if not open_[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(nodes):
        raise ValueError("the nodes of an ONNX graph must not form a cycle, got one")
    return tuple(order)


def rename_reads(node: NodeProto, names: Mapping[str, str]) -> None:
    """Have a node and its subgraphs read other tensors in place of some, in place."""
    for place, name in enumerate(node.input):
        node.input[place] = names.get(name, name)
    for graph in bodies(node):
        for inner in graph.node:
            rename_reads(inner, names)
        for value in graph.output:
            value.name = names.get(value.name, value.name)


def copied(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    """Return a copy of a node that reads other tensors in place of some."""
    copy = NodeProto()
    copy.CopyFrom(node)
    rename_reads(copy, names)
    return copy


def replace_nodes(
    graph: onnx.GraphProto, change: Callable[[NodeProto], Iterable[NodeProto] | None]
) -> None:
    """Replace nodes of a graph, in place.

    :param change: From a node, which it may write to, to the nodes that take its place; None
        keeps the node.
    """
    found = [(node, change(node)) for node in graph.node]
    if all(new is None for _, new in found):
        return  # a copy of all nodes would stay in the graph's memory
    nodes = [each for node, new in found for each in ((node,) if new is None else new)]
    del graph.node[:]
    graph.node.extend(nodes)


def keep_where(items: Any, keep: Callable[[Any], bool]) -> None:
    """Remove the items of a repeated field that are not to be kept; the others are not copied."""
    for index in reversed(range(len(items))):
        if not keep(items[index]):
            del items[index]


def drop_unused(graph: onnx.GraphProto, *, inputs: bool = False) -> None:
    """Remove nodes and stored values that no output depends on, in place.

    :param inputs: True removes such inputs too.
    """
    needed = {value.name for value in graph.output}

    def is_needed(node: NodeProto) -> bool:
        found = not needed.isdisjoint(node.output)
        if found:
            needed.update(reads(node))
        return found

    keep_where(graph.node, is_needed)  # from the last one on
    for field in (graph.initializer, graph.input) if inputs else (graph.initializer,):
        keep_where(field, lambda value: value.name in needed)


def make_part(
    model: onnx.ModelProto,
    nodes: Iterable[NodeProto],
    stored: Iterable[TensorProto],
    inputs: Iterable[onnx.ValueInfoProto],
    outputs: Iterable[onnx.ValueInfoProto],
    opset: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """Return a model of some nodes, with the functions and the version of another model.

    :param stored: Initializers.
    :param opset: Versions of operators by domain, those of the other model if None.
    """
    graph = helper.make_graph(
        list(nodes), model.graph.name or "part", list(inputs), list(outputs), list(stored)
    )
    if opset is None:
        opset = {entry.domain: entry.version for entry in model.opset_import}
    return helper.make_model(
        graph,
        ir_version=model.ir_version,
        opset_imports=[helper.make_opsetid(*entry) for entry in opset.items()],
        functions=[f for f in model.functions if not f.domain.startswith("aimet.")],
    )
