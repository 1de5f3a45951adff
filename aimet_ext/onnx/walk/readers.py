"""What reads a layer's output in an ONNX graph: an activation, a batch norm."""

from __future__ import annotations

from onnx import NodeProto
from torch.nn import functional

from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.layers import OnnxLayer
from aimet_ext.onnx.nodes import attribute
from aimet_ext.walk.protocol import Activation

__all__ = ["activation_after", "check_no_batch_norm"]


def activation_after(graph: OnnxGraph, layer: OnnxLayer) -> Activation | None:
    """The ReLU that alone reads a layer's output, at each of its uses; None without one."""
    found = {_relu(graph, _sole_reader(graph, use.output)) for use in layer.uses}
    return found.pop() if len(found) == 1 else None


def check_no_batch_norm(graph: OnnxGraph, layer: OnnxLayer) -> None:
    """Refuse a layer whose output goes through a batch norm first.

    :raises ValueError: it does.
    """
    for use in layer.uses:
        reader = _sole_reader(graph, use.output)
        if reader is not None and reader.op_type == "BatchNormalization":
            raise ValueError(
                f"the batch norm {reader.name!r} after layer {layer.name!r} must be folded into "
                "it before the simulation is built; call "
                "aimet_onnx.batch_norm_fold.fold_all_batch_norms_to_weight(model)"
            )


def _sole_reader(graph: OnnxGraph, tensor: str) -> NodeProto | None:
    """The one node that reads a tensor's values; its shape may be read by others."""
    if tensor in graph.outputs:
        return None
    nodes = [graph.nodes[index] for index in graph.consumers.get(tensor, ())]
    readers = [node for node in nodes if node.op_type != "Shape"]
    return readers[0] if len(readers) == 1 else None


def _relu(graph: OnnxGraph, node: NodeProto | None) -> Activation | None:
    if node is None:
        return None
    if node.op_type == "Relu":
        return functional.relu
    if node.op_type != "Clip":
        return None
    low, high = _bound(graph, node, 1), _bound(graph, node, 2)
    if low != 0:
        return None
    return {6.0: functional.relu6, None: functional.relu}.get(high)


def _bound(graph: OnnxGraph, node: NodeProto, place: int) -> float | None:
    """Lower (1) or upper (2) bound of a Clip: an attribute up to opset 10, an input from 11 on.

    NaN where it is computed.
    """
    name = node.input[place] if len(node.input) > place else ""
    if not name:
        value = attribute(node, ("min", "max")[place - 1], None)
        return None if value is None else float(value)
    if graph.constant(name) is None:
        return float("nan")
    return float(graph.array(name).reshape(-1)[0])
