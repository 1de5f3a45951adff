"""Weight grids of the layers of a PyTorch model, and which MLPs are padded for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from aimet_ext.config import QSpec
from aimet_ext.grids.fitting import LAYERS, WeightPlan, fit_blocks
from aimet_ext.models.huggingface import causal_lm, original_name
from aimet_ext.models.padding import mlp_layers, pad_mlp
from aimet_ext.models.topology import BlockTopology, find_blocks


@dataclass(frozen=True)
class PaddingPlan:
    """MLPs to be widened.

    :param blocks: All decoder blocks.
    :param multiple: Number of which each inner width becomes a multiple.
    """

    blocks: tuple[BlockTopology, ...]
    multiple: int


def fits(name: str, pattern: str, model: nn.Module) -> bool:
    """Return True if a layer's name in the model or in its checkpoint fits a pattern."""
    return fnmatchcase(name, pattern) or fnmatchcase(original_name(name, model), pattern)


def plan_weights(
    model: nn.Module,
    *,
    weights: QSpec | None,
    lm_head: QSpec | None,
    embedding: QSpec | None,
    overrides: Mapping[str, QSpec | None],
) -> WeightPlan:
    """Give each linear layer, convolution and embedding of a model its spec.

    :param overrides: Specs by pattern, matched with names of the model and of its checkpoint; the
        first one that fits counts.
    :raises ValueError: a pattern that fits nothing, a block size that does not divide a layer
        whose spec says ``on_indivisible="error"``, or two specs for one shared weight.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LAYERS)}
    language_model = causal_lm(model)
    output = None if language_model is None else language_model.get_output_embeddings()
    specs: dict[str, QSpec | None] = {}
    for name, layer in layers.items():
        if layer is output:
            specs[name] = lm_head
        else:
            specs[name] = embedding if isinstance(layer, nn.Embedding) else weights
    for pattern, spec in reversed(list(overrides.items())):  # the first pattern has the last word
        fitting = [name for name in layers if fits(name, pattern, model)]
        if not fitting:
            raise ValueError(
                f"the pattern of an override must fit a layer with a weight, {pattern!r} fits "
                f"none; names look like {original_name(next(iter(layers), ''), model)!r}"
            )
        specs.update(dict.fromkeys(fitting, spec))
    _check_shared(layers, specs)
    return fit_blocks(layers, specs)


def plan_padding(
    model: nn.Module, plan: WeightPlan, block_sizes: Mapping[str, int] | None = None
) -> PaddingPlan:
    """Check that MLPs can be padded so that the block sizes of a plan divide their inner widths.

    :param block_sizes: Block sizes of layers outside the plan, by name.
    :raises ValueError: a layer to be padded is not what leads out of an MLP.
    :raises TypeError: a layer of an MLP is no linear layer.
    """
    try:
        blocks = tuple(find_blocks(model))
    except ValueError as error:
        raise ValueError(
            'on_indivisible="pad" needs decoder blocks whose MLPs can be widened, for '
            f"{', '.join(plan.pad)}, but {error}"
        ) from error
    inner = [f"{block.name}.{block.stages[-1][0]}" for block in blocks]
    others = sorted(set(plan.pad) - set(inner))
    if others:
        raise ValueError(
            'only the inner width of an MLP can be padded (on_indivisible="pad"), and these '
            f'layers read something else: {", ".join(others)}; give them "per_channel" or a block '
            "size that divides"
        )
    for block in blocks:
        mlp_layers(model, block)
    planned = {name: spec.block_size for name, spec in plan.specs.items() if spec is not None}
    sizes = {**(block_sizes or {}), **planned}
    return PaddingPlan(blocks, math.lcm(*(sizes.get(name) or 1 for name in inner)))


def pad_mlps(model: nn.Module, plan: WeightPlan) -> dict[str, int]:
    """Pad the MLPs of all blocks, in place, so that the block sizes of a plan divide them.

    :returns: new inner width by name of block.
    :raises ValueError: a layer to be padded is not what leads out of an MLP.
    :raises TypeError: a layer of an MLP is no linear layer.
    """
    padding = plan_padding(model, plan)
    widths = {block.name: pad_mlp(model, block, padding.multiple) for block in padding.blocks}
    record_inner_width(model, widths)
    return widths


def record_inner_width(model: nn.Module, widths: Mapping[str, int]) -> None:
    """Say in the config of a language model how wide its MLPs are, if all are alike.

    :param widths: Inner width by name of block.
    """
    language_model = causal_lm(model)
    if language_model is not None and len(set(widths.values())) == 1:
        language_model.config.get_text_config().intermediate_size = next(iter(widths.values()))


def _check_shared(layers: Mapping[str, Any], specs: Mapping[str, QSpec | None]) -> None:
    first: dict[int, str] = {}
    for name, layer in layers.items():
        other = first.setdefault(id(layer.weight), name)
        if specs[name] != specs[other]:
            raise ValueError(
                f"{other} and {name} share one weight and need the same spec, got "
                f"{specs[other]} and {specs[name]}; for a model with tied embeddings pass the "
                "same for embedding and lm_head"
            )
