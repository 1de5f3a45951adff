"""Building ``aimet_torch.QuantizationSimModel`` with the quantizers asked for."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.nn import BaseQuantizationMixin
from aimet_torch.quantization.affine import GroupedBlockQuantizeDequantize, QuantizeDequantize
from torch import Tensor, nn

from aimet_ext.config import LPBQ, PerTensor, QSpec

__all__ = [
    "build_sim",
    "calibrate_alone",
    "calibrated_weight_quantizer",
    "parameter_quantizers",
    "put_quantizer",
    "weight_quantizer_for",
]

_NORM_BITS = 16


def build_sim(
    model: nn.Module,
    dummy_input: Any,
    weights: Mapping[str, QSpec | None],
    activations: QSpec | None,
    config: str | Mapping[str, Any],
    *,
    in_place: bool = False,
) -> QuantizationSimModel:
    """A simulation whose weights are quantized layer by layer as asked, ranges already set.

    :param model: traceable; copied unless ``in_place``.
    :param dummy_input: what the model is traced with.
    :param weights: a spec by name of module, None for float. Modules not named (norms) have 16-bit
        parameters, or float ones where activations are float.
    :param activations: spec of every input and output quantizer, None for float.
    :param config: alias or path of AIMET's configuration file, or its content.
    """
    with _config_file(config) as config_file, _quiet():
        sim = QuantizationSimModel(
            model,
            dummy_input,
            default_output_bw=_NORM_BITS,
            default_param_bw=_NORM_BITS,
            in_place=in_place,
            config_file=config_file,
        )
    _set_activations(sim, activations)
    _set_weights(sim, weights, keep_others=activations is not None)
    return sim


def weight_quantizer_for(spec: QSpec, weight: Tensor) -> nn.Module:
    """AIMET's quantizer for a weight, without a range, on the weight's device.

    Blocks run along the input channels, dimension 1 of linear layers and convolutions.

    :param weight: ``[out, in, …]``.
    :raises ValueError: the block size does not divide the input width.
    """
    outputs, width, *rest = weight.shape
    ones = [1] * len(rest)
    block = spec.block_size
    if block is None:
        shape = () if isinstance(spec.granularity, PerTensor) else (outputs, 1, *ones)
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


def parameter_quantizers(sim: QuantizationSimModel) -> dict[str, dict[str, nn.Module | None]]:
    """Quantizers of the parameters of each layer that can have some, None where one is float.

    :returns: by name of layer and name of parameter, of whatever type; a layer that stands at two
        places is listed once.
    """
    return {
        name: dict(layer.param_quantizers.items())
        for name, layer in sim.model.named_modules()
        if isinstance(layer, BaseQuantizationMixin)
    }


def put_quantizer(layer: Any, parameter: str, quantizer: nn.Module | None) -> None:
    """Quantize a parameter of AIMET's layer with this quantizer, None: leave it float."""
    layer.param_quantizers[parameter] = quantizer


def calibrated_weight_quantizer(spec: QSpec, layer: Any) -> nn.Module:
    """A quantizer for a layer's weight with the range that ``sim.compute_encodings`` would set.

    The layer itself is left as it is.

    :param layer: AIMET's layer.
    :raises ValueError: the block size does not divide the input width.
    """
    quantizer = weight_quantizer_for(spec, layer.weight)
    calibrate_alone(layer, "weight", quantizer)
    return quantizer


def calibrate_alone(layer: Any, parameter: str, quantizer: nn.Module) -> None:
    """Set a quantizer's range from a parameter, by AIMET's own rule.

    The layer's own quantizers, of this parameter and of others, keep their ranges.
    """
    own = dict(layer.param_quantizers.items())
    try:
        for key in own:
            layer.param_quantizers[key] = quantizer if key == parameter else None
        with _quiet():
            layer.compute_param_encodings()
    finally:
        for key, kept in own.items():
            layer.param_quantizers[key] = kept


def _set_activations(sim: QuantizationSimModel, spec: QSpec | None) -> None:
    for name, quantizer in list(sim.named_quantizers()):
        parent, _, key = name.rpartition(".")
        if parent.endswith("param_quantizers"):
            continue
        if spec is None:
            setattr(sim.model.get_submodule(parent), key, None)
            continue
        quantizer.symmetric = spec.symmetric
        quantizer.signed = spec.symmetric
        quantizer.bitwidth = spec.bitwidth


def _set_weights(
    sim: QuantizationSimModel, weights: Mapping[str, QSpec | None], *, keep_others: bool
) -> None:
    made: dict[int, nn.Module | None] = {}  # tied weights share one quantizer
    for name, layer in sim.model.named_modules():
        if not isinstance(layer, BaseQuantizationMixin):
            continue
        if name in weights:
            spec, weight = weights[name], layer.weight
            if id(weight) not in made:
                made[id(weight)] = None if spec is None else weight_quantizer_for(spec, weight)
            layer.param_quantizers["weight"] = made[id(weight)]
        elif not keep_others:
            for parameter in layer.param_quantizers:
                layer.param_quantizers[parameter] = None
        with _quiet():
            layer.compute_param_encodings()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of what AIMET calls: torch.jit is deprecated, and so is some of its own."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, torch.jit.TracerWarning):
            warnings.simplefilter("ignore", category)
        yield


@contextmanager
def _config_file(config: str | Mapping[str, Any]) -> Iterator[str]:
    if isinstance(config, str):
        yield config
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        yield str(path)
