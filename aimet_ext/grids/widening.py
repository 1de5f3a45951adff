"""Padding of MLPs inside a simulation, with the quantizers that the wider weights need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.grids.assignment import plan_padding, record_inner_width
from aimet_ext.grids.fitting import WeightPlan, some
from aimet_ext.models.huggingface import causal_lm
from aimet_ext.models.padding import mlp_layers, pad_mlp, pad_rows
from aimet_ext.models.topology import BlockTopology
from aimet_ext.sim.protocol import SimAdaptor
from aimet_ext.sim.torch.setup import calibrate_alone, put_quantizer
from aimet_ext.sim.torch.state import describe_quantizer, make_quantizer

__all__ = ["Widening", "plan_widening"]

_Quantizers = Mapping[str, Mapping[str, Any]]
_Undo = Callable[..., Any]
_CLASSES = ("QuantizeDequantize", "GroupedBlockQuantizeDequantize")


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

    :param blocks: all decoder blocks.
    :param multiple: what their inner widths become a multiple of.
    :param grown: the quantizers to be replaced because they have cells in the padded dimension.
    """

    blocks: tuple[BlockTopology, ...]
    multiple: int
    grown: tuple[tuple[_Part, Any], ...]

    def apply(self, model: nn.Module, undo: _Undo) -> dict[str, int]:
        """Pad, in place.

        :param undo: takes a function and its arguments, to be called if something fails later.
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
        widths = {block.name: pad_mlp(model, block, self.multiple) for block in self.blocks}
        record_inner_width(model, widths)
        for part, quantizer in self.grown:
            layer = model.get_submodule(part.layer)
            undo(put_quantizer, layer, part.parameter, quantizer)
            put_quantizer(layer, part.parameter, _grown(layer, part, quantizer))
        return widths


def plan_widening(adaptor: SimAdaptor, plan: WeightPlan, quantizers: _Quantizers) -> Widening:
    """Check that the MLPs of a simulation can be padded as a plan wants it.

    Zeros leave every range that was calibrated as valid as it was, those of activations too, so
    only quantizers with a cell for each row or block grow; their old cells keep their ranges.

    :param quantizers: of all parameters, by layer and parameter.
    :raises ValueError: a layer to be padded is not what leads out of an MLP, shares its weight, was
        decided by an earlier technique, or has a quantizer that cannot grow.
    :raises TypeError: a layer of an MLP is no linear layer.
    """
    model = adaptor.model
    sizes = {
        name: _block_size(of_layer.get("weight"))
        for name, of_layer in quantizers.items()
        if name not in plan.specs
    }
    padding = plan_padding(model, plan, sizes)
    blocks = [b for b in padding.blocks if mlp_layers(model, b)[1].in_features % padding.multiple]
    parts = [part for block in blocks for part in _parts(model, block, padding.multiple)]
    names = sorted({part.layer for part in parts})
    _check_weights(model, names)
    _check_history(adaptor, names, quantizers)
    _check_activations(adaptor, blocks)
    grown = []
    for part in parts:
        quantizer = quantizers.get(part.layer, {}).get(part.parameter)
        replaced = part.parameter == "weight" and part.layer in plan.specs
        if quantizer is not None and not replaced and _has_cells(part, quantizer):
            _grown_description(part, quantizer)
            grown.append((part, quantizer))
    return Widening(padding.blocks, padding.multiple, tuple(grown))


def _parts(model: nn.Module, block: BlockTopology, multiple: int) -> Iterator[_Part]:
    rows, down = mlp_layers(model, block)
    extra = -down.in_features % multiple
    for name, fused in rows.items():
        for parameter in ("weight", "bias"):
            yield _Part(name, parameter, fused, extra)
    yield _Part(f"{block.name}.{block.stages[-1][0]}", "weight", 0, extra)


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


def _check_history(adaptor: SimAdaptor, names: Iterable[str], quantizers: _Quantizers) -> None:
    known = set()
    if adaptor.ledger is not None:
        known = {name for run in adaptor.ledger.runs for name in run.modules}
        known |= {side.module for entry in adaptor.ledger.entries for side in entry.sides}
    frozen = {
        name
        for name in names
        for quantizer in quantizers.get(name, {}).values()
        if quantizer is not None and not quantizer.is_overwrite_allowed()
    }
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


def _has_cells(part: _Part, quantizer: Any) -> bool:
    """Whether a quantizer has several cells along the dimension that is padded."""
    shape = tuple(getattr(quantizer, "shape", ()))
    if part.fused:
        return shape[:1] not in ((), (1,))
    return _block_size(quantizer) > 0


def _block_size(quantizer: Any) -> int:
    """Elements of a block along the last dimension, 0 if it is not cut into blocks."""
    size = getattr(quantizer, "block_size", None)
    return 0 if size is None else max(0, int(size[-1]))


def _grown_description(part: _Part, quantizer: Any) -> dict[str, Any]:
    """What of a quantizer does not change when it is calibrated, for the padded parameter.

    :raises ValueError: it cannot grow.
    """
    static = describe_quantizer(quantizer)
    shape = list(static["shape"])
    block = static.get("block_size")
    grouping = static.get("block_grouping")
    if part.fused:
        fits = block is None or block[0] in (1, -1)
        shape[0] += part.fused * part.extra
    else:
        old, shape[-1] = shape[-1], shape[-1] + part.extra // _block_size(quantizer)
        fits = grouping is None or grouping[-1] in (-1, old)
        static["block_grouping"] = grouping and [*grouping[:-1], -1]
    if not fits or static["class"] not in _CLASSES or static["parameters"] != ["max", "min"]:
        raise ValueError(
            f"{part.layer}: a quantizer of the {part.parameter} that can grow with it is required "
            f"({' or '.join(_CLASSES)}, blocks along the input channels), got {quantizer}; "
            'use on_indivisible="per_channel" or a block size that divides'
        )
    return {**static, "shape": shape}


@torch.no_grad()
def _grown(layer: Any, part: _Part, quantizer: Any) -> Any:
    """A quantizer for the padded parameter: old cells keep their range, new ones hold zeros."""
    new = make_quantizer(_grown_description(part, quantizer)).to(layer.weight.device)
    if not quantizer.is_initialized():
        return new
    calibrate_alone(layer, part.parameter, new)
    cells = part.extra if part.fused else new.shape[-1] - quantizer.shape[-1]
    bounds = []
    for key in ("min", "max"):
        old = getattr(quantizer, key).detach()
        kept = part.grow(torch.ones_like(old), cells).bool()
        bounds.append(torch.where(kept, part.grow(old, cells), getattr(new, key).detach()))
    new.set_range(*bounds)
    return new


def _put_back(layer: Any, attributes: Mapping[str, Any]) -> None:
    for key, value in attributes.items():
        setattr(layer, key, value)
