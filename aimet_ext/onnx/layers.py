"""Layers with a weight in an ONNX graph, and the other stored values that nodes read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from onnx import NodeProto
from torch import Tensor, nn

from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.index import FLOATS, attribute, inner_nodes

Kind = Literal["linear", "conv", "embedding", "other"]

_TAKEN = frozenset(dir(nn.Linear(1, 1)))  # attributes of modules, which no child may be named
_WEIGHTED = frozenset(("MatMul", "Gemm", "Conv", "ConvTranspose"))
_SAME = ("SAME_UPPER", "SAME_LOWER")
_UNSUPPORTED = {
    "Einsum": "Einsum is not supported, rewrite it as MatMul",
    "FusedMatMul": "FusedMatMul is not supported, export without that fusion",
}


@dataclass(frozen=True)
class Use:
    """One place where a layer's weight is applied.

    :param node: index of the node.
    :param input: tensor that it reads.
    :param output: tensor with the result, after the Add of the bias if there is one.
    :param add: index of that Add.
    """

    node: int
    input: str
    output: str
    add: int | None = None


@dataclass(frozen=True, kw_only=True)
class OnnxLayer:
    """A weight and the nodes that apply it.

    :param name: name of the first node, or of the weight where that has none.
    :param uses: places where it is applied, in order.
    :param kind: ``"other"`` for what is no layer, see :func:`other_weights`.
    :param weight: name of the initializer, or of the Constant node's output.
    :param transposed: the stored weight is ``[in, out]``.
    :param bias: name of the stored bias ``[out]``, None if there is none, or uses differ in it.
    :param kernel: one number per spatial dimension; empty for all but convolutions, as the rest.
    :param pads: all begins, then all ends, as ONNX has them.
    :param auto_pad: ``NOTSET`` where ``pads`` count.
    :param output_padding: one number per spatial dimension of a transposed convolution, whose
        weight is ``[in, out / group, *kernel]`` as in torch; None for all else.
    :param directions: number of directions of a recurrent node, whose stored weight is
        ``[directions, out, in]``, and as that of a module has them one above the other; 0 for all
        else.
    """

    name: str
    kind: Kind
    uses: tuple[Use, ...]
    weight: str
    transposed: bool = False
    bias: str | None = None
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    group: int = 1
    auto_pad: str = "NOTSET"
    output_padding: tuple[int, ...] | None = None
    directions: int = 0

    @property
    def channel_axis(self) -> int:
        """Dimension of the stored weight's output channels."""
        return int(self.transposed or self.output_padding is not None)

    @property
    def padding(self) -> tuple[int, ...] | None:
        """Equal padding on both sides of each spatial dimension, None where it is not equal.

        Of a transposed convolution it is that before: less behind makes further outputs.
        """
        half = len(self.kernel)
        if self.output_padding is not None:
            return self.pads[:half]
        if self.auto_pad not in ("NOTSET", "VALID") or self.pads[:half] != self.pads[half:]:
            return None
        return self.pads[:half]


class FoundLayers(dict[str, OnnxLayer]):
    """Layers by name, in the graph's order.

    :param skipped: nodes with a weight that are no layer here, and why.
    """

    def __init__(self, layers: Mapping[str, OnnxLayer], skipped: Mapping[str, str]) -> None:
        super().__init__(layers)
        self.skipped = dict(skipped)

    def shared_weights(self) -> dict[str, list[str]]:
        """Return the names of all layers that have the same weight, for each that shares one."""
        by_weight: dict[str, list[str]] = {}
        for name, layer in self.items():
            by_weight.setdefault(layer.weight, []).append(name)
        shared = (names for names in by_weight.values() if len(names) > 1)
        return {name: names for names in shared for name in names}


def find_layers(graph: OnnxGraph) -> FoundLayers:
    """Return all layers with a weight of a graph.

    Nodes that apply one weight in the same way are one layer, named after the first of them. An
    embedding and a linear layer that share a weight are two.

    :raises ValueError: two layers have the same name.
    """
    skipped: dict[str, str] = {}
    merged: dict[tuple[object, ...], OnnxLayer] = {}
    for index, node in enumerate(graph.nodes):
        found = _layer(graph, index, node)
        if isinstance(found, str):
            skipped[node.name or f"{node.op_type} of {node.output[0]}"] = found
        elif found is not None:
            # What a weight is applied with is a part of the layer, its uses are not.
            key = (
                *(found.weight, found.kind, found.transposed, found.kernel, found.strides),
                *(found.dilations, found.pads, found.group, found.auto_pad, found.output_padding),
            )
            first = merged.get(key)
            merged[key] = found if first is None else _joined(graph, first, found)
    layers: dict[str, OnnxLayer] = {}
    for layer in merged.values():
        if layer.name in layers:
            raise ValueError(
                f"every node with a weight needs a name of its own, but two are {layer.name!r}; "
                "rename one in the model"
            )
        layers[layer.name] = layer
    return FoundLayers(layers, skipped)


def other_weights(graph: OnnxGraph, known: Collection[str]) -> dict[str, OnnxLayer]:
    """Return stored float values of several dimensions, by names of their own.

    Among them are the weights of all operators that are no layers: LSTM, a MatMul of another form.
    Their uses are the nodes that read them, whatever these compute.

    :param known: stored values to leave out, such as the weights of layers.
    """
    found: dict[str, OnnxLayer] = {}
    for weight, tensor in graph.stored.items():
        readers = graph.consumers.get(weight, [])
        if weight in known or tensor.data_type not in FLOATS or len(tensor.dims) < 2 or not readers:
            continue
        name = f"{weight} of {graph.nodes[readers[0]].op_type}"
        uses = tuple(Use(index, weight, graph.nodes[index].output[0]) for index in readers)
        found[name] = OnnxLayer(name=name, kind="other", uses=uses, weight=weight)
    return found


def node_names(graph: OnnxGraph, layers: Mapping[str, OnnxLayer]) -> dict[str, str]:
    """Name of the layer by the name of any of its nodes, those that AIMET fused among them."""
    names: dict[str, str] = {}
    for name, layer in layers.items():
        for use in layer.uses if not layer.directions else ():
            for index in (use.node, use.add):
                if index is not None and graph.nodes[index].name:
                    names[graph.nodes[index].name] = name
    for call, inner in graph.fused.items():
        found = [names[node] for node in inner if node in names]
        if found:
            names.setdefault(call, found[0])
    return {**names, **{name: name for name in layers}}


def _layer(graph: OnnxGraph, index: int, node: NodeProto) -> OnnxLayer | str | None:
    """Return the layer of one node, or why it is none, or None if it has no weight."""
    if any(inner.op_type in _WEIGHTED for inner in inner_nodes(node)):
        return "layers inside of its body are not supported, move them out of it"
    if graph.calls_function(node):
        weighted = any(_is_matrix(graph, name) for name in node.input)
        return "it calls a function of the model, inline functions first" if weighted else None
    if node.domain not in ("", "ai.onnx") and node.op_type not in _UNSUPPORTED:
        return None
    if node.op_type in _UNSUPPORTED:
        weighted = any(_weight(graph, name) is not None for name in node.input)
        return _UNSUPPORTED[node.op_type] if weighted else None
    if node.op_type in ("Conv", "ConvTranspose"):
        return _conv(graph, index, node)
    kinds = {"MatMul": _matmul, "Gemm": _gemm, "Gather": _gather}
    read = kinds.get(node.op_type)
    return None if read is None else read(graph, index, node)


def _matmul(graph: OnnxGraph, index: int, node: NodeProto) -> OnnxLayer | str | None:
    found = _weight(graph, node.input[1])
    if found is None:
        left = _weight(graph, node.input[0])
        if left is not None and _is_matrix(graph, left[0]):
            return "the weight is the left factor of the MatMul"
        return _changed_on_the_way(graph, node.input[1])
    weight, flipped = found
    if len(graph.shape(weight)) != 2:
        return f"a weight of 2 dimensions is required, got {list(graph.shape(weight))}"
    out = graph.shape(weight)[0 if flipped else 1]
    add = _bias_add(graph, node.output[0], out)
    bias = None
    if add is not None:
        bias = graph.source(next(n for n in graph.nodes[add].input if n != node.output[0]))
    return _found(
        graph, index, "linear", weight, node.input[0], add, transposed=not flipped, bias=bias
    )


def _gemm(graph: OnnxGraph, index: int, node: NodeProto) -> OnnxLayer | str | None:
    found = _weight(graph, node.input[1])
    if found is None:
        return _changed_on_the_way(graph, node.input[1])
    for key, required in (("transA", 0), ("alpha", 1.0), ("beta", 1.0)):
        value = attribute(node, key, required)
        if value != required:
            return f"Gemm with {key}={required:g} is required, got {value:g}"
    weight, flipped = found
    transposed = bool(attribute(node, "transB", 0)) == flipped
    bias = _bias_input(graph, node)
    out = graph.shape(weight)[1 if transposed else 0]
    if bias is not None and not _is_vector(graph, bias, out):
        return f"Gemm with a stored bias [{out}] is required, {bias!r} is not one"
    return _found(graph, index, "linear", weight, node.input[0], transposed=transposed, bias=bias)


def _conv(graph: OnnxGraph, index: int, node: NodeProto) -> OnnxLayer | str | None:
    found = _weight(graph, node.input[1])
    if found is None:
        return _changed_on_the_way(graph, node.input[1])
    weight, flipped = found
    shape = graph.shape(weight)
    if flipped or not 3 <= len(shape) <= 5:
        return f"a stored weight of 1 to 3 spatial dimensions is required, got {list(shape)}"
    ones, group = (1,) * (len(shape) - 2), attribute(node, "group", 1)
    turned = node.op_type == "ConvTranspose"
    if turned and (
        attribute(node, "output_shape", None) or attribute(node, "auto_pad", "NOTSET") in _SAME
    ):
        return "a transposed convolution with pads is required, not with an output_shape"
    bias, out = _bias_input(graph, node), shape[1] * group if turned else shape[0]
    if bias is not None and not _is_vector(graph, bias, out):
        return f"a stored bias [{out}] is required, {bias!r} is not one"
    return _found(
        graph,
        index,
        "conv",
        weight,
        node.input[0],
        bias=bias,
        kernel=tuple(attribute(node, "kernel_shape", shape[2:])),
        strides=tuple(attribute(node, "strides", ones)),
        dilations=tuple(attribute(node, "dilations", ones)),
        pads=tuple(attribute(node, "pads", (0,) * (2 * len(ones)))),
        group=group,
        auto_pad=attribute(node, "auto_pad", "NOTSET"),
        output_padding=(
            tuple(attribute(node, "output_padding", (0,) * len(ones))) if turned else None
        ),
    )


def _gather(graph: OnnxGraph, index: int, node: NodeProto) -> OnnxLayer | str | None:
    found = _weight(graph, node.input[0])
    if found is None or attribute(node, "axis", 0) != 0 or len(graph.shape(found[0])) != 2:
        return None
    weight, flipped = found
    if flipped:
        return "the weight of an embedding must not be transposed on the way"
    return _found(graph, index, "embedding", weight, node.input[1])


def _found(
    graph: OnnxGraph,
    index: int,
    kind: Kind,
    weight: str,
    source: str,
    add: int | None = None,
    **fields: Any,
) -> OnnxLayer:
    """Return the layer of a node that reads a tensor, and of the Add of its bias."""
    last = graph.nodes[index if add is None else add]
    use = Use(node=index, input=source, output=last.output[0], add=add)
    name = layer_name(graph.nodes[index], weight)
    return OnnxLayer(name=name, kind=kind, uses=(use,), weight=weight, **fields)


def _weight(graph: OnnxGraph, name: str) -> tuple[str, bool] | None:
    """Return the stored float tensor behind a name, and whether it is transposed on the way."""
    flipped = False
    while True:
        stored = graph.constant(name)
        if stored is not None:
            return (name, flipped) if stored.data_type in FLOATS else None
        node = graph.node(name)
        if node is None:
            return None
        if node.op_type == "Transpose" and list(attribute(node, "perm", (1, 0))) == [1, 0]:
            flipped = not flipped
        elif node.op_type != "Identity":
            return None
        name = node.input[0]


def _changed_on_the_way(graph: OnnxGraph, name: str) -> str | None:
    """Explain why a tensor is no weight of a layer, if only a stored matrix is behind it."""
    passed: list[str] = []
    while graph.constant(name) is None:
        node = graph.node(name)
        if node is None:
            return None
        inputs = [n for n in node.input if n and not _is_small(graph, n)]
        if len(inputs) != 1:
            return None
        passed.append(node.op_type)
        name = inputs[0]
    if not _is_matrix(graph, name):
        return None
    return f"its weight {name!r} goes through {', '.join(reversed(passed))}, store the result"


def _is_matrix(graph: OnnxGraph, name: str) -> bool:
    """Return True if a stored tensor has more than one row and column."""
    stored = graph.constant(name)
    return stored is not None and sum(d > 1 for d in stored.dims) > 1


def _is_small(graph: OnnxGraph, name: str) -> bool:
    """Return True if a tensor is stored and no matrix: shapes, axes, scales."""
    return graph.constant(name) is not None and not _is_matrix(graph, name)


def _bias_add(graph: OnnxGraph, output: str, width: int) -> int | None:
    """Return the Add of a stored vector that alone reads a tensor."""
    readers = graph.consumers.get(output, [])
    if len(readers) != 1 or output in graph.outputs:
        return None
    node = graph.nodes[readers[0]]
    if node.op_type != "Add" or len(set(node.input)) != 2:
        return None
    other = next(name for name in node.input if name != output)
    return readers[0] if _is_vector(graph, graph.source(other), width) else None


def _bias_input(graph: OnnxGraph, node: NodeProto) -> str | None:
    """Return the tensor that a Gemm or Conv adds, None if there is none."""
    return graph.source(node.input[2]) if len(node.input) > 2 and node.input[2] else None


def _is_vector(graph: OnnxGraph, name: str, width: int) -> bool:
    stored = graph.constant(name)
    return stored is not None and tuple(stored.dims) == (width,) and stored.data_type in FLOATS


def _joined(graph: OnnxGraph, first: OnnxLayer, more: OnnxLayer) -> OnnxLayer:
    """Join two layers that apply the same weight."""
    uses = (*first.uses, *more.uses)
    if first.bias == more.bias:
        return replace(first, uses=uses)
    if first.kind == "linear":  # without a common bias: results before the Adds
        uses = tuple(Use(u.node, u.input, graph.nodes[u.node].output[0]) for u in uses)
    return replace(first, uses=uses, bias=None)


def layer_name(node: NodeProto, weight: str) -> str:
    """Return the name of a layer, such that a module of torch can have it."""
    pieces = (node.name or weight).split(".")
    return ".".join(f"{p}_" if not p or p in _TAKEN else p for p in pieces)


def weight_shape(graph: OnnxGraph, layer: OnnxLayer) -> tuple[int, ...]:
    """Return the shape of a layer's weight as a module of torch has it."""
    shape = graph.shape(layer.weight)
    if layer.directions:
        return (shape[0] * shape[1], shape[2], *layer.kernel)
    return shape[::-1] if layer.transposed else shape


def stored_weight(graph: OnnxGraph, layer: OnnxLayer) -> Tensor:
    """Return a copy of a layer's weight as a module of torch has it."""
    weight = graph.tensor(layer.weight)
    if layer.directions:
        return weight.reshape(weight_shape(graph, layer))
    return weight.mT.contiguous() if layer.transposed else weight


def stored_bias(graph: OnnxGraph, layer: OnnxLayer) -> Tensor | None:
    """Return a copy of a layer's bias ``[out]``, None if it has none."""
    return None if layer.bias is None else graph.tensor(layer.bias)
