"""Differentiable torch versions of ONNX operators: shapes, slices, gathers and constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from aimet_ext.onnx.ops.operator import (
    Attributes,
    Inputs,
    Limit,
    Operator,
    Outputs,
    ints,
    number,
    only,
    operand,
)


def _axes(attributes: Attributes, inputs: Inputs) -> list[int] | None:
    """Return axes, an attribute before opset 13 and the second input since."""
    given = operand(inputs, 1)
    axes: list[int] | None = attributes.get("axes") if given is None else ints(given)
    return axes


def _reshape(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Reshape the input; 0 copies a size unless ``allowzero``, -1 stands for the rest."""
    x: Tensor = inputs[0]
    shape = ints(inputs[1])
    if not attributes.get("allowzero"):
        shape = [x.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return x.reshape(shape)


def _flatten(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Return the input as a matrix, the axes before ``axis`` in its rows."""
    x: Tensor = inputs[0]
    axis = attributes.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(int(torch.Size(x.shape[:axis]).numel()), -1)


def _unsqueeze(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Return the input with axes of size 1 put in where the result shall have them."""
    x: Tensor = inputs[0]
    axes = _axes(attributes, inputs) or []
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _slice(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Return a part of the input; a negative step goes backwards."""
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
    """Split the input along an axis into given sizes, or even ones, the last one smaller."""
    x: Tensor = inputs[0]
    axis = attributes.get("axis", 0)
    given = operand(inputs, 1)
    sizes = attributes.get("split") if given is None else ints(given)
    if sizes is None:
        count = attributes.get("num_outputs", attributes["n_outputs"])
        width = -(-x.shape[axis] // count)
        sizes = [max(0, min(width, x.shape[axis] - i * width)) for i in range(count)]
    return tuple(x.split(sizes, axis))


def _positive(indices: Tensor, size: int) -> Tensor:
    """Return indices counted from the front, as int64."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


def _gather(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Return slices of the data along an axis; the indices' own shape takes that axis' place."""
    data: Tensor = inputs[0]
    indices: Tensor = inputs[1]
    axis = attributes.get("axis", 0) % data.dim()
    found = data.index_select(axis, _positive(indices.reshape(-1), data.shape[axis]))
    return found.reshape(data.shape[:axis] + indices.shape + data.shape[axis + 1 :])


def _gather_nd(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Return slices of the data at index tuples, which stand in the indices' last axis."""
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
    """Return the input's shape, or a slice of it, on the host."""
    shape = list(inputs[0].shape)[attributes.get("start", 0) : attributes.get("end")]
    return torch.tensor(shape, dtype=torch.int64)


def _trilu(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Return the upper or lower triangle of the last two axes, zero elsewhere."""
    diagonal = operand(inputs, 1)
    function = torch.triu if attributes.get("upper", 1) else torch.tril
    return function(inputs[0], 0 if diagonal is None else int(number(diagonal)))


def _eye_like(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    x: Tensor = inputs[0]
    rows = torch.arange(x.shape[0], device=x.device)[:, None] + attributes.get("k", 0)
    columns = torch.arange(x.shape[1], device=x.device)[None]
    return (rows == columns).to(attributes.get("dtype", x.dtype))


def _one_hot(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Return the second value where an index points along the new axis, the first elsewhere."""
    depth, (off, on) = int(number(inputs[1])), inputs[2].unbind()
    at = _positive(inputs[0], depth).unsqueeze(attributes.get("axis", -1))
    axis = attributes.get("axis", -1) % at.dim()
    steps = torch.arange(depth, device=at.device).reshape([-1] + [1] * (at.dim() - 1 - axis))
    return torch.where(at == steps, on, off)


def _pad(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Return the input with constant values around it; negative widths cut."""
    x: Tensor = inputs[0]
    widths = attributes["pads"] if "pads" in attributes else ints(inputs[1])
    given, axes = operand(inputs, 2), operand(inputs, 3)
    value = attributes.get("value", 0) if given is None else number(given)
    order: Sequence[int] = range(x.dim()) if axes is None else ints(axes)
    pairs = [(0, 0)] * x.dim()
    for i, axis in enumerate(order):
        pairs[axis] = (widths[i], widths[i + len(order)])
    return functional.pad(x, [width for pair in reversed(pairs) for width in pair], value=value)


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
    ("", "Cast"): lambda a, x, opset: x[0].to(a["to"]),
    ("", "CastLike"): lambda a, x, opset: x[0].to(x[1].dtype),
    ("", "Concat"): lambda a, x, opset: torch.cat(list(x), a["axis"]),
    ("", "Constant"): lambda a, x, opset: next(v for v in a.values() if isinstance(v, Tensor)),
    ("", "ConstantOfShape"): lambda a, x, opset: (
        a.get("value", torch.zeros(1)).reshape(()).expand(ints(x[0]))
    ),
    # The shape may also hold ones where the input is wider.
    ("", "Expand"): lambda a, x, opset: x[0].expand(torch.broadcast_shapes(x[0].shape, ints(x[1]))),
    ("", "EyeLike"): _eye_like,
    ("", "Flatten"): _flatten,
    ("", "Gather"): _gather,
    ("", "GatherElements"): lambda a, x, opset: x[0].gather(
        a.get("axis", 0), _positive(x[1], x[0].shape[a.get("axis", 0)])
    ),
    ("", "GatherND"): _gather_nd,
    ("", "NonZero"): lambda a, x, opset: x[0].nonzero().T,
    ("", "OneHot"): _one_hot,
    ("", "Pad"): _pad,
    ("", "Range"): lambda a, x, opset: torch.arange(*map(number, x), dtype=x[0].dtype),
    ("", "Reshape"): _reshape,
    ("", "ScatterElements"): _scatter_elements,
    ("", "ScatterND"): _scatter_nd,
    ("", "Shape"): _shape,
    ("", "Size"): lambda a, x, opset: torch.tensor(x[0].numel()),
    ("", "Slice"): _slice,
    ("", "Split"): _split,
    ("", "Squeeze"): lambda a, x, opset: (
        x[0].squeeze() if (axes := _axes(a, x)) is None else x[0].squeeze(tuple(axes))
    ),
    ("", "Tile"): lambda a, x, opset: x[0].repeat(ints(x[1])),
    ("", "TopK"): lambda a, x, opset: tuple(
        x[0].topk(int(number(x[1])), a.get("axis", -1), bool(a.get("largest", 1)))
    ),
    ("", "Transpose"): lambda a, x, opset: x[0].permute(a.get("perm", [*range(x[0].dim())][::-1])),
    ("", "Trilu"): _trilu,
    ("", "Unsqueeze"): _unsqueeze,
    ("", "Where"): lambda a, x, opset: torch.where(x[0], x[1], x[2]),
}

SHAPE_LIMITS: Mapping[tuple[str, str], Limit] = {
    ("", "Cast"): _known_dtype,
    ("", "Constant"): _numbers,
    ("", "Pad"): only("mode", "constant"),
    ("", "ScatterElements"): only("reduction", "none", "add"),
    ("", "ScatterND"): only("reduction", "none", "add"),
}
