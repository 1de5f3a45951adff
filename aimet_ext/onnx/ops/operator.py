"""Signature of a translated ONNX operator, and how it is given the attributes and inputs of a node.

A translated operator is a function ``(attributes, inputs, opset) -> Tensor | tuple[Tensor, ...]``
of torch tensors. It is differentiable in its floating-point inputs, works in their dtype, float64
too, and never writes into an input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from onnx import AttributeProto, NodeProto, helper, numpy_helper
from torch import Tensor

from aimet_ext.onnx.values import DTYPES, to_torch

#: Domain of onnxruntime's own operators.
CONTRIB = "com.microsoft"

# By attribute name: int, float, str, list, Tensor or torch.dtype. "n_outputs" is the number of
# outputs that the node names.
Attributes: TypeAlias = Mapping[str, Any]
# Tensor, or None where an optional input is left out.
Inputs: TypeAlias = Sequence[Any]
Outputs: TypeAlias = "Tensor | tuple[Tensor | None, ...]"
Operator: TypeAlias = Callable[[Attributes, Inputs, int], Outputs]
# Attributes and the given inputs (False: left out) to the reason why this is not translated.
Limit: TypeAlias = Callable[[Attributes, Sequence[bool]], "str | None"]

# Attributes that are a TensorProto.DataType.
_DTYPE_ATTRIBUTES = ("dtype", "softmax_precision", "stash_type", "to")

# Attributes of a Constant that are plain numbers, taken as tensors.
_NUMBERS = {
    "value_float": torch.float32,
    "value_floats": torch.float32,
    "value_int": torch.int64,
    "value_ints": torch.int64,
}

# Inputs that say how and not what to compute: they stay on the host, where sizes are known.
_HOST_INPUTS: Mapping[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,),
    "CumSum": (1,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
}


# ---- what operators read ------------------------------------------------------------------------


def operand(inputs: Inputs, position: int) -> Any:
    """Return an optional input, None where it is left out."""
    return inputs[position] if position < len(inputs) else None


def ints(tensor: Tensor) -> list[int]:
    """Return values of an integer tensor of any shape, on the host."""
    return [int(value) for value in tensor.reshape(-1).tolist()]


def number(tensor: Tensor) -> int | float:
    """Return the value of a tensor with one element."""
    return tensor.reshape(()).item()


def floating(attributes: Attributes, tensor: Tensor) -> torch.dtype:
    """Return the dtype of a norm: that of ``stash_type``, and never less than the tensor's own."""
    stash = attributes.get("stash_type", torch.float32)
    return torch.promote_types(tensor.dtype, stash)


def only(name: str, *values: object) -> Limit:
    """Limit of an attribute to some values, the first of them its default."""

    def limit(attributes: Attributes, given: Sequence[bool]) -> str | None:
        value = attributes.get(name, values[0])
        return None if value in values else f"{name}={value!r} is not translated"

    return limit


# ---- what nodes state ---------------------------------------------------------------------------


def key_of(node: NodeProto) -> tuple[str, str]:
    """Return domain and operator, as the table has them; ONNX's own domain goes by two names."""
    return ("" if node.domain == "ai.onnx" else node.domain), node.op_type


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Return attributes as torch has them: tensors, dtypes, text; and ``n_outputs``.

    A value that torch has nothing for (strings in a tensor, graphs, unknown dtypes) stays ONNX's.
    """
    found: dict[str, Any] = {"n_outputs": len(node.output)}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if attribute.type == AttributeProto.TENSOR and value.data_type in DTYPES:
            value = to_torch(np.array(numpy_helper.to_array(value)))
        elif attribute.name in _NUMBERS:
            value = torch.tensor(value, dtype=_NUMBERS[attribute.name])
        elif attribute.name in _DTYPE_ATTRIBUTES:
            value = DTYPES.get(value, value)
        elif isinstance(value, bytes):
            value = value.decode()
        found[attribute.name] = value
    return found


def widened(attributes: Attributes) -> dict[str, Any]:
    """Return attributes with every floating-point tensor and dtype as float64."""
    found: dict[str, Any] = {}
    for name, value in attributes.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.double()
        elif isinstance(value, torch.dtype) and value.is_floating_point:
            value = torch.float64
        found[name] = value
    return found


def apply_operator(
    operator: Operator, op_type: str, attributes: Attributes, inputs: Inputs, opset: int
) -> tuple[Tensor | None, ...]:
    """Compute an operator; integers on the host follow the other inputs to their device."""
    device = next(
        (x.device for x in inputs if x is not None and x.device.type != "cpu"), torch.device("cpu")
    )
    if device.type != "cpu":
        host = _HOST_INPUTS.get(op_type, (1,) if op_type.startswith("Reduce") else ())
        inputs = [
            x if x is None or i in host else x.to(device, non_blocking=True)
            for i, x in enumerate(inputs)
        ]
    outputs = operator(attributes, inputs, opset)
    return outputs if isinstance(outputs, tuple) else (outputs,)
