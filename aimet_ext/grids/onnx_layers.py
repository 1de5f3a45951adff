"""Layers of an ONNX simulation, by the names of their nodes and the types of these."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any

from aimet_ext.data.geometry import TRANSPOSED
from aimet_ext.errors import some
from aimet_ext.grids.patterns import LAYERS, LayerTable
from aimet_ext.patterns import fits, scopes
from aimet_ext.sim.onnx.names import TYPES, layer_aliases, without_type
from aimet_ext.sim.onnx.ranges import (
    is_frozen,
    is_fused,
    parameter_quantizers,
    put_grids,
    readers,
)
from aimet_ext.specs import WeightPlan

if TYPE_CHECKING:
    from aimet_ext.onnx.graph import OnnxGraph
    from aimet_ext.onnx.layers import FoundLayers, OnnxLayer
    from aimet_ext.sim.onnx.adaptor import OnnxSim


class OnnxTable(LayerTable):
    """See :class:`aimet_ext.grids.patterns.LayerTable`.

    A layer's names are those of :func:`aimet_ext.sim.onnx.names.layer_aliases`.

    :param adaptor: Adaptor of an ONNX simulation.
    """

    def __init__(self, adaptor: Any) -> None:
        self.sim: OnnxSim = adaptor
        self.graph: OnnxGraph = adaptor.graph
        self.found: FoundLayers = adaptor.layers
        quantizers = parameter_quantizers(adaptor)
        live = {name: q for name, q in quantizers.items() if q.enabled}
        super().__init__(adaptor, {name: live.get(name) for name in self.found})

    @cached_property
    def layers(self) -> dict[str, Any]:
        """Layers that can have a grid, transposed convolutions among them; see the base class."""
        kinds = (*LAYERS, *TRANSPOSED)
        every = ((name, self.model.get_submodule(name)) for name in self.quantizers)
        return {name: layer for name, layer in every if isinstance(layer, kinds)}

    @cached_property
    def nodes(self) -> dict[str, list[Any]]:
        """The simulation's own nodes that read a tensor, quantized or not, by its name."""
        return readers(self.sim)

    @cached_property
    def aliases(self) -> dict[str, tuple[str, ...]]:
        """All names of each layer."""
        return layer_aliases(self.sim)

    def matching(self, pattern: str) -> list[str]:
        return [name for name, aliases in self.aliases.items() if fits(pattern, *aliases)]

    def of_type(self, word: str, excluded: Collection[str]) -> list[str] | None:
        """Return the quantized layers of an ONNX type; a biased MatMul is a Gemm as well.

        :raises ValueError: nodes of that type have weights that can have no such grid.
        """
        if word not in TYPES:
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
            if is_fused(node):
                types |= {"MatMul", "Gemm"}
        return types

    def excluded(self, pattern: str) -> set[str] | None:
        found = {
            name
            for name, aliases in self.aliases.items()
            if any(fits(pattern, *scopes(alias)) for alias in aliases)
        }
        if found:
            return found
        every = [*self.graph.nodes, *self.adaptor.sim.model.model.graph.node]
        fitting = {node.name for node in every if fits(pattern, node.name)}
        return fitting or None

    def is_name(self, pattern: str, name: str) -> bool:
        return pattern in self.aliases[name]

    def ends_with_name(self, pattern: str, name: str) -> bool:
        ends = {re.split(r"[/.]", without_type(alias))[-1] for alias in self.aliases[name]}
        return without_type(pattern).endswith(tuple(end for end in ends if end))

    def is_frozen(self, name: str) -> bool:
        return is_frozen(self.quantizers[name])

    @cached_property
    def left_out(self) -> set[str]:
        embeddings = {name for name, layer in self.found.items() if layer.kind == "embedding"}
        if embeddings or "inputs_embeds" in self.graph.inputs:
            return embeddings | output_layers(self.graph, self.found)
        return embeddings

    def shown(self) -> list[str]:
        return list(self.found)

    def apply(self, plan: WeightPlan, undo: ExitStack) -> dict[str, int]:
        """Give each layer of a plan its grid; all quantizers are made before any is changed.

        :raises ValueError: MLPs are to be padded, which is for PyTorch simulations, or AIMET has no
            such grid for a layer.
        """
        if plan.pad:
            raise ValueError(
                f'{some(plan.pad)}: on_indivisible="pad" is for PyTorch simulations, the MLPs of '
                "an ONNX model must be widened before it is exported; use "
                'on_indivisible="per_channel" or a block size that divides'
            )
        put_grids(self.sim, plan.specs, undo)
        return {}


def output_layers(graph: OnnxGraph, layers: Mapping[str, OnnxLayer]) -> set[str]:
    """Find the linear layer that makes the logits, by name; none if something else makes them.

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
