"""What an ONNX graph computes of constants alone, computed once and stored instead."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
import onnx

from aimet_ext.onnx.skeleton import can_be_given, placeholder
from aimet_ext.onnx.types import read_array

__all__ = ["bound_masks", "drop_unused", "fold_constants"]

# Elements of a folded tensor at most: a causal mask of 8192 tokens.
_LARGEST = 1 << 26
_RANDOM = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial")
)


def fold_constants(model: onnx.ModelProto, keep: Collection[str] = ()) -> onnx.ModelProto:
    """A copy of a model in which tensors that depend on no input are stored values.

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
    constants = {proto.name: proto for proto in graph.initializer}
    static, kept = set(constants), set(keep)
    foldable: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
            static.add(node.output[0])
        elif _is_static(node, static, kept):
            foldable.append(node)
            static.update(node.output)
    wanted = _boundary(graph, foldable)
    values = _evaluate(folded, foldable, constants, wanted)
    too_large = {name for name, value in values.items() if value.size > _LARGEST}
    for name, value in values.items():
        if name not in too_large:
            graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    done = set(values) - too_large
    _replace_nodes(graph, [node for node in graph.node if not set(node.output) & done])
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
    for proto in (*model.graph.initializer, *_constant_values(model.graph)):
        if proto.data_type != onnx.TensorProto.FLOAT:
            continue
        values = onnx.numpy_helper.to_array(proto)
        if values.size and values.min() < -1e30:
            bounded = np.where(values < -1e30, np.float32(lowest), values).astype(np.float32)
            name = proto.name
            proto.CopyFrom(onnx.numpy_helper.from_array(bounded, name))
            changed.append(name)
    return changed


def _constant_values(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            yield node.attribute[0].t


def _is_static(node: onnx.NodeProto, static: Collection[str], keep: Collection[str]) -> bool:
    """Whether a node's outputs are the same in every run, and may be stored in its place."""
    if node.op_type in _RANDOM or node.domain not in ("", "ai.onnx") or not node.output:
        return False
    if any(
        a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute
    ):
        return False
    read = [name for name in node.input if name]
    if not all(name in static for name in read):
        return False
    return node.op_type == "Identity" or not any(name in keep for name in read)


def _boundary(graph: onnx.GraphProto, foldable: Iterable[onnx.NodeProto]) -> list[str]:
    """Static tensors that other nodes read; outputs of the graph stay computed."""
    made = {name for node in foldable for name in node.output if name}
    outputs = {value.name for value in graph.output}
    read = {
        name
        for node in graph.node
        if node.op_type != "Constant" and not made.intersection(node.output)
        for name in _reads(node)
    }
    return sorted((made & read) - outputs)


def _reads(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, in its subgraphs too."""
    found = set(node.input)
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            for inner in body.node:
                found |= _reads(inner)
    return found


def _evaluate(
    model: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    constants: dict[str, onnx.TensorProto],
    wanted: list[str],
) -> dict[str, np.ndarray[Any, Any]]:
    """Values of tensors that depend on constants alone, by onnxruntime."""
    import onnxruntime

    if not wanted:
        return {}
    used = sorted({name for node in nodes for name in node.input if name in constants})
    given = {name: _as_value(constants[name]) for name in used if can_be_given(constants[name])}
    protos = []
    for name in used:
        proto = onnx.TensorProto()
        proto.CopyFrom(placeholder(constants[name]) if name in given else constants[name])
        proto.name = name
        protos.append(proto)
    outputs = [onnx.ValueInfoProto(name=name) for name in wanted]
    part = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "constants", [], outputs, initializer=protos),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if given:  # beside the part, which is serialized: all weights may be more than that can hold
        options.add_external_initializers([*given], [*given.values()])
    session = onnxruntime.InferenceSession(
        part.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return dict(zip(wanted, session.run(wanted, {}), strict=True))


def _as_value(proto: onnx.TensorProto) -> Any:
    """A stored value as onnxruntime takes it beside a model; it must outlive the session."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(read_array(proto, ""))


def _replace_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    copies = []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del graph.node[:]
    graph.node.extend(copies)


def drop_unused(graph: onnx.GraphProto) -> None:
    """Drop nodes and stored values that no output depends on."""
    needed = {value.name for value in graph.output}
    alive = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= _reads(node)
            alive.append(node)
    if len(alive) < len(graph.node):
        _replace_nodes(graph, alive[::-1])
    unused = [proto for proto in graph.initializer if proto.name not in needed]
    for proto in unused:
        graph.initializer.remove(proto)
