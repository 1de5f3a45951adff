"""Values of ONNX tensors: read, written, handed to torch; and types and shapes inferred.

Protobuf serializes 2 GiB at most, and ONNX serializes a model to infer types and shapes. These
follow from small values (shapes, axes, indices), so large ones are left out there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from aimet_ext.data.feeds import InputSpec
from aimet_ext.onnx.index import FLOATS, GraphIndex, attributes, elements, stored_value
from aimet_ext.onnx.reading import read_model

#: By ``onnx.TensorProto.DataType``.
DTYPES: Mapping[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    16: torch.bfloat16,
}

_VALUES = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
_SMALL = 1024  # elements; larger values are left out


def read_array(tensor: TensorProto, base_dir: str) -> np.ndarray[Any, Any]:
    """Return a writable copy of a tensor's value."""
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
    if not stored or tensor.raw_data != fresh:
        put_bytes(tensor, fresh)


def put_bytes(tensor: TensorProto, content: bytes) -> None:
    """Put the bytes of a value in the place of a tensor's own, of the same shape and type."""
    for field in (*_VALUES, "external_data", "data_location"):
        tensor.ClearField(field)
    tensor.raw_data = content


def set_value(tensor: TensorProto, array: np.ndarray[Any, Any]) -> None:
    """Put an array of any shape and type in the place of a tensor's value; the name stays."""
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def to_torch(array: np.ndarray[Any, Any]) -> Tensor:
    """Return the same memory as a torch tensor, bfloat16 too."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def torch_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return the same memory as an array, bfloat16 too."""
    if tensor.dtype is torch.bfloat16:
        dtype = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
        found: np.ndarray[Any, Any] = tensor.view(torch.int16).numpy().view(dtype)
        return found
    return tensor.numpy()


def read_input_specs(path: Path) -> dict[str, InputSpec]:
    """Return shapes and types of the inputs of an ONNX file; its weights are not read."""
    model = read_model(path, external=False)
    return input_specs(GraphIndex(model.graph).inputs)


def input_specs(inputs: Mapping[str, onnx.ValueInfoProto]) -> dict[str, InputSpec]:
    """Return shapes and types that a graph requires of its inputs, by name."""
    found = {}
    for name, value in inputs.items():
        kind = value.type.tensor_type
        dims = (dim.dim_value if dim.dim_value > 0 else dim.dim_param for dim in kind.shape.dim)
        shape = tuple(dims) if kind.HasField("shape") else None
        found[name] = InputSpec(shape, DTYPES.get(kind.elem_type))
    return found


def infer_types(
    model: onnx.ModelProto, nodes: Iterable[NodeProto], known: Mapping[str, int]
) -> dict[str, int]:
    """Return the element type of every tensor of a graph.

    Where ONNX does not know an operator, its schema or else its first float input tells.

    :param model: model to run shape inference on; needs no large values.
    :param nodes: nodes in topological order.
    :param known: types that the model states.
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
    """Return the type of one output, 0 if it cannot be told."""
    for name, value in attributes(node).items():
        if name in ("to", "dtype") and isinstance(value, int):
            return value
        if name == "value" and isinstance(value, TensorProto):
            return value.data_type
    by_schema = _schema_type(node, place, types, versions)
    if by_schema:
        return by_schema
    kinds = [types[name] for name in node.input if name in types]
    return next((kind for kind in kinds if kind in FLOATS), kinds[0] if kinds else 0)


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
        return _data_type(output.type_str)
    for index, name in enumerate(node.input):
        declared = schema.inputs[min(index, len(schema.inputs) - 1)].type_str
        if name in types and declared == output.type_str:
            return types[name]
    for constraint in schema.type_constraints:  # a type variable that allows one type
        if constraint.type_param_str == output.type_str and len(constraint.allowed_type_strs) == 1:
            return _data_type(constraint.allowed_type_strs[0])
    return 0


def _data_type(text: str) -> int:
    """Return the data type that a schema spells out, as ``tensor(int64)``."""
    name = text.removeprefix("tensor(").removesuffix(")")
    return int(TensorProto.DataType.Value(name.upper()))


def infer_shapes(model: onnx.ModelProto, *, data_prop: bool = False) -> onnx.ModelProto:
    """Return a copy of a model with the types and shapes that follow from those of its inputs.

    Large stored values are declared as external data there, so the copy is not one to run.

    :param data_prop: follow shapes that are computed, too.
    """
    return onnx.shape_inference.infer_shapes(_light(model), data_prop=data_prop)


def is_large(tensor: TensorProto) -> bool:
    """Return True if a stored value is too large for shapes to follow from it."""
    return elements(tensor) > _SMALL


def can_be_given(tensor: TensorProto) -> bool:
    """Return True if a stored value is large, and of a type that onnxruntime takes beside a model.

    That is what numpy itself has; bfloat16 and 4 bits come from elsewhere.
    """
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return is_large(tensor) and dtype.kind in "fiub" and dtype.isbuiltin == 1


def placeholder(tensor: TensorProto, name: str = "") -> TensorProto:
    """Return a stored value without its content, declared as external data.

    :param name: name in place of its own.
    """
    empty = TensorProto(name=name or tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    empty.data_location = TensorProto.EXTERNAL
    size = elements(tensor) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    for key, value in (("location", "given_at_run_time"), ("offset", "0"), ("length", str(size))):
        empty.external_data.add(key=key, value=value)
    return empty


def without_large(
    nodes: Iterable[NodeProto], stored: Iterable[TensorProto]
) -> tuple[list[NodeProto], list[TensorProto]]:
    """Return nodes without large Constants, and initializers without the content of large ones.

    The values of the Constants are among the initializers then.
    """
    kept, values = [], [placeholder(tensor) if is_large(tensor) else tensor for tensor in stored]
    for node in nodes:
        value = stored_value(node)
        if value is not None and is_large(value):
            values.append(placeholder(value, node.output[0]))
        else:
            kept.append(node)
    return kept, values


def _light(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model without its large values; nothing large is copied."""
    graph = model.graph
    light = onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions
    )
    light.graph.name = graph.name or "light"
    for name in ("input", "output", "value_info", "quantization_annotation", "sparse_initializer"):
        getattr(light.graph, name).extend(getattr(graph, name))
    nodes, values = without_large(graph.node, graph.initializer)
    light.graph.node.extend(nodes)
    light.graph.initializer.extend(values)
    return light
