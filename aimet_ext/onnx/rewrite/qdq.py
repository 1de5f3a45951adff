"""QDQ graphs: what of them an NPU would compute in float, and casts that do nothing."""

from __future__ import annotations

import onnx

from aimet_ext.onnx.rewrite.fold import drop_unused
from aimet_ext.onnx.skeleton import infer_shapes

__all__ = ["drop_casts", "float_nodes", "float_weights"]

_CONVERSIONS = ("Constant", "DequantizeLinear", "QuantizeLinear")
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


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
        for place, name in enumerate(node.input):
            node.input[place] = same.get(name, name)
        if node.op_type != "Cast" or node.output[0] in outputs:
            continue
        if node.attribute[0].i == onnx.TensorProto.FLOAT and node.input[0] in dequantized:
            same[node.output[0]] = node.input[0]
    if same:
        drop_unused(graph)
    return len(same)


def float_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of nodes with a float result that is not quantized next, which HTP has as float16.

    Those that an output of the graph comes from directly are among them.
    """
    readers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    kinds = _kinds(model)
    outputs = {value.name for value in model.graph.output}
    return [
        node.name
        for node in model.graph.node
        if node.op_type not in _CONVERSIONS
        and any(
            kinds.get(name, onnx.TensorProto.FLOAT) == onnx.TensorProto.FLOAT
            and (name in outputs or set(readers.get(name, ())) != {"QuantizeLinear"})
            for name in node.output
            if name
        )
    ]


def float_weights(model: onnx.ModelProto) -> list[str]:
    """Stored float values that a MatMul, Gemm or Conv takes for its weight."""
    stored = {
        proto.name for proto in model.graph.initializer if proto.data_type == onnx.TensorProto.FLOAT
    }
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            if node.attribute[0].t.data_type == onnx.TensorProto.FLOAT:
                stored.add(node.output[0])
        elif node.op_type in _CONVERSIONS and node.input[0] in stored:
            stored.add(node.output[0])
    layers = (node for node in model.graph.node if node.op_type in _LAYERS)
    return [node.input[1] for node in layers if node.input[1] in stored]


def _kinds(model: onnx.ModelProto) -> dict[str, int]:
    inferred = infer_shapes(model)
    return {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
