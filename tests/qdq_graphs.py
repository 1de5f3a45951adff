"""Small QDQ graphs as an exporter writes them, node by node, with made-up ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 21  # the first whose quantize and dequantize nodes know int16


class QdqGraph:
    """A graph under construction; each method adds nodes and returns the tensor to go on with."""

    def __init__(self, **inputs: tuple[int, ...]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in inputs.items()
        ]

    def constant(self, name: str, value: np.ndarray[Any, Any]) -> str:
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def op(self, kind: str, *inputs: str, name: str, **attributes: Any) -> str:
        node = helper.make_node(kind, list(inputs), [f"{name}_out"], name=name, **attributes)
        self.nodes.append(node)
        return f"{name}_out"

    def quantized(self, tensor: str, bound: float, dtype: Any = np.uint16) -> str:
        """Quantize and dequantize on the symmetric range ±bound."""
        info = np.iinfo(dtype)
        scale = self.constant(f"{tensor}_scale", np.float32(2 * bound / (info.max - info.min)))
        middle = np.asarray((info.max + info.min + 1) // 2, dtype=dtype)
        zero = self.constant(f"{tensor}_zero_point", middle)
        integers = self.op("QuantizeLinear", tensor, scale, zero, name=f"{tensor}_q")
        return self.op("DequantizeLinear", integers, scale, zero, name=f"{tensor}_dq")

    def weight(self, name: str, value: np.ndarray[Any, Any], axis: int) -> str:
        """An int8 constant with a scale for every slice along an axis, and its dequantize node."""
        others = tuple(i for i in range(value.ndim) if i != axis)
        scales = (np.abs(value).max(axis=others) / 127).astype(np.float32)
        shape = [-1 if i == axis else 1 for i in range(value.ndim)]
        integers = np.round(value / scales.reshape(shape)).astype(np.int8)
        return self.op(
            "DequantizeLinear",
            self.constant(f"{name}_q", integers),
            self.constant(f"{name}_scale", scales),
            self.constant(f"{name}_zero_point", np.zeros(scales.shape, np.int8)),
            name=f"{name}_dq",
            axis=axis,
        )

    def model(self, **outputs: str) -> onnx.ModelProto:
        """The model whose outputs are called so and hold these tensors."""
        renamed = {tensor: name for name, tensor in outputs.items()}
        for node in self.nodes:
            for names in (node.input, node.output):
                for index, tensor in enumerate(names):
                    names[index] = renamed.get(tensor, tensor)
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
        graph = helper.make_graph(self.nodes, "g", self.inputs, values, self.initializers)
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=10)
        shapes = onnx.shape_inference.infer_shapes(model).graph.output
        for value, inferred in zip(model.graph.output, shapes, strict=True):
            value.CopyFrom(inferred)
        return model


def two_layers(seed: int = 0) -> onnx.ModelProto:
    """``y = relu(x A) B`` with 8-bit weights and 16-bit activations; ``x [1, 8, 32]``."""
    rng = np.random.default_rng(seed)
    graph = QdqGraph(x=(1, 8, 32))
    first = graph.weight("A", rng.normal(size=(32, 48)).astype(np.float32), axis=1)
    second = graph.weight("B", rng.normal(size=(48, 16)).astype(np.float32), axis=1)
    hidden = graph.op("MatMul", graph.quantized("x", 4.0), first, name="up")
    hidden = graph.op("Relu", graph.quantized(hidden, 30.0), name="relu")
    output = graph.op("MatMul", graph.quantized(hidden, 30.0), second, name="down")
    return graph.model(y=graph.quantized(output, 120.0))


def product(dtype: Any = np.uint16) -> onnx.ModelProto:
    """``y = a b`` of two activations, each of them of this type; ``a [1, 8, 32]``."""
    graph = QdqGraph(a=(1, 8, 32), b=(1, 32, 16))
    operands = [graph.quantized(name, 4.0, dtype) for name in "ab"]
    return graph.model(y=graph.quantized(graph.op("MatMul", *operands, name="mul"), 32.0, dtype))


def with_unsupported(kind: str = "Shrink") -> onnx.ModelProto:
    """A graph with an operator in its middle that HTP does not have."""
    graph = QdqGraph(x=(1, 8))
    hidden = graph.op("Relu", "x", name="before")
    hidden = graph.op(kind, hidden, name="foreign")
    return graph.model(y=graph.op("Relu", hidden, name="after"))


def inputs_of(model: onnx.ModelProto, seed: int = 1) -> Mapping[str, np.ndarray[Any, Any]]:
    """Normal numbers for every input of a graph."""
    rng = np.random.default_rng(seed)
    feed = {}
    for value in model.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        feed[value.name] = rng.normal(size=shape).astype(np.float32)
    return feed
