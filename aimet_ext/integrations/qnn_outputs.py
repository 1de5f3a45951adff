"""Intermediate tensors of a QDQ graph as outputs, so that HTP shows them layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aimet_ext.errors import require

if TYPE_CHECKING:
    import onnx as onnx_types

__all__ = ["output_names", "with_outputs"]

_SUFFIX = "_shown"


def output_names(tensors: Sequence[str]) -> list[str]:
    """Names that :func:`with_outputs` gives to the outputs for these tensors."""
    return [f"{name}{_SUFFIX}" for name in tensors]


def with_outputs(
    model: str | Path | onnx_types.ModelProto, tensors: Sequence[str]
) -> onnx_types.ModelProto:
    """A copy of a QDQ graph that returns more of its tensors, quantized as its own nodes read them.

    A quantized tensor gets a dequantize node of its own behind the quantize node that is there:
    the groups of dequantize, operator and quantize that HTP takes as one stay as they were, and so
    do the numbers of the other outputs. A tensor that no node quantizes comes out as it is, which
    HTP may refuse.

    :param model: file of the model, whose external data is not read, or the model itself, which is
        left as it is.
    :param tensors: names of tensors: of the operator's output or of the dequantized one.
    :returns: the model; its new outputs follow its own ones, in the order of ``tensors``, and are
        called as :func:`output_names` says.
    :raises ValueError: a tensor is not there or is given twice.
    """
    onnx = require("onnx", "onnx")
    copy: onnx_types.ModelProto
    if isinstance(model, (str, Path)):
        copy = onnx.load(str(model), load_external_data=False)
    else:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
    graph = copy.graph
    producers = {name: node for node in graph.node for name in node.output}
    quantize = {
        node.input[0]: node for node in reversed(graph.node) if node.op_type == "QuantizeLinear"
    }
    known = {*producers, *(value.name for value in graph.input)}
    missing = [name for name in tensors if name not in known]
    if missing:
        raise ValueError(
            f"with_outputs: names of the graph's tensors were required, it has no {missing[:5]}"
        )
    if len(set(tensors)) != len(tensors):
        raise ValueError("with_outputs: a tensor is given twice; name each once")
    types = _types(copy, tensors)
    for name, shown in zip(tensors, output_names(tensors), strict=True):
        source = _quantized(name, producers, quantize)
        if source is None:
            node = onnx.helper.make_node("Identity", [name], [shown], name=shown)
        else:
            integers = source.input[0] if name in source.output else source.output[0]
            node = onnx.helper.make_node(
                "DequantizeLinear", [integers, *source.input[1:]], [shown], name=shown
            )
            kept = [a for a in source.attribute if a.name in ("axis", "block_size")]
            node.attribute.extend(kept)
        graph.node.append(node)
        value = graph.output.add(name=shown)
        if name in types:
            value.type.CopyFrom(types[name])
        else:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return copy


def _quantized(name: str, producers: dict[str, Any], quantize: dict[str, Any]) -> Any | None:
    """The node that has a tensor's integers, scale and zero point: its source, or a reader."""
    source = producers.get(name)
    if source is not None and source.op_type == "DequantizeLinear":
        return source
    return quantize.get(name)


def _types(model: Any, tensors: Sequence[str]) -> dict[str, Any]:
    """Types and shapes of tensors, those that the graph lists or that follow from what it lists."""
    from aimet_ext.onnx.skeleton import infer_shapes

    found = _listed(model)
    if not all(name in found for name in tensors):
        found = _listed(infer_shapes(model))
    return found


def _listed(model: Any) -> dict[str, Any]:
    graph = model.graph
    return {value.name: value.type for value in [*graph.input, *graph.value_info, *graph.output]}
