"""Roles of the layers of an ONNX decoder block by its structure, and its stages and scale pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from onnx import NodeProto

from aimet_ext.core.equivalence import ScalePair
from aimet_ext.models.description import TopologyDescription, candidate_pairs
from aimet_ext.models.topology import BlockTopology
from aimet_ext.onnx.blocks.flow import ATTENTION, Flow, Norm, SharedVector
from aimet_ext.onnx.index import attribute

_LLAMA = TopologyDescription(name="onnx", block_class="ONNX block")
_PRODUCTS = frozenset(("Einsum", "FusedMatMul", "MatMul"))


@dataclass(frozen=True)
class Heads:
    """Attention heads as far as a graph states them, named as in a model's config; else None.

    :param dim: channels of a head.
    :param partial_rotary_factor: share of a head's channels that rotary embeddings turn, pairs
        ``d/2`` apart.
    :param refusal: why queries and keys cannot be rescaled.
    """

    dim: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    partial_rotary_factor: float | None = None
    refusal: str | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionRoles:
    """Layers of the attention by name; roles that share a layer are fused.

    :param qk_norms: gains between the projections and the scores.
    :param mask: tensor that is added to the scores, None without one.
    """

    norm: Norm
    q: str
    k: str
    v: str
    o: str
    others: tuple[str, ...] = ()
    qk_norms: tuple[str, ...] = ()
    heads: Heads = field(default_factory=Heads)
    mask: str | None = None


@dataclass(frozen=True, kw_only=True)
class MlpRoles:
    """Layers of the MLP by name; gate is None where there is none, or equals up if fused."""

    norm: Norm
    gate: str | None
    up: str
    down: str
    others: tuple[str, ...] = ()


class MismatchError(Exception):
    """A part of a block is not what it should be; the message says what was found."""


def attention_roles(flow: Flow, start: str, writer: str, members: Sequence[str]) -> AttentionRoles:
    """Return roles in the first half of a block.

    :param start: hidden states that the half begins with.
    :param writer: the layer whose output is added to them.
    :param members: all linear layers of the half.
    :raises MismatchError: the structure is another one.
    """
    core = _core(flow, start, flow.layers[writer].uses[0].input)
    if core.op_type == "Softmax":
        query, key, value, mask = _explicit(flow, core)
    else:
        query, key, value = _packed(core)
        mask = None
    found = {
        role: _only(flow, tensor, f"the {role} input of {core.op_type} {core.name!r}")
        for role, tensor in (("query", query), ("key", key), ("value", value))
    }
    layers = tuple(found.values())
    norm, others = _readers(flow, start, layers, [n for n in members if n != writer])
    gains = {
        gain
        for tensor, layer in ((query, found["query"]), (key, found["key"]))
        for gain in _gains(flow, tensor, layer)
    }
    return AttentionRoles(
        norm=norm,
        q=found["query"],
        k=found["key"],
        v=found["value"],
        o=writer,
        others=others,
        qk_norms=tuple(sorted(gains)),
        heads=_heads(flow, core, found, value),
        mask=mask,
    )


def mlp_roles(flow: Flow, start: str, writer: str, members: Sequence[str]) -> MlpRoles:
    """Return roles in the second half of a block; parameters as for :func:`attention_roles`."""
    tensor = flow.origin(flow.layers[writer].uses[0].input)
    node = flow.graph.node(tensor)
    gate: str | None = None
    sides = [] if node is None or node.op_type != "Mul" else flow.operands(node)
    direct = [side for side in sides if flow.straight_to_layer(side) is not None]
    if len(sides) == 2 and len(direct) == 1:
        through = next(side for side in sides if side not in direct)
        up = _only(flow, direct[0], f"the factor {direct[0]!r} of {writer}")
        gate = _only(flow, through, f"the factor {through!r} of {writer}")
        if gate == up:
            gate = gate if _in_halves(flow, up, direct[0], through) else None
    else:
        up = _only(flow, tensor, f"the input of {writer}")
    roles = (up,) if gate is None else (gate, up)
    norm, others = _readers(flow, start, roles, [n for n in members if n != writer])
    return MlpRoles(norm=norm, gate=gate, up=up, down=writer, others=others)


def _core(flow: Flow, start: str, end: str) -> NodeProto:
    """Return the one node of attention between the hidden states and the output projection."""
    found: dict[str, NodeProto] = {}
    for name in flow.behind(end, {start, *flow.made}):
        node = flow.graph.node(name)
        if name not in flow.made and node is not None and node.op_type in ATTENTION:
            found[node.output[0]] = node
    if len(found) != 1:
        kinds = ", ".join(sorted(node.op_type for node in found.values())) or "none"
        raise MismatchError(f"one attention (Softmax or a fused one) is required, found {kinds}")
    return next(iter(found.values()))


def _explicit(flow: Flow, softmax: NodeProto) -> tuple[str, str, str, str | None]:
    """Return query, key and value around a softmax, and the mask that is added before it."""
    mask: str | None = None
    tensor = softmax.input[0]
    while True:
        tensor = flow.origin(tensor)
        node = flow.graph.node(tensor)
        operands = [] if node is None else flow.operands(node)
        if node is None or not operands:
            raise MismatchError(f"the scores of Softmax {softmax.name!r} come from no product")
        if node.op_type in _PRODUCTS and len(operands) == 2:
            query, key = operands
            break
        inner = [name for name in operands if flow.layers_behind(name)]
        if len(inner) != 1:
            raise MismatchError(f"{node.op_type} {node.name!r} mixes scores of different layers")
        if node.op_type == "Add" and len(operands) == 2:
            mask = next(name for name in operands if name != inner[0])
        tensor = inner[0]
    probabilities = softmax.output[0]
    for _ in range(8):
        readers = [flow.graph.nodes[i] for i in flow.graph.consumers.get(probabilities, ())]
        product = next((n for n in readers if n.op_type in _PRODUCTS), None)
        if product is not None:
            value = next(n for n in product.input if n != probabilities)
            return query, key, value, mask
        following = [n for n in readers if n.op_type != "Shape"]
        if len(following) != 1:
            break
        probabilities = following[0].output[0]
    raise MismatchError(f"what Softmax {softmax.name!r} gives is multiplied by no values")


def _packed(node: NodeProto) -> tuple[str, str, str]:
    """Return query, key and value of a fused attention; one tensor three times if packed."""
    inputs = [*node.input, "", ""]
    if attribute(node, "do_rotary", 0) and len(node.input) < 9:
        raise MismatchError(f"{node.op_type} {node.name!r} turns without cos_cache and sin_cache")
    if node.op_type == "Attention" and node.domain == "com.microsoft":
        raise MismatchError(f"com.microsoft Attention {node.name!r} holds its own projections")
    return inputs[0], inputs[1] or inputs[0], inputs[2] or inputs[0]


def _only(flow: Flow, tensor: str, what: str) -> str:
    """Return the one layer whose output a tensor is made of."""
    layers = flow.layers_behind(tensor)
    if len(layers) != 1:
        raise MismatchError(f"{what} must come from one layer, found {', '.join(layers) or 'none'}")
    return layers[0]


def _readers(
    flow: Flow, start: str, roles: Iterable[str], members: Iterable[str]
) -> tuple[Norm, tuple[str, ...]]:
    """Return the norm that the input layers of a half read, and its readers without a role."""
    wanted = tuple(dict.fromkeys(roles))
    inputs = {flow.origin(flow.layers[name].uses[0].input) for name in wanted}
    if len(inputs) != 1:
        raise MismatchError(f"{', '.join(wanted)} must read one norm, they read {sorted(inputs)}")
    tensor = inputs.pop()
    norm = flow.norm(tensor, {start, flow.origin(start)})
    if norm is None:
        raise MismatchError(
            f"{', '.join(wanted)} must read the hidden states through a norm with a gain, "
            f"{tensor!r} is none"
        )
    layers, odd = [], []
    for node in _real_readers(flow, tensor):
        layer = flow.layer_of(node)
        if layer is None:
            odd.append(f"{node.op_type} {node.name!r}")
        elif layer not in wanted:
            layers.append(layer)
    missing = sorted(set(members) - set(wanted) - set(layers))
    if odd or missing:
        raise MismatchError(
            f"{', '.join(odd + missing)}: what else reads the norm, or lies between, must be a "
            "layer that reads the norm"
        )
    return norm, tuple(dict.fromkeys(layers))


def _real_readers(flow: Flow, tensor: str) -> Iterator[NodeProto]:
    """Yield the nodes that read the values of a tensor, through casts and identities."""
    for index in flow.graph.consumers.get(tensor, ()):
        node = flow.graph.nodes[index]
        if node.op_type in ("Cast", "Identity"):
            yield from _real_readers(flow, node.output[0])
        elif node.op_type != "Shape":
            yield node


def _gains(flow: Flow, tensor: str, layer: str) -> Iterator[str]:
    """Yield the stored gains of norms between a projection and the scores."""
    outputs = {use.output for use in flow.layers[layer].uses}
    sources = flow.moved(outputs)
    for name in flow.behind(tensor, outputs):
        found = None if name in sources else flow.norm(name, sources)
        if found is not None:
            yield found.gain


def _heads(flow: Flow, core: NodeProto, found: dict[str, str], value: str) -> Heads:
    """Return head counts of a fused attention, or the head's width by the reshape of the values."""
    if core.op_type == "Softmax":
        output = flow.layers[found["value"]].uses[0].output
        shape = flow.reshaped(value, output)
        return Heads(dim=shape[-1] if shape and (shape[-1] or 0) > 0 else None)
    query = attribute(core, "num_heads", attribute(core, "q_num_heads", None))
    count = attribute(core, "kv_num_heads", query)
    if not query:
        return Heads(refusal=f"{core.op_type} does not say how many heads it has")
    rows = flow.shape(found["query"])[0]
    shared = [found["query"], found["key"], found["value"]].count(found["query"])
    total = {1: query, 2: query + count, 3: query + 2 * count}[shared]
    dim = rows // total
    rotary: float | None = None
    refusal = None
    if attribute(core, "do_rotary", 0):
        rotary = 2 * flow.graph.shape(core.input[7])[-1] / dim
        if attribute(core, "rotary_interleaved", 0):
            refusal = "rotary embeddings turn neighbouring channels (rotary_interleaved)"
    return Heads(dim, query, count, rotary, refusal)


def _in_halves(flow: Flow, layer: str, direct: str, through: str) -> bool:
    """Return True if one layer holds both gate and up, rather than an activation of its own output.

    :raises MismatchError: it holds them in another order.
    """
    places = [flow.half(tensor, layer) for tensor in (through, direct)]
    if places == [None, None]:
        return False
    if places != [0, 1]:
        raise MismatchError(
            f"the rows of {layer} must be those of the gate and then those of up, found {places}"
        )
    return True


# ---- names of the roles -------------------------------------------------------------------------


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
    found_block = BlockTopology(
        name, tuple(named), table.stages, kept, unavailable, dict(named), table.head_dim
    )
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
    return replace(
        names,
        **qkv,
        gate=gate,
        up=up,
        attention_readers=_others("self_attn.reader", attention.others),
        mlp_readers=_others("mlp.reader", mlp.others),
        qk_norms=("self_attn.q_norm", "self_attn.k_norm") if attention.qk_norms else (),
        others=(),
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
        flow.shared_vector(stored, made, role=role, name=f"{block}.{role}.{what}")
        for role, what, stored, made in vectors
        if stored is not None
    ]
    return [vector for vector in found if vector is not None]
