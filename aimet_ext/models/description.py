"""The layers of a decoder block as a user describes them, and the scale pairs that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aimet_ext.core.equivalence import PairKind, ScalePair, Side
from aimet_ext.walk.routing import PackedLayers

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class TopologyDescription:
    """The modules of a decoder block, named relative to the block.

    A technique goes by it in place of what it finds by running a block, which takes any
    architecture: to name the layers itself, or to leave out what is not described.

    Roles that share a module are fused: its output rows hold the roles one after another, in the
    order query, key, value or gate, up. Every module of the block that has a weight must be named.

    :param name: Name of the family, for messages.
    :param block_class: Class name of the block, matched against the classes it derives from.
    :param attention_norm: Norm that the attention's input projections read.
    :param mlp_norm: Norm that the MLP's input projections read.
    :param q: Projection to the queries.
    :param k: Projection to the keys.
    :param v: Projection to the values.
    :param o: Projection of the attention's output.
    :param gate: projection that goes through the activation and multiplies ``up``; None for an
        MLP without a gate, where ``up`` goes through the activation.
    :param up: Projection to the inner channels of the MLP.
    :param down: Projection from the inner channels to the MLP's output.
    :param attention_readers: all other layers that read the attention norm.
    :param mlp_readers: all other layers that read the MLP norm, a router for example.
    :param qk_norms: norms between the q and k projections and their product.
    :param others: all other modules that have a weight and are in no pair.
    :param gain_offset: 1.0 where norms multiply by ``1 + weight``.
    :param head_dim: width of a head; None to read it from the attention module or the config.
    """

    name: str
    block_class: str
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention_readers: tuple[str, ...] = ()
    mlp_readers: tuple[str, ...] = ()
    qk_norms: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    gain_offset: float = 0.0
    head_dim: int | None = None

    @property
    def attention_inputs(self) -> tuple[str, ...]:
        """All layers that read the attention norm."""
        return tuple(dict.fromkeys((self.q, self.k, self.v, *self.attention_readers)))

    @property
    def mlp_inputs(self) -> tuple[str, ...]:
        """All layers that read the MLP norm."""
        gate = () if self.gate is None else (self.gate,)
        return tuple(dict.fromkeys((*gate, self.up, *self.mlp_readers)))

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """Linear layers in dependency order: what goes in and out of attention, then of the MLP."""
        return self.attention_inputs, (self.o,), self.mlp_inputs, (self.down,)


def described_blocks(model: nn.Module, table: TopologyDescription) -> list[tuple[str, nn.Module]]:
    """Return the blocks of a model that a description is of, by name.

    :raises ValueError: no block is of its class, or a block differs from it; all differences are
        listed.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if any(cls.__name__ == table.block_class for cls in type(module).__mro__)
    ]
    if not found:
        raise ValueError(_unknown(model, table))
    problems = [
        f"{name} (description {table.name!r}): {problem}"
        for name, block in found
        for problem in _mismatches(block, table)
    ]
    if problems:
        raise ValueError(
            "blocks differ from their TopologyDescription; pass one of this model, or none. "
            f"Differences: {'; '.join(problems)}"
        )
    return found


def _unknown(model: nn.Module, table: TopologyDescription) -> str:
    """Describe what a model without the described blocks has instead."""
    who = f"no decoder block of {type(model).__name__} is of class {table.block_class}"
    stacks = [
        (len(module), name, module[0])
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and not isinstance(module, PackedLayers)
        and len({type(child) for child in module}) == 1
    ]
    if not stacks:
        return f"{who}: there is no stack of blocks"
    count, name, block = max(stacks, key=lambda stack: stack[0])
    problems = "; ".join(_mismatches(block, table))
    return (
        f"{who}: {name} holds {count} of class {type(block).__name__}. Against the description "
        f"{table.name!r}: {problems or 'all modules fit'}. Pass one that fits, or none"
    )


def _weight(block: nn.Module, name: str) -> Tensor | None:
    """Return the weight of a module of the block, None if there is no such module or weight."""
    module: Any = block
    for part in name.split("."):
        module = getattr(module, part, None)
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _mismatches(block: nn.Module, table: TopologyDescription) -> list[str]:
    """Return everything in which a block differs from a table."""
    linears = [layer for stage in table.stages for layer in stage]
    norms = (table.attention_norm, table.mlp_norm)
    named = (*linears, *norms, *table.qk_norms, *table.others)
    weights = {name: _weight(block, name) for name in dict.fromkeys(named)}
    missing = {name for name, weight in weights.items() if weight is None}
    present = {
        name.rpartition(".")[0] for name, _ in block.named_parameters() if name.endswith(".weight")
    }
    problems = [f"{name} with a weight is missing" for name in weights if name in missing]
    problems += [f"{name} is in the block and not in the table" for name in present - set(named)]
    if not missing:
        problems += _shape_mismatches(
            {name: tuple(weight.shape) for name, weight in weights.items() if weight is not None},
            table,
        )
    return sorted(problems)


def _shape_mismatches(
    shapes: Mapping[str, tuple[int, ...]], table: TopologyDescription
) -> Iterator[str]:
    """Yield layers that are no matrices, and neighbours whose widths do not fit."""
    linears = [layer for stage in table.stages for layer in stage]
    odd = [n for n in linears if len(shapes[n]) < 2 or any(side != 1 for side in shapes[n][2:])]
    for name in odd:
        yield f"{name} must have a weight [out, in], got {list(shapes[name])}"
    if odd:
        return
    for norm, readers in (
        (table.attention_norm, table.attention_inputs),
        (table.mlp_norm, table.mlp_inputs),
    ):
        for reader in readers:
            if shapes[norm] != shapes[reader][1:2]:
                yield f"{reader} reads {shapes[reader][1]} channels of {norm} {list(shapes[norm])}"
    inner = shapes[table.down][1]
    for name in {name for name in (table.gate, table.up) if name is not None}:
        rows = inner * (table.gate, table.up).count(name)
        if shapes[name][0] != rows:
            yield f"{name} must have {rows} rows for {table.down}, got {shapes[name][0]}"


# ---- candidate pairs ----------------------------------------------------------------------------


class UnavailableError(Exception):
    """A kind of pair that a block cannot have; the message is the reason."""


def candidate_pairs(
    table: TopologyDescription, shapes: Shapes, head_dim: int | None, config: Any
) -> tuple[tuple[ScalePair, ...], dict[str, str]]:
    """Return candidate pairs of a block, and the kinds it cannot have with the reasons.

    :param shapes: Shapes of the weights of the table's linear layers and of the two norms.
    :param head_dim: channels of an attention head, None if unknown.
    :param config: object that may state head counts and rotary settings, or None.
    """
    makers: dict[PairKind, Callable[[], ScalePair]] = {
        "norm_qkv": lambda: _norm_pair(
            "norm_qkv", table.attention_norm, table.attention_inputs, table, shapes
        ),
        "v_o": lambda: _value_pair(table, shapes, head_dim, config),
        "norm_mlp": lambda: _norm_pair("norm_mlp", table.mlp_norm, table.mlp_inputs, table, shapes),
        "up_down": lambda: _up_pair(table, shapes),
        "q_k": lambda: query_pair(table, shapes, head_dim, config),
    }
    pairs: list[ScalePair] = []
    unavailable: dict[str, str] = {}
    for kind, make in makers.items():
        try:
            pairs.append(make())
        except UnavailableError as reason:
            unavailable[kind] = str(reason)
    return tuple(pairs), unavailable


def _norm_pair(
    kind: Literal["norm_qkv", "norm_mlp"],
    norm: str,
    readers: tuple[str, ...],
    table: TopologyDescription,
    shapes: Shapes,
) -> ScalePair:
    producer = Side(module=norm, axis="out", power=-1, gain_offset=table.gain_offset)
    return ScalePair(
        name=_name([norm], readers),
        kind=kind,
        size=shapes[norm][0],
        sides=(producer, *(Side(module=name, axis="in", power=1) for name in readers)),
    )


def _up_pair(table: TopologyDescription, shapes: Shapes) -> ScalePair:
    if table.gate is None:
        raise UnavailableError(
            f"{table.up} goes through the activation, which does not commute with a scale"
        )
    inner = shapes[table.down][1]
    roles = {"gate": (table.gate, inner), "up": (table.up, inner)}
    return ScalePair(
        name=_name([table.up], [table.down]),
        kind="up_down",
        size=inner,
        sides=(
            Side(module=table.up, axis="out", power=-1, rows=_rows("up", roles, shapes)),
            Side(module=table.down, axis="in", power=1),
        ),
    )


def _value_pair(
    table: TopologyDescription, shapes: Shapes, head_dim: int | None, config: Any
) -> ScalePair:
    """Pair each value head with the output columns of all query heads that share it."""
    d, groups, roles = _heads(table, shapes, head_dim, config)
    size = roles["v"][1]
    return ScalePair(
        name=_name([table.v], [table.o]),
        kind="v_o",
        size=size,
        sides=(
            Side(module=table.v, axis="out", power=-1, rows=_rows("v", roles, shapes)),
            Side(
                module=table.o,
                axis="in",
                power=1,
                index=_repeat_heads(torch.arange(size).view(-1, d), groups),
            ),
        ),
    )


def query_pair(
    table: TopologyDescription, shapes: Shapes, head_dim: int | None, config: Any
) -> ScalePair:
    """Pair queries with keys; channels i and i + d/2 are rotated together and share a scale."""
    if table.qk_norms:
        raise UnavailableError(
            f"{', '.join(table.qk_norms)} would normalise the scale away or break it"
        )
    d, groups, roles = _heads(table, shapes, head_dim, config)
    rotated = _rotated_share(config)
    if rotated != 1 or d % 2:
        raise UnavailableError(
            f"rotary embeddings must turn all of an even head_dim, got {rotated:g} of {d}"
        )
    size = roles["k"][1] // 2
    tied = torch.arange(size).view(-1, d // 2).repeat(1, 2)  # [kv_heads, head_dim]
    query, key = _rows("q", roles, shapes), _rows("k", roles, shapes)
    return ScalePair(
        name=f"{_name([table.q], [table.k])} (rotary pairs tied)",
        kind="q_k",
        size=size,
        sides=(
            Side(
                module=table.q, axis="out", power=1, index=_repeat_heads(tied, groups), rows=query
            ),
            Side(module=table.k, axis="out", power=-1, index=tied.flatten(), rows=key),
        ),
    )


def _heads(
    table: TopologyDescription, shapes: Shapes, head_dim: int | None, config: Any
) -> tuple[int, int, dict[str, tuple[str, int]]]:
    """Return head width, query heads per value head, ``{role: (module, rows)}`` of q, k, v."""
    if not isinstance(head_dim, int):
        raise UnavailableError(
            "head_dim is neither on the attention module nor in a config; "
            "pass a TopologyDescription with head_dim"
        )
    query = shapes[table.o][1]
    query_rows = query if table.q == table.v else 0
    sharing = (table.k, table.v).count(table.v)
    value = (shapes[table.v][0] - query_rows) // sharing
    heads = (query // head_dim, value // head_dim)
    stated = (
        getattr(config, "num_attention_heads", None) or heads[0],
        getattr(config, "num_key_value_heads", None) or heads[1],
    )
    whole = heads == stated and (heads[0] * head_dim, heads[1] * head_dim) == (query, value)
    if not whole or value <= 0 or query % value:
        raise UnavailableError(
            f"{table.o} reads {query} channels and {table.v} has {shapes[table.v][0]} rows, which "
            f"does not fit {stated[0]} query and {stated[1]} key-value heads of {head_dim}"
        )
    roles = {"q": (table.q, query), "k": (table.k, value), "v": (table.v, value)}
    return head_dim, query // value, roles


def _repeat_heads(index: Tensor, groups: int) -> Tensor:
    """Scale entries ``[kv_heads, head_dim]`` for query heads, flat: whole heads are repeated."""
    return index.repeat_interleave(groups, dim=0).flatten()  # [kv_heads * groups * head_dim]


def _rows(
    role: str, roles: Mapping[str, tuple[str, int]], shapes: Shapes
) -> tuple[int, int] | None:
    """Start and stop of a role's rows in its module; None where it has the module for itself."""
    module = roles[role][0]
    widths = {name: width for name, (other, width) in roles.items() if other == module}
    if sum(widths.values()) != shapes[module][0]:
        parts = " + ".join(f"{width} ({name})" for name, width in widths.items())
        raise UnavailableError(
            f"{module} must have {parts} rows, got {shapes[module][0]} (gated attention?)"
        )
    if len(widths) == 1:
        return None
    ahead = list(widths)[: list(widths).index(role)]
    start = sum(widths[name] for name in ahead)
    return start, start + widths[role]


def _rotated_share(config: Any) -> float:
    """Return the smallest share of a head's channels that a config rotates; 1 if not given."""
    parameters = getattr(config, "rope_parameters", None) or {}
    # one set of parameters, or one for each type of layer
    sets = [parameters, *(entry for entry in parameters.values() if isinstance(entry, Mapping))]
    shares = [entry.get("partial_rotary_factor") for entry in sets]
    shares.append(getattr(config, "partial_rotary_factor", None))
    return min((float(share) for share in shares if share is not None), default=1.0)


def _name(producers: Iterable[str], readers: Iterable[str]) -> str:
    """Return ``"input_layernorm->q_proj,k_proj,v_proj"``."""
    short = [",".join(n.rpartition(".")[2] for n in names) for names in (producers, readers)]
    return "->".join(short)
