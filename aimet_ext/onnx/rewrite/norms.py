"""RMS norms that a QDQ graph spells out, as the one operator that an NPU has for them.

Between the steps of a norm there are no quantizers, so HTP computes it in float16: 12 dB against
the simulation where inputs go up to 1000, 65 dB where they are small. Its own operator gives 75 to
85 dB in either case. onnxruntime calls that operator ``SimplifiedLayerNormalization``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from aimet_ext.onnx.rewrite.fold import drop_unused

__all__ = ["fuse_rms_norms"]

_STEPS = frozenset(
    ("Add", "Cast", "Div", "Identity", "Mul", "Pow", "ReduceMean", "Reciprocal", "Sqrt")
)
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class _Norm:
    """The steps of one norm.

    :param nodes: in order.
    :param source: dequantized tensor that it normalizes.
    :param gain: its dequantized weight.
    :param output: name of the result, which is quantized next.
    """

    nodes: tuple[onnx.NodeProto, ...]
    source: str
    gain: str
    output: str
    epsilon: float


def fuse_rms_norms(model: onnx.ModelProto) -> list[str]:
    """Replace the steps of each RMS norm by one node, in place.

    What the steps compute is compared with the operator on random numbers; norms of another kind
    stay as they are.

    :param model: with QuantizeLinear and DequantizeLinear around each norm.
    :returns: names of the normalized tensors.
    """
    graph = _Graph(model)
    norms = [graph.norm(node) for node in model.graph.node if node.op_type == "ReduceMean"]
    found = [norm for norm in norms if norm is not None]
    last = {norm.nodes[-1].output[0]: norm for norm in found}
    nodes = []
    for node in model.graph.node:
        norm = last.get(node.output[0]) if node.output else None
        copy = onnx.NodeProto()
        copy.CopyFrom(node if norm is None else _fused(norm))
        nodes.append(copy)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    if found:
        drop_unused(model.graph)
    return [norm.output for norm in found]


def _fused(norm: _Norm) -> onnx.NodeProto:
    return onnx.helper.make_node(
        "SimplifiedLayerNormalization",
        [norm.source, norm.gain],
        [norm.output],
        name=norm.nodes[-1].name,
        axis=-1,
        epsilon=norm.epsilon,
        stash_type=1,
    )


class _Graph:
    """Who makes and who reads the tensors of a model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.constants = {proto.name: proto for proto in model.graph.initializer}
        self.producer: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        self.order: dict[str, int] = {}
        for index, node in enumerate(model.graph.node):
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
                continue
            for name in node.output:
                self.producer[name] = node
                self.order[name] = index
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def norm(self, mean: onnx.NodeProto) -> _Norm | None:
        """The norm that a mean belongs to, if it is one."""
        output = self._output(mean)
        if output is None:
            return None
        nodes, sources = self._region(output)
        varying = [name for name in sources if not self._is_stored(name)]
        gains = [name for name in sources if self._is_stored(name)]
        if nodes is None or len(varying) != 1 or len(gains) != 1:
            return None
        for epsilon in self._scalars(nodes):
            norm = _Norm(tuple(nodes), varying[0], gains[0], output, epsilon)
            if self._agrees(norm):
                return norm
        return None

    def _output(self, node: onnx.NodeProto) -> str | None:
        """The first tensor after a node that is quantized."""
        name = node.output[0]
        for _ in range(12):
            readers = self.readers.get(name, [])
            if readers and all(reader.op_type == "QuantizeLinear" for reader in readers):
                return name
            if len(readers) != 1 or readers[0].op_type not in _STEPS:
                return None
            name = readers[0].output[0]
        return None

    def _region(self, output: str) -> tuple[list[onnx.NodeProto] | None, list[str]]:
        """Nodes between dequantized tensors and an output, and those tensors."""
        nodes: dict[str, onnx.NodeProto] = {}
        sources: list[str] = []
        waiting = [output]
        while waiting:
            name = waiting.pop()
            node = self.producer.get(name)
            if name in self.constants or name in nodes:
                continue
            if node is None or node.op_type == "DequantizeLinear":
                if name not in sources:
                    sources.append(name)
                continue
            if node.op_type not in _STEPS:
                return None, []
            nodes[name] = node
            waiting.extend(node.input)
        return sorted(nodes.values(), key=lambda node: self.order[node.output[0]]), sources

    def _is_stored(self, name: str) -> bool:
        node = self.producer.get(name)
        return node is not None and all(each in self.constants for each in node.input)

    def _scalars(self, nodes: list[onnx.NodeProto]) -> list[float]:
        """Small numbers that the steps add."""
        names = {name for node in nodes if node.op_type == "Add" for name in node.input}
        values = [
            onnx.numpy_helper.to_array(self.constants[name])
            for name in sorted(names)
            if name in self.constants
        ]
        return [float(value.reshape(())) for value in values if value.size == 1]

    def _agrees(self, norm: _Norm) -> bool:
        """Whether the steps compute what the operator does, on numbers as small as epsilon too."""
        width = self._width(norm.gain)
        if width is None:
            return False
        draw = np.random.default_rng(0)
        size = np.float32(norm.epsilon**0.5)
        source = draw.standard_normal((1, 4, width), dtype=np.float32) * size
        gain = draw.standard_normal(width, dtype=np.float32)
        mean = np.square(source.astype(np.float64)).mean(-1, keepdims=True)
        expected = source / np.sqrt(mean + norm.epsilon) * gain
        output = self._run(norm, {norm.source: source, norm.gain: gain})
        if output is None or output.shape != expected.shape:
            return False
        return bool(np.abs(output - expected).max() <= _TOLERANCE * np.abs(expected).max())

    def _width(self, gain: str) -> int | None:
        proto = self.constants.get(self.producer[gain].input[0])
        return int(proto.dims[0]) if proto is not None and len(proto.dims) == 1 else None

    def _run(
        self, norm: _Norm, values: Mapping[str, np.ndarray[Any, Any]]
    ) -> np.ndarray[Any, Any] | None:
        import onnxruntime

        names = {name for node in norm.nodes for name in node.input}
        stored = []
        for name in sorted(names & set(self.constants)):
            proto = onnx.TensorProto()
            proto.CopyFrom(self.constants[name])
            proto.name = name
            stored.append(proto)
        inputs = [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in values
        ]
        outputs = [onnx.ValueInfoProto(name=norm.output)]
        part = onnx.helper.make_model(
            onnx.helper.make_graph(norm.nodes, "norm", inputs, outputs, initializer=stored),
            opset_imports=self.model.opset_import,
            ir_version=self.model.ir_version,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(
            part.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        output: np.ndarray[Any, Any] = session.run(None, dict(values))[0]
        return output
