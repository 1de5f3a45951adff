"""Nodes of an ONNX graph: their attributes and what they read, AIMET's additions taken out."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx
from onnx import NodeProto, helper

__all__ = ["attribute", "float_nodes", "in_order", "operators", "reads"]

_QUANTIZER = "QcQuantizeOp"
_FUSED = "aimet.supergroup"  # domain of the functions in which AIMET fuses patterns of nodes


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """An attribute of a node as a Python value (str in place of bytes)."""
    for found in node.attribute:
        if found.name == name:
            value = helper.get_attribute_value(found)
            return value.decode() if isinstance(value, bytes) else value
    return default


def reads(node: NodeProto) -> Iterator[str]:
    """Tensors that a node reads; a body's own tensors apart, what it takes from outside too."""
    yield from filter(None, node.input)
    for graph in _bodies(node):
        own = {t.name for t in graph.initializer} | {v.name for v in graph.input}
        own |= {name for inner in graph.node for name in inner.output}
        for inner in graph.node:
            yield from (name for name in reads(inner) if name not in own)
        yield from (v.name for v in graph.output if v.name not in own)


def operators(node: NodeProto) -> Iterator[str]:
    """Operators inside of a node's bodies."""
    for graph in _bodies(node):
        yield from (inner.op_type for inner in _with_bodies(graph.node))


def _bodies(node: NodeProto) -> Iterator[onnx.GraphProto]:
    for found in node.attribute:
        if found.HasField("g"):
            yield found.g
        yield from found.graphs


def float_nodes(
    model: onnx.ModelProto,
) -> tuple[list[NodeProto], dict[str, str], dict[str, tuple[str, ...]]]:
    """Nodes without AIMET's quantizers and without its fusions, and the names of tensors.

    :returns: copies of the nodes that read the tensors themselves; from the output of each
        quantizer, the tensor that it quantizes; from each fused node, the names of its nodes.
    """
    names = _seen_through(model.graph.node)
    fused = {
        (f.domain, f.name, f.overload): f for f in model.functions if f.domain.startswith(_FUSED)
    }
    nodes: list[NodeProto] = []
    calls: dict[str, tuple[str, ...]] = {}
    for node in model.graph.node:
        if node.op_type == _QUANTIZER:
            continue
        copy = _copy(node, names)
        function = fused.get((node.domain, node.op_type, node.overload))
        if function is None:
            nodes.append(copy)
        else:
            nodes += _inlined(copy, function)
            calls[node.name] = tuple(inner.name for inner in function.node)
    return nodes, names, calls


def _inlined(call: NodeProto, function: onnx.FunctionProto) -> list[NodeProto]:
    """The nodes of a fused pattern. AIMET keeps their names, each call has a function of its own.

    :raises ValueError: the function has attributes, which no pattern of AIMET's has.
    """
    names = dict(zip(function.input, [*call.input] + [""] * len(function.input), strict=False))
    names.update(zip(function.output, call.output, strict=True))
    nodes = []
    for inner in function.node:
        if any(found.ref_attr_name for found in inner.attribute):
            raise ValueError(
                f"{call.name}: AIMET's fused nodes must not hand attributes on, {inner.name} of "
                f"{function.name} takes one; build the simulation without fusing"
            )
        copy = NodeProto()
        copy.CopyFrom(inner)
        _rename(copy, names)
        copy.output[:] = [names.get(name, name) for name in copy.output]
        nodes.append(copy)
    return nodes


def _seen_through(nodes: Iterable[NodeProto]) -> dict[str, str]:
    """From the output of each quantizer to the tensor that it quantizes."""
    direct = {n.output[0]: n.input[0] for n in _with_bodies(nodes) if n.op_type == _QUANTIZER}
    found = {}
    for name, source in direct.items():
        while source in direct:
            source = direct[source]
        found[name] = source
    return found


def _with_bodies(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for graph in _bodies(node):
            yield from _with_bodies(graph.node)


def _copy(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    """A node that reads the tensors themselves; a Constant is not copied, it may be large."""
    if node.op_type == "Constant":
        return node
    copy = NodeProto()
    copy.CopyFrom(node)
    _rename(copy, names)
    return copy


def _rename(node: NodeProto, names: Mapping[str, str]) -> None:
    for place, name in enumerate(node.input):
        node.input[place] = names.get(name, name)
    for graph in _bodies(node):
        kept = [inner for inner in graph.node if inner.op_type != _QUANTIZER]
        del graph.node[:]
        graph.node.extend(kept)
        for inner in graph.node:
            _rename(inner, names)
        for value in graph.output:
            value.name = names.get(value.name, value.name)


def in_order(nodes: Sequence[NodeProto], given: Collection[str]) -> tuple[NodeProto, ...]:
    """Nodes in topological order, in their own as far as that is one."""
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
