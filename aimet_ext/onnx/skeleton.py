"""ONNX models of any size without their large values, where it is types and shapes that count.

Protobuf serializes 2 GiB at most, and ONNX serializes a model to infer shapes. What they follow
from are small values: shapes, axes, indices.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

__all__ = ["can_be_given", "elements", "infer_shapes", "is_large", "large_constant", "placeholder"]

_SMALL = 1024  # elements; larger values are left out


def infer_shapes(model: onnx.ModelProto, *, data_prop: bool = False) -> onnx.ModelProto:
    """A copy of a model with the types and shapes that follow from those of its inputs.

    Large stored values are declared as external data there, so the copy is not one to run.

    :param data_prop: follow shapes that are computed, too.
    """
    return onnx.shape_inference.infer_shapes(_light(model), data_prop=data_prop)


def elements(tensor: TensorProto) -> int:
    """Of a stored value."""
    return int(np.prod(tensor.dims, dtype=np.int64))


def is_large(tensor: TensorProto) -> bool:
    """Whether a stored value is none that shapes follow from."""
    return elements(tensor) > _SMALL


def can_be_given(tensor: TensorProto) -> bool:
    """Whether a stored value is large, and of a type that onnxruntime takes beside a model.

    That is what numpy itself has; bfloat16 and 4 bits come from elsewhere.
    """
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return is_large(tensor) and dtype.kind in "fiub" and dtype.isbuiltin == 1


def large_constant(node: NodeProto) -> TensorProto | None:
    """The value of a Constant node, if it is large."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    value = next((each.t for each in node.attribute if each.name == "value"), None)
    return value if value is not None and is_large(value) else None


def placeholder(tensor: TensorProto, name: str = "") -> TensorProto:
    """A stored value without its content, declared as external data.

    :param name: in place of its own.
    """
    empty = TensorProto(name=name or tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    empty.data_location = TensorProto.EXTERNAL
    size = elements(tensor) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    for key, value in (("location", "given_at_run_time"), ("offset", "0"), ("length", str(size))):
        empty.external_data.add(key=key, value=value)
    return empty


def _light(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, nothing large copied."""
    graph = model.graph
    large = {
        node.output[0]: value for node in graph.node if (value := large_constant(node)) is not None
    }
    light = onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions
    )
    light.graph.name = graph.name or "light"
    light.graph.node.extend(node for node in graph.node if not large.keys() & set(node.output))
    for name in ("input", "output", "value_info", "quantization_annotation"):
        getattr(light.graph, name).extend(getattr(graph, name))
    light.graph.initializer.extend(
        placeholder(tensor) if is_large(tensor) else tensor for tensor in graph.initializer
    )
    light.graph.initializer.extend(placeholder(value, name) for name, value in large.items())
    light.graph.sparse_initializer.extend(graph.sparse_initializer)
    return light
