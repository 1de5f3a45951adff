"""Facts of an ONNX simulation that a lint judges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aimet_ext.onnx.index import MOVES
from aimet_ext.onnx.layers import OnnxLayer
from aimet_ext.sim.facts import FIXED_RANGES, Activation, LintLayer, NormFacts, SimFacts
from aimet_ext.sim.onnx.quantizers import is_integer, weight_quantizer_of
from aimet_ext.sim.protocol import WeightQuantizer

# Operators whose output holds values of their first input, so that its quantizer counts.
_MOVES = MOVES | {"DepthToSpace", "Gather", "MaxPool", "SpaceToDepth"}
# Operators that AIMET takes together with the layer before them, which then has no quantizer.
_FUSED = {"BatchNormalization", "Clip", "HardSwish", "LeakyRelu", "PRelu", "Relu"}
# RMS norms as one operator, and steps between the mean of squares and the root.
_RMS_NORMS = {"RMSNormalization", "SimplifiedLayerNormalization"}
_ROOT_STEPS = {"Add", "Div", "Pow", "Reciprocal", "Sqrt"}
_ADDING = {"Add", "Max", "Min", "Sub", "Where"}
# How the output for the next call is named after the input.
_CACHES = (("past_key_values", "present"), ("past", "present"), ("past", "new"))


def read_facts(adaptor: Any) -> SimFacts:
    """Return the facts of an ONNX simulation.

    :param adaptor: Adaptor of ``aimet_onnx.QuantizationSimModel``.
    """
    return _Reader(adaptor).facts()


class _Reader:
    def __init__(self, adaptor: Any) -> None:
        self.adaptor, self.graph = adaptor, adaptor.graph
        self.fused = {node for nodes in self.graph.fused.values() for node in nodes}
        self.activations: dict[str, Activation] = {
            name: _activation(name, quantizer)
            for name, quantizer in adaptor.activation_quantizers().items()
        }

    def facts(self) -> SimFacts:
        """Return all facts; the graph is gone over once for each."""
        shared = self.adaptor.layers.shared_weights()
        return SimFacts(
            layers=tuple(
                self._layer(name, layer, name in shared)
                for name, layer in self.adaptor.layers.items()
                if layer.output_padding is None
            ),
            activations=tuple(self.activations.values()),
            norms=tuple(self._norms()),
            unset=tuple(
                name for name in self.adaptor.sim.param_names if self._is_unset_parameter(name)
            ),
            fixed=tuple(self._fixed()),
            masked=tuple(self._masked().values()),
            angles=tuple(self._angles().values()),
            operands=tuple(self._operands().values()),
            tied=tuple(self._tied()),
        )

    def source(self, tensor: str) -> Activation | None:
        """Return the quantizer that a tensor's values went through last, None if they are float."""
        while tensor not in self.activations:
            node = self.graph.node(tensor)
            if node is None or node.op_type not in _MOVES:
                return None
            tensor = node.input[0]
        return self.activations[tensor]

    def target(self, tensor: str) -> Activation | None:
        """Return the next quantizer of a tensor's values, beyond what AIMET fuses."""
        while tensor not in self.activations:
            readers = self.graph.readers(tensor)
            if len(readers) != 1 or readers[0].op_type not in _FUSED | _MOVES:
                return None
            tensor = readers[0].output[0]
        return self.activations[tensor]

    def _layer(self, name: str, layer: OnnxLayer, shared: bool) -> LintLayer:
        shape = self.graph.shape(layer.weight)
        use = layer.uses[0]
        common: dict[str, Any] = {
            "name": name,
            "kind": layer.kind,
            "width": shape[0] if layer.transposed else shape[1],
            "tied": shared,
        }
        if layer.kind == "embedding":
            return LintLayer(**common, weight=self._table(layer))
        sides = {"input": self.source(use.input), "output": self._made(layer)}
        return LintLayer(
            **common,
            kernel=layer.kernel,
            weight=self.adaptor.weight_quantizer(name),
            fused=self._fused(layer),
            bias=getattr(self.adaptor.model.get_submodule(name), "bias", None),
            reads=sides["input"],
            makes=sides["output"],
            floats=tuple(side for side, found in sides.items() if found is None),
        )

    def _table(self, layer: OnnxLayer) -> WeightQuantizer | None:
        """Return the quantizer of a lookup table, which AIMET counts among the activations."""
        quantizer = self.adaptor.sim.qc_quantize_op_dict.get(layer.weight)
        if not is_integer(quantizer):
            return None
        return weight_quantizer_of(self.graph, layer, quantizer, self.adaptor.touch)

    def _made(self, layer: OnnxLayer) -> Activation | None:
        """Return the quantizer of a layer's result, before the Add of its bias if that has one."""
        use = layer.uses[0]
        own = self.graph.nodes[use.node].output[0]
        return self.activations.get(own) or self.target(use.output)

    def _fused(self, layer: OnnxLayer) -> str | None:
        """Return the operator in which the graph adds a float bias; also a Gemm without one."""
        if layer.kind == "conv":
            return "Conv" if layer.bias is not None and not self._is_int32(layer.bias) else None
        for use in layer.uses:
            node = self.graph.nodes[use.node]
            if node.op_type == "Gemm":
                return "Gemm"
            if use.add is not None and {node.name, self.graph.nodes[use.add].name} <= self.fused:
                return "MatMul+Add"
        return None

    def _is_int32(self, bias: str) -> bool:
        quantizer = self.adaptor.sim.qc_quantize_op_dict.get(bias)
        return is_integer(quantizer) and int(quantizer.bitwidth) == 32

    def _operands(self) -> dict[str, Activation]:
        """Return the quantizers of the second factors of products of two activations."""
        found = {}
        weights = {use.node for layer in self.adaptor.layers.values() for use in layer.uses}
        for index, node in enumerate(self.graph.nodes):
            if node.op_type == "MatMul" and index not in weights:
                second = self.source(node.input[1])
                if second is not None:
                    found[second.name] = second
        return found

    def _norms(self) -> Iterator[NormFacts]:
        """Yield the RMS norms with a quantized gain, of one operator or spelt out."""
        for node in self.graph.nodes:
            if node.op_type not in {"Mul", *_RMS_NORMS}:
                continue
            for gain, other in (node.input[:2], node.input[1::-1]):
                quantizer = self.adaptor.sim.qc_quantize_op_dict.get(gain)
                source = other if node.op_type != "Mul" else self._normalized(other)
                if not self.graph.is_stored(gain) or not is_integer(quantizer) or source is None:
                    continue
                yield NormFacts(
                    name=gain,
                    bitwidth=int(quantizer.bitwidth),
                    signed=bool(quantizer.use_symmetric_encodings),
                    reads=self.source(source),
                    makes=self.target(node.output[0]),
                )

    def _normalized(self, tensor: str) -> str | None:
        """Return what is divided by the root of its mean square to make a tensor, if it is that."""
        scaled = self.graph.node(self.graph.source(tensor, _MOVES))
        if scaled is None or scaled.op_type not in ("Div", "Mul"):
            return None
        root = self.graph.node(scaled.input[1])
        while root is not None and root.op_type in _ROOT_STEPS | _MOVES:
            made = [self.graph.node(name) for name in root.input if not self.graph.is_stored(name)]
            root = next((node for node in made if node is not None), None)
        if root is None or root.op_type != "ReduceMean":
            return None
        return str(self.graph.source(scaled.input[0], _MOVES))

    def _is_unset_parameter(self, name: str) -> bool:
        quantizer = self.adaptor.sim.qc_quantize_op_dict.get(name)
        return bool(
            quantizer is not None
            and quantizer.enabled
            and quantizer.quant_info.isIntDataType
            and not quantizer.is_initialized()
        )

    def _fixed(self) -> Iterator[tuple[str, Activation]]:
        for node in self.graph.nodes:
            if node.op_type in FIXED_RANGES and node.output[0] in self.activations:
                yield node.op_type, self.activations[node.output[0]]

    def _masked(self) -> dict[str, Activation]:
        """Return the quantizers of what goes into each Softmax, and of what was added to it."""
        found = {}
        for node in self.graph.nodes:
            if node.op_type != "Softmax":
                continue
            tensor = self.graph.source(node.input[0], _MOVES)
            adding = self.graph.node(tensor)
            tensors = [node.input[0]]
            if adding is not None and adding.op_type in _ADDING:
                tensors += [tensor, *adding.input]
            for name in tensors:
                activation = self.source(name) if name else None
                if activation is not None:
                    found[activation.name] = activation
        return found

    def _angles(self) -> dict[str, Activation]:
        """Return the quantizers of what Cos and Sin read, and of what that is made of by Concat."""
        found, tensors = {}, [n.input[0] for n in self.graph.nodes if n.op_type in ("Cos", "Sin")]
        while tensors:
            tensor = self.graph.source(tensors.pop(), _MOVES)
            activation, node = self.source(tensor), self.graph.node(tensor)
            if activation is not None:
                found[activation.name] = activation
            if node is not None and node.op_type == "Concat":
                tensors += node.input
        return found

    def _tied(self) -> Iterator[tuple[Activation | None, Activation | None, str, str]]:
        """Yield a cache's quantizers and the names of its two tensors, as input and as output."""
        for name in self.graph.inputs:
            for old, new in _CACHES:
                output = name.replace(old, new, 1)
                if old in name and output in self.graph.outputs:
                    yield self.source(name), self.source(output), name, output
                    break


def _activation(name: str, quantizer: Any) -> Activation:
    encodings = quantizer.get_encodings() if quantizer.is_initialized() else None
    low, high = (None, None) if not encodings else (encodings[0].min, encodings[0].max)
    return Activation(name=name, bitwidth=int(quantizer.bitwidth), low=low, high=high)
