"""Decoder blocks and their scale pairs, as names, found by family tables or a description.

Works on a Hugging Face model, on a wrapper around it, and on the model of a simulation: only names,
class names of the blocks and the shapes of weights are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor, nn

from aimet_ext.core.equivalence import PairKind, ScalePair
from aimet_ext.models.families import FAMILIES, TopologyDescription
from aimet_ext.models.pairs import candidate_pairs

__all__ = ["BlockTopology", "TopologyDescription", "find_blocks", "select_pairs"]


@dataclass(frozen=True)
class BlockTopology:
    """A decoder block as names.

    :param name: of the block, as found in the model passed in, for example ``"model.layers.0"``.
    :param linears: linear layers in dependency order, relative to the block.
    :param stages: the same, grouped: (q, k, v), (o,), (gate, up), (down,).
    :param pairs: candidate scale pairs; each is to be proved before it is used.
    :param unavailable: kinds of pairs that this block cannot have, with the reason.
    :param aliases: full names of layers in the simulation, by name in the block, where they have
        others there.
    """

    name: str
    linears: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]
    pairs: tuple[ScalePair, ...]
    unavailable: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)


def find_blocks(
    model: nn.Module, description: TopologyDescription | None = None
) -> list[BlockTopology]:
    """The decoder blocks of a model, in order.

    :param description: table of an architecture that no family table knows.
    :raises ValueError: no block has a known class, or a block differs from its table; all
        differences are listed.
    """
    tables = FAMILIES if description is None else (description,)
    by_class = {table.block_class: table for table in tables}
    found: list[tuple[str, nn.Module, TopologyDescription]] = []
    for name, module in model.named_modules():
        known = [by_class[c.__name__] for c in type(module).__mro__ if c.__name__ in by_class]
        if known:
            found.append((name, module, known[0]))
    if not found:
        raise ValueError(_unknown(model, tables))
    problems = [
        f"{name} (table {table.name!r}): {problem}"
        for name, block, table in found
        for problem in _mismatches(block, table)
    ]
    if problems:
        raise ValueError(
            "blocks differ from the table of their family; pass a TopologyDescription of this "
            f"model. Differences: {'; '.join(problems)}"
        )
    return [_block_topology(model, name, block, table) for name, block, table in found]


def select_pairs(
    block: BlockTopology,
    kinds: Iterable[PairKind],
    *,
    unavailable: Literal["error", "skip"] = "error",
) -> tuple[ScalePair, ...]:
    """The pairs of a block that are of the given kinds, in the block's order.

    :param unavailable: what to do with a kind that the block cannot have.
    :raises ValueError: a kind does not exist, or is unavailable and not to be skipped.
    """
    wanted = set(kinds)
    if not wanted <= set(get_args(PairKind)):
        raise ValueError(
            f"kinds of scale pairs must be among {', '.join(get_args(PairKind))}, "
            f"got {', '.join(sorted(wanted))}"
        )
    missing = [f"{kind}: {block.unavailable[kind]}" for kind in block.unavailable if kind in wanted]
    if missing and unavailable == "error":
        raise ValueError(f"{block.name} cannot have these scale pairs: {'; '.join(missing)}")
    return tuple(pair for pair in block.pairs if pair.kind in wanted)


def _weight(block: nn.Module, name: str) -> Tensor | None:
    """The weight of a module of the block, None if there is no such module or weight."""
    module: Any = block
    for part in name.split("."):
        module = getattr(module, part, None)
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _mismatches(block: nn.Module, table: TopologyDescription) -> list[str]:
    """Everything in which a block differs from a table."""
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
    """Layers that are no matrices, and neighbours whose widths do not fit."""
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


def _unknown(model: nn.Module, tables: tuple[TopologyDescription, ...]) -> str:
    """What a model without any known block has instead, against the nearest table."""
    who = f"no decoder block of {type(model).__name__} is known"
    known = ", ".join(table.block_class for table in tables)
    stacks = [
        (len(module), name, module[0])
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    ]
    advice = "Pass a TopologyDescription that names the block's class and modules"
    if not stacks:
        return f"{who}: a block of class {known} is required, there is no stack of blocks. {advice}"
    count, name, block = max(stacks, key=lambda stack: stack[0])
    problems, nearest = min(
        ((_mismatches(block, table), table.name) for table in tables), key=lambda pair: len(pair[0])
    )
    return (
        f"{who}: {name} holds {count} of class {type(block).__name__}, known are {known}. "
        f"Against the nearest table, {nearest!r}: {'; '.join(problems) or 'all modules fit'}. "
        f"{advice}"
    )


def _block_topology(
    model: nn.Module, name: str, block: nn.Module, table: TopologyDescription
) -> BlockTopology:
    """Stages and candidate pairs of a block that fits its table."""
    linears = tuple(layer for stage in table.stages for layer in stage)
    shapes = {
        layer: tuple(block.get_parameter(f"{layer}.weight").shape)
        for layer in (*linears, table.attention_norm, table.mlp_norm)
    }
    config = _config(model, name, table)
    attention = block.get_submodule(table.o.rpartition(".")[0])
    head_dim = table.head_dim or getattr(attention, "head_dim", None)
    if head_dim is None and config is not None:
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
    pairs, unavailable = candidate_pairs(table, shapes, head_dim, config)
    return BlockTopology(name, linears, table.stages, pairs, unavailable)


def _config(model: nn.Module, name: str, table: TopologyDescription) -> Any:
    """The config of the nearest module, from the attention outwards, that states head counts."""
    path = f"{name}.{table.o}".lstrip(".").split(".")
    for end in range(len(path) - 1, -1, -1):
        config = getattr(model.get_submodule(".".join(path[:end])), "config", None)
        if hasattr(config, "num_attention_heads"):
            return config
    return None
