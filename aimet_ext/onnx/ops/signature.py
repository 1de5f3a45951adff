"""Signature of a translated ONNX operator, and how its operands are read.

A translated operator is a function ``(attributes, inputs, opset) -> Tensor | tuple[Tensor, ...]``
of torch tensors. It is differentiable in its floating-point inputs, works in their dtype, float64
too, and never writes into an input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

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
