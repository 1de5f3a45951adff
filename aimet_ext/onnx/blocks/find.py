"""Decoder blocks of an ONNX graph: found along the residual stream, and their inputs captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from onnx import NodeProto
from torch import Tensor

from aimet_ext.data.batches import token_mask
from aimet_ext.models.description import TopologyDescription
from aimet_ext.models.topology import BlockTopology
from aimet_ext.onnx.blocks.flow import Flow, Norm, SharedVector
from aimet_ext.onnx.blocks.roles import (
    MismatchError,
    attention_roles,
    block_topology,
    mlp_roles,
)
from aimet_ext.onnx.graph import OnnxGraph, Part
from aimet_ext.onnx.layers import OnnxLayer, other_weights
from aimet_ext.walk.states import real_tokens
from aimet_ext.walk.stream import BlockStream

#: Operators that compute one shape from others.
SHAPE_ARITHMETIC = frozenset(
    (
        *("Add", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Gather", "Identity", "Max"),
        *("Min", "Mul", "ReduceProd", "Reshape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze"),
        "Where",
    )
)
_MASK = "attention_mask"
_TAKEN = (_MASK, "hidden_states")  # parameters of a block


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockPlan:
    """A decoder block in a graph, before its parameters are read.

    :param topology: the block as names; its layers are called as in a checkpoint.
    :param start: tensor of the hidden states that go in.
    :param end: tensor of the hidden states that come out.
    :param nodes: indices of the nodes that depend on ``start``, in order.
    :param constants: nodes beside them that depend on stored values alone.
    :param arguments: other tensors that the block reads, in the order they are read.
    :param layers: graph layer by the name that it has in the block.
    :param norms: by the name that they have in the block.
    :param mask: the argument that is added to the scores, or the mask ``[batch, seq]`` that is fed
        to the graph; None if the block reads neither.
    :param shared: by kind of pair, what it would change and others read as well.
    """

    topology: BlockTopology
    start: str
    end: str
    nodes: tuple[int, ...]
    constants: tuple[int, ...]
    arguments: tuple[str, ...]
    layers: Mapping[str, OnnxLayer]
    norms: Mapping[str, Norm]
    mask: str | None = None
    shared: Mapping[str, Sequence[SharedVector]] = field(default_factory=dict)

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of all stored values that are parameters of the block."""
        pairs = [(layer.weight, layer.bias) for layer in self.layers.values()]
        pairs += [(norm.gain, norm.bias) for norm in self.norms.values()]
        return tuple(dict.fromkeys(name for pair in pairs for name in pair if name is not None))


@dataclass(frozen=True)
class _Addition:
    """One step of the residual stream.

    :param before: tensor of the hidden states before it.
    :param after: tensor after it.
    :param writer: the layer whose output is added.
    :param normed: True if a norm stands between.
    """

    before: str
    after: str
    writer: str
    normed: bool = False


@dataclass
class _Region:
    """Nodes between two tensors and what they read from outside."""

    nodes: list[int] = field(default_factory=list)
    constants: list[int] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)


def find_onnx_blocks(
    graph: OnnxGraph,
    description: TopologyDescription | None = None,
    *,
    stack: str = "model.layers",
) -> tuple[Flow, list[BlockPlan]]:
    """Return the decoder blocks of a graph, in order, by its structure.

    A block adds the output of its attention and then that of its MLP to the hidden states; each
    half reads them through a norm with a gain. Names of nodes do not matter.

    :param description: names for the roles, and ``head_dim``, in place of Llama's.
    :param stack: prefix of the blocks' names; checkpoints have that of the default.
    :returns: the graph that the plans speak of, and the plans.
    :raises ValueError: there is no such block, or blocks differ from that; all differences are
        listed.
    """
    flow = Flow(graph)
    additions = _additions(flow)
    chain = _longest_chain(additions)
    if len(chain) < 2:
        raise ValueError(
            "no decoder block found: layers whose outputs are added to the hidden states, one "
            f"after another, are required, the graph has {len(chain)} such of its "
            f"{len(flow.layers)} linear layers with stored weights"
        )
    plans: list[BlockPlan] = []
    problems: list[str] = []
    if len(chain) % 2:
        problems.append(f"an even number of additions is required, found {len(chain)}")
    known = {step.after for step in chain}
    problems += [
        f"{step.writer} is added to {step.before!r}, which is not the hidden states"
        for step in additions
        if step.after not in known
    ]
    inner = flow.graph.beyond([chain[0].before])
    for number, (first, second) in enumerate(zip(chain[::2], chain[1::2], strict=False)):
        name = f"{stack}.{number}"
        try:
            plans.append(_plan(flow, name, first, second, inner, description))
        except MismatchError as mismatch:
            problems.append(f"{name} ({first.writer}, {second.writer}): {mismatch}")
    problems += _differences(plans)
    if problems:
        raise ValueError(
            "decoder blocks of the ONNX graph are not as required (norm, attention, addition, "
            f"norm, MLP, addition). Differences: {'; '.join(problems)}"
        )
    return flow, plans


def _additions(flow: Flow) -> list[_Addition]:
    """Return all nodes that add a layer's output to something that is none."""
    found = []
    for node in flow.graph.nodes:
        if node.op_type != "Add" or node.output[0] in flow.made:
            continue
        operands = flow.operands(node)
        if len(operands) != 2:
            continue
        writers = [flow.writer(name) for name in operands]
        for writer, own, other in zip(writers, operands, reversed(operands), strict=True):
            # An activation may add to a layer's output what it makes of that.
            if writer is not None and writer not in flow.layers_behind(other):
                normed = flow.origin(own) not in flow.made
                found.append(_Addition(flow.origin(other), node.output[0], writer, normed))
    return found


def _longest_chain(additions: Sequence[_Addition]) -> list[_Addition]:
    """Return the longest row of additions, each of which adds to what the one before gave."""
    best: dict[str, list[_Addition]] = {}
    for step in additions:
        chain = [*best.get(step.before, ()), step]
        if len(chain) > len(best.get(step.after, ())):
            best[step.after] = chain
    return max(best.values(), key=len, default=[])


def _plan(
    flow: Flow,
    name: str,
    first: _Addition,
    second: _Addition,
    inner: set[str],
    description: TopologyDescription | None,
) -> BlockPlan:
    """Describe one block; ``inner`` are all tensors that depend on the first block's input.

    :raises MismatchError: it is not as it should be.
    """
    region = _region(flow, first.before, second.after)
    foreign = sorted(set(region.arguments) & inner)
    if foreign:
        raise MismatchError(f"it must read the hidden states alone, it also reads {foreign}")
    upper = _region(flow, first.before, first.after).layers
    lower = [layer for layer in region.layers if layer not in upper]
    attention = attention_roles(flow, first.before, first.writer, upper)
    mlp = mlp_roles(flow, first.after, second.writer, lower)
    repeated = [n for n in region.layers if len(flow.graph.consumers[flow.layers[n].weight]) > 1]
    if repeated:
        raise MismatchError(f"{', '.join(repeated)}: each weight must be used in one place")
    topology, norms, shared = block_topology(flow, name, attention, mlp, description)
    normed = [step.writer for step in (first, second) if step.normed]
    return BlockPlan(
        topology=replace(topology, between=tuple(f"the norm behind {name}" for name in normed)),
        start=first.before,
        end=second.after,
        nodes=tuple(region.nodes),
        constants=tuple(region.constants),
        arguments=tuple(region.arguments),
        layers={role: flow.layers[layer] for role, layer in topology.aliases.items()},
        norms=norms,
        mask=_mask(flow, attention.mask, region.arguments),
        shared=shared,
    )


def _region(flow: Flow, start: str, end: str) -> _Region:
    """Return the nodes between two tensors that depend on the first, and what else they read."""
    graph = flow.graph
    behind = graph.behind([end], lambda name, _: name != start)
    order = sorted({graph.producer[n] for n in behind if n != start and n in graph.producer})
    depends: set[str] = {start}
    constant: set[str] = set()
    shapes: set[str] = set()  # small, and other than in the data for another batch size
    for index in order:
        node = graph.nodes[index]
        inputs = graph.reads[index]
        if any(name in depends for name in inputs):
            depends.update(node.output)
        elif all(name in constant or flow.graph.is_stored(name) for name in inputs):
            constant.update(node.output)
        elif _counts(flow, node) or (
            node.op_type in SHAPE_ARITHMETIC
            and all(name in shapes | constant or flow.graph.is_stored(name) for name in inputs)
        ):
            shapes.update(node.output)
    region = _Region()
    needed: set[str] = set()
    for index in reversed(order):
        node = graph.nodes[index]
        if not (depends | needed).intersection(node.output):
            continue
        fixed = constant.intersection(node.output)
        (region.constants if fixed else region.nodes).append(index)
        needed.update(name for name in graph.reads[index] if name in constant | shapes)
    region.nodes.reverse()
    region.constants.reverse()
    depends |= shapes
    for index in region.nodes:
        node = graph.nodes[index]
        layer = flow.layer_of(node)
        if layer is not None and layer not in region.layers:
            region.layers.append(layer)
        for name in graph.reads[index]:
            known = name in depends or name in constant or flow.graph.is_stored(name)
            if not known and name not in region.arguments:
                region.arguments.append(name)
    return region


def _counts(flow: Flow, node: NodeProto) -> bool:
    """Return True if a node counts tokens: by a shape, or by a sum over the mask that is fed."""
    if node.op_type == "ReduceSum":
        return flow.origin(node.input[0]) in flow.graph.inputs
    return node.op_type == "Shape"


def _mask(flow: Flow, added: str | None, arguments: Sequence[str]) -> str | None:
    """Return the argument that says which tokens are attended to."""
    if added in arguments:
        return added
    return next((name for name in arguments if flow.origin(name) == "attention_mask"), None)


def _differences(plans: Sequence[BlockPlan]) -> list[str]:
    """Return blocks that are not of one kind with the first."""
    problems = []
    for plan in plans[1:]:
        mine, first = plan.topology, plans[0].topology
        if mine.linears != first.linears:
            problems.append(f"{mine.name} has {mine.linears}, {first.name} has {first.linears}")
        if len(plan.arguments) != len(plans[0].arguments):
            problems.append(
                f"{mine.name} reads {list(plan.arguments)} beside the hidden states, "
                f"{first.name} {list(plans[0].arguments)}"
            )
    return problems


def argument_names(plans: Sequence[BlockPlan]) -> tuple[str, ...]:
    """Return names by which all blocks are given their other tensors, those of the first one."""
    first = plans[0]
    names = (f"{name}_" if name in _TAKEN else name for name in first.arguments)
    pairs = zip(first.arguments, names, strict=True)
    return tuple(_MASK if own == first.mask else name for own, name in pairs)


def capture_blocks(
    flow: Flow,
    plans: Sequence[BlockPlan],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    quantized: Callable[[str], Tensor | None],
    cache_dir: str | Path | None = None,
    device: torch.device | str | None = None,
) -> BlockStream:
    """Capture the first block's inputs for every batch, and the other tensors all blocks read.

    :param batches: inputs of the graph by name.
    :param quantized: function from a layer's name to the weight ``[out, in]`` to use for it, None
        for the stored one.
    :raises ValueError: blocks differ in what they receive, a batch is masked whole, or hidden
        states are not finite or not ``[batch, seq, hidden]``.
    :raises RuntimeError: onnxruntime failed on a batch.
    """
    wanted = dict.fromkeys([plans[0].start, *(n for plan in plans for n in plan.arguments)])
    outputs = [name for name in wanted if name not in flow.graph.inputs]
    graph = flow.graph
    nodes = graph.subgraph(graph.inputs, outputs)
    layers = {**flow.found, **other_weights(graph, ())}
    before = [name for name, layer in layers.items() if layer.uses[0].node in set(nodes)]
    weights = {name: weight for name in before if (weight := quantized(name)) is not None}
    part = Part(
        graph,
        nodes,
        list(graph.inputs),
        outputs,
        layers=layers,
        weights=weights,
    )
    names = argument_names(plans)
    stream = BlockStream(torch.device("cpu") if device is None else device, cache_dir)
    try:
        for number, batch in enumerate(batches):
            found = {**batch, **_run(part, batch, number)}
            _check_equal(plans, found, number)
            hidden = _hidden(found[plans[0].start], number)
            kwargs = {
                name: found[inner] for name, inner in zip(names, plans[0].arguments, strict=True)
            }
            mask = token_mask(batch)
            new = None if mask is None else mask[:, -hidden.shape[1] :]  # without cached tokens
            stream.append(
                hidden, (hidden,), kwargs, real_tokens(new, kwargs.get(_MASK), hidden, number)
            )
    except BaseException:
        stream.close()
        raise
    return stream


def _run(part: Part, batch: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    try:
        return part.run(batch)
    except Exception as error:
        raise RuntimeError(
            f"onnxruntime failed on batch {number} with {type(error).__name__}: {error}"
        ) from error


def _check_equal(plans: Sequence[BlockPlan], found: Mapping[str, Tensor], number: int) -> None:
    """Check that all blocks receive the same tensors, whatever their names."""
    for plan in plans[1:]:
        for mine, first in zip(plan.arguments, plans[0].arguments, strict=True):
            if mine != first and not torch.equal(found[mine], found[first]):
                raise ValueError(
                    f"all blocks must receive the same tensors beside the hidden states, but in "
                    f"batch {number} {mine!r} of {plan.topology.name} differs from {first!r} of "
                    f"{plans[0].topology.name}; calibrate without cached keys and values, models "
                    "whose layers have different masks are not supported"
                )


def _hidden(hidden: Tensor, number: int) -> Tensor:
    if hidden.ndim != 3 or not bool(hidden.isfinite().all()):
        raise ValueError(
            "the first block must receive finite hidden states [batch, seq, hidden], got "
            f"{'NaN or infinity' if hidden.ndim == 3 else list(hidden.shape)} for batch {number}; "
            "check the batch and the embedding's weights"
        )
    return hidden
