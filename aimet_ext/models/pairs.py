"""The scale pairs that a decoder block should have, by its table and the shapes of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from aimet_ext.core.equivalence import PairKind, ScalePair, Side
from aimet_ext.models.families import TopologyDescription

__all__ = ["candidate_pairs"]

Shapes = Mapping[str, tuple[int, ...]]


class _UnavailableError(Exception):
    """A kind of pair that a block cannot have; the message is the reason."""


def candidate_pairs(
    table: TopologyDescription, shapes: Shapes, head_dim: int | None, config: Any
) -> tuple[tuple[ScalePair, ...], dict[str, str]]:
    """Candidate pairs of a block, and the kinds it cannot have with the reasons.

    :param shapes: of the weights of the table's linear layers and of the two norms.
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
        "q_k": lambda: _query_pair(table, shapes, head_dim, config),
    }
    pairs: list[ScalePair] = []
    unavailable: dict[str, str] = {}
    for kind, make in makers.items():
        try:
            pairs.append(make())
        except _UnavailableError as reason:
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
        raise _UnavailableError(
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
    """Each value head to the output columns of all query heads that share it."""
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


def _query_pair(
    table: TopologyDescription, shapes: Shapes, head_dim: int | None, config: Any
) -> ScalePair:
    """Queries to keys; channels i and i + d/2 are rotated into each other and share a scale."""
    if table.qk_norms:
        raise _UnavailableError(
            f"{', '.join(table.qk_norms)} would normalise the scale away or break it"
        )
    d, groups, roles = _heads(table, shapes, head_dim, config)
    rotated = _rotated_share(config)
    if rotated != 1 or d % 2:
        raise _UnavailableError(
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
    """Head width, query heads per value head, and ``{role: (module, rows)}`` of q, k and v."""
    if not isinstance(head_dim, int):
        raise _UnavailableError(
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
        raise _UnavailableError(
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
        raise _UnavailableError(
            f"{module} must have {parts} rows, got {shapes[module][0]} (gated attention?)"
        )
    if len(widths) == 1:
        return None
    ahead = list(widths)[: list(widths).index(role)]
    start = sum(widths[name] for name in ahead)
    return start, start + widths[role]


def _rotated_share(config: Any) -> float:
    """The smallest share of a head's channels that a config has rotated; 1 if it says nothing."""
    parameters = getattr(config, "rope_parameters", None) or {}
    # one set of parameters, or one for each type of layer
    sets = [parameters, *(entry for entry in parameters.values() if isinstance(entry, Mapping))]
    shares = [entry.get("partial_rotary_factor") for entry in sets]
    shares.append(getattr(config, "partial_rotary_factor", None))
    return min((float(share) for share in shares if share is not None), default=1.0)


def _name(producers: Iterable[str], readers: Iterable[str]) -> str:
    """``"input_layernorm->q_proj,k_proj,v_proj"``."""
    short = [",".join(n.rpartition(".")[2] for n in names) for names in (producers, readers)]
    return "->".join(short)
