"""Differentiable torch versions of ONNX operators: the table of all, and how one node is computed.

>>> unsupported(model.graph.node)
[]
>>> evaluate(node, {"x": x, "gain": gain}, opset=17)
{'y': tensor(...)}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from onnx import AttributeProto, NodeProto, helper, numpy_helper
from torch import Tensor

from aimet_ext.errors import TransformRefused
from aimet_ext.onnx.ops.attention import ATTENTION, ATTENTION_LIMITS
from aimet_ext.onnx.ops.math import MATH, MATH_LIMITS
from aimet_ext.onnx.ops.shape import SHAPE, SHAPE_LIMITS
from aimet_ext.onnx.ops.signature import Attributes, Inputs, Limit, Operator
from aimet_ext.onnx.values import DTYPES, to_torch

# By domain ("" for ONNX's own) and operator.
OPERATORS: Mapping[tuple[str, str], Operator] = {**MATH, **SHAPE, **ATTENTION}
_LIMITS: Mapping[tuple[str, str], Limit] = {**MATH_LIMITS, **SHAPE_LIMITS, **ATTENTION_LIMITS}

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


def unsupported(nodes: Iterable[NodeProto]) -> list[str]:
    """List what is not translated of nodes: ``"domain::operator (node name)"`` and the reason.

    The reason stands behind a colon where the operator is translated but not the node's
    attributes; a node without name goes by its first output.
    """
    found = []
    for node in nodes:
        key = key_of(node)
        label = f"{key[0] or 'ai.onnx'}::{key[1]} ({node.name or node.output[0]})"
        if key not in OPERATORS:
            found.append(label)
        elif key in _LIMITS:
            reason = _LIMITS[key](attributes_of(node), [bool(name) for name in node.input])
            found += [f"{label}: {reason}"] if reason else []
    return found


def apply_operator(
    key: tuple[str, str], attributes: Attributes, inputs: Inputs, opset: int
) -> tuple[Tensor | None, ...]:
    """Compute an operator; integers on the host follow the other inputs to their device."""
    device = next(
        (x.device for x in inputs if x is not None and x.device.type != "cpu"), torch.device("cpu")
    )
    if device.type != "cpu":
        host = _HOST_INPUTS.get(key[1], (1,) if key[1].startswith("Reduce") else ())
        inputs = [
            x if x is None or i in host else x.to(device, non_blocking=True)
            for i, x in enumerate(inputs)
        ]
    outputs = OPERATORS[key](attributes, inputs, opset)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def evaluate(
    node: NodeProto, values: Mapping[str, Tensor], opset: int, *, wide: bool = False
) -> dict[str, Tensor]:
    """Return the outputs of one node by tensor name, differentiable in its inputs.

    :param values: at least the node's inputs, by tensor name; none is written into.
    :param opset: version of ONNX's own domain that the model uses.
    :param wide: take float64 where the node asks for less, as a Cast to float32 does.
    :raises TransformRefused: the operator, or what its attributes ask for, is not translated.
    """
    refused = unsupported([node])
    if refused:
        raise TransformRefused(f"no differentiable form of {refused[0]} is known")
    attributes = attributes_of(node)
    inputs = [values[name] if name else None for name in node.input]
    outputs = apply_operator(
        key_of(node), widened(attributes) if wide else attributes, inputs, opset
    )
    return outputs_by_name(node.output, outputs)


def outputs_by_name(names: Iterable[str], outputs: Iterable[Tensor | None]) -> dict[str, Tensor]:
    """Return an operator's outputs by the node's names for them; either may be longer."""
    pairs = zip(names, outputs, strict=False)
    return {name: value for name, value in pairs if name and value is not None}
