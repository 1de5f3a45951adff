"""Second operands of MatMuls between activations, in the only form that HTP computes exactly.

With 16 bits HTP takes the second operand as a weight: symmetric and signed. An unsigned one is
accepted, and brought down to about 8 bits: 40 dB against the simulation, where the signed one has
75 to 82 dB. One of 8 bits loses too (50 dB), so keys and values that are kept in 8 bits are
widened first, which is exact.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx

__all__ = ["sign_second_operands"]

_UNSIGNED = (onnx.TensorProto.UINT8, onnx.TensorProto.UINT16)


def sign_second_operands(model: onnx.ModelProto) -> list[str]:
    """Have MatMuls between activations read signed, symmetric 16-bit integers, in place.

    A tensor that lies on another grid is put on such a one just before. That changes no value where
    its own grid is symmetric or has 8 bits, and else adds a rounding to 16 bits. Where the first
    operand has 8 bits the second one stays as it is: HTP takes 8 by 8 bits, and not 8 by 16.

    :param model: QDQ graph.
    :returns: the tensors that get a second grid.
    """
    graph = model.graph
    stored = {proto.name: proto for proto in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            stored[node.output[0]] = node.attribute[0].t
    producer = {name: node for node in graph.node for name in node.output}
    signed: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        source = producer.get(node.input[1]) if node.op_type == "MatMul" else None
        grid = None if source is None else _grid(source, stored)
        first = producer.get(node.input[0]) if grid else None
        if first is not None and (_grid(first, stored) or (0.0, 0, 16))[2] == 8:
            grid = None
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        if source is not None and grid is not None:
            name = node.input[1]
            if name not in signed:
                signed[name] = f"{name}_signed"
                nodes += _pair(graph, name, signed[name], _scale(*grid))
            copy.input[1] = signed[name]
        nodes.append(copy)
    del graph.node[:]
    graph.node.extend(nodes)
    return list(signed)


def _grid(node: onnx.NodeProto, stored: dict[str, Any]) -> tuple[float, int, int] | None:
    """Scale, zero point and width of a dequantized activation; None for anything else."""
    if node.op_type != "DequantizeLinear" or len(node.input) < 3 or node.input[0] in stored:
        return None
    scale, zero = stored.get(node.input[1]), stored.get(node.input[2])
    if scale is None or zero is None or zero.data_type not in _UNSIGNED:
        return None
    values, point = onnx.numpy_helper.to_array(scale), onnx.numpy_helper.to_array(zero)
    if values.size != 1:
        return None
    return float(values.reshape(())), int(point.reshape(())), 8 * point.dtype.itemsize


def _scale(scale: float, zero: int, bits: int) -> float:
    """The scale of a signed 16-bit grid with room for all values of another one.

    It uses all 16 bits, since HTP does not compute with the last of them: integers of 8 bits are
    multiples of 128 there.
    """
    lowest, highest = -zero, (1 << bits) - 1 - zero
    steps = max(-(lowest + 1), highest)  # the lowest integer of a symmetric grid has no opposite
    if steps > 32767:
        return scale * steps / 32767
    return scale / 2 ** math.floor(math.log2(32767 / steps))


def _pair(graph: onnx.GraphProto, source: str, output: str, scale: float) -> list[onnx.NodeProto]:
    names = [f"{output}_scale", f"{output}_zero_point"]
    values = (np.float32(scale), np.int16(0))
    graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(value), name)
        for value, name in zip(values, names, strict=True)
    )
    return [
        onnx.helper.make_node(
            "QuantizeLinear", [source, *names], [f"{output}_q"], name=f"{output}_QuantizeLinear"
        ),
        onnx.helper.make_node(
            "DequantizeLinear", [f"{output}_q", *names], [output], name=f"{output}_DequantizeLinear"
        ),
    ]
