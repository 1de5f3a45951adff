"""Decoder blocks and their scale pairs, as names, found by watching a model run.

Works on a Hugging Face model, on a wrapper around it, and on the model of a simulation whose
quantizers are off: what modules are called, and of which classes, does not matter.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from aimet_ext.core.equivalence import PairKind, ScalePair
from aimet_ext.data.batches import call_model
from aimet_ext.data.geometry import Geometry
from aimet_ext.models.description import (
    TopologyDescription,
    UnavailableError,
    candidate_pairs,
    described_blocks,
    query_pair,
)
from aimet_ext.models.proof import probe_batch, probe_inputs
from aimet_ext.models.scaled_run import ScaledRun
from aimet_ext.models.structure import ACTIVATED, Structure, peers
from aimet_ext.walk.blocks import find_stack
from aimet_ext.walk.hooks import counted_calls, evaluating, first_calls
from aimet_ext.walk.order import layer_order
from aimet_ext.walk.routing import is_routed
from aimet_ext.walk.stream import nearest_config

LOGGER = logging.getLogger(__name__)
_ABSENT: Mapping[PairKind, str] = {
    "norm_qkv": "no norm with gains is read by layers alone that lead into attention",
    "v_o": "no channels of a layer reach another one across tokens as they are",
    "norm_mlp": "no norm with gains is read by layers alone that lead into an MLP",
    "up_down": "no channels of a layer reach another one within a token as they are",
}


@dataclass(frozen=True)
class BlockTopology:
    """A decoder block as names.

    :param name: Name of the block in the model passed in, for example ``"model.layers.0"``.
    :param linears: linear layers in dependency order, relative to the block.
    :param stages: the same, grouped by what they read: (q, k, v), (o,), (gate, up), (down,).
    :param pairs: candidate scale pairs; each is to be proved before it is used.
    :param unavailable: kinds of pairs that this block cannot have, or not all of, with the reason.
    :param aliases: full names of layers in the simulation, by name in the block, where they have
        others there.
    :param head_dim: width of a head, None if unknown.
    :param between: norms between a layer and the hidden states that it is added to.
    :param writers: layers whose outputs are added to the hidden states; those of the second and
        the last stage if empty.
    :param mlp: layers that lead into the inner channels of the block's one MLP, and the layer that
        leads out; None if there is none, or several, or their channels are in another order.
    """

    name: str
    linears: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]
    pairs: tuple[ScalePair, ...]
    unavailable: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    head_dim: int | None = None
    between: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    mlp: tuple[tuple[str, ...], str] | None = None


def is_linear(module: nn.Module) -> bool:
    """Return True for a linear layer, or a convolution that is one."""
    try:
        geometry = Geometry.of(module)
    except TypeError:
        return False
    return geometry.groups == 1 and all(side == 1 for side in geometry.kernel_size)


def find_blocks(
    model: nn.Module,
    description: TopologyDescription | None = None,
    run: Callable[[], object] | None = None,
    *,
    is_layer: Callable[[nn.Module], bool] = is_linear,
    unused: Collection[str] = (),
) -> list[BlockTopology]:
    """Return the decoder blocks of a model, in order.

    The blocks are the largest stack of modules in an ``nn.ModuleList`` that hold linear layers. One
    of each structure is run, on what the model calls it with, to find its pairs. Where that fails
    there are none.

    :param description: description to go by, in place of what is found.
    :param run: function that runs the model on a batch; None for one of random ids.
    :param is_layer: function that tells which linear layers are among those of a block; others,
        such as routers, are in pairs alone.
    :param unused: full names of layers that are none of a block's unless it calls them, such as
        adapters of other blocks in a module that blocks share.
    :raises ValueError: there is no stack of blocks, or they differ from the description.
    """
    if description is not None:
        found = described_blocks(model, description)
        return [_described(model, name, block, description) for name, block in found]
    names = stack_of(model)
    kinds: dict[Any, list[str]] = {}
    for name in names:
        own = frozenset(n.removeprefix(f"{name}.") for n in unused if n.startswith(f"{name}."))
        kinds.setdefault((_form(model.get_submodule(name)), own), []).append(name)
    shared = _shared_parameters(model)
    by_name: dict[str, BlockTopology] = {}
    firsts = [names[0] for names in kinds.values()]
    try:
        calls = _calls(model, firsts, run)
    except Exception as error:  # noqa: BLE001  (of the batch: a walk of the model says more)
        reason = f"in a run of the model, {type(error).__name__}: {error}"
        return [_unwatched(model, name, reason, is_layer) for name in names]
    for first, ((_, own), alike) in zip(firsts, kinds.items(), strict=True):
        found_block = _find(model, first, *calls[first], is_layer, own)
        for name in alike:
            by_name[name] = _with_own_parameters(model, replace(found_block, name=name), shared)
    return [by_name[name] for name in names]


def select_pairs(block: BlockTopology, kinds: Collection[PairKind]) -> tuple[ScalePair, ...]:
    """Return the pairs of a block that are of the given kinds, in the block's order."""
    return tuple(pair for pair in block.pairs if pair.kind in kinds)


# ---- by a description ---------------------------------------------------------------------------


def _described(
    model: nn.Module, name: str, block: nn.Module, table: TopologyDescription
) -> BlockTopology:
    """Return stages and candidate pairs of a block that fits its description."""
    linears = tuple(layer for stage in table.stages for layer in stage)
    shapes = {
        layer: tuple(block.get_parameter(f"{layer}.weight").shape)
        for layer in (*linears, table.attention_norm, table.mlp_norm)
    }
    config, head_dim = _heads(model, name, table.o)
    head_dim = table.head_dim or head_dim
    pairs, unavailable = candidate_pairs(table, shapes, head_dim, config)
    inner = tuple(dict.fromkeys(n for n in (table.gate, table.up) if n is not None))
    return BlockTopology(
        name,
        linears,
        table.stages,
        pairs,
        unavailable,
        head_dim=head_dim,
        between=table.others,
        writers=(table.o, table.down),
        mlp=(inner, table.down),
    )


def _heads(model: nn.Module, name: str, output: str) -> tuple[Any, int | None]:
    """Return the config that states heads, and their width, as far as they are known.

    :param name: Name of the block.
    :param output: Output projection of its attention.
    """
    full = f"{name}.{output}".lstrip(".")
    config = nearest_config(model, full, "num_attention_heads")
    head_dim = getattr(model.get_submodule(full.rpartition(".")[0]), "head_dim", None)
    if head_dim is None and config is not None:
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
    return config, head_dim


# ---- by what is seen ----------------------------------------------------------------------------


def stack_of(model: nn.Module) -> list[str]:
    """Return the names of the decoder blocks.

    :raises ValueError: there are none.
    """
    layers = [name for name, module in model.named_modules() if is_linear(module)]
    names = find_stack(model, layers)
    inside = tuple(f"{name}." for name in names)
    if 2 * sum(layer.startswith(inside) for layer in layers) <= len(layers):
        names = find_stack(model, layers, mixed=True) or names
    if not names:
        raise ValueError(
            f"no decoder block of {type(model).__name__} is known: a torch.nn.ModuleList of blocks "
            "with linear layers is required, there is no stack of blocks; pass a "
            "TopologyDescription of blocks that stand elsewhere"
        )
    return names


def _form(block: nn.Module) -> Any:
    """Return what blocks of one structure have in common."""
    modules = [(name, type(module)) for name, module in block.named_modules()]
    return (*modules, *((name, tuple(p.shape)) for name, p in block.named_parameters()))


def _shared_parameters(model: nn.Module) -> set[int]:
    """Return the identities of parameters that several modules have."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    return {number for number, count in owners.items() if count > 1} - {id(None)}


def _with_own_parameters(model: nn.Module, block: BlockTopology, shared: set[int]) -> BlockTopology:
    """Return a block without pairs of parameters that other modules have too."""
    if not shared:
        return block
    module, unavailable, pairs = model.get_submodule(block.name), dict(block.unavailable), []
    for pair in block.pairs:
        parameters = (
            (side.module, p)
            for side in pair.sides
            for p in module.get_submodule(side.module).parameters(recurse=False)
        )
        others = sorted({name for name, p in parameters if id(p) in shared})
        if others:
            unavailable[pair.kind] = f"{', '.join(others)} shares parameters with other modules"
        else:
            pairs.append(pair)
    return replace(block, pairs=tuple(pairs), unavailable=unavailable)


def _calls(
    model: nn.Module, names: Sequence[str], run: Callable[[], object] | None
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the arguments of some blocks in a run of the model.

    :raises ValueError: a block is not called.
    """
    if run is None:
        run = partial(call_model, model, probe_batch(model))
    with evaluating(model), torch.no_grad():
        calls = first_calls([model.get_submodule(name) for name in names], run)
    if len(calls) < len(names):
        raise ValueError(f"all of {', '.join(names)} must be called, {len(calls)} are")
    return dict(zip(names, calls, strict=True))


def _unwatched(
    model: nn.Module,
    name: str,
    reason: str,
    is_layer: Callable[[nn.Module], bool],
    run: Callable[[], object] | None = None,
) -> BlockTopology:
    """Return the layers of a block in the order of their calls, or else of their names.

    :param run: Function that runs the block.
    """
    block = model.get_submodule(name)
    layers = [
        n for n, module in block.named_modules() if n and is_linear(module) and is_layer(module)
    ]
    stages: list[tuple[str, ...]] = [(n,) for n in layers]
    if run is not None:
        with evaluating(block):
            with torch.no_grad(), counted_calls(block, layers) as calls:
                run()
            once = [layer for layer in layers if calls[layer] == 1]
            stages = layer_order(block, once, [run], f"{name}.").stages
    kinds: list[str] = [*_ABSENT, "q_k"]
    unavailable = dict.fromkeys(kinds, reason)
    linears = tuple(layer for stage in stages for layer in stage)
    return BlockTopology(name, linears, tuple(stages), (), unavailable)


def _find(
    model: nn.Module,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    is_layer: Callable[[nn.Module], bool],
    unused: Collection[str],
) -> BlockTopology:
    """Return what is found in a run of a block.

    :param unused: Names in the block of layers that are not in it unless they are called.
    """
    block = model.get_submodule(name)
    try:
        run = ScaledRun(block, (), probe_inputs(block, args, kwargs))
        idle = [n for n in run.uncalled if n not in unused]
        if any(any(peers(run.called, layer)) for layer in idle):  # as experts are
            run = ScaledRun(block, (), probe_inputs(block, args, kwargs, length=sys.maxsize))
        run.uncalled = [n for n in run.uncalled if n not in unused]
        structure = Structure(run)
    except Exception as error:  # noqa: BLE001  (the block is code of any kind)
        reason = f"its parts cannot be run one by one: {type(error).__name__}: {error}"
        LOGGER.warning("no scale pairs are found in %s, %s", name, reason)
        return _unwatched(model, name, reason, is_layer, partial(block, *args, **kwargs))
    own = [n for n, module in block.named_modules() if n and is_linear(module) and is_layer(module)]
    layers = [n for n in own if n in run.called]
    layers += [n for n in run.uncalled if n in own and any(peers(layers, n))]
    stages = structure.stages(layers, [n for n in layers if is_routed(block, n)])
    pairs, unavailable = list(structure.pairs), dict[str, str]()
    kinds = {pair.kind for pair in pairs}
    for kind, absent in _ABSENT.items():
        if kind in structure.lost:
            unavailable[kind] = "; ".join(structure.lost[kind])
        elif kind not in kinds:
            inner = [names[-1] for names in structure.mlps.values()]
            activated = kind == "up_down" and inner
            unavailable[kind] = ACTIVATED.format(", ".join(inner)) if activated else absent
    head_dim = None
    values = next((pair for pair in pairs if pair.kind == "v_o"), None)
    if values is None:
        unavailable["q_k"] = f"values must be known first: {unavailable['v_o']}"
    else:
        config, head_dim = _heads(model, name, values.sides[-1].module)
        try:
            pairs.append(_query_pair(structure, values, head_dim, config))
        except UnavailableError as reason:
            unavailable["q_k"] = str(reason)
    mlps = list(structure.mlps.items())
    return BlockTopology(
        name,
        tuple(layer for stage in stages for layer in stage),
        stages,
        tuple(pairs),
        unavailable,
        head_dim=head_dim,
        between=structure.between,
        writers=structure.writers,
        mlp=(mlps[0][1], mlps[0][0]) if len(mlps) == 1 else None,
    )


def _query_pair(
    structure: Structure, values: ScalePair, head_dim: int | None, config: Any
) -> ScalePair:
    """Return the pair of queries and keys that reach a layer beside the values.

    :param values: The pair of values and output projection.
    :raises UnavailableError: they are not whole layers, or rows one after another.
    """
    value, output = values.sides[0], values.sides[-1].module
    reached = structure.readings[output].reached_by
    seen = structure.run.seen
    norms = tuple(name for name in reached if seen[name].is_norm)
    order = [name for name in seen if name in reached and not seen[name].is_norm]
    weights = {name: seen[name].module.get_parameter("weight") for name in (*order, output)}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    start, stop = value.rows or (0, shapes[value.module][0])
    beside = [name for name in order if name != value.module or stop - start < len(reached[name])]
    table = TopologyDescription(name="", block_class="", v=value.module, o=output, qk_norms=norms)
    if beside == [value.module] and stop == shapes[value.module][0] and value.index is None:
        return query_pair(replace(table, q=beside[0], k=beside[0]), shapes, head_dim, config)
    if len(beside) != 2 or value.module in beside:
        raise UnavailableError(
            "queries and keys must be layers of their own, or rows before those of the values, "
            f"what reaches {output} are rows of {', '.join(order)}"
        )
    query, key = sorted(beside, key=lambda name: -shapes[name][0])
    return query_pair(replace(table, q=query, k=key), shapes, head_dim, config)
