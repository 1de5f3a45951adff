"""The operators of a QDQ model that are compared one by one, and known causes of a divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto
from onnx.numpy_helper import to_array

from aimet_ext.integrations.qnn_targets import NORM_REMEDY, SCORE_STEP, refuses_norm
from aimet_ext.onnx.index import GraphIndex, attribute
from aimet_ext.verification.report import array_sqnr

_WITH_WEIGHT = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_RMS_NORMS = ("RMSNormalization", "SimplifiedLayerNormalization")
_OTHERS = ("Add", "LayerNormalization", "Mul", "Softmax", *_RMS_NORMS)
_MOVING = ("QuantizeLinear", "Reshape", "Transpose")

# Blocks of as many input channels as this, or of a multiple of it, are computed right; the smaller
# one if the layer's width is an even multiple of it.
_BLOCK, _SMALL_BLOCK = 32, 16
_WIDTHS = (4, 8, 16)
# A dropped bias explains a difference if adding it brings the output this much nearer (dB), and
# the factor that brings it nearest is about 1.
_GAIN, _FACTOR = 6.0, (0.7, 1.3)
# Above this (dB), a loss is not attributed: rounding in another order causes it.
_SOUND = 60.0


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerFacts:
    """One operator of a QDQ model, with the facts that decide whether a target computes it right.

    :param name: Name of the module that the weight belongs to, or else of the operator.
    :param nodes: Names of the operators: a ``MatMul`` and the ``Add`` of its bias are one layer.
    :param op_type: Type: ``"MatMul"``, ``"MatMul+Add"``, ``"Gemm"``, ``"Conv"``, … .
    :param tensor: Output of the last operator, before its quantizer.
    :param parents: Nearest such tensors upstream.
    :param step: Step of the grid of that output, None if unknown.
    :param score_step: Step of the grid of a Softmax's input, None for other operators.
    :param bits: Width of the stored weight, None without one.
    :param block_size: Block size of the weight, None unless blockwise.
    :param lpbq: True if the blocks' scales are integers.
    :param kernel: Spatial sizes of a convolution's weight.
    :param factor_type: Type of the second factor's integers, in a product of two activations.
    :param norm_types: Types of an RMS norm's input, gain and output, None for other operators.
    :param bias: Values of the bias, None without one.
    :param fused: True if nothing is quantized between a MatMul and the Add of its bias.
    :param bias_type: Type of the bias, ``"float32"``, ``"int32"``, … , None without one.
    """

    name: str
    nodes: tuple[str, ...]
    op_type: str
    tensor: str
    parents: tuple[str, ...] = ()
    step: float | None = None
    score_step: float | None = None
    bits: int | None = None
    block_size: int | None = None
    lpbq: bool = False
    kernel: tuple[int, ...] = ()
    factor_type: str | None = None
    norm_types: tuple[str | None, ...] | None = None
    bias: np.ndarray[Any, Any] | None = None
    bias_type: str | None = None
    fused: bool = False


def compared_layers(model: ModelProto, names: Mapping[str, str] | None = None) -> list[LayerFacts]:
    """Return the operators whose output is quantized, in the order of computation.

    These have a stored weight or two quantized factors, or are sums, products, norms or softmax;
    operators that only move data are left out.

    :param model: Model with quantize and dequantize nodes, constants as integers.
    :param names: Names of modules by the names of their weights in the ONNX file.
    """
    return _Reader(model, names or {}).layers()


class _Reader:
    """Reader of the facts of a QDQ graph."""

    def __init__(self, model: ModelProto, names: Mapping[str, str]) -> None:
        self.index, self.names = GraphIndex(model.graph), names

    def layers(self) -> list[LayerFacts]:
        found, biases = [], set()
        for node in self.index.nodes:
            if node.op_type in _WITH_WEIGHT:
                layer, add = self._layer(node)
                biases.add(add)
            elif node.op_type in _OTHERS and node.name not in biases:
                layer = LayerFacts(
                    name=node.name,
                    nodes=(node.name,),
                    op_type=node.op_type,
                    tensor=node.output[0],
                    norm_types=self._norm_types(node) if node.op_type in _RMS_NORMS else None,
                    score_step=self._score_step(node) if node.op_type == "Softmax" else None,
                )
            else:
                continue
            if self._quantizer(layer.tensor) is not None:
                found.append(replace(layer, step=self._step(layer.tensor)))
        return self._with_parents(found)

    def _with_parents(self, layers: list[LayerFacts]) -> list[LayerFacts]:
        """Return the layers, each with the nearest ones upstream."""
        compared = {layer.tensor for layer in layers}
        above: dict[str, set[str]] = {}  # all that is read for a compared tensor
        nearest: dict[str, set[str]] = {}
        for node in self.index.nodes:
            found: set[str] = set().union(*(nearest.get(name, ()) for name in node.input))
            for name in node.output:
                above[name] = found
                nearest[name] = {name} if name in compared else found
        return [replace(each, parents=tuple(sorted(above[each.tensor]))) for each in layers]

    def _layer(self, node: Any) -> tuple[LayerFacts, str | None]:
        """Return a layer, and the name of the Add that is its bias."""
        stored = self._stored(node.input[1])
        output, add, bias = node.output[0], None, None
        if len(node.input) > 2 and node.input[2]:
            bias = self._stored(node.input[2])
        elif node.op_type == "MatMul" and stored is not None:
            add, bias = self._added(output)
        if add is not None:
            output = add.output[0]
        facts: dict[str, Any] = {"name": node.name}
        if stored is not None:
            weight, scales = stored
            facts = self._weight(node, weight, scales)
        elif node.op_type == "MatMul":
            facts["factor_type"] = self._factor_type(node.input[1])
        if bias is not None:
            facts["bias"], facts["bias_type"] = self._values(*bias), _type(bias[0])
        layer = LayerFacts(
            nodes=(node.name,) if add is None else (node.name, add.name),
            op_type=node.op_type if add is None else f"{node.op_type}+Add",
            tensor=output,
            fused=add is not None and self._quantizer(node.output[0]) is None,
            **facts,
        )
        return layer, None if add is None else add.name

    def _weight(self, node: Any, weight: Any, dequantize: Any) -> dict[str, Any]:
        block = None if dequantize is None else attribute(dequantize, "block_size", 0) or None
        integers = block is not None and not self.index.is_stored(dequantize.input[1])
        kind = _type(weight)
        base = weight.name.removesuffix("_q").removesuffix("_qdq")
        return {
            "name": self.names.get(base, node.name),
            "bits": int("".join(filter(str.isdigit, kind))),
            "block_size": block,
            "lpbq": integers,
            "kernel": tuple(weight.dims[2:]),
        }

    def _score_step(self, node: Any) -> float | None:
        made = self.index.node(node.input[0])
        if made is None or made.op_type != "DequantizeLinear":
            return None
        scale = self.index.constant(made.input[1])
        return None if scale is None else float(to_array(scale).max())

    def _norm_types(self, node: Any) -> tuple[str | None, ...]:
        made = self._quantizer(node.output[0])
        tensors = (node.input[0], node.input[1], made)
        return tuple(None if name is None else self._factor_type(name) for name in tensors)

    def _factor_type(self, name: str) -> str | None:
        """Return the type of a dequantized tensor's integers, by its zero point."""
        node = self.index.node(name)
        if node is None or node.op_type != "DequantizeLinear" or len(node.input) < 3:
            return None
        zero = self.index.constant(node.input[2])
        return None if zero is None else _type(zero)

    def _added(self, output: str) -> tuple[Any, Any]:
        """Find the Add that alone reads a MatMul's output, and the stored vector that it adds."""
        quantizer = self._quantizer(output)
        seen = output if quantizer is None else quantizer
        readers = self.index.readers(seen)
        if len(readers) != 1 or readers[0].op_type != "Add":
            return None, None
        other = [name for name in readers[0].input if name != seen]
        stored = self._stored(other[0]) if len(other) == 1 else None
        if stored is None or len([d for d in stored[0].dims if d != 1]) != 1:
            return None, None
        return readers[0], stored

    def _stored(self, name: str) -> tuple[Any, Any] | None:
        """Find the stored tensor behind an input, and its dequantize node, None for a float."""
        dequantize = None
        while not self.index.is_stored(name):
            node = self.index.node(name)
            if node is None or node.op_type not in (*_MOVING, "DequantizeLinear"):
                return None
            if node.op_type == "DequantizeLinear" and dequantize is None:
                dequantize = node
            name = node.input[0]
        return self.index.stored[name], dequantize

    def _quantizer(self, tensor: str) -> str | None:
        """Return the dequantized name of a tensor, None if it is not quantized."""
        for node in self.index.readers(tensor):
            if node.op_type == "QuantizeLinear":
                for reader in self.index.readers(node.output[0]):
                    if reader.op_type == "DequantizeLinear":
                        return str(reader.output[0])
        return None

    def _step(self, tensor: str) -> float | None:
        """Return the step of a quantized tensor's grid, None unless it is one stored number."""
        for node in self.index.readers(tensor):
            quantizes = node.op_type == "QuantizeLinear"
            scale = self.index.constant(node.input[1]) if quantizes else None
            if scale is not None and not any(size > 1 for size in scale.dims):
                return float(to_array(scale).reshape(-1)[0])
        return None

    def _values(
        self, tensor: TensorProto, dequantize: NodeProto | None
    ) -> np.ndarray[Any, Any] | None:
        """Read a stored vector in float64, None if its values or scale are not in the file."""
        if tensor.data_location == tensor.EXTERNAL:
            return None
        value = to_array(tensor).astype(np.float64)
        if dequantize is None:
            return value.reshape(-1)
        scale, *zero = (self.index.constant(name) for name in dequantize.input[1:])
        if scale is None:
            return None
        offset = to_array(zero[0]).astype(np.float64) if zero and zero[0] is not None else 0.0
        return ((value - offset) * to_array(scale).astype(np.float64)).reshape(-1)


def _type(tensor: TensorProto) -> str:
    name = str(tensor.DataType.Name(tensor.data_type)).lower()
    return "float32" if name == "float" else name


@dataclass(frozen=True)
class Cause:
    """Cause of a divergence or refusal of a layer.

    :param message: Cause in a few words.
    :param remedy: Advice.
    """

    message: str
    remedy: str


def culprit(layers: Sequence[LayerFacts], ratios: Sequence[float], failing: int) -> int:
    """Return the operator with the largest drop in dB on the way to one that diverges.

    A sum with a large term, such as a mask, hides an error that appears again further down; so the
    first operator below a threshold need not be the wrong one.

    :param layers: Layers in the order of computation.
    :param ratios: Signal to noise ratio of each on the device, in dB.
    :param failing: Index of the one that diverges.
    :returns: Index of it or of one that it depends on.
    """
    place = {layer.tensor: index for index, layer in enumerate(layers)}
    upstream, queue = {failing}, [failing]
    while queue:
        parents = {place[name] for name in layers[queue.pop()].parents} - upstream
        upstream |= parents
        queue += parents

    def drop(index: int) -> float:
        given = [ratios[place[name]] for name in layers[index].parents]
        return min([_SOUND, *given]) - ratios[index]

    return max(sorted(upstream), key=drop)


def known_cause(
    layer: LayerFacts,
    device: np.ndarray[Any, Any],
    sim: np.ndarray[Any, Any],
    fallbacks: Collection[str] = (),
) -> Cause | None:
    """Return the cause of a layer's difference from the sim, None if unknown.

    :param device: Output of the layer on the device.
    :param sim: Output of the layer in the ONNX sim.
    :param fallbacks: Operators that the device did not take.
    """
    if not set(fallbacks).isdisjoint(layer.nodes):
        return Cause(
            "it runs on the CPU, as HTP did not take it",
            "quantize all of its inputs and its output to integers",
        )
    return dropped_bias(layer, device, sim) or pattern_cause(layer)


def dropped_bias(
    layer: LayerFacts, device: np.ndarray[Any, Any], sim: np.ndarray[Any, Any]
) -> Cause | None:
    """Return the cause, if the sim's output is the sum of the device's and the bias.

    The factor ``c`` of ``device + c · bias`` that comes nearest to the sim's output is
    ``⟨sim − device, bias⟩ / ⟨bias, bias⟩``: about 1 if the bias was left out, 0 if it was added.
    """
    if layer.bias is None or not np.any(layer.bias):
        return None
    bias = _along_channels(layer, device.shape)
    if bias is None:
        return None
    difference = sim.astype(np.float64) - device
    spread = np.broadcast_to(bias, device.shape)
    factor = float((difference * spread).sum() / np.square(spread).sum())
    gain = array_sqnr(device + spread, sim) - array_sqnr(device, sim)
    if not (gain >= _GAIN and _FACTOR[0] <= factor <= _FACTOR[1]):
        return None
    apart = "keep MatMul and Add apart, each with its own quantizers"
    return Cause(
        f"its bias ({layer.bias_type}) is dropped: with the bias added, the device's output is "
        f"{gain:.0f} dB nearer to the sim's",
        apart if layer.lpbq else f"{apart}, or store the bias as int32",
    )


def _along_channels(layer: LayerFacts, shape: Sequence[int]) -> np.ndarray[Any, Any] | None:
    """Reshape a bias to be added to an output: channels are last, or second for Conv."""
    assert layer.bias is not None
    axis = 1 if layer.op_type.startswith("Conv") else len(shape) - 1
    if layer.bias.size != shape[axis]:
        return None
    return layer.bias.reshape([-1 if d == axis else 1 for d in range(len(shape))])


def _takes_block(size: int | None) -> bool:
    return size == _SMALL_BLOCK or (size is not None and size % _BLOCK == 0)


def _is_blockwise(layer: LayerFacts) -> bool:
    return layer.block_size is not None


def _kind(layer: LayerFacts) -> str:
    return "LPBQ" if layer.lpbq else "blockwise"


# What HTP refuses or gets wrong: whether a layer is such a one, what to say, what to do.
_Pattern = tuple[Callable[[LayerFacts], bool], Callable[[LayerFacts], Cause]]
_PATTERNS: tuple[_Pattern, ...] = (
    (
        lambda layer: layer.factor_type == "uint16",
        lambda _: Cause(
            "it is a product of two activations whose second one is uint16, which HTP multiplies "
            "with some 8 bits only",
            "have the second input quantized symmetrically and stored as int16 with zero point 0",
        ),
    ),
    (
        lambda layer: layer.norm_types is not None and refuses_norm(*layer.norm_types),
        lambda layer: Cause(
            "it is an RMS norm with an input, gain and output of "
            f"{', '.join(str(kind) for kind in layer.norm_types or ())}, which HTP does not take",
            NORM_REMEDY,
        ),
    ),
    (
        lambda layer: layer.score_step is not None and layer.score_step > SCORE_STEP,
        lambda layer: Cause(
            f"its scores have a step of {layer.score_step:.3g}, so that a rounding changes an "
            f"attention weight by up to {math.expm1((layer.score_step or 0) / 2):.0%}",
            "quantize activations to 16 bits",
        ),
    ),
    (
        lambda layer: layer.bits is not None and layer.bits not in _WIDTHS,
        lambda layer: Cause(
            f"its weight has {layer.bits} bits, and HTP takes 4, 8 and 16",
            "quantize the weight to one of these widths",
        ),
    ),
    (
        lambda layer: _is_blockwise(layer) and not _takes_block(layer.block_size),
        lambda layer: Cause(
            f"its block size {layer.block_size} is none that HTP is known to take",
            f"choose {_SMALL_BLOCK} or a multiple of {_BLOCK}",
        ),
    ),
    (
        lambda layer: _is_blockwise(layer) and any(size > 1 for size in layer.kernel),
        lambda layer: Cause(
            f"{_kind(layer)} weights of a {'x'.join(map(str, layer.kernel))} convolution are none "
            "that HTP is known to take",
            "quantize this layer per channel",
        ),
    ),
    (
        lambda layer: layer.lpbq and layer.op_type.startswith("Conv"),
        lambda _: Cause(
            "its blocks have integer scales (LPBQ), which HTP takes for no convolution",
            "store the product of integer and channel scales as the blocks' float scales",
        ),
    ),
    (
        lambda layer: layer.lpbq and (layer.op_type == "Gemm" or layer.fused),
        lambda layer: Cause(
            f"it is one operator with LPBQ weights and {layer.bias_type or 'no'} bias, which HTP "
            "refuses or computes without the bias",
            "write it as a MatMul and an Add, each with its own quantizers",
        ),
    ),
    (
        lambda layer: (
            _is_blockwise(layer)
            and (layer.op_type != "MatMul+Add" or layer.fused)
            and layer.bias_type is not None
            and layer.bias_type != "int32"
        ),
        lambda layer: Cause(
            f"its bias is {layer.bias_type}, which HTP gets wrong with {_kind(layer)} weights",
            "store the bias as int32 with the scale of the input times that of the weight",
        ),
    ),
)


def pattern_cause(layer: LayerFacts) -> Cause | None:
    """Return a known reason for HTP to refuse or miscompute a layer, by its storage."""
    return next((cause(layer) for fits, cause in _PATTERNS if fits(layer)), None)
