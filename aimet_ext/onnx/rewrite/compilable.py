"""ONNX graphs as a compiler takes them: of one shape, constants computed, inner tensors shown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from aimet_ext.onnx.index import (
    GraphIndex,
    attributes,
    bodies,
    drop_unused,
    make_part,
    reads,
    rename_reads,
    replace_nodes,
    stored_value,
    stored_values,
)
from aimet_ext.onnx.reading import read_model
from aimet_ext.onnx.session import open_session
from aimet_ext.onnx.values import (
    can_be_given,
    infer_shapes,
    placeholder,
    read_array,
    set_value,
)

# Elements of a folded tensor at most: a causal mask of 8192 tokens.
_LARGEST = 1 << 26
_RANDOM = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial")
)
_CONVERSIONS = ("Constant", "DequantizeLinear", "QuantizeLinear")
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SUFFIX = "_shown"


def fold_constants(model: onnx.ModelProto, keep: Collection[str] = ()) -> onnx.ModelProto:
    """Return a copy of a model in which tensors that depend on no input are stored values.

    Cosines and sines of positions, causal masks and shapes become what they are; a device that
    rounds every step of their computation would spoil them. An ``Identity`` of a constant becomes
    a constant of its own, so that equal weights that an exporter merged have a name each. What
    nothing reads any more is dropped.

    :param model: left as it is; external data has to be loaded.
    :param keep: constants that only ``Identity`` may turn into another: those with encodings.
    :returns: the copy. Stored values keep the names of the tensors.
    """
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    graph = folded.graph
    constants, kept = stored_values(graph), set(keep)
    static = set(constants)
    foldable: list[NodeProto] = []
    for node in graph.node:
        if stored_value(node) is None and _is_static(node, static, kept):
            foldable.append(node)
            static.update(node.output)
    wanted = _boundary(graph, foldable)
    values = {
        name: value
        for name, value in run_nodes(folded, foldable, constants, wanted).items()
        if value.size <= _LARGEST
    }
    graph.initializer.extend(numpy_helper.from_array(value, n) for n, value in values.items())
    replace_nodes(graph, lambda node: None if values.keys().isdisjoint(node.output) else ())
    drop_unused(graph)
    return folded


def bound_masks(model: onnx.ModelProto, lowest: float = -100.0) -> list[str]:
    """Raise what stands for minus infinity in stored values, in place.

    An integer grid has to hold the masked scores; with a number such as -1e38 among them it holds
    nothing else. ``exp(-100)`` is 0 beside any score that a softmax of 16 bits can tell apart.

    :param lowest: put in the place of all values below -1e30.
    :returns: names of the stored values that were changed.
    """
    changed = []
    for name, proto in stored_values(model.graph).items():
        if proto.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(proto)
        if values.size and values.min() < -1e30:
            set_value(proto, np.where(values < -1e30, np.float32(lowest), values))
            changed.append(name)
    return changed


def _is_static(node: onnx.NodeProto, static: Collection[str], keep: Collection[str]) -> bool:
    """Return True if a node's outputs are the same in every run, and may be stored in its place."""
    if node.op_type in _RANDOM or node.domain not in ("", "ai.onnx") or not node.output:
        return False
    if any(True for _ in bodies(node)):
        return False
    read = [name for name in node.input if name]
    if not all(name in static for name in read):
        return False
    return node.op_type == "Identity" or not any(name in keep for name in read)


def _boundary(graph: onnx.GraphProto, foldable: Iterable[onnx.NodeProto]) -> list[str]:
    """Return static tensors that other nodes read; outputs of the graph stay computed."""
    made = {name for node in foldable for name in node.output if name}
    outputs = {value.name for value in graph.output}
    read = {
        name
        for node in graph.node
        if node.op_type != "Constant" and not made.intersection(node.output)
        for name in reads(node)
    }
    return sorted((made & read) - outputs)


def run_nodes(
    model: onnx.ModelProto,
    nodes: Iterable[NodeProto],
    stored: Mapping[str, TensorProto],
    wanted: Sequence[str],
    feed: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> dict[str, np.ndarray[Any, Any]]:
    """Return values of tensors that some nodes of a model make, by onnxruntime.

    :param stored: stored values of the model.
    :param feed: float32 values of the other tensors that the nodes read.
    """
    if not wanted:
        return {}
    nodes, feed = list(nodes), feed or {}
    used = sorted({name for node in nodes for name in node.input if name in stored})
    # Beside the part, which is serialized: all weights may be more than that can hold.
    given = {name: read_array(stored[name], "") for name in used if can_be_given(stored[name])}
    protos = []
    for name in used:
        proto = TensorProto()
        proto.CopyFrom(placeholder(stored[name]) if name in given else stored[name])
        proto.name = name
        protos.append(proto)
    inputs = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in feed]
    outputs = [onnx.ValueInfoProto(name=name) for name in wanted]
    part = make_part(model, nodes, protos, inputs, outputs)
    session = open_session(part, optimize="none", threads=1, given=given)
    return dict(zip(wanted, session.run(list(wanted), dict(feed)), strict=True))


def make_static(
    model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]], keep: Collection[str] = ()
) -> onnx.ModelProto:
    """Return a copy of a model for inputs of these shapes; what depends on nothing else is stored.

    An NPU's compiler takes static shapes only.

    :param model: left as it is; external data has to be loaded.
    :param shapes: shapes of all inputs by name.
    :param keep: see :func:`fold_constants`.
    """
    static = onnx.ModelProto()
    static.CopyFrom(model)
    if _fix(static.graph, shapes):
        del static.graph.value_info[:]
        for output in static.graph.output:
            output.type.tensor_type.ClearField("shape")
    folded = fold_constants(static, keep)
    while any(node.op_type == "Shape" for node in folded.graph.node):
        inferred = infer_shapes(folded, data_prop=True)
        if not _store_shapes(folded.graph, inferred.graph):
            break
        folded = fold_constants(folded, keep)
    if any(not output.type.tensor_type.HasField("shape") for output in folded.graph.output):
        inferred = infer_shapes(folded, data_prop=True)
        for output, found in zip(folded.graph.output, inferred.graph.output, strict=True):
            output.CopyFrom(found)
    return folded


def _fix(graph: onnx.GraphProto, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Set the shapes of inputs; whether any was free."""
    free = False
    for value in graph.input:
        if value.name not in shapes:
            continue
        dims = value.type.tensor_type.shape.dim
        free = free or any(dim.dim_value < 1 for dim in dims)
        for dim, size in zip(dims, shapes[value.name], strict=True):
            dim.dim_value = size
    return free


def _store_shapes(graph: onnx.GraphProto, inferred: onnx.GraphProto) -> int:
    """Put stored values in the place of Shape nodes whose input has a known shape."""
    known: dict[str, list[int]] = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(dim.dim_value > 0 for dim in kind.shape.dim):
            known[value.name] = [dim.dim_value for dim in kind.shape.dim]
    stored = []

    def store(node: NodeProto) -> tuple[()] | None:
        if node.op_type != "Shape" or node.input[0] not in known:
            return None
        given = attributes(node)
        sizes = known[node.input[0]][given.get("start", 0) : given.get("end")]
        stored.append(numpy_helper.from_array(np.array(sizes, dtype=np.int64), node.output[0]))
        return ()

    replace_nodes(graph, store)
    graph.initializer.extend(stored)
    return len(stored)


def drop_casts(model: onnx.ModelProto) -> int:
    """Have readers of a dequantized tensor that is cast to float32, which it is, read the tensor.

    :param model: changed in place.
    :returns: how many casts went.
    """
    graph = model.graph
    outputs = {value.name for value in graph.output}
    dequantized = {
        node.output[0] for node in graph.node if node.op_type in ("DequantizeLinear", "Identity")
    }
    same: dict[str, str] = {}
    for node in graph.node:
        rename_reads(node, same)
        if node.op_type != "Cast" or node.output[0] in outputs:
            continue
        if node.attribute[0].i == TensorProto.FLOAT and node.input[0] in dequantized:
            same[node.output[0]] = node.input[0]
    if same:
        drop_unused(graph)
    return len(same)


def float_weights(model: onnx.ModelProto) -> list[str]:
    """Return stored float values that a MatMul, Gemm or Conv takes for its weight."""
    index = GraphIndex(model.graph)
    floats = {n for n, proto in index.stored.items() if proto.data_type == TensorProto.FLOAT}
    for node in index.nodes:
        if node.op_type in _CONVERSIONS and node.input and node.input[0] in floats:
            floats.add(node.output[0])
    layers = (node for node in index.nodes if node.op_type in _LAYERS)
    return [node.input[1] for node in layers if node.input[1] in floats]


def output_names(tensors: Sequence[str]) -> list[str]:
    """Return names that :func:`with_outputs` gives to the outputs for these tensors."""
    return [f"{name}{_SUFFIX}" for name in tensors]


def with_outputs(model: str | Path | onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """Return a copy of a QDQ graph with more outputs, quantized as the graph's nodes read them.

    A quantized tensor gets a dequantize node of its own behind the quantize node that is there:
    the groups of dequantize, operator and quantize that HTP takes as one stay as they were, and so
    do the numbers of the other outputs. A tensor that no node quantizes comes out as it is, which
    HTP may refuse.

    :param model: file of the model, whose external data is not read, or the model itself, which is
        left as it is.
    :param tensors: names of tensors: of the operator's output or of the dequantized one.
    :returns: the model; its new outputs follow its own ones, in the order of ``tensors``, and are
        called as :func:`output_names` says.
    :raises ValueError: a tensor is not there or is given twice.
    """
    copy = onnx.ModelProto()
    if isinstance(model, onnx.ModelProto):
        copy.CopyFrom(model)
    else:
        copy = read_model(model, external=False)
    index = GraphIndex(copy.graph)
    missing = [name for name in tensors if name not in index.producer and name not in index.inputs]
    if missing:
        raise ValueError(
            f"with_outputs: names of the graph's tensors were required, it has no {missing[:5]}"
        )
    if len(set(tensors)) != len(tensors):
        raise ValueError("with_outputs: a tensor is given twice; name each once")
    types = _listed(copy)
    if not all(name in types for name in tensors):
        types = _listed(infer_shapes(copy))
    for name, shown in zip(tensors, output_names(tensors), strict=True):
        source = _quantized(index, name)
        if source is None:
            node = onnx.helper.make_node("Identity", [name], [shown], name=shown)
        else:
            integers = source.input[0] if name in source.output else source.output[0]
            node = onnx.helper.make_node(
                "DequantizeLinear", [integers, *source.input[1:]], [shown], name=shown
            )
            kept = [a for a in source.attribute if a.name in ("axis", "block_size")]
            node.attribute.extend(kept)
        copy.graph.node.append(node)
        value = copy.graph.output.add(name=shown)
        if name in types:
            value.type.CopyFrom(types[name])
        else:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    return copy


def _quantized(index: GraphIndex, name: str) -> NodeProto | None:
    """Return the node with a tensor's integers, scale and zero point: its source, or a reader."""
    source = index.node(name)
    if source is not None and source.op_type == "DequantizeLinear":
        return source
    return next(
        (n for n in index.readers(name) if n.op_type == "QuantizeLinear" and n.input[0] == name),
        None,
    )


def _listed(model: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    """Return types and shapes of the tensors that a graph lists."""
    graph = model.graph
    return {value.name: value.type for value in [*graph.input, *graph.value_info, *graph.output]}
