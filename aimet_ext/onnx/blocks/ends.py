"""Embeddings, last norm and output layers of an ONNX graph, by its structure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aimet_ext.errors import TransformRefused
from aimet_ext.models.proof import float64_casts
from aimet_ext.onnx.blocks.find import BlockPlan
from aimet_ext.onnx.blocks.flow import Flow, Norm, Reading, SharedVector
from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.index import FLOATS, elements
from aimet_ext.onnx.layers import OnnxLayer
from aimet_ext.onnx.ops.translate import TranslatedGraph

_MOVES = frozenset(("Cast", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze"))


@dataclass(frozen=True, eq=False, kw_only=True)
class EndsPlan:
    """The ends of a graph's residual stream.

    :param embeddings: Tables, by names that checkpoints have for them.
    :param norm: Norm behind the last block, and its name.
    :param readers: Output layers by such names.
    :param logits: Outputs of the graph that depend on the hidden states.
    """

    embeddings: Mapping[str, OnnxLayer]
    norm: tuple[str, Norm]
    readers: Mapping[str, OnnxLayer]
    start: str
    end: str
    logits: tuple[str, ...]

    @property
    def values(self) -> dict[str, tuple[str, bool]]:
        """Stored value of each parameter, and True if it is stored transposed, by full name."""
        name, norm = self.norm
        found = {
            f"{table}.weight": (layer.weight, False) for table, layer in self.embeddings.items()
        }
        found[f"{name}.weight"] = norm.gain, False
        if norm.bias is not None:
            found[f"{name}.bias"] = norm.bias, False
        for head, layer in self.readers.items():
            found[f"{head}.weight"] = layer.weight, layer.transposed
            if layer.bias is not None:
                found[f"{head}.bias"] = layer.bias, False
        return found


def find_onnx_ends(flow: Flow, plans: Sequence[BlockPlan], root: str) -> EndsPlan:
    """Return the ends of the residual stream that blocks share.

    :param root: Prefix of the names of embeddings and norm: ``"model."`` as checkpoints have it.
    :raises TransformRefused: a stored value has no known role, or there is no norm behind the
        blocks; all that is wrong is listed.
    """
    graph, start, end = flow.graph, plans[0].start, plans[-1].end
    width = flow.shape(plans[0].layers[plans[0].topology.linears[0]].name)[1]
    problems: list[str] = []
    tables = {layer.weight: layer for layer in flow.found.values() if layer.kind == "embedding"}
    embeddings: list[OnnxLayer] = []
    for name in graph.behind([start], lambda name, _: not graph.is_stored(name)):
        stored = graph.constant(name)
        if stored is None or stored.data_type not in FLOATS or elements(stored) < 2:
            continue
        if name in tables and graph.shape(name)[1] == width:
            embeddings.append(tables[name])
        else:
            problems.append(f"{name} {list(stored.dims)} before the blocks is no embedding")
    readers: dict[str, Norm] = {}
    behind = graph.beyond([end])
    for node in (graph.nodes[i] for name in behind for i in graph.consumers.get(name, ())):
        layer = flow.layer_of(node)
        norm = None if layer is None else _norm(flow, flow.layers[layer].uses[0].input, end)
        if layer is not None and norm is not None:
            readers[layer] = norm
    norms = {norm.gain: norm for norm in readers.values()}
    known = {name for norm in norms.values() for name in (norm.gain, norm.bias)}
    known |= {n for r in readers for n in (flow.layers[r].weight, flow.layers[r].bias)}
    for name in dict.fromkeys(_read(graph, behind, end)):
        stored = graph.stored[name]
        if name not in known and stored.data_type in FLOATS and elements(stored) > 1:
            problems.append(f"{name} {list(stored.dims)} behind the blocks has no known role")
    logits = tuple(name for name in graph.outputs if name in behind)
    if not embeddings:
        problems.append("an embedding before the blocks, found none")
    if len(norms) != 1 or not logits:
        problems.append(f"one norm behind the blocks that output layers read, found {len(norms)}")
    if problems:
        raise TransformRefused(
            "what writes to the hidden states and reads them must be known for r1. Required is "
            f"that all has a role: {'; '.join(problems)}; pass r1=False"
        )
    embeddings.sort(key=lambda layer: -graph.shape(layer.weight)[0])
    return EndsPlan(
        embeddings={f"{root}{_numbered('embed_tokens', i)}": e for i, e in enumerate(embeddings)},
        norm=(f"{root}norm", next(iter(norms.values()))),
        readers={_numbered("lm_head", i): flow.layers[n] for i, n in enumerate(sorted(readers))},
        start=start,
        end=end,
        logits=logits,
    )


def _numbered(name: str, number: int) -> str:
    return name if number == 0 else f"{name}_{number}"


def _read(graph: OnnxGraph, behind: set[str], end: str) -> Iterator[str]:
    """Yield stored values that nodes behind the blocks read, computed from stored ones too."""
    nodes = {graph.producer[name] for name in behind - {end} if name in graph.producer}
    inputs = (name for index in sorted(nodes) for name in graph.reads[index])
    own = [name for name in inputs if name not in behind]
    return (name for name in graph.behind(own) if graph.is_stored(name))


def _norm(flow: Flow, tensor: str, end: str) -> Norm | None:
    """Return the norm of the last hidden states behind a tensor, some of its tokens perhaps."""
    sources = {end, flow.origin(end)}
    while True:
        norm = flow.norm(tensor, sources)
        node = None if norm is not None else flow.graph.node(tensor)
        if node is None or node.op_type not in _MOVES:
            return norm
        tensor = node.input[0]


def shared_ends(flow: Flow, plans: Sequence[BlockPlan], ends: EndsPlan) -> list[SharedVector]:
    """Return what a rotation of the hidden states changes and others read as well.

    Gains and biases beside the blocks, biases of layers that write to the hidden states, and a
    table that output layers read too.
    """
    name, norm = ends.norm
    found = [flow.shared_vector(norm.gain, norm.scaled, role=name, name=f"{name}.weight")]
    if norm.bias is not None:
        made = norm.shifted
        found.append(flow.shared_vector(norm.bias, made, role=name, name=f"{name}.bias"))
    for plan in plans:
        stages = plan.topology.stages
        for role in (*stages[1], *stages[-1]):
            layer = plan.layers[role]
            if layer.bias is not None:
                full = f"{plan.topology.name}.{role}.bias"
                made = layer.uses[0].output
                found.append(flow.shared_vector(layer.bias, made, role=role, name=full))
    for name, table in ends.embeddings.items():
        readings = flow.graph.readings(table.weight)
        for use in table.uses if readings > len(table.uses) else ():
            node = flow.graph.nodes[use.node]
            reading = Reading(node.name, node.output[0], 0)
            copy = f"{name}.weight"
            found.append(SharedVector(table.weight, name, copy, reading, readings))
    return [vector for vector in found if vector is not None]


class OnnxEnds:
    """The outputs of a graph without its blocks, see :data:`aimet_ext.models.residual.EndsFn`.

    :param batch: Inputs of the graph by name.
    :raises TransformRefused: an operator has no differentiable form here.
    """

    def __init__(self, flow: Flow, ends: EndsPlan, batch: Mapping[str, Tensor]) -> None:
        self.plan, self.batch = ends, batch
        graph, values = flow.graph, ends.values
        heads = dict(ends.readers)
        tables = {k: v for k, (v, _) in values.items() if k.rpartition(".")[0] in ends.embeddings}
        norms = {k: v for k, (v, _) in values.items() if k.rpartition(".")[0] == ends.norm[0]}
        self.front = graph_part(graph, [], [ends.start], {}, tables).double()
        self.back = graph_part(graph, [ends.end], ends.logits, heads, norms).double()

    def __call__(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return the outputs in float64, one beside the other in a vector."""
        outputs = self._run(self.back, params, [self._run(self.front, params, [])[0]])
        return torch.cat([output.flatten() for output in outputs])

    def _run(
        self, part: TranslatedGraph, params: Mapping[str, Tensor], first: list[Tensor]
    ) -> tuple[Tensor, ...]:
        inputs = [*first, *(self.batch[name] for name in part.inputs[len(first) :])]
        own = {name: params[name] for name, _ in part.named_parameters()}
        with torch.no_grad(), float64_casts(torch.float64):
            found = functional_call(part, own, tuple(inputs))
        return found if isinstance(found, tuple) else (found,)


def graph_part(
    graph: OnnxGraph,
    given: Sequence[str],
    outputs: Sequence[str],
    linears: Mapping[str, OnnxLayer],
    parameters: Mapping[str, str],
) -> TranslatedGraph:
    """Return a part of a graph; it takes ``given`` and then the inputs of the graph that it reads.

    :param outputs: Tensors that it returns.
    """
    nodes = graph.subgraph([*given, *graph.inputs], outputs)
    read = {name for index in nodes for name in graph.reads[index]}
    inputs = [*given, *(name for name in graph.inputs if name in read)]
    part = TranslatedGraph(graph, nodes, inputs, outputs, linears, parameters)
    return part.requires_grad_(False).eval()


class EndModule(nn.Module):
    """Copies of what a graph stores for an embedding, a norm or an output layer."""

    def __init__(self, graph: OnnxGraph, stored: Mapping[str, tuple[str, bool]]) -> None:
        super().__init__()
        self.graph, self.stored = graph, dict(stored)
        for key, (name, transposed) in self.stored.items():
            value = graph.tensor(name)
            value = value.T.contiguous() if transposed else value
            self.register_parameter(key, nn.Parameter(value, requires_grad=False))

    def commit(self) -> None:
        """Write the copies back."""
        for key, (name, transposed) in self.stored.items():
            value = self.get_parameter(key)
            self.graph.set_tensor(name, value.T if transposed else value)

    @torch.no_grad()
    def reload(self) -> None:
        """Read the values again."""
        for key, (name, transposed) in self.stored.items():
            value = self.graph.tensor(name)
            self.get_parameter(key).copy_(value.T if transposed else value)
