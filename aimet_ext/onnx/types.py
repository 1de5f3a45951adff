"""Types and values of ONNX tensors: read, written, handed to torch, inferred."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

__all__ = ["infer_types", "read_array", "to_torch", "torch_array", "write_array"]

_FLOATS = frozenset(
    (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
)
_VALUES = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def read_array(tensor: TensorProto, base_dir: str) -> np.ndarray[Any, Any]:
    """A writable copy of a tensor's value."""
    array = np.asarray(numpy_helper.to_array(tensor, base_dir))
    return array if array.flags.writeable and array.flags.owndata else array.copy()


def write_array(tensor: TensorProto, array: np.ndarray[Any, Any]) -> None:
    """Write a tensor's value in place; it is no longer external data then.

    A value that is there already is not written again: protobuf never gives back what the one
    before took.

    :raises ValueError: the array has another shape or type.
    """
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if tuple(tensor.dims) != array.shape or array.dtype != dtype:
        raise ValueError(
            f"{tensor.name}: values of shape {tuple(tensor.dims)} and type {dtype} are required, "
            f"got {array.shape} and {array.dtype}"
        )
    fresh = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape)).raw_data
    stored = tensor.data_location != TensorProto.EXTERNAL and tensor.HasField("raw_data")
    if stored and tensor.raw_data == fresh:
        return
    for field in (*_VALUES, "external_data", "data_location"):
        tensor.ClearField(field)
    tensor.raw_data = fresh


def to_torch(array: np.ndarray[Any, Any]) -> Tensor:
    """The same memory as a torch tensor, bfloat16 too."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def torch_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The same memory as an array, bfloat16 too."""
    if tensor.dtype is torch.bfloat16:
        dtype = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
        found: np.ndarray[Any, Any] = tensor.view(torch.int16).numpy().view(dtype)
        return found
    return tensor.numpy()


def infer_types(
    model: onnx.ModelProto, nodes: Iterable[NodeProto], known: Mapping[str, int]
) -> dict[str, int]:
    """Element type of every tensor of a graph.

    Where ONNX does not know an operator, its schema or else its first float input tells.

    :param model: to run shape inference on; needs no large values.
    :param nodes: in topological order.
    :param known: what is stated.
    """
    types = dict(known)
    inferred = onnx.shape_inference.infer_shapes(model)
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        if value.type.tensor_type.elem_type:
            types.setdefault(value.name, value.type.tensor_type.elem_type)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    for node in nodes:
        for place, name in enumerate(node.output):
            if name and name not in types:
                kind = _output_type(node, place, types, versions)
                if kind:
                    types[name] = kind
    return types


def _output_type(
    node: NodeProto, place: int, types: Mapping[str, int], versions: Mapping[str, int]
) -> int:
    """Type of one output, 0 if it cannot be told."""
    for found in node.attribute:
        if found.name in ("to", "dtype") and found.type == onnx.AttributeProto.INT:
            return int(found.i)
        if found.name == "value" and found.type == onnx.AttributeProto.TENSOR:
            return int(found.t.data_type)
    by_schema = _schema_type(node, place, types, versions)
    if by_schema:
        return by_schema
    kinds = [types[name] for name in node.input if name in types]
    return next((kind for kind in kinds if kind in _FLOATS), kinds[0] if kinds else 0)


def _schema_type(
    node: NodeProto, place: int, types: Mapping[str, int], versions: Mapping[str, int]
) -> int:
    domain = "" if node.domain == "ai.onnx" else node.domain
    if not onnx.defs.has(node.op_type, domain):
        return 0
    version = versions.get(domain, onnx.defs.onnx_opset_version())
    try:
        schema = onnx.defs.get_schema(node.op_type, version, domain)
    except onnx.defs.SchemaError:  # newer than the model's opset
        return 0
    output = schema.outputs[min(place, len(schema.outputs) - 1)]
    if output.type_str.startswith("tensor("):
        name = output.type_str.removeprefix("tensor(").removesuffix(")")
        return int(TensorProto.DataType.Value(name.upper()))
    for index, name in enumerate(node.input):
        declared = schema.inputs[min(index, len(schema.inputs) - 1)].type_str
        if name in types and declared == output.type_str:
            return types[name]
    return _constrained(schema, output.type_str)


def _constrained(schema: Any, variable: str) -> int:
    """The one type that a type variable allows, 0 if there are more."""
    for constraint in schema.type_constraints:
        allowed = list(constraint.allowed_type_strs)
        if constraint.type_param_str == variable and len(allowed) == 1:
            name = allowed[0].removeprefix("tensor(").removesuffix(")")
            return int(TensorProto.DataType.Value(name.upper()))
    return 0
