"""Padding of MLPs of a model, or inside a simulation with the quantizers that wider ones need."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.errors import some
from aimet_ext.models.huggingface import causal_lm
from aimet_ext.models.padding import mlp_layers, pad_mlp, pad_rows
from aimet_ext.models.topology import BlockTopology, find_blocks
from aimet_ext.sim.protocol import SimAdaptor
from aimet_ext.sim.torch.state import MADE, LayerParameter, describe_quantizer, make_quantizer
from aimet_ext.specs import WeightPlan

_Parameters = Mapping[str, Mapping[str, LayerParameter]]
_Undo = Callable[..., Any]


@dataclass(frozen=True)
class _Part:
    """A parameter that gets zeros: rows if ``fused`` says how many projections it holds."""

    layer: str
    parameter: str
    fused: int
    extra: int

    def grow(self, tensor: Tensor, extra: int) -> Tensor:
        """Append zeros to a tensor where the parameter gets them."""
        if self.fused:
            return pad_rows(tensor, self.fused, extra)
        return nn.functional.pad(tensor, (0, extra))


@dataclass(frozen=True)
class Widening:
    """MLPs of a simulation that are to be padded; that they can be was checked.

    :param blocks: All decoder blocks.
    :param multiple: Number of which their inner widths become multiples.
    :param grown: Quantizers to be replaced because they have cells in the padded dimension.
    """

    blocks: tuple[BlockTopology, ...]
    multiple: int
    grown: tuple[tuple[_Part, LayerParameter, dict[str, Any]], ...]

    def apply(self, model: nn.Module, undo: _Undo) -> dict[str, int]:
        """Pad, in place.

        :param undo: Function that takes a function and its arguments, to be called on a failure.
        :returns: new inner width by name of block.
        """
        keys = ("weight", "bias", "in_features", "out_features")
        for block in self.blocks:
            rows, down = mlp_layers(model, block)
            for layer in (*map(model.get_submodule, rows), down):
                undo(_put_back, layer, {key: getattr(layer, key) for key in keys})
        language_model = causal_lm(model)
        if language_model is not None:
            config = language_model.config.get_text_config()
            undo(_put_back, config, {"intermediate_size": config.intermediate_size})
        widths = _pad(model, self.blocks, self.multiple)
        for part, parameter, description in self.grown:
            undo(parameter.put, parameter.quantizer)
            _grow(parameter, part, description)
        return widths


def plan_widening(adaptor: SimAdaptor, plan: WeightPlan, parameters: _Parameters) -> Widening:
    """Check that the MLPs of a simulation can be padded as a plan wants it.

    Zeros leave every range that was calibrated as valid as it was, those of activations too, so
    only quantizers with a cell for each row or block grow; their old cells keep their ranges.

    :param parameters: Parameters of all layers, by layer and name.
    :raises ValueError: a layer to be padded is not what leads out of an MLP, shares its weight, was
        decided by an earlier technique, or has a quantizer that cannot grow.
    :raises TypeError: a layer of an MLP is no linear layer.
    """
    model = adaptor.model
    sizes = {
        name: own["weight"].block
        for name, own in parameters.items()
        if name not in plan.specs and "weight" in own
    }
    every, multiple = plan_padding(model, plan, sizes, find=partial(adaptor.find_blocks, None))
    blocks = [block for block in every if mlp_layers(model, block)[1].in_features % multiple]
    parts = [part for block in blocks for part in _parts(model, block, multiple)]
    names = sorted({part.layer for part in parts})
    _check_weights(model, names)
    _check_history(adaptor, names, parameters)
    _check_activations(adaptor, blocks)
    grown = []
    for part in parts:
        parameter = parameters.get(part.layer, {}).get(part.parameter)
        replaced = part.parameter == "weight" and part.layer in plan.specs
        if parameter is None or replaced or not _has_cells(part, parameter):
            continue
        description = _grown_description(parameter, part)
        if description is None:
            raise ValueError(
                f"{part.layer}: a quantizer of the {part.parameter} that can grow with it is "
                f"required ({' or '.join(MADE)}, blocks along the input channels), got "
                f'{parameter.quantizer}; use on_indivisible="per_channel" or a block size that '
                "divides"
            )
        grown.append((part, parameter, description))
    return Widening(every, multiple, tuple(grown))


def plan_padding(
    model: nn.Module,
    plan: WeightPlan,
    block_sizes: Mapping[str, int] | None = None,
    *,
    find: Callable[[], Sequence[BlockTopology]] | None = None,
) -> tuple[tuple[BlockTopology, ...], int]:
    """Check that MLPs can be padded so that the block sizes of a plan divide their inner widths.

    :param block_sizes: Block sizes of layers outside the plan, by name.
    :param find: Function that finds the decoder blocks, None for that of models.
    :returns: all decoder blocks, and the number of which each inner width becomes a multiple.
    :raises ValueError: a layer to be padded is not what leads out of an MLP.
    :raises TypeError: a layer of an MLP is no linear layer.
    """
    try:
        blocks = tuple(find_blocks(model) if find is None else find())
    except ValueError as error:
        raise ValueError(
            'on_indivisible="pad" needs decoder blocks whose MLPs can be widened, for '
            f"{', '.join(plan.pad)}, but {error}"
        ) from error
    for block in blocks:
        mlp_layers(model, block)
    inner = [_outer(block) for block in blocks]
    others = sorted(set(plan.pad) - set(inner))
    if others:
        raise ValueError(
            'only the inner width of an MLP can be padded (on_indivisible="pad"), and these '
            f'layers read something else: {", ".join(others)}; give them "per_channel" or a block '
            "size that divides"
        )
    planned = {name: spec.block_size for name, spec in plan.specs.items() if spec is not None}
    sizes = {**(block_sizes or {}), **planned}
    return blocks, math.lcm(*(sizes.get(name) or 1 for name in inner))


def pad_mlps(model: nn.Module, plan: WeightPlan) -> dict[str, int]:
    """Pad the MLPs of all blocks, in place, so that the block sizes of a plan divide them.

    :returns: new inner width by name of block.
    :raises ValueError: a layer to be padded is not what leads out of an MLP.
    :raises TypeError: a layer of an MLP is no linear layer.
    """
    return _pad(model, *plan_padding(model, plan))


def _pad(model: nn.Module, blocks: Sequence[BlockTopology], multiple: int) -> dict[str, int]:
    """Pad the MLPs of blocks; the config of a language model says how wide they are, if all alike.

    :returns: new inner width by name of block.
    """
    widths = {block.name: pad_mlp(model, block, multiple) for block in blocks}
    language_model = causal_lm(model)
    if language_model is not None and len(set(widths.values())) == 1:
        language_model.config.get_text_config().intermediate_size = next(iter(widths.values()))
    return widths


def _parts(model: nn.Module, block: BlockTopology, multiple: int) -> Iterator[_Part]:
    rows, down = mlp_layers(model, block)
    extra = -down.in_features % multiple
    for name, fused in rows.items():
        for parameter in ("weight", "bias"):
            yield _Part(name, parameter, fused, extra)
    yield _Part(_outer(block), "weight", 0, extra)


def _outer(block: BlockTopology) -> str:
    """Return the full name of the layer that leads out of a block's MLP, which it has."""
    assert block.mlp is not None
    return f"{block.name}.{block.mlp[1]}"


def _check_weights(model: nn.Module, names: Iterable[str]) -> None:
    users = Counter(
        id(value) for module in model.modules() for value in module.parameters(recurse=False)
    )
    shared = [name for name in names if users[id(model.get_submodule(name).weight)] > 1]
    if shared:
        raise ValueError(
            f"{some(shared)}: to be padded a layer must not share its weight with another one; "
            'use on_indivisible="per_channel" or a block size that divides'
        )


def _check_history(adaptor: SimAdaptor, names: Iterable[str], parameters: _Parameters) -> None:
    known = set()
    if adaptor.ledger is not None:
        known = {name for run in adaptor.ledger.runs for name in run.modules}
        known |= {side.module for entry in adaptor.ledger.entries for side in entry.sides}
    frozen = {n for n in names if any(p.frozen for p in parameters.get(n, {}).values())}
    decided = [name for name in names if name in known or name in frozen]
    if decided:
        raise ValueError(
            f"{some(decided)}: an earlier technique decided what is to be padded; pad before it, "
            'or use on_indivisible="per_channel" or a block size that divides'
        )


def _check_activations(adaptor: SimAdaptor, blocks: Iterable[BlockTopology]) -> None:
    wide = [
        name
        for block in blocks
        for name, quantizer in adaptor.activation_quantizers(block.name).items()
        if torch.Size(getattr(quantizer, "shape", ())).numel() > 1
    ]
    if wide:
        raise ValueError(
            f"{some(wide)}: beside an MLP to be padded all activations must be quantized per "
            'tensor; use on_indivisible="per_channel" or a block size that divides'
        )


def _has_cells(part: _Part, parameter: LayerParameter) -> bool:
    """Return True if a quantizer has several cells along the dimension that is padded."""
    return parameter.shape[:1] not in ((), (1,)) if part.fused else parameter.block > 0


def _grown_description(parameter: LayerParameter, part: _Part) -> dict[str, Any] | None:
    """Return the description of a quantizer of the same grid for a padded parameter.

    :returns: None if no such quantizer can be made.
    """
    static = describe_quantizer(parameter.quantizer)
    shape, block = list(static["shape"]), static.get("block_size")
    grouping = static.get("block_grouping")
    if part.fused:
        fits = block is None or block[0] in (1, -1)
        shape[0] += part.fused * part.extra
    else:
        old, shape[-1] = shape[-1], shape[-1] + part.extra // parameter.block
        fits = grouping is None or grouping[-1] in (-1, old)
        static["block_grouping"] = grouping and [*grouping[:-1], -1]
    if not fits or static["class"] not in MADE or static["parameters"] != ["max", "min"]:
        return None
    return {**static, "shape": shape}


@torch.no_grad()
def _grow(parameter: LayerParameter, part: _Part, description: Mapping[str, Any]) -> None:
    """Replace the quantizer of a parameter that was padded; old cells keep their range."""
    cells = part.extra if part.fused else description["shape"][-1] - parameter.shape[-1]
    new = make_quantizer(description).to(parameter.layer.weight.device)
    if (bounds := parameter.bounds) is not None:
        parameter.calibrate(new)
        kept = part.grow(torch.ones_like(bounds[0]), cells).bool()
        grown = (part.grow(old, cells) for old in bounds)
        wanted = zip(grown, (new.min, new.max), strict=True)
        new.set_range(*(torch.where(kept, old, rest.detach()) for old, rest in wanted))
    parameter.put(new)


def _put_back(layer: Any, attributes: Mapping[str, Any]) -> None:
    for key, value in attributes.items():
        setattr(layer, key, value)
