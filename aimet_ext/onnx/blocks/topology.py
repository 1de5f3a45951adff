"""Stages and scale pairs of a decoder block of an ONNX graph, named as checkpoints name them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from aimet_ext.core.equivalence import ScalePair
from aimet_ext.models.topology import BlockTopology, TopologyDescription, candidate_pairs
from aimet_ext.onnx.blocks.flow import Flow, Norm
from aimet_ext.onnx.blocks.roles import AttentionRoles, MismatchError, MlpRoles

_SAME = frozenset(("Cast", "Dropout", "Identity"))
_LLAMA = TopologyDescription(name="onnx", block_class="ONNX block")


@dataclass(frozen=True)
class Reading:
    """One input of a node.

    :param node: name of the node.
    :param output: first tensor that it makes.
    :param place: number of the input.
    """

    node: str
    output: str
    place: int


@dataclass(frozen=True)
class SharedVector:
    """A stored vector that a block would rescale and others read as well.

    :param stored: its name in the graph.
    :param role: module of the block that it belongs to.
    :param name: possible name of a copy for the block alone.
    :param reading: the input through which only this module reads it, None where there is none:
        then no copy can be put in its place.
    :param readings: number of inputs, and outputs of the graph, that it goes to.
    """

    stored: str
    role: str
    name: str
    reading: Reading | None
    readings: int


def block_topology(
    flow: Flow,
    name: str,
    attention: AttentionRoles,
    mlp: MlpRoles,
    description: TopologyDescription | None = None,
) -> tuple[BlockTopology, dict[str, Norm], dict[str, list[SharedVector]]]:
    """Return a block as names, its norms by name, and what is stored once for it and others.

    The last are the vectors that a scale pair would change, by the kind of the pair, which the
    block cannot have as long as they are shared.

    :param name: name of the block.
    :param description: names for the roles, Llama's if None.
    :raises MismatchError: roles share layers in a way that no description has.
    """
    table = _table(attention, mlp, description or _LLAMA)
    named = _named(table, attention, mlp)
    norms = {table.attention_norm: attention.norm, table.mlp_norm: mlp.norm}
    shapes: dict[str, tuple[int, ...]] = {role: flow.shape(layer) for role, layer in named.items()}
    width = shapes[table.q][1]
    shapes |= {table.attention_norm: (width,), table.mlp_norm: (width,)}
    pairs, unavailable = candidate_pairs(table, shapes, table.head_dim, attention.heads)
    if attention.heads.refusal is not None:
        unavailable.setdefault("q_k", attention.heads.refusal)
    shared: dict[str, list[SharedVector]] = {}
    for pair in pairs:
        found = _shared(flow, name, pair, named, norms)
        if found:
            shared[pair.kind] = found
            vectors = ", ".join(f"{vector.stored} of {vector.role}" for vector in found)
            unavailable.setdefault(
                pair.kind,
                f"{vectors} is read in other places too; give each its own copy before the "
                "simulation is built",
            )
    kept = tuple(pair for pair in pairs if pair.kind not in unavailable)
    found_block = BlockTopology(name, tuple(named), table.stages, kept, unavailable, dict(named))
    return found_block, norms, shared


def _table(
    attention: AttentionRoles, mlp: MlpRoles, names: TopologyDescription
) -> TopologyDescription:
    """Return the description of a block, its layers named as in checkpoints of its kind."""
    fused_attention = len({attention.q, attention.k, attention.v})
    fused_mlp = mlp.gate == mlp.up
    if fused_attention == 2 or attention.o in (attention.q, attention.k, attention.v):
        raise MismatchError("query, key and value must be one layer or three")
    qkv = {"q": names.q, "k": names.k, "v": names.v}
    if fused_attention == 1 and len(set(qkv.values())) > 1:
        qkv = dict.fromkeys(qkv, _beside(names.q, "qkv_proj"))
    gate, up = names.gate, names.up
    if mlp.gate is None:
        gate = None
    elif fused_mlp and gate != up:
        gate = up = _beside(names.up, "gate_up_proj")
    elif gate is None:
        raise MismatchError(f"{mlp.gate} and {mlp.up} are two layers, the description names one")
    offsets = {attention.norm.gain_offset, mlp.norm.gain_offset}
    if len(offsets) > 1:
        raise MismatchError("both norms must add the same to their gains")
    return TopologyDescription(
        name=names.name,
        block_class=names.block_class,
        attention_norm=names.attention_norm,
        mlp_norm=names.mlp_norm,
        q=qkv["q"],
        k=qkv["k"],
        v=qkv["v"],
        o=names.o,
        gate=gate,
        up=up,
        down=names.down,
        attention_readers=_others("self_attn.reader", attention.others),
        mlp_readers=_others("mlp.reader", mlp.others),
        qk_norms=("self_attn.q_norm", "self_attn.k_norm") if attention.qk_norms else (),
        gain_offset=offsets.pop(),
        head_dim=names.head_dim or attention.heads.dim,
    )


def _beside(name: str, other: str) -> str:
    parent, dot, _ = name.rpartition(".")
    return f"{parent}{dot}{other}"


def _others(stem: str, layers: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{stem}_{number}" for number, _ in enumerate(layers))


def _named(table: TopologyDescription, attention: AttentionRoles, mlp: MlpRoles) -> dict[str, str]:
    """Map the names of a table to the layers of the graph, in dependency order."""
    named = {table.q: attention.q, table.k: attention.k, table.v: attention.v}
    named.update(zip(table.attention_readers, attention.others, strict=True))
    named[table.o] = attention.o
    if table.gate is not None and mlp.gate is not None:
        named[table.gate] = mlp.gate
    named[table.up] = mlp.up
    named.update(zip(table.mlp_readers, mlp.others, strict=True))
    named[table.down] = mlp.down
    return named


def _shared(
    flow: Flow,
    block: str,
    pair: ScalePair,
    named: Mapping[str, str],
    norms: Mapping[str, Norm],
) -> list[SharedVector]:
    """Return gains and biases that a pair would rescale and that are not the block's alone."""
    vectors: list[tuple[str, str, str | None, str]] = []  # role, what of it, stored, where read
    for side in pair.sides:
        if side.axis != "out":
            continue
        if side.module in norms:
            norm = norms[side.module]
            vectors.append((side.module, "weight", norm.gain, norm.scaled))
            vectors.append((side.module, "bias", norm.bias, norm.shifted))
        else:
            layer = flow.layers[named[side.module]]
            vectors.append((side.module, "bias", layer.bias, layer.uses[0].output))
    found = [
        _shared_vector(flow, stored, made, role=role, name=f"{block}.{role}.{what}")
        for role, what, stored, made in vectors
        if stored is not None
    ]
    return [vector for vector in found if vector is not None]


def _shared_vector(
    flow: Flow, stored: str, made: str, *, role: str, name: str
) -> SharedVector | None:
    """Return a stored vector as one that is shared, None if it has one reader.

    :param stored: name of the vector.
    :param made: tensor that the node makes which uses it.
    :param role: see :class:`SharedVector`, as ``name``.
    """
    graph = flow.graph
    readings = graph.readings(stored)
    reading = _reading(flow, stored, made)
    if readings == 1 and reading is not None:
        return None
    return SharedVector(stored, role, name, reading, readings)


def to_copy(shared: Iterable[SharedVector]) -> list[SharedVector]:
    """Return the shared vectors that need a copy before they are rescaled, each reading once.

    Where nothing but these reads a vector, the first of them keeps it.
    """
    groups: dict[str, dict[Reading, SharedVector]] = {}
    for vector in shared:
        if vector.reading is not None:
            groups.setdefault(vector.stored, {}).setdefault(vector.reading, vector)
    found: list[SharedVector] = []
    for group in groups.values():
        vectors: Sequence[SharedVector] = list(group.values())
        found += vectors[1:] if len(vectors) == vectors[0].readings else vectors
    return found


def _reading(flow: Flow, stored: str, made: str) -> Reading | None:
    """Return the input behind which only the node that makes a tensor uses a stored vector."""
    graph = flow.graph
    index = graph.producer[made]
    place = _place(flow, index, stored)
    while place is not None:
        node = graph.nodes[index]
        name = node.input[place]
        if name == stored:
            return Reading(node.name, node.output[0], place)
        if name in graph.outputs or len(graph.consumers[name]) != 1:
            return None
        index = graph.producer[name]
        place = 0 if graph.nodes[index].op_type in _SAME else _place(flow, index, stored)
    return None


def _place(flow: Flow, index: int, stored: str) -> int | None:
    """Return the one input of a node that has a stored vector's values, or these and an offset."""
    places = [i for i, name in enumerate(flow.graph.nodes[index].input) if _has(flow, name, stored)]
    return places[0] if len(places) == 1 else None


def _has(flow: Flow, name: str, stored: str) -> bool:
    if not name:
        return False
    origin = flow.origin(name)
    node = flow.graph.node(origin)
    if origin == stored or node is None or node.op_type != "Add":
        return origin == stored
    sources = [flow.origin(other) for other in node.input]
    return stored in sources and all(flow.graph.is_stored(other) for other in sources)
