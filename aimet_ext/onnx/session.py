"""Parts of an ONNX graph that run in onnxruntime, some weights replaced."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.layers import OnnxLayer
from aimet_ext.onnx.nodes import attribute, reads
from aimet_ext.onnx.types import to_torch, torch_array

__all__ = ["Part"]

_LARGE = 1024  # bytes; larger stored values are given to the session as they are
_WEIGHT_INPUT = {"MatMul": 1, "Gemm": 1, "Conv": 1, "Gather": 0}


class Part:
    """A session over a part of a graph. Large stored values lie in memory once, while it lives.

    :param graph: what the part belongs to.
    :param nodes: indices, in order.
    :param inputs: tensors that are fed.
    :param outputs: tensors that come out.
    :param layers: layers whose weights are replaced, at least.
    :param weights: weights ``[out, in, …]`` in place of those that are stored, by layer.
    :param providers: of onnxruntime, the CPU's if None.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        nodes: Sequence[int],
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        layers: Mapping[str, OnnxLayer],
        weights: Mapping[str, Tensor],
        providers: Sequence[Any] | None = None,
    ) -> None:
        read = {name for index in nodes for name in reads(graph.nodes[index])}
        stored = ((name, graph.initializers.get(name)) for name in read)
        large = {name for name, tensor in stored if tensor is not None and _is_large(tensor)}
        model = graph.model(nodes, inputs, outputs, drop=large)
        fresh = _replace(model, sorted(nodes), layers, weights)
        _prune(model, inputs, outputs)
        self._outputs = list(outputs)
        options = _options()
        # They must live as long as the session does.
        self._values: dict[str, Any] = {}
        for tensor in model.graph.initializer:
            if tensor.data_location != TensorProto.EXTERNAL:
                continue
            array = fresh[tensor.name] if tensor.name in fresh else graph.array(tensor.name)
            self._values[tensor.name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        if self._values:
            options.add_external_initializers([*self._values], [*self._values.values()])
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"] if providers is None else list(providers),
        )
        self._inputs = [value.name for value in self._session.get_inputs()]

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs for these inputs, which may be more than are read."""
        feeds = {name: torch_array(values[name].contiguous()) for name in self._inputs}
        found = self._session.run(self._outputs, feeds)
        return dict(zip(self._outputs, map(to_torch, found), strict=True))


def _options() -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    # Weights in another layout beside the given ones would take their size once more.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _is_large(tensor: TensorProto) -> bool:
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return _can_be_given(dtype) and math.prod(tensor.dims) * dtype.itemsize >= _LARGE


def _can_be_given(dtype: np.dtype[Any]) -> bool:
    """Whether numpy itself has the type; bfloat16 and 4 bits come from elsewhere."""
    return dtype.kind in "fiub" and dtype.isbuiltin == 1


def _replace(
    model: onnx.ModelProto,
    indices: Sequence[int],
    layers: Mapping[str, OnnxLayer],
    weights: Mapping[str, Tensor],
) -> dict[str, np.ndarray[Any, Any]]:
    """Have nodes of a part read other weights, which are declared as external data.

    :param indices: of the part's nodes in the graph.
    :returns: the arrays by the names that these weights got.
    """
    places = dict(zip(indices, model.graph.node, strict=True))
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for number, (name, weight) in enumerate(weights.items()):
        for use in layers[name].uses:
            node = places.get(use.node)
            if node is None:
                continue
            turned = _is_turned(node)
            own = f"replaced_weight_{number}{'_turned' if turned else ''}"
            node.input[_WEIGHT_INPUT[node.op_type]] = own
            if own not in arrays:
                arrays[own] = torch_array((weight.T if turned else weight).contiguous().cpu())
                model.graph.initializer.append(_declared(own, arrays[own]))
    return arrays


def _is_turned(node: NodeProto) -> bool:
    """Whether a node reads its weight as ``[in, out]``."""
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB", 0))


def _declared(name: str, array: np.ndarray[Any, Any]) -> TensorProto:
    """An initializer whose value the session is given, or one that holds it where it cannot be."""
    if not _can_be_given(array.dtype):
        return numpy_helper.from_array(array, name)
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = TensorProto(name=name, data_type=kind, dims=array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "given"), ("offset", "0"), ("length", str(array.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _prune(model: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Drop nodes and initializers that nothing depends on any more, and inputs likewise."""
    wanted = set(outputs)
    kept = []
    for node in reversed(model.graph.node):
        if not wanted.isdisjoint(node.output):
            kept.append(node)
            wanted.update(reads(node))
    if len(kept) < len(model.graph.node):
        del model.graph.node[:]
        model.graph.node.extend(reversed(kept))
    for field in (model.graph.initializer, model.graph.input):
        values = [value for value in field if value.name in wanted]
        if len(values) < len(field):
            del field[:]
            field.extend(values)
