"""The ends of an ONNX simulation's residual stream: given values of their own, found, computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aimet_ext.models.description import TopologyDescription
from aimet_ext.models.residual import ReadNorm, ResidualEnds, Survey
from aimet_ext.onnx.blocks.ends import (
    EndModule,
    OnnxEnds,
    find_onnx_ends,
    graph_part,
    shared_ends,
)
from aimet_ext.onnx.blocks.find import BlockPlan, find_onnx_blocks
from aimet_ext.onnx.blocks.flow import to_copy
from aimet_ext.onnx.graph import OnnxGraph, Part
from aimet_ext.onnx.shells import insert_module
from aimet_ext.onnx.values import input_specs
from aimet_ext.sim.onnx.blocks import BlockStack, Copies, OnnxPart
from aimet_ext.sim.onnx.quantizers import is_integer

if TYPE_CHECKING:
    from aimet_ext.sim.onnx.adaptor import OnnxSim

_BATCH, _LENGTH = 2, 16
_IDS, _MASK, _POSITIONS, _PAST = "input_ids", "attention_mask", "position_ids", "past_key_values"


def copy_ends(adaptor: OnnxSim, description: TopologyDescription | None) -> Copies:
    """Copy what a rotation of the hidden states changes and others read as well.

    :returns: the copies, which can be undone. The adaptor has to look at the graph again.
    :raises TransformRefused: the ends are not as required.
    """
    flow, plans = find_onnx_blocks(adaptor.graph, description)
    shared = shared_ends(flow, plans, find_onnx_ends(flow, plans, "model."))
    copies = Copies(adaptor.sim, adaptor.graph)
    try:
        for vector in to_copy(shared):
            copies.add(vector)
    except BaseException:
        copies.undo()
        raise
    return copies


def add_ends(adaptor: OnnxSim, blocks: str, batch: Mapping[str, Tensor]) -> ResidualEnds:
    """Find the ends and put them into the adaptor's model, each a part of its own.

    :param blocks: Name of the module that holds the blocks.
    :param batch: Inputs of the graph on which it is computed without its blocks.
    """
    stack = adaptor.model.get_submodule(blocks)
    assert isinstance(stack, BlockStack)
    plans = list(stack.plans.values())
    plan = find_onnx_ends(stack.flow, plans, _root(plans))
    layers = {**plan.embeddings, **plan.readers}
    inside = {index for block in plans for index in block.nodes}
    nodes = [node for index, node in enumerate(stack.flow.graph.nodes) if index not in inside]
    beside = [name for node in nodes for name in node.output if name]
    for name in (*plan.embeddings, plan.norm[0], *plan.readers):
        prefix = f"{name}."
        stored = {
            full.removeprefix(prefix): value
            for full, value in plan.values.items()
            if full.startswith(prefix)
        }
        module = EndModule(adaptor.graph, stored)
        insert_module(adaptor.model, name, module)
        adaptor.parts[name] = OnnxPart(
            layers={"": layers[name]} if name in layers else {},
            stored=[value for value, _ in stored.values()],
            tensors=beside if name == plan.norm[0] else (),
            commit=module.commit,
            reload=module.reload,
        )
    norm = ReadNorm(plan.norm[0], tuple(plan.readers), plan.norm[1].gain_offset)
    return ResidualEnds(tuple(plan.embeddings), norm, OnnxEnds(stack.flow, plan, batch))


def _root(plans: Sequence[BlockPlan]) -> str:
    """Return the prefix of names that the blocks have: ``"model."`` of ``"model.layers.0"``."""
    return f"{plans[0].topology.name.split('.')[0]}."


def survey(adaptor: OnnxSim, batches: Sequence[Mapping[str, Tensor]]) -> Survey:
    """Return the float outputs of a simulation, and the ranges of what its quantizers read."""
    graph = adaptor.graph
    weights = {
        layer.weight for layer in adaptor.layers.values() if layer.weight in adaptor.sim.param_names
    }
    quantized = [n for n, q in adaptor.sim.qc_quantize_op_dict.items() if is_integer(q)]
    made = [name for name in quantized if name in graph.producer and name not in graph.stored]
    outputs = [name for name in graph.outputs if name in _logits(adaptor, graph)]
    wanted = list(dict.fromkeys([*outputs, *made]))
    ranges: dict[str, tuple[float, float]] = {}
    found: list[Tensor] = []
    part = Part(
        graph,
        graph.subgraph(graph.inputs, wanted),
        list(graph.inputs),
        wanted,
        layers={},
        weights={},
    )
    for batch in batches:
        values = part.run(batch)
        found.append(torch.cat([values[name].flatten() for name in outputs]))
        for name in made:
            low, high = ranges.get(name, (float("inf"), -float("inf")))
            value = values[name]
            if value.numel() and value.is_floating_point():
                ranges[name] = min(low, float(value.min())), max(high, float(value.max()))
    for name in quantized:
        if name in graph.stored and name not in weights:
            value = graph.tensor(name)
            ranges[name] = float(value.min()), float(value.max())
    return Survey(tuple(found), ranges)


def logits_behind(adaptor: OnnxSim, blocks: str) -> Callable[[Any, Tensor], Tensor]:
    """Return a function from a batch and its last hidden states to the float graph's logits."""
    stack = adaptor.model.get_submodule(blocks)
    assert isinstance(stack, BlockStack)
    graph, end = stack.flow.graph, list(stack.plans.values())[-1].end
    behind = graph.beyond([end])
    outputs = [name for name in graph.outputs if name in behind]
    part = graph_part(graph, [end], outputs[:1], {}, {})

    def logits(batch: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        found = part(hidden, *(batch[name].to(hidden.device) for name in part.inputs[1:]))
        assert isinstance(found, Tensor)
        return found

    return logits


def _logits(adaptor: OnnxSim, graph: OnnxGraph) -> set[str]:
    """Return what depends on the last block; caches may hold rotated values."""
    stacks = (m for m in adaptor.model.modules() if isinstance(m, BlockStack))
    stack = next(stacks, None)
    if stack is None:
        return set(graph.outputs)
    return stack.flow.graph.beyond([list(stack.plans.values())[-1].end])


def probe_batch(adaptor: OnnxSim) -> dict[str, Tensor]:
    """Return two short sequences of random ids as a graph's inputs.

    :raises ValueError: the graph has further inputs, or no table of embeddings.
    """
    graph = adaptor.graph
    rows = [graph.shape(x.weight)[0] for x in adaptor.layers.values() if x.kind == "embedding"]
    specs = input_specs(graph.inputs)
    known = [name for name in specs if name in (_IDS, _MASK, _POSITIONS) or name.startswith(_PAST)]
    others = sorted(set(specs) - set(known))
    if others or _IDS not in specs or not rows:
        raise ValueError(
            f"dataloader must be given for a graph with the inputs {', '.join(specs)}: random ids "
            f"are made for {_IDS}, {_MASK}, {_POSITIONS} and empty {_PAST} alone"
        )
    sizes = specs[_IDS].sizes
    batch, length = sizes[0] or _BATCH, sizes[1] or _LENGTH
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, max(rows), (batch, length), generator=generator)
    feed = {_IDS: ids, _MASK: torch.ones_like(ids), _POSITIONS: torch.arange(length).expand_as(ids)}
    if batch > 1:
        feed[_MASK][-1, length - length // 4 :] = 0
    for name in known:
        if name.startswith(_PAST):
            free = (batch, 1, 0, 1)
            found = specs[name].sizes
            feed[name] = torch.zeros([s or f for s, f in zip(found, free, strict=True)])
    return {name: feed[name].to(specs[name].dtype or feed[name].dtype) for name in specs}
