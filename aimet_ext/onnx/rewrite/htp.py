"""Rewrites into the forms that HTP computes right: layers, RMS norms, second operands of MatMuls.

**Layers** are rewritten before quantizers are placed. Measured on HTP v75 with 16-bit activations
against the quantization simulation (int32 biases change one of the outcomes only):

===============  =========================  ========================  ==========================
weight           MatMul, then Add           Gemm                      Conv 1x1
===============  =========================  ========================  ==========================
LPBQ, 4 bits     84 to 86 dB                rejected; with a float    rejected, with and without
                                            bias accepted, the bias   a bias
                                            is dropped (1 dB)
blocks, 4 bits   68 to 72 dB                68 dB; with a float bias  68 dB; with a float bias
                                            rejected, int32 69 dB     accepted and wrong (-8 dB)
per channel, 4   63 to 68 dB                62 to 65 dB               63 to 68 dB
per channel, 8   84 to 86 dB                84 to 86 dB               84 to 86 dB
===============  =========================  ========================  ==========================

So layers whose weight has blocks become a MatMul, and their bias an Add after it. A convolution
with blocks, but not LPBQ, keeps its form, with its bias as an Add.

**RMS norms** that a QDQ graph spells out have no quantizers between their steps, so HTP computes
them in float16: 12 dB against the simulation where inputs go up to 1000, 65 dB where they are
small. Its own operator gives 75 to 85 dB in either case. onnxruntime calls that operator
``SimplifiedLayerNormalization``.

**Second operands** of MatMuls between activations: with 16 bits HTP takes them as weights,
symmetric and signed. An unsigned one is accepted, and brought down to about 8 bits: 40 dB against
the simulation, where the signed one has 75 to 82 dB. One of 8 bits loses too (50 dB), so keys and
values that are kept in 8 bits are widened first, which is exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper
from onnx.helper import make_node

from aimet_ext.onnx.index import (
    GraphIndex,
    attributes,
    copied,
    drop_unused,
    keep_where,
    replace_nodes,
)
from aimet_ext.onnx.rewrite.compilable import run_nodes
from aimet_ext.onnx.values import set_value

_BLOCKS = ("LPBQ", "PER_BLOCK")
_STEPS = frozenset(
    ("Add", "Cast", "Div", "Identity", "Mul", "Pow", "ReduceMean", "Reciprocal", "Sqrt")
)
_TOLERANCE = 1e-5
_UNSIGNED = (TensorProto.UINT8, TensorProto.UINT16)


def set_apart(model: onnx.ModelProto, kinds: Mapping[str, str]) -> list[str]:
    """Rewrite layers into the forms that HTP computes right, in place; the function is the same.

    Outputs keep their names, weights too, which are stored turned where a MatMul needs that.

    :param kinds: kind of the scales by stored weight: ``"LPBQ"``, ``"PER_BLOCK"``, or
        others, which are left alone.
    :returns: names of the nodes that were rewritten.
    """
    layers = _Layers(model.graph, kinds)
    replace_nodes(model.graph, layers.rewritten)
    if layers.changed:
        drop_unused(model.graph)
    return layers.changed


class _Layers:
    """Layers of a graph, each in another form.

    :param changed: names of the nodes that were rewritten so far.
    """

    def __init__(self, graph: onnx.GraphProto, kinds: Mapping[str, str]) -> None:
        self.graph, self.kinds = graph, kinds
        self.index = GraphIndex(graph)
        self.changed: list[str] = []

    def rewritten(self, node: NodeProto) -> list[NodeProto] | None:
        """Return the nodes that take a node's place, None for the node itself."""
        found = None
        if node.op_type in ("Gemm", "Conv") and self.kinds.get(node.input[1]) in _BLOCKS:
            weight = self.index.constant(node.input[1])
            if weight is not None:
                change = self._gemm if node.op_type == "Gemm" else self._conv
                found = change(node, weight)
        if found is not None:
            self.changed.append(node.name)
        return found

    def _gemm(self, node: NodeProto, weight: TensorProto) -> list[NodeProto] | None:
        given = attributes(node)
        plain = all(given.get(key, 1.0) == 1.0 for key in ("alpha", "beta"))
        if not plain or given.get("transA", 0):
            return None
        if given.get("transB", 0):
            if self.index.readings(node.input[1]) > 1:
                return None
            self._store(weight, numpy_helper.to_array(weight).T)
        return self._matmul(node, node.input[0], node.output[0])

    def _conv(self, node: NodeProto, weight: TensorProto) -> list[NodeProto] | None:
        if self.kinds[node.input[1]] == "LPBQ":
            return self._pointwise(node, weight)
        bias = self.index.constant(node.input[2]) if len(node.input) > 2 else None
        if bias is None:
            return None
        name = f"{node.input[2]}_per_channel"
        values = numpy_helper.to_array(bias).reshape(-1, *[1] * (len(weight.dims) - 2))
        self.graph.initializer.append(numpy_helper.from_array(values.copy(), name))
        alone = copied(node, {})
        del alone.input[2:]
        alone.output[0] = f"{node.output[0]}_without_bias"
        add = make_node("Add", [alone.output[0], name], node.output, f"{node.name}/Add")
        return [alone, add]

    def _pointwise(self, node: NodeProto, weight: TensorProto) -> list[NodeProto] | None:
        """Return a 1x1 convolution as a MatMul with channels last."""
        given = attributes(node)
        spatial = len(weight.dims) - 2
        ones = all(n == 1 for key in ("strides", "dilations") for n in given.get(key, ()))
        if (
            any(n > 1 for n in weight.dims[2:])
            or given.get("group", 1) > 1
            or any(given.get("pads", ()))
            or not ones
            or self.index.readings(node.input[1]) > 1
        ):
            return None
        values = numpy_helper.to_array(weight)
        self._store(weight, values.reshape(values.shape[:2]).T)
        last, first = f"{node.output[0]}_channels_last", f"{node.input[0]}_channels_last"
        to_last = [0, *range(2, spatial + 2), 1]
        to_first = [0, spatial + 1, *range(1, spatial + 1)]
        first = f"{first}_{node.name}"
        before = make_node(
            "Transpose", [node.input[0]], [first], f"{node.name}/Transpose", perm=to_last
        )
        after = make_node(
            "Transpose", [last], node.output, f"{node.name}/Transpose_1", perm=to_first
        )
        return [before, *self._matmul(node, first, last), after]

    def _matmul(self, node: NodeProto, source: str, output: str) -> list[NodeProto]:
        if len(node.input) < 3 or not node.input[2]:
            return [make_node("MatMul", [source, node.input[1]], [output], node.name)]
        product = f"{output}_without_bias"
        return [
            make_node("MatMul", [source, node.input[1]], [product], node.name),
            make_node("Add", [product, node.input[2]], [output], f"{node.name}/Add"),
        ]

    def _store(self, proto: TensorProto, values: np.ndarray[Any, Any]) -> None:
        """Put values of another shape in a stored one's place."""
        set_value(proto, values)
        keep_where(self.graph.value_info, lambda info: info.name != proto.name)


@dataclass(frozen=True)
class _Norm:
    """The steps of one norm.

    :param nodes: nodes in order.
    :param source: dequantized tensor that it normalizes.
    :param gain: its dequantized weight.
    :param output: name of the result, which is quantized next.
    """

    nodes: tuple[NodeProto, ...]
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
    graph = _Norms(model)
    norms = [graph.norm(node) for node in model.graph.node if node.op_type == "ReduceMean"]
    found = [norm for norm in norms if norm is not None]
    last = {norm.nodes[-1].output[0]: norm for norm in found}

    def fused(node: NodeProto) -> list[NodeProto] | None:
        norm = last.get(node.output[0]) if node.output else None
        return None if norm is None else [_fused(norm)]

    replace_nodes(model.graph, fused)
    if found:
        drop_unused(model.graph)
    return [norm.output for norm in found]


def _fused(norm: _Norm) -> NodeProto:
    return make_node(
        "SimplifiedLayerNormalization",
        [norm.source, norm.gain],
        [norm.output],
        name=norm.nodes[-1].name,
        axis=-1,
        epsilon=norm.epsilon,
        stash_type=1,
    )


class _Norms(GraphIndex):
    """Norms of a QDQ graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model.graph)
        self.model = model

    def norm(self, mean: NodeProto) -> _Norm | None:
        """Return the norm that a mean belongs to, if it is one."""
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

    def _output(self, node: NodeProto) -> str | None:
        """Return the first tensor after a node that is quantized."""
        name = node.output[0]
        for _ in range(12):
            readers = self.readers(name)
            if readers and all(reader.op_type == "QuantizeLinear" for reader in readers):
                return name
            if len(readers) != 1 or readers[0].op_type not in _STEPS:
                return None
            name = readers[0].output[0]
        return None

    def _region(self, output: str) -> tuple[list[NodeProto] | None, list[str]]:
        """Return nodes between dequantized tensors and an output, and those tensors."""
        nodes: dict[str, NodeProto] = {}
        sources: list[str] = []
        waiting = [output]
        while waiting:
            name = waiting.pop()
            node = self.node(name)
            if name in self.stored or name in nodes:
                continue
            if node is None or node.op_type == "DequantizeLinear":
                if name not in sources:
                    sources.append(name)
                continue
            if node.op_type not in _STEPS:
                return None, []
            nodes[name] = node
            waiting.extend(node.input)
        return sorted(nodes.values(), key=lambda node: self.producer[node.output[0]]), sources

    def _is_stored(self, name: str) -> bool:
        node = self.node(name)
        return node is not None and all(each in self.stored for each in node.input)

    def _scalars(self, nodes: list[NodeProto]) -> list[float]:
        """Return small numbers that the steps add."""
        names = {name for node in nodes if node.op_type == "Add" for name in node.input}
        values = [
            numpy_helper.to_array(self.stored[name])
            for name in sorted(names)
            if name in self.stored
        ]
        return [float(value.reshape(())) for value in values if value.size == 1]

    def _agrees(self, norm: _Norm) -> bool:
        """Return True if the steps compute what the operator does, for small numbers too."""
        made = self.node(norm.gain)
        stored = None if made is None else self.stored.get(made.input[0])
        if stored is None or len(stored.dims) != 1:
            return False
        draw = np.random.default_rng(0)
        size = np.float32(norm.epsilon**0.5)
        source = draw.standard_normal((1, 4, stored.dims[0]), dtype=np.float32) * size
        gain = draw.standard_normal(stored.dims[0], dtype=np.float32)
        mean = np.square(source.astype(np.float64)).mean(-1, keepdims=True)
        expected = source / np.sqrt(mean + norm.epsilon) * gain
        feed = {norm.source: source, norm.gain: gain}
        output = run_nodes(self.model, norm.nodes, self.stored, [norm.output], feed)[norm.output]
        if output.shape != expected.shape:
            return False
        return bool(np.abs(output - expected).max() <= _TOLERANCE * np.abs(expected).max())


def sign_second_operands(model: onnx.ModelProto) -> list[str]:
    """Have MatMuls between activations read signed, symmetric 16-bit integers, in place.

    A tensor that lies on another grid is put on such a one just before. That changes no value where
    its own grid is symmetric or has 8 bits, and else adds a rounding to 16 bits. Where the first
    operand has 8 bits the second one stays as it is: HTP takes 8 by 8 bits, and not 8 by 16.

    :param model: QDQ graph.
    :returns: the tensors that get a second grid.
    """
    index = GraphIndex(model.graph)
    signed: dict[str, str] = {}

    def sign(node: NodeProto) -> list[NodeProto] | None:
        name = node.input[1] if node.op_type == "MatMul" else ""
        grid, first = _grid(index, name), _grid(index, node.input[0]) if name else None
        if grid is None or (first is not None and first[2] == 8):
            return None
        pair = []
        if name not in signed:
            signed[name] = f"{name}_signed"
            pair = _pair(model.graph, name, signed[name], _scale(*grid))
        node.input[1] = signed[name]
        return [*pair, node]

    replace_nodes(model.graph, sign)
    return list(signed)


def _grid(index: GraphIndex, name: str) -> tuple[float, int, int] | None:
    """Scale, zero point and width of a dequantized activation; None for anything else."""
    node = index.node(name)
    if node is None or node.op_type != "DequantizeLinear" or len(node.input) < 3:
        return None
    scale, zero = index.constant(node.input[1]), index.constant(node.input[2])
    if index.is_stored(node.input[0]) or scale is None or zero is None:
        return None
    if zero.data_type not in _UNSIGNED:
        return None
    values, point = numpy_helper.to_array(scale), numpy_helper.to_array(zero)
    if values.size != 1:
        return None
    return float(values.reshape(())), int(point.reshape(())), 8 * point.dtype.itemsize


def _scale(scale: float, zero: int, bits: int) -> float:
    """Return the scale of a signed 16-bit grid with room for all values of another one.

    It uses all 16 bits, since HTP does not compute with the last of them: integers of 8 bits are
    multiples of 128 there.
    """
    lowest, highest = -zero, (1 << bits) - 1 - zero
    steps = max(-(lowest + 1), highest)  # the lowest integer of a symmetric grid has no opposite
    if steps > 32767:
        return scale * steps / 32767
    return scale / 2 ** math.floor(math.log2(32767 / steps))


def _pair(graph: onnx.GraphProto, source: str, output: str, scale: float) -> list[NodeProto]:
    """Return a quantizer to signed 16 bits, its scale and zero point stored in the graph."""
    grid = {f"{output}_scale": np.float32(scale), f"{output}_zero_point": np.int16(0)}
    graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in grid.items())
    steps = (("QuantizeLinear", source, f"{output}_q"), ("DequantizeLinear", f"{output}_q", output))
    return [make_node(op, [x, *grid], [y], name=f"{output}_{op}") for op, x, y in steps]
