"""Layers of an ONNX simulation, by the names of their nodes and the types of these."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any

from aimet_ext.config import PerTensor, QSpec
from aimet_ext.grids.fitting import WeightPlan, some
from aimet_ext.grids.patterns import LayerTable
from aimet_ext.sim.onnx.setup import (
    QuantizerState,
    bias_state,
    calibrated_state,
    is_per_channel,
    parameter_quantizers,
)

if TYPE_CHECKING:
    from aimet_ext.onnx.graph import OnnxGraph
    from aimet_ext.onnx.layers import FoundLayers, OnnxLayer

__all__ = ["OnnxTable", "output_layers"]

_FUSED = "aimet.supergroup"  # domain of what AIMET makes of MatMul and Add
_TYPES = ("MatMul", "Gemm", "Conv", "Gather", "ConvTranspose", "FusedMatMul", "Einsum")
_SUFFIX = re.compile(rf"[/.]({'|'.join(_TYPES)})(_\d+)?$|\.weight$")


class OnnxTable(LayerTable):
    """See :class:`aimet_ext.grids.patterns.LayerTable`.

    A layer's names are those of the nodes that read its weight, before AIMET fused them too, and
    that of its weight; also without the type at the end, and with dots in place of slashes:
    ``/layers.0/up_proj/MatMul`` is ``layers.0.up_proj`` as well.

    :param adaptor: of ``aimet_onnx.QuantizationSimModel``.
    """

    def __init__(self, adaptor: Any) -> None:
        self.graph: OnnxGraph = adaptor.graph
        self.found: FoundLayers = adaptor.layers
        weights = {name: layer.weight for name, layer in self.found.items()}
        self.parameters = parameter_quantizers(adaptor.sim, weights)
        live = {name: q for name, q in self.parameters.items() if q.enabled}
        super().__init__(adaptor, {name: live.get(name) for name in self.found})

    @cached_property
    def nodes(self) -> dict[str, list[Any]]:
        """The simulation's own nodes that read a tensor, quantized or not, by its name."""
        nodes = self.adaptor.sim.model.model.graph.node
        through = {n.output[0]: n.input[0] for n in nodes if n.op_type == "QcQuantizeOp"}
        readers: dict[str, list[Any]] = {}
        for node in nodes:
            for name in node.input if node.op_type != "QcQuantizeOp" else ():
                readers.setdefault(through.get(name, name), []).append(node)
        return readers

    @cached_property
    def aliases(self) -> dict[str, tuple[str, ...]]:
        """All names of each layer."""
        bodies = {
            function.domain: [node.name for node in function.node]
            for function in self.adaptor.sim.model.model.functions
        }
        found = {}
        for name, layer in self.found.items():
            names = [name, layer.weight]
            for use in layer.uses:
                names += [self.graph.nodes[n].name for n in (use.node, use.add) if n is not None]
            for node in self.nodes.get(layer.weight, ()):
                names += [node.name, *bodies.get(node.domain, ())]
            names += [_SUFFIX.sub("", long) for long in names]
            names += [long.strip("/").replace("/", ".") for long in names]
            found[name] = tuple(dict.fromkeys(filter(None, names)))
        return found

    def matching(self, pattern: str) -> list[str]:
        """Names of the layers that fit a pattern under any of their names."""
        return [
            name
            for name, aliases in self.aliases.items()
            if any(fnmatchcase(alias, pattern) for alias in aliases)
        ]

    def of_type(self, word: str, excluded: Collection[str]) -> list[str] | None:
        """Names of the quantized layers of an ONNX type; a biased MatMul is a Gemm as well.

        :raises ValueError: nodes of that type have weights that can have no such grid.
        """
        if word not in _TYPES:
            return None
        skipped = self.found.skipped
        problems = [
            f"{node.name} ({skipped[node.name]})"
            for node in self.graph.nodes
            if node.op_type == word and node.name in skipped and node.name not in excluded
        ]
        if problems:
            raise ValueError(
                f"layers={word!r} means all nodes of that type, but some weights can have no such "
                f"grid: {some(problems)}; list these in nodes_to_exclude"
            )
        found = [name for name, layer in self.found.items() if word in self._types(layer)]
        return [name for name in found if self.quantizers[name] is not None]

    def _types(self, layer: OnnxLayer) -> set[str]:
        types = {self.graph.nodes[use.node].op_type for use in layer.uses}
        for node in self.nodes.get(layer.weight, ()):
            if node.domain.startswith(_FUSED):
                types |= {"MatMul", "Gemm"}
        return types

    def excluded(self, pattern: str) -> set[str] | None:
        """Names of the layers that fit a pattern, or are in what does; None if nothing does."""
        found = {
            name
            for name, aliases in self.aliases.items()
            if any(fnmatchcase(part, pattern) for alias in aliases for part in _scopes(alias))
        }
        if found:
            return found
        every = [*self.graph.nodes, *self.adaptor.sim.model.model.graph.node]
        fitting = {node.name for node in every if fnmatchcase(node.name, pattern)}
        return fitting or None

    def is_name(self, pattern: str, name: str) -> bool:
        """Whether a pattern is one of the names of a layer."""
        return pattern in self.aliases[name]

    def ends_with_name(self, pattern: str, name: str) -> bool:
        """Whether a pattern ends with the last part of a layer's name, types left out."""
        ends = {re.split(r"[/.]", _SUFFIX.sub("", alias))[-1] for alias in self.aliases[name]}
        return _SUFFIX.sub("", pattern).endswith(tuple(end for end in ends if end))

    def is_frozen(self, name: str) -> bool:
        """Whether an earlier technique froze the range of a layer's weight."""
        quantizer = self.quantizers[name]
        return quantizer is not None and quantizer.is_encoding_frozen()

    @cached_property
    def left_out(self) -> set[str]:
        """Names of embeddings and of the output layer of a language model."""
        embeddings = {name for name, layer in self.found.items() if layer.kind == "embedding"}
        if embeddings or "inputs_embeds" in self.graph.inputs:
            return embeddings | output_layers(self.graph, self.found)
        return embeddings

    def example(self) -> str:
        """What names look like."""
        return repr(next(iter(self.found), ""))

    def apply(self, plan: WeightPlan, undo: ExitStack) -> dict[str, int]:
        """Give each layer of a plan its grid; all states are made before any is put.

        :raises ValueError: MLPs are to be padded, which is for PyTorch simulations, or AIMET has no
            such grid for a layer.
        """
        if plan.pad:
            raise ValueError(
                f'{some(plan.pad)}: on_indivisible="pad" is for PyTorch simulations, the MLPs of '
                "an ONNX model must be widened before it is exported; use "
                'on_indivisible="per_channel" or a block size that divides'
            )
        made: dict[str, tuple[Any, QuantizerState]] = {}
        for name, spec in plan.specs.items():
            layer = self.found[name]
            if layer.weight not in made:
                made.update(self._states(name, layer, spec))
        for quantizer, state in made.values():
            undo.callback(QuantizerState.of(quantizer).put, quantizer)
            state.put(quantizer)
        return {}

    def _states(
        self, name: str, layer: OnnxLayer, spec: QSpec | None
    ) -> Iterator[tuple[str, tuple[Any, QuantizerState]]]:
        """The new states of the quantizers of a layer's weight and bias, by tensor."""
        quantizers = self.adaptor.sim.qc_quantize_op_dict
        own = self.parameters.get(name)
        stored = self.graph.array(layer.weight)
        yield (
            layer.weight,
            (own, calibrated_state(name, own, spec, stored, int(layer.transposed))),
        )
        bias = None if layer.bias is None else quantizers.get(layer.bias)
        if bias is None or spec is None or isinstance(spec.granularity, PerTensor):
            return
        if bias.tensor_quantizer_params is None:  # of a lone Add, which has one scale
            return
        if not is_per_channel(bias) and not bias.is_encoding_frozen():
            yield layer.bias or "", (bias, bias_state(bias, self.graph.array(layer.bias or "")))


def output_layers(graph: OnnxGraph, layers: Mapping[str, OnnxLayer]) -> set[str]:
    """The linear layer that makes the logits, by name; none if something else makes them.

    Logits are the output of that name, else the first output. Between layer and output may stand
    nodes that read nothing else but stored values, as a type cast or a soft cap does.
    """
    made_by = {
        use.output: name
        for name, layer in layers.items()
        for use in layer.uses
        if layer.kind == "linear"
    }
    name = "logits" if "logits" in graph.outputs else graph.outputs[0]
    while name not in made_by:
        index = graph.producer.get(name)
        if index is None:
            return set()
        sources = [n for n in graph.nodes[index].input if n and graph.constant(n) is None]
        if len(sources) != 1:
            return set()
        name = sources[0]
    return {made_by[name]}


def _scopes(name: str) -> Iterator[str]:
    """A name and the names of what it is in: ``/a/b/MatMul``, ``/a/b`` and ``/a``."""
    yield name
    for found in re.finditer(r"[/.]", name):
        if found.start():
            yield name[: found.start()]
