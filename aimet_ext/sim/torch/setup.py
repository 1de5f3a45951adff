"""Building ``aimet_torch.QuantizationSimModel`` with the quantizers asked for."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.nn import BaseQuantizationMixin
from aimet_torch.quantization.affine import GroupedBlockQuantizeDequantize, QuantizeDequantize
from aimet_torch.quantization.base import QuantizerBase
from aimet_torch.quantization.tensor import QuantizedTensorBase
from torch import Tensor, nn

from aimet_ext.data.geometry import TRANSPOSED
from aimet_ext.files.scratch import temporary
from aimet_ext.models.attention import every_module, own_projections
from aimet_ext.models.experts import all_tokens
from aimet_ext.sim.torch.unknown import unknown_modules
from aimet_ext.specs import LPBQ, PerTensor, QSpec
from aimet_ext.walk.routing import PackedLayers, is_sent_to

# Bits of what has no spec: gains of norms, which NPUs take in 8 bits beside activations of 8.
_GAIN_BITS, _NARROW = 16, 8


_new_empty = QuantizedTensorBase.new_empty


def _new_empty_of_sizes(self: QuantizedTensorBase, *size: Any, **settings: Any) -> Tensor:
    """Take a size as torch's own method does, as one argument or as several; AIMET's takes one."""
    sizes = (size if len(size) > 1 else size[0]) if size else settings.pop("size")
    return _new_empty(self, sizes, **settings)


QuantizedTensorBase.new_empty = _new_empty_of_sizes


def build_sim(
    model: nn.Module,
    dummy_input: Any,
    weights: Mapping[str, QSpec | None],
    activations: QSpec | None,
    config: str | Mapping[str, Any],
    *,
    recurrent: Mapping[str, QSpec | None] = MappingProxyType({}),
    in_place: bool = False,
    ranges: bool = True,
) -> QuantizationSimModel:
    """Return a simulation whose weights are quantized as asked for each layer, with ranges.

    :param model: Traceable model; copied unless ``in_place``.
    :param dummy_input: Input to trace the model with.
    :param weights: Spec by name of module, None for float. Modules not named (norms) have 16-bit
        parameters, 8-bit ones beside activations of 8 bits, or float ones where activations are
        float.
    :param activations: Spec of every input and output quantizer, None for float.
    :param config: Alias or path of AIMET's configuration file, or its content.
    :param recurrent: Specs of one range by name of matrix of a recurrent layer, None for float, as
        those not named are: what AIMET gives on both frameworks.
    :param ranges: False if ranges are loaded next: AIMET looks for a 16-bit grid for seconds.
    """
    narrow = activations is not None and activations.bitwidth <= _NARROW
    if not in_place:
        model = copy.deepcopy(model)
    _say_quantized(model)
    with (
        _config_file(config) as config_file,
        quiet(),
        all_tokens(model),
        every_module(),
        unknown_modules(model, dummy_input) as uncalled,
    ):
        sim = QuantizationSimModel(
            model,
            dummy_input,
            default_output_bw=_GAIN_BITS,
            default_param_bw=_NARROW if narrow else _GAIN_BITS,
            in_place=True,
            config_file=config_file,
        )
    _settle_attention(sim)
    # An expert that the dummy input does not reach is quantized like the others of its list.
    experts = {name for name in uncalled if name in weights and is_sent_to(sim.model, name)}
    for name in uncalled:
        _remove_quantizers(sim.model.get_submodule(name), activations_alone=name in experts)
    dead = uncalled - experts
    weights = {name: spec for name, spec in weights.items() if name not in dead}
    _set_activations(sim, activations)
    _share_ranges(sim)
    _set_weights(sim, weights, keep_others=activations is not None)
    _set_recurrent(sim, recurrent, dead)
    if ranges:
        with quiet():
            for module in sim.qmodules():
                module.compute_param_encodings()
    return sim


def _say_quantized(model: nn.Module) -> None:
    """Have transformers call layers whose weights it would read, as it does for quantized ones."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_json_string"):  # which leaves this out
            config._is_quantized = True


def weight_quantizer_for(spec: QSpec, weight: Tensor, *, turned: bool = False) -> nn.Module:
    """Return AIMET's quantizer for a weight, without a range, on the weight's device.

    Blocks run along the input channels, dimension 1 of linear layers and convolutions.

    :param weight: ``[out, in, …]``.
    :param turned: True for the weight ``[in, out, …]`` of a transposed convolution, without blocks.
    :raises ValueError: the block size does not divide the input width.
    """
    outputs, width, *rest = weight.shape
    ones = [1] * len(rest)
    block = spec.block_size
    if block is None:
        channels = (1, width) if turned else (outputs, 1)
        shape = () if isinstance(spec.granularity, PerTensor) else (*channels, *ones)
        return QuantizeDequantize(shape, spec.bitwidth, spec.symmetric).to(weight.device)
    if width % block:
        raise ValueError(
            f"a block size that divides the input width {width} is required, got {block}"
        )
    shape, size = (outputs, width // block, *ones), (1, block, *rest)
    if isinstance(spec.granularity, LPBQ):
        return GroupedBlockQuantizeDequantize(
            shape,
            spec.bitwidth,
            symmetric=True,
            decompressed_bw=spec.bitwidth + spec.granularity.scale_bits,
            block_size=size,
            block_grouping=(1, -1, *ones),
        ).to(weight.device)
    return QuantizeDequantize(shape, spec.bitwidth, spec.symmetric, block_size=size).to(
        weight.device
    )


def minmax_quantizer_for(spec: QSpec, weight: Tensor) -> nn.Module:
    """Return a quantizer for a weight, with the range that AIMET sets for plain rounding.

    :raises ValueError: the block size does not divide the input width.
    """
    quantizer: Any = weight_quantizer_for(spec, weight)
    with quiet(), torch.no_grad(), quantizer.compute_encodings():
        quantizer(weight)
    return quantizer


def _set_activations(sim: QuantizationSimModel, spec: QSpec | None) -> None:
    # A shared quantizer is there under each of its names.
    for name, quantizer in list(sim.model.named_modules(remove_duplicate=False)):
        parent, _, key = name.rpartition(".")
        if not isinstance(quantizer, QuantizerBase) or parent.endswith("param_quantizers"):
            continue
        if spec is None:
            setattr(sim.model.get_submodule(parent), key, None)
            continue
        quantizer.symmetric = spec.symmetric
        quantizer.signed = spec.symmetric
        quantizer.bitwidth = spec.bitwidth


def _settle_attention(sim: QuantizationSimModel) -> None:
    """Leave AIMET's attention with the weights and quantizers that it computes with.

    Its modules for masks, added biases and mean weights are there in any case; those that the
    traced model does not call would never get a range.
    """
    graph: Any = sim.connected_graph
    called = {op.get_module() for op in graph.ordered_ops}
    attentions = [m for m in sim.model.modules() if isinstance(m, nn.MultiheadAttention)]
    for attention in attentions:
        own_projections(attention)
        held: Any = attention.param_quantizers
        for key in list(held):
            if getattr(attention, key, None) is None:
                held[key] = None
        for module in attention.children():
            if isinstance(module, BaseQuantizationMixin) and module not in called:
                _leave_activations(module)


def _remove_quantizers(module: Any, *, activations_alone: bool) -> None:
    """Leave the inputs, outputs and parameters of a module float."""
    if isinstance(module, BaseQuantizationMixin):
        _leave_activations(module)
        for key in () if activations_alone else module.param_quantizers:
            module.param_quantizers[key] = None


def _leave_activations(module: Any) -> None:
    """Leave the inputs and outputs of a module float."""
    for slots in (module.input_quantizers, module.output_quantizers):
        for number in range(len(slots)):
            slots[number] = None


def _share_ranges(sim: QuantizationSimModel) -> None:
    """Give experts the same activation quantizers: one that sees no tokens needs ranges too."""
    for module in sim.model.modules():
        if isinstance(module, PackedLayers):
            layers: list[Any] = list(module)
            for kind in ("input_quantizers", "output_quantizers"):
                for number, quantizer in enumerate(getattr(layers[0], kind)):
                    for layer in layers:
                        getattr(layer, kind)[number] = quantizer


def _set_weights(
    sim: QuantizationSimModel,
    weights: Mapping[str, QSpec | None],
    *,
    keep_others: bool,
) -> None:
    made: dict[int, nn.Module | None] = {}  # tied weights share one quantizer
    for name, layer in sim.model.named_modules():
        if not isinstance(layer, BaseQuantizationMixin):
            continue
        if name in weights:
            spec, weight = weights[name], layer.weight
            if id(weight) not in made:
                turned = isinstance(layer, TRANSPOSED)
                made[id(weight)] = (
                    None if spec is None else weight_quantizer_for(spec, weight, turned=turned)
                )
            layer.param_quantizers["weight"] = made[id(weight)]
        elif not keep_others:
            for parameter in layer.param_quantizers:
                layer.param_quantizers[parameter] = None


def _set_recurrent(
    sim: QuantizationSimModel, specs: Mapping[str, QSpec | None], dead: Collection[str]
) -> None:
    """Give each matrix of a recurrent layer its quantizer.

    :param specs: By name of matrix.
    :param dead: Modules that the model does not call.
    """
    for name, module in sim.named_qmodules():
        if isinstance(module, nn.RNNBase | nn.RNNCellBase) and name not in dead:
            held: Any = module.param_quantizers
            for key in [key for key in held if key.startswith("weight")]:
                spec = specs.get(f"{name}.{key}" if name else key)
                held[key] = (
                    None if spec is None else weight_quantizer_for(spec, getattr(module, key))
                )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings of what AIMET calls: torch.jit and some of its own are deprecated."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, torch.jit.TracerWarning):
            warnings.simplefilter("ignore", category)
        yield


@contextmanager
def _config_file(config: str | Mapping[str, Any]) -> Iterator[str]:
    if isinstance(config, str):
        yield config
        return
    with temporary() as folder:
        path = folder / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        yield str(path)
