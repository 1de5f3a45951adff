"""Differentiable torch versions of ONNX operators: shapes, slices, gathers and constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from aimet_ext.onnx.ops.common import (
    Attributes,
    Inputs,
    Limit,
    Operator,
    Outputs,
    ints,
    number,
    operand,
)

__all__ = ["SHAPE", "SHAPE_LIMITS"]


def _axes(attributes: Attributes, inputs: Inputs) -> list[int] | None:
    """Axes, an attribute before opset 13 and the second input since."""
    given = operand(inputs, 1)
    axes: list[int] | None = attributes.get("axes") if given is None else ints(given)
    return axes


def _cast(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    return inputs[0].to(attributes["to"])


def _cast_like(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    return inputs[0].to(inputs[1].dtype)


def _reshape(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Input in a new shape; 0 copies a size unless ``allowzero``, -1 stands for the rest."""
    x: Tensor = inputs[0]
    shape = ints(inputs[1])
    if not attributes.get("allowzero"):
        shape = [x.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return x.reshape(shape)


def _flatten(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Input as a matrix, the axes before ``axis`` in its rows."""
    x: Tensor = inputs[0]
    axis = attributes.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(int(torch.Size(x.shape[:axis]).numel()), -1)


def _transpose(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    x: Tensor = inputs[0]
    return x.permute(attributes.get("perm", list(range(x.dim()))[::-1]))


def _unsqueeze(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Input with axes of size 1 put in where the result shall have them."""
    x: Tensor = inputs[0]
    axes = _axes(attributes, inputs) or []
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    x: Tensor = inputs[0]
    axes = _axes(attributes, inputs)
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _expand(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Input broadcast against a shape, which may also hold ones where the input is wider."""
    x: Tensor = inputs[0]
    return x.expand(torch.broadcast_shapes(x.shape, ints(inputs[1])))


def _tile(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    return inputs[0].repeat(ints(inputs[1]))


def _slice(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Part of the input; a negative step goes backwards."""
    x: Tensor = inputs[0]
    if opset < 10:
        starts, ends, axes = (attributes.get(key) for key in ("starts", "ends", "axes"))
        steps = None
    else:
        starts, ends, axes, steps = (
            None if value is None else ints(value)
            for value in (operand(inputs, position) for position in range(1, 5))
        )
    assert starts is not None and ends is not None
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        first, last, _ = slice(start, end, step).indices(x.shape[axis])  # Python's rules are ONNX's
        if step > 0:
            selected = [slice(None)] * x.dim()
            selected[axis] = slice(first, last, step)
            x = x[tuple(selected)]
        else:
            x = x.index_select(axis, torch.arange(first, last, step, device=x.device))
    return x


def _split(attributes: Attributes, inputs: Inputs, opset: int) -> Outputs:
    """Parts of the input along an axis: of given sizes, or even ones, the last one smaller."""
    x: Tensor = inputs[0]
    axis = attributes.get("axis", 0)
    given = operand(inputs, 1)
    sizes = attributes.get("split") if given is None else ints(given)
    if sizes is None:
        count = attributes.get("num_outputs", attributes["n_outputs"])
        width = -(-x.shape[axis] // count)
        sizes = [max(0, min(width, x.shape[axis] - i * width)) for i in range(count)]
    return tuple(x.split(sizes, axis))


def _concat(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    return torch.cat(list(inputs), attributes["axis"])


def _positive(indices: Tensor, size: int) -> Tensor:
    """Indices counted from the front, as int64."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


def _gather(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Slices of the data along an axis; the indices' own shape takes that axis' place."""
    data: Tensor = inputs[0]
    indices: Tensor = inputs[1]
    axis = attributes.get("axis", 0) % data.dim()
    found = data.index_select(axis, _positive(indices.reshape(-1), data.shape[axis]))
    return found.reshape(data.shape[:axis] + indices.shape + data.shape[axis + 1 :])


def _gather_elements(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    axis = attributes.get("axis", 0)
    return inputs[0].gather(axis, _positive(inputs[1], inputs[0].shape[axis]))


def _gather_nd(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Slices of the data at index tuples, which stand in the indices' last axis."""
    data: Tensor = inputs[0]
    indices: Tensor = inputs[1].long()
    count = attributes.get("batch_dims", 0)
    if not count:
        return data[indices.unbind(-1)]
    shape = data.shape[:count]
    flat, at = data.flatten(0, count - 1), indices.flatten(0, count - 1)
    row = torch.arange(flat.shape[0], device=data.device)
    row = row.reshape([-1] + [1] * (at.dim() - 2))
    found = flat[(row, *at.unbind(-1))]
    return found.reshape(shape + found.shape[1:])


def _scatter_elements(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    data, indices, updates = inputs
    axis = attributes.get("axis", 0)
    at = _positive(indices, data.shape[axis])
    if attributes.get("reduction", "none") == "add":
        return data.scatter_add(axis, at, updates)
    return data.scatter(axis, at, updates)


def _scatter_nd(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Copy of the data with slices replaced, or with ``reduction="add"`` increased."""
    data, indices, updates = inputs
    accumulate = attributes.get("reduction", "none") == "add"
    return data.index_put(indices.long().unbind(-1), updates, accumulate=accumulate)


def _shape(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """The input's shape, or a slice of it, on the host."""
    shape = list(inputs[0].shape)[attributes.get("start", 0) : attributes.get("end")]
    return torch.tensor(shape, dtype=torch.int64)


def _size(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    return torch.tensor(inputs[0].numel())


def _constant(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    value: Tensor = next(v for v in attributes.values() if isinstance(v, Tensor))
    return value


def _constant_of_shape(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    value = attributes.get("value", torch.zeros(1))
    return value.reshape(()).expand(ints(inputs[0]))


def _range(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    start, limit, step = (number(value) for value in inputs)
    return torch.arange(start, limit, step, dtype=inputs[0].dtype)


def _where(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    return torch.where(inputs[0], inputs[1], inputs[2])


def _trilu(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """The upper or lower triangle of the last two axes, zero elsewhere."""
    diagonal = operand(inputs, 1)
    function = torch.triu if attributes.get("upper", 1) else torch.tril
    return function(inputs[0], 0 if diagonal is None else int(number(diagonal)))


def _eye_like(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    x: Tensor = inputs[0]
    rows = torch.arange(x.shape[0], device=x.device)[:, None] + attributes.get("k", 0)
    columns = torch.arange(x.shape[1], device=x.device)[None]
    return (rows == columns).to(attributes.get("dtype", x.dtype))


def _one_hot(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """The second value where an index points along the new axis, the first elsewhere."""
    depth, (off, on) = int(number(inputs[1])), inputs[2].unbind()
    at = _positive(inputs[0], depth).unsqueeze(attributes.get("axis", -1))
    axis = attributes.get("axis", -1) % at.dim()
    steps = torch.arange(depth, device=at.device).reshape([-1] + [1] * (at.dim() - 1 - axis))
    return torch.where(at == steps, on, off)


def _pad(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Input with constant values around it; negative widths cut."""
    x: Tensor = inputs[0]
    widths = attributes["pads"] if "pads" in attributes else ints(inputs[1])
    given, axes = operand(inputs, 2), operand(inputs, 3)
    value = attributes.get("value", 0) if given is None else number(given)
    order: Sequence[int] = range(x.dim()) if axes is None else ints(axes)
    pairs = [(0, 0)] * x.dim()
    for i, axis in enumerate(order):
        pairs[axis] = (widths[i], widths[i + len(order)])
    return functional.pad(x, [width for pair in reversed(pairs) for width in pair], value=value)


def _top_k(attributes: Attributes, inputs: Inputs, opset: int) -> Outputs:
    """The largest or smallest values along an axis, in order, and their indices."""
    count = int(number(inputs[1]))
    return tuple(
        inputs[0].topk(count, attributes.get("axis", -1), bool(attributes.get("largest", 1)))
    )


def _non_zero(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    return inputs[0].nonzero().T


def _only(name: str, *values: object) -> Limit:
    """Limit of an attribute to some values, the first of them its default."""

    def limit(attributes: Attributes, given: Sequence[bool]) -> str | None:
        value = attributes.get(name, values[0])
        return None if value in values else f"{name}={value!r} is not translated"

    return limit


def _numbers(attributes: Attributes, given: Sequence[bool]) -> str | None:
    """Limit of a Constant to dense numbers."""
    if any(isinstance(value, Tensor) for value in attributes.values()):
        return None
    return "strings, sparse tensors and other than plain numbers are not translated"


def _known_dtype(attributes: Attributes, given: Sequence[bool]) -> str | None:
    """Limit of a Cast to dtypes that torch has."""
    to = attributes["to"]
    return None if isinstance(to, torch.dtype) else f"data type {to} is not translated"


SHAPE: Mapping[tuple[str, str], Operator] = {
    ("", "Cast"): _cast,
    ("", "CastLike"): _cast_like,
    ("", "Concat"): _concat,
    ("", "Constant"): _constant,
    ("", "ConstantOfShape"): _constant_of_shape,
    ("", "Expand"): _expand,
    ("", "EyeLike"): _eye_like,
    ("", "Flatten"): _flatten,
    ("", "Gather"): _gather,
    ("", "GatherElements"): _gather_elements,
    ("", "GatherND"): _gather_nd,
    ("", "NonZero"): _non_zero,
    ("", "OneHot"): _one_hot,
    ("", "Pad"): _pad,
    ("", "Range"): _range,
    ("", "Reshape"): _reshape,
    ("", "ScatterElements"): _scatter_elements,
    ("", "ScatterND"): _scatter_nd,
    ("", "Shape"): _shape,
    ("", "Size"): _size,
    ("", "Slice"): _slice,
    ("", "Split"): _split,
    ("", "Squeeze"): _squeeze,
    ("", "Tile"): _tile,
    ("", "TopK"): _top_k,
    ("", "Transpose"): _transpose,
    ("", "Trilu"): _trilu,
    ("", "Unsqueeze"): _unsqueeze,
    ("", "Where"): _where,
}

SHAPE_LIMITS: Mapping[tuple[str, str], Limit] = {
    ("", "Cast"): _known_dtype,
    ("", "Constant"): _numbers,
    ("", "Pad"): _only("mode", "constant"),
    ("", "ScatterElements"): _only("reduction", "none", "add"),
    ("", "ScatterND"): _only("reduction", "none", "add"),
}
