"""Sources and readers of the tensors of an ONNX graph, by which blocks and roles are found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from onnx import NodeProto, helper

from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.index import FLOATS, attribute, elements
from aimet_ext.onnx.layers import FoundLayers, OnnxLayer, find_layers

ATTENTION = frozenset(("GroupQueryAttention", "MultiHeadAttention", "Attention", "Softmax"))
NORMS = frozenset(("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"))
_SKIPS = {
    "SkipLayerNormalization": ("LayerNormalization", 3),
    "SkipSimplifiedLayerNormalization": ("SimplifiedLayerNormalization", 2),
}
_SUM = 3  # output of a skip normalization that holds the sum
_SAME = frozenset(("Identity", "Cast", "Dropout"))
_MOVES = _SAME | {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten"}
_CUTS = _MOVES | {"Split", "Slice"}


@dataclass(frozen=True)
class Norm:
    """A normalisation with a gain, as tensors.

    :param gain: stored value of the gain, without ``gain_offset``.
    :param bias: stored value of the bias, None without one.
    :param source: normalised tensor.
    :param scaled: output of the node that multiplies by the gain.
    :param shifted: output of the node that adds the bias.
    :param gain_offset: 1.0 where the graph adds 1 to the stored gain.
    """

    gain: str
    bias: str | None
    source: str
    scaled: str
    shifted: str
    gain_offset: float = 0.0


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
    :param name: possible name of a copy for the block alone.
    :param reading: the input through which only this module reads it, None where there is none:
        then no copy can be put in its place.
    :param readings: number of inputs, and outputs of the graph, that it goes to.
    """

    stored: str
    role: str
    name: str
    reading: Reading | None
    readings: int


class Flow:
    """Questions about a float graph and its linear layers; nothing is changed.

    :param graph: looked at as :func:`split_skips` gives it.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = split_skips(graph)
        #: All layers with weights, and those that are linear; indices of nodes are of that graph.
        self.found: FoundLayers = find_layers(self.graph)
        self.layers: dict[str, OnnxLayer] = {
            name: layer for name, layer in self.found.items() if layer.kind == "linear"
        }
        self.made: dict[str, str] = {
            use.output: name for name, layer in self.layers.items() for use in layer.uses
        }
        #: Products of layers before their biases are added.
        self.unbiased: dict[str, str] = {
            self.graph.nodes[use.node].output[0]: name
            for name, layer in self.layers.items()
            for use in layer.uses
            if use.add is not None
        }

    def origin(self, tensor: str) -> str:
        """Return the tensor whose values a tensor has, before casts and identities."""
        node = self.graph.node(tensor)
        while node is not None and node.op_type in _SAME and tensor not in self.made:
            tensor = node.input[0]
            node = self.graph.node(tensor)
        return tensor

    def operands(self, node: NodeProto) -> list[str]:
        """Return inputs of a node that are no stored values."""
        return [name for name in node.input if name and not self.graph.is_stored(name)]

    def behind(self, tensor: str, stop: Iterable[str] = ()) -> Iterator[str]:
        """Yield tensors that a tensor's values depend on, itself first; shapes do not count.

        :param stop: tensors behind which nothing is looked at.
        """
        ends = set(stop)
        return self.graph.behind(
            [tensor], lambda name, node: name not in ends and node.op_type != "Shape"
        )

    def layers_behind(self, tensor: str, stop: Iterable[str] = ()) -> list[str]:
        """Return linear layers whose outputs a tensor depends on through no other linear layer."""
        ends = {*self.made, *stop}
        found = [self.made[name] for name in self.behind(tensor, ends) if name in self.made]
        return sorted(set(found), key=list(self.layers).index)

    def layer_of(self, node: NodeProto) -> str | None:
        """Return the linear layer that a node belongs to."""
        return self.made.get(node.output[0], self.unbiased.get(node.output[0]))

    def shape(self, layer: str) -> tuple[int, int]:
        """Return output and input channels of a linear layer."""
        found = self.layers[layer]
        stored = self.graph.shape(found.weight)
        return (stored[1], stored[0]) if found.transposed else (stored[0], stored[1])

    def straight_to_layer(self, tensor: str) -> str | None:
        """Return the layer whose output, or a part of it, a tensor is, reshaped perhaps."""
        return next((self.made[name] for name in self._straight(tensor) if name in self.made), None)

    def half(self, tensor: str, layer: str) -> int | None:
        """Return the half (0 or 1) of a layer's output that a tensor is made of, else None."""
        outputs = {use.output for use in self.layers[layer].uses}
        for name in self.behind(tensor, outputs):
            node = None if name in outputs else self.graph.node(name)
            if node is None or not outputs & {self.origin(other) for other in node.input}:
                continue
            if node.op_type == "Split" and len(node.output) == 2:
                return list(node.output).index(name)
            if node.op_type == "Slice":
                start = self.integers(node.input[1])
                if start == [0]:
                    return 0
                return 1 if start in ([None], [self.shape(layer)[0] // 2]) else None
        return None

    def moved(self, tensors: Iterable[str]) -> set[str]:
        """Return tensors with the values of others, or a part of them, those themselves too."""
        return self.graph.beyond(tensors, lambda node: node.op_type in _CUTS)

    def writer(self, tensor: str) -> str | None:
        """Return the linear layer that a tensor is the output of, a norm after it allowed for."""
        tensor = self.origin(tensor)
        if tensor in self.made:
            return self.made[tensor]
        norm = self.norm(tensor, set(self.made))
        return None if norm is None else self.made.get(self.origin(norm.source))

    def norm(self, tensor: str, sources: Iterable[str]) -> Norm | None:
        """Return the norm that makes a tensor out of one of the sources, None if none does."""
        tensor, sources = self.origin(tensor), set(sources)
        node = self.graph.node(tensor)
        if node is None:
            return None
        if node.op_type in NORMS:
            return self._fused_norm(node, sources)
        bias = None
        if node.op_type == "Add":
            stored, other = self._split(node)
            if stored is None or other is None:
                return None
            bias, node = stored, self.graph.node(self.origin(other))
        if node is None or node.op_type != "Mul":
            return None
        gain, other = self._split(node)
        if gain is None or other is None:
            return self._offset_norm(node, sources, bias, tensor)
        source = self._normalised(other, sources)
        return None if source is None else Norm(gain, bias, source, node.output[0], tensor)

    def reshaped(self, tensor: str, above: str) -> list[int | None]:
        """Return the shape that the last Reshape between two tensors gives, as far as known."""
        stop = {above}
        for name in self.behind(tensor, stop):
            node = self.graph.node(name)
            if name == above or node is None or node.op_type != "Reshape":
                continue
            if above in set(self._straight(node.input[0])):
                return self.integers(node.input[1])
        return []

    def integers(self, tensor: str) -> list[int | None]:
        """Return a vector of integers that a graph computes, None where a value is not fixed."""
        stored = self.graph.constant(tensor)
        if stored is not None:
            return [int(value) for value in self.graph.array(tensor).reshape(-1)]
        node = self.graph.node(tensor)
        if node is not None and node.op_type == "Concat":
            return [value for name in node.input for value in self.integers(name)]
        if node is not None and node.op_type in _MOVES:
            return self.integers(node.input[0])
        return [None]

    def shared_vector(self, stored: str, made: str, *, role: str, name: str) -> SharedVector | None:
        """Return a stored vector as one that is shared, None if it has one reader.

        :param stored: name of the vector.
        :param made: tensor that the node makes which uses it.
        :param role: see :class:`SharedVector`, as ``name``.
        """
        readings = self.graph.readings(stored)
        reading = self._reading(stored, made)
        if readings == 1 and reading is not None:
            return None
        return SharedVector(stored, role, name, reading, readings)

    def _straight(self, tensor: str) -> Iterator[str]:
        """Yield a tensor and those before it through nodes that move or cut values."""
        node: NodeProto | None = None
        while True:
            yield tensor
            node = None if tensor in self.made else self.graph.node(tensor)
            if node is None or node.op_type not in _CUTS:
                return
            tensor = node.input[0]

    def _split(self, node: NodeProto) -> tuple[str | None, str | None]:
        """Return the stored float vector that a node of two inputs reads, and its other input."""
        for place, name in enumerate(node.input[:2]):
            source = self.origin(name)
            if self._is_vector(source):
                return source, node.input[1 - place]
        return None, None

    def _is_vector(self, tensor: str) -> bool:
        stored = self.graph.constant(tensor)
        if stored is None or stored.data_type not in FLOATS:
            return False
        return len(stored.dims) > 0 and max(stored.dims) > 1 and elements(stored) == stored.dims[-1]

    def _fused_norm(self, node: NodeProto, sources: set[str]) -> Norm | None:
        gain = self.origin(node.input[1])
        bias = self.origin(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        source = self._matching(node.input[0], sources)
        plain = attribute(node, "axis", -1) in (-1, 2) and self._is_vector(gain)
        made = node.output[0]
        return Norm(gain, bias, source, made, made) if source is not None and plain else None

    def _offset_norm(
        self, node: NodeProto, sources: set[str], bias: str | None, end: str
    ) -> Norm | None:
        """Return a norm that multiplies by its stored gain plus 1.

        :param end: output of the norm.
        """
        for place, name in enumerate(node.input[:2]):
            made = self.graph.node(self.origin(name))
            if made is None or made.op_type != "Add":
                continue
            gain, other = self._split(made)
            stored = None if other is None else self.graph.constant(self.origin(other))
            if gain is None or other is None or stored is None or elements(stored) != 1:
                continue
            if float(self.graph.array(self.origin(other)).reshape(-1)[0]) != 1.0:
                continue
            source = self._normalised(node.input[1 - place], sources)
            return None if source is None else Norm(gain, bias, source, node.output[0], end, 1.0)
        return None

    def _normalised(self, tensor: str, sources: set[str]) -> str | None:
        """Return the one source that a tensor is a normalised form of."""
        ends, met, averaged = sources, set(), False
        for name in self.behind(tensor, ends):
            node = self.graph.node(name)
            if name in sources:
                met.add(name)
            elif node is not None:
                averaged |= node.op_type in ("ReduceMean", "LpNormalization", *NORMS)
            elif not self.graph.is_stored(name):
                return None
            if name in self.made and name not in sources:
                return None
        return next(iter(met)) if averaged and len(met) == 1 else None

    def _matching(self, tensor: str, sources: set[str]) -> str | None:
        return next((name for name in (tensor, self.origin(tensor)) if name in sources), None)

    def _reading(self, stored: str, made: str) -> Reading | None:
        """Return the input behind which only the node that makes a tensor uses a stored vector."""
        graph = self.graph
        index = graph.producer[made]
        place = self._reads_at(index, stored)
        while place is not None:
            node = graph.nodes[index]
            name = node.input[place]
            if name == stored:
                return Reading(node.name, node.output[0], place)
            if name in graph.outputs or len(graph.consumers[name]) != 1:
                return None
            index = graph.producer[name]
            place = 0 if graph.nodes[index].op_type in _SAME else self._reads_at(index, stored)
        return None

    def _reads_at(self, index: int, stored: str) -> int | None:
        """Return the one input of a node with a stored vector's values, or these and an offset."""
        inputs = enumerate(self.graph.nodes[index].input)
        places = [place for place, name in inputs if name and self._has(name, stored)]
        return places[0] if len(places) == 1 else None

    def _has(self, name: str, stored: str) -> bool:
        origin = self.origin(name)
        node = self.graph.node(origin)
        if origin == stored or node is None or node.op_type != "Add":
            return origin == stored
        sources = [self.origin(other) for other in node.input]
        return stored in sources and all(self.graph.is_stored(other) for other in sources)


def split_skips(graph: OnnxGraph) -> OnnxGraph:
    """Return the same graph with each skip normalization as an addition and a normalization.

    Stored values are shared with the graph that was given; indices of nodes are others.
    """
    if not any(node.op_type in _SKIPS for node in graph.nodes):
        return graph
    opset = dict(graph.opset)
    if "com.microsoft" in opset:
        opset.setdefault("", opset.get("ai.onnx", 17))
    return graph.with_nodes((part for node in graph.nodes for part in _parts(node)), opset)


def _parts(node: NodeProto) -> Iterator[NodeProto]:
    if node.op_type not in _SKIPS:
        yield node
        return
    op_type, before = _SKIPS[node.op_type]
    inputs = [*node.input, "", "", ""]
    outputs = [*node.output, "", "", "", ""]
    total = outputs[_SUM] or f"{outputs[0]}/sum"
    bias = inputs[before + 1]
    plain = f"{total}/plain" if bias else total
    yield helper.make_node("Add", inputs[:2], [plain], name=f"{node.name}/Add")
    if bias:
        yield helper.make_node("Add", [plain, bias], [total], name=f"{node.name}/Add_1")
    norm = helper.make_node(
        op_type,
        [total, *filter(None, inputs[2 : before + 1])],
        [outputs[0]],
        name=f"{node.name}/Norm",
        axis=-1,
        epsilon=attribute(node, "epsilon", 1e-12),
    )
    yield norm


def to_copy(shared: Iterable[SharedVector]) -> list[SharedVector]:
    """Return the shared vectors that need a copy before they are rescaled, each reading once.

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
