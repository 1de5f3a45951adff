"""Weights of a QDQ graph that are stored as integers."""

from __future__ import annotations

from onnx import ModelProto, TensorProto

from aimet_ext.onnx.index import GraphIndex, attribute

_KINDS = {
    "Conv": "conv",
    "ConvTranspose": "conv",
    "Gather": "embedding",
    "Gemm": "linear",
    "MatMul": "linear",
}
# Between stored integers and the operator that applies them.
_MOVES = ("QuantizeLinear", "Identity", "Reshape", "Transpose")


def stored_integers(model: ModelProto) -> dict[str, tuple[str, str]]:
    """Return kind and grid of each layer whose weight is stored as integers, by the node's name.

    :param model: Model with quantize and dequantize nodes.
    :returns: Pairs such as ``("linear", "int4 in blocks of 32")``.
    """
    index, found = GraphIndex(model.graph), {}
    for node in index.nodes:
        if (kind := _KINDS.get(node.op_type)) is None:
            continue
        given = node.input[0 if kind == "embedding" else 1]
        dequantize = index.node(index.source(given, _MOVES))
        weight = index.constant(index.source(given, (*_MOVES, "DequantizeLinear")))
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or weight is None:
            continue
        scale = index.constant(dequantize.input[1])
        if size := attribute(dequantize, "block_size", 0):
            where = f"in blocks of {size}{', LPBQ' * (scale is None)}"
        else:
            many = scale is not None and any(dim > 1 for dim in scale.dims)
            where = "per channel" if many else "per tensor"
        width = TensorProto.DataType.Name(weight.data_type).lower()
        found[node.name or node.output[0]] = kind, f"{width} {where}"
    return found
