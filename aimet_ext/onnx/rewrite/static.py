"""An ONNX graph whose shapes are free, for one shape of its inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx

from aimet_ext.onnx.rewrite.fold import fold_constants
from aimet_ext.onnx.skeleton import infer_shapes

__all__ = ["make_static"]


def make_static(
    model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]], keep: Collection[str] = ()
) -> onnx.ModelProto:
    """A copy of a model for inputs of these shapes; what depends on nothing else is stored.

    An NPU's compiler takes static shapes only.

    :param model: left as it is; external data has to be loaded.
    :param shapes: of all inputs.
    :param keep: see :func:`aimet_ext.onnx.rewrite.fold.fold_constants`.
    """
    static = onnx.ModelProto()
    static.CopyFrom(model)
    if _fix(static.graph, shapes):
        del static.graph.value_info[:]
        for output in static.graph.output:
            output.type.tensor_type.ClearField("shape")
    folded = fold_constants(static, keep)
    while any(node.op_type == "Shape" for node in folded.graph.node):
        inferred = infer_shapes(folded, data_prop=True)
        if not _store_shapes(folded.graph, inferred.graph):
            break
        folded = fold_constants(folded, keep)
    if any(not output.type.tensor_type.HasField("shape") for output in folded.graph.output):
        _name_outputs(folded)
    return folded


def _fix(graph: onnx.GraphProto, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Set the shapes of inputs; whether any was free."""
    free = False
    for value in graph.input:
        if value.name not in shapes:
            continue
        dims = value.type.tensor_type.shape.dim
        free = free or any(dim.dim_value < 1 for dim in dims)
        for dim, size in zip(dims, shapes[value.name], strict=True):
            dim.dim_value = size
    return free


def _store_shapes(graph: onnx.GraphProto, inferred: onnx.GraphProto) -> int:
    """Put stored values in the place of Shape nodes whose input has a known shape."""
    known: dict[str, list[int]] = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(dim.dim_value > 0 for dim in kind.shape.dim):
            known[value.name] = [dim.dim_value for dim in kind.shape.dim]
    kept, stored = [], 0
    for node in graph.node:
        if node.op_type == "Shape" and node.input[0] in known:
            given = {each.name: each.i for each in node.attribute}
            sizes = known[node.input[0]][given.get("start", 0) : given.get("end")]
            value = np.array(sizes, dtype=np.int64)
            graph.initializer.append(onnx.numpy_helper.from_array(value, node.output[0]))
            stored += 1
            continue
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        kept.append(copy)
    del graph.node[:]
    graph.node.extend(kept)
    return stored


def _name_outputs(model: onnx.ModelProto) -> None:
    """Give outputs the shapes that follow from the inputs'."""
    inferred = infer_shapes(model, data_prop=True)
    for output, found in zip(model.graph.output, inferred.graph.output, strict=True):
        output.CopyFrom(found)
