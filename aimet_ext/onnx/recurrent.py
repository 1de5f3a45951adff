"""Recurrent nodes of an ONNX graph, beside nodes that compute what their weights multiply.

The gates of a step are ``W x_t + R h_{t-1} + b``. One node holds both matrices of all its
directions, ``[directions, gates, in]``: ``W`` is a linear layer of its input, ``R`` one with
groups, each direction's of its own hidden states. The candidate gate of a GRU without
``linear_before_reset`` multiplies the states behind the reset gate: its rows are groups of their
own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from onnx import NodeProto, TensorProto, helper

from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.index import FLOATS, attribute, attributes
from aimet_ext.onnx.layers import FoundLayers, OnnxLayer, Use, find_layers, layer_name

OPERATORS = ("LSTM", "GRU", "RNN")
_END = 2**31 - 1


def with_states(graph: OnnxGraph) -> tuple[OnnxGraph, FoundLayers, frozenset[str]]:
    """Return a view of a graph in which weights of recurrent nodes are layers, and its layers.

    Each of these nodes runs twice in it: once for the states that ``R`` multiplies.

    :returns: the view, its layers, and the names of the nodes that the graph does not have.
    """
    places = [n for n, node in enumerate(graph.nodes) if _is_recurrent(graph, node)]
    reasons = {n: reason for n in places if (reason := _reason(graph, graph.nodes[n]))}
    for n in places:
        reasons.setdefault(n, _shared(graph, n, reasons))
    nodes: list[NodeProto] = []
    found: dict[str, OnnxLayer] = {}
    helpers: set[str] = set()
    for number, node in enumerate(graph.nodes):
        if number in places and not reasons[number]:
            states = _States(graph, node, len(nodes))
            nodes += states.nodes
            helpers |= {helping.name for helping in states.nodes}
            for layer in states.layers(len(nodes)):
                first = found.get(layer.weight)
                uses = (*first.uses, *layer.uses) if first is not None else layer.uses
                found[layer.weight] = replace(first or layer, uses=uses)
        nodes.append(node)
    view = graph.with_nodes(nodes, graph.opset) if found else graph
    own = find_layers(view)
    skipped = {name: why for name, why in own.skipped.items() if name not in helpers}
    skipped |= {_place(graph.nodes[n]): why for n, why in reasons.items() if why}
    layers = {**own, **{layer.name: layer for layer in found.values()}}
    return view, FoundLayers(layers, skipped), frozenset(helpers)


def is_matrix_of(node: NodeProto, weight: str) -> bool:
    """Return True if a recurrent node has a weight as its ``W`` or ``R``."""
    return node.op_type in OPERATORS and weight in node.input[1:3]


def _is_recurrent(graph: OnnxGraph, node: NodeProto) -> bool:
    own = node.op_type in OPERATORS and node.domain in ("", "ai.onnx")
    return own and any(graph.is_stored(name) for name in node.input[1:3])


def _place(node: NodeProto) -> str:
    return node.name or f"{node.op_type} of {node.output[0]}"


def _given(node: NodeProto, place: int) -> str:
    """Return an input of a node, empty where it is left out."""
    return node.input[place] if len(node.input) > place else ""


def _reason(graph: OnnxGraph, node: NodeProto) -> str:
    """Return why weights of a recurrent node are not decided, nothing if they can be."""
    stored = [graph.constant(name) for name in node.input[1:3]]
    if not all(t is not None and t.data_type in FLOATS and len(t.dims) == 3 for t in stored):
        return "stored weights W and R of 3 dimensions are required, others are not supported"
    if _given(node, 4):
        return "sequence_lens leave steps out, which is not supported; pad and leave it out"
    if attribute(node, "layout", 0):
        return "layout 0 is required, steps before sequences"
    if graph.opset.get("", 0) < 10:
        return f"opset 10 or later is required, got {graph.opset.get('', 0)}"
    special = {"activations", "activation_alpha", "activation_beta", "clip"} & {*attributes(node)}
    if _resets_before(node) and special:
        return f"a GRU with linear_before_reset=0 must be without {', '.join(sorted(special))}"
    return ""


def _shared(graph: OnnxGraph, number: int, reasons: dict[int, str]) -> str:
    """Return why a weight that other nodes read too is not decided."""
    node = graph.nodes[number]
    for place in (1, 2):
        for reader in graph.consumers[node.input[place]]:
            other = graph.nodes[reader]
            alike = other.op_type == node.op_type and attributes(other) == attributes(node)
            if not alike or reasons.get(reader) or other.input[place] != node.input[place]:
                return f"its weight {node.input[place]!r} is read by {_place(other)} too"
    return ""


def _resets_before(node: NodeProto) -> bool:
    """Return True for a GRU whose reset gate multiplies the state before ``R`` does."""
    return node.op_type == "GRU" and not attribute(node, "linear_before_reset", 0)


@dataclass
class _States:
    """Nodes that compute the rows that ``R`` of a recurrent node multiplies.

    :param begin: Place of the first of them in the graph.
    :ivar rows: Tensor ``[steps * batch, groups * hidden, 1]`` of these rows.
    """

    graph: OnnxGraph
    node: NodeProto
    begin: int

    def __post_init__(self) -> None:
        node = self.node
        self.nodes: list[NodeProto] = []
        self._prefix = f"{_place(node)}/states"
        self.directions, _, self._hidden = self.graph.shape(node.input[2])
        outputs = [f"{self._prefix}/Y"]
        own = helper.make_node(node.op_type, list(node.input), outputs, self._prefix)
        own.attribute.extend(node.attribute)
        self.nodes.append(own)
        groups = [tensor for d in range(self.directions) for tensor in self._of(d, outputs[0])]
        self.groups = len(groups)
        joined = self._add("Concat", *groups, axis=2)  # [steps, batch, groups * hidden]
        shape = self._constant([-1, self.groups * self._hidden, 1])
        self.rows = self._add("Reshape", joined, shape)

    def layers(self, place: int) -> tuple[OnnxLayer, OnnxLayer]:
        """Return both layers of the node.

        :param place: Place of the node itself.
        """
        x, w, r = self.node.input[:3]
        # What becomes of the sums, inside of the node, no other node reads.
        uses = {
            weight: [
                Use(self.begin + n, read, "")
                for n, helping in enumerate(self.nodes)
                if weight in helping.input
            ]
            for weight, read in ((w, x), (r, self.rows))
        }
        name = layer_name(self.node, w)
        common: dict[str, Any] = {"directions": self.directions}
        kernel: dict[str, Any] = {"kernel": (1,), "strides": (1,), "dilations": (1,)}
        own = OnnxLayer(
            name=f"{name}.W",
            kind="linear",
            uses=(*uses[w], Use(place, x, "")),
            weight=w,
            **common,
        )
        states = OnnxLayer(
            name=f"{name}.R",
            kind="conv",
            uses=(Use(place, self.rows, ""), *uses[r]),
            weight=r,
            pads=(0, 0),
            group=self.groups,
            **kernel,
            **common,
        )
        return own, states

    def _of(self, direction: int, states: str) -> list[str]:
        """Return what each group of gates of a direction multiplies, ``[steps, batch, hidden]``.

        :param states: States behind each step, ``[steps, directions, batch, hidden]``.
        """
        kind = attribute(self.node, "direction", "forward")
        own = self._add("Gather", states, self._constant(direction), axis=1)
        if initial := _given(self.node, 5):
            first = self._slice(initial, 0, direction, direction + 1)  # [1, batch, hidden]
        else:
            start = self._slice(own, 0, 0, 1)
            first = self._add("Sub", start, start)
        if kind == "reverse" or direction == 1:
            before = self._add("Concat", self._slice(own, 0, 1, _END), first, axis=0)
        else:
            before = self._add("Concat", first, self._slice(own, 0, 0, -1), axis=0)
        if not _resets_before(self.node):
            return [before]
        return [before, before, self._add("Mul", self._reset(direction, before), before)]

    def _reset(self, direction: int, before: str) -> str:
        """Return the reset gate of a GRU, the second of its three."""
        size, sums = self._hidden, []
        for read, weight in zip((self.node.input[0], before), self.node.input[1:3], strict=True):
            matrix = self._slice(weight, 0, direction, direction + 1)
            matrix = self._slice(matrix, 1, size, 2 * size)  # [1, hidden, in]
            turned = self._add("Transpose", matrix, perm=[0, 2, 1])
            sums.append(self._add("MatMul", read, turned))
        if biases := _given(self.node, 3):  # of W, then of R
            own = self._slice(biases, 0, direction, direction + 1)
            sums += [self._slice(own, 1, n * size, (n + 1) * size) for n in (1, 4)]
        total = sums[0]
        for more in sums[1:]:
            total = self._add("Add", total, more)
        return self._add("Sigmoid", total)

    def _slice(self, tensor: str, axis: int, begin: int, end: int) -> str:
        return self._add("Slice", tensor, *(self._constant([n]) for n in (begin, end, axis)))

    def _constant(self, value: int | Sequence[int]) -> str:
        dims, data = ([], [value]) if isinstance(value, int) else ([len(value)], value)
        return self._add("Constant", value=helper.make_tensor("", TensorProto.INT64, dims, data))

    def _add(self, kind: str, *read: str, **attributes: Any) -> str:
        """Add a node, and return its output."""
        name = f"{self._prefix}/{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(read), [name], name, **attributes))
        return name
