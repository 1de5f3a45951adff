"""QDQ graphs: what an NPU would compute in float, casts that do nothing, inner tensors shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto

from aimet_ext.onnx.index import GraphIndex, drop_unused, rename_reads
from aimet_ext.onnx.values import infer_shapes

__all__ = ["drop_casts", "float_weights", "output_names", "with_outputs"]

_CONVERSIONS = ("Constant", "DequantizeLinear", "QuantizeLinear")
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SUFFIX = "_shown"


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
        copy = onnx.load(str(model), load_external_data=False)
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
