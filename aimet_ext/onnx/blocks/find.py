"""Decoder blocks of an ONNX graph: the residual stream, and what is added to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onnx import NodeProto

from aimet_ext.models.topology import BlockTopology, TopologyDescription
from aimet_ext.onnx.blocks.flow import Flow, Norm
from aimet_ext.onnx.blocks.roles import MismatchError, attention_roles, mlp_roles
from aimet_ext.onnx.blocks.topology import SharedVector, block_topology
from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.index import reads
from aimet_ext.onnx.layers import OnnxLayer

__all__ = ["SHAPE_ARITHMETIC", "BlockPlan", "find_onnx_blocks"]

#: Operators that compute one shape from others.
SHAPE_ARITHMETIC = frozenset(
    (
        *("Add", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Gather", "Identity", "Max"),
        *("Min", "Mul", "ReduceProd", "Reshape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze"),
        "Where",
    )
)


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
    """

    before: str
    after: str
    writer: str


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
        for writer, other in ((writers[0], operands[1]), (writers[1], operands[0])):
            # An activation may add to a layer's output what it makes of that.
            if writer is not None and writer not in flow.layers_behind(other):
                found.append(_Addition(flow.origin(other), node.output[0], writer))
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
    return BlockPlan(
        topology=topology,
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
        inputs = list(reads(node))
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
        needed.update(name for name in reads(node) if name in constant | shapes)
    region.nodes.reverse()
    region.constants.reverse()
    depends |= shapes
    for index in region.nodes:
        node = graph.nodes[index]
        layer = flow.layer_of(node)
        if layer is not None and layer not in region.layers:
            region.layers.append(layer)
        for name in reads(node):
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
