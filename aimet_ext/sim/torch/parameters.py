"""Parameters of AIMET's layers with their quantizers: read, rounded, replaced and made wider."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from aimet_torch.nn import BaseQuantizationMixin
from torch import Tensor

from aimet_ext.config import QSpec
from aimet_ext.files.encodings import Layout
from aimet_ext.sim.torch.setup import quiet, weight_quantizer_for
from aimet_ext.sim.torch.state import MADE, describe_quantizer, make_quantizer


@dataclass(frozen=True, eq=False)
class LayerParameter:
    """A parameter of AIMET's layer and the quantizer that it has now.

    :param layer: AIMET's layer.
    :param key: Name of the parameter in it.
    :param quantizer: Quantizer of any type, None where the parameter stays float.
    """

    layer: Any
    key: str
    quantizer: Any

    @property
    def value(self) -> Tensor:
        """The float values."""
        return getattr(self.layer, self.key)

    @property
    def frozen(self) -> bool:
        """True if an earlier technique froze the range."""
        return self.quantizer is not None and not self.quantizer.is_overwrite_allowed()

    @property
    def shape(self) -> tuple[int, ...]:
        """Cells of the grid along each dimension; empty for one cell."""
        return tuple(getattr(self.quantizer, "shape", ()))

    @property
    def block(self) -> int:
        """Elements of a block along the last dimension, 0 if it is not cut into blocks."""
        size = getattr(self.quantizer, "block_size", None)
        return 0 if size is None else max(0, int(size[-1]))

    @torch.no_grad()
    def rounded(self) -> Tensor:
        """Return the values that AIMET's quantizer makes of the parameter."""
        return self.quantizer(self.value).as_subclass(Tensor).detach()

    def layout(self, *, transposed: bool = False) -> Layout:
        """Return the layout of an encoding, the channel axis told from the quantizer's shape.

        :param transposed: True if the parameter lies in the file with its dimensions reversed.
        """
        value, quantizer = self.value, self.quantizer
        cells = (1,) * (value.dim() - len(self.shape)) + self.shape
        axis = next((i for i, n in enumerate(cells) if n > 1 and n == value.shape[i]), 0)
        grouping = getattr(quantizer, "block_grouping", None) or (1,) * len(self.shape)
        scale_bits = None
        if any(n > 1 and group in (-1, n) for n, group in zip(self.shape, grouping, strict=True)):
            scale_bits = quantizer.decompressed_bw - quantizer.bitwidth  # LPBQ, a group a channel
        shape = tuple(value.shape)
        if transposed:
            shape, axis = shape[::-1], 1 - axis
        return Layout(shape, axis, scale_bits)

    def put(self, quantizer: Any) -> None:
        """Replace the quantizer of the parameter, None: leave it float."""
        self.layer.param_quantizers[self.key] = quantizer

    def calibrate(self, quantizer: Any) -> Any:
        """Set the range of a quantizer from the parameter by AIMET's own rule, and return it.

        The layer's own quantizers, of this parameter and of others, keep their ranges.
        """
        own = dict(self.layer.param_quantizers.items())
        try:
            for key in own:
                self.layer.param_quantizers[key] = quantizer if key == self.key else None
            with quiet():
                self.layer.compute_param_encodings()
        finally:
            for key, kept in own.items():
                self.layer.param_quantizers[key] = kept
        return quantizer

    def grown_description(self, rows: int, columns: int) -> dict[str, Any] | None:
        """Return the description of a quantizer of the same grid for a padded parameter.

        :param rows: Rows that are added.
        :param columns: Input channels that are added.
        :returns: None if no such quantizer can be made.
        """
        static = describe_quantizer(self.quantizer)
        shape, block = list(static["shape"]), static.get("block_size")
        grouping = static.get("block_grouping")
        if rows:
            fits = block is None or block[0] in (1, -1)
            shape[0] += rows
        else:
            old, shape[-1] = shape[-1], shape[-1] + columns // self.block
            fits = grouping is None or grouping[-1] in (-1, old)
            static["block_grouping"] = grouping and [*grouping[:-1], -1]
        if not fits or static["class"] not in MADE or static["parameters"] != ["max", "min"]:
            return None
        return {**static, "shape": shape}

    @torch.no_grad()
    def grow(
        self, description: Mapping[str, Any], append: Callable[[Tensor, int], Tensor], count: int
    ) -> None:
        """Replace the quantizer of a parameter that was padded; old cells keep their range.

        :param description: Result of :meth:`grown_description`.
        :param append: Function that appends so many zeros to a tensor as the parameter got them.
        :param count: Cells that are added.
        """
        new = make_quantizer(description).to(self.layer.weight.device)
        if self.quantizer.is_initialized():
            self.calibrate(new)
            bounds = []
            for key in ("min", "max"):
                old = getattr(self.quantizer, key).detach()
                kept = append(torch.ones_like(old), count).bool()
                bounds.append(torch.where(kept, append(old, count), getattr(new, key).detach()))
            new.set_range(*bounds)
        self.put(new)


def layer_parameters(sim: Any) -> dict[str, dict[str, LayerParameter]]:
    """Return the parameters of each layer that can have quantizers.

    :returns: by name of layer and name of parameter; a layer that stands at two places is listed
        once.
    """
    return {
        name: {key: LayerParameter(layer, key, q) for key, q in layer.param_quantizers.items()}
        for name, layer in sim.model.named_modules()
        if isinstance(layer, BaseQuantizationMixin)
    }


def quantized_parameters(sim: Any) -> dict[str, LayerParameter]:
    """Return the parameters that have a quantizer, by their names in the model."""
    return {
        f"{name}.{key}".lstrip("."): parameter
        for name, parameters in layer_parameters(sim).items()
        for key, parameter in parameters.items()
        if parameter.quantizer is not None
    }


def calibrated_weight_quantizer(spec: QSpec, layer: Any) -> Any:
    """Return a quantizer for a layer's weight with the range that ``compute_encodings`` would set.

    The layer itself is left as it is.

    :param layer: AIMET's layer.
    :raises ValueError: the block size does not divide the input width.
    """
    weight = LayerParameter(layer, "weight", None)
    return weight.calibrate(weight_quantizer_for(spec, layer.weight))


def set_weight_specs(
    weights: Mapping[str, LayerParameter], specs: Mapping[str, QSpec | None], undo: ExitStack
) -> None:
    """Give weights new quantizers, with ranges; layers that share a weight share one.

    :param weights: Weights by layer.
    :param specs: Specs by layer, None for a weight that becomes float.
    :param undo: Stack that gets the calls which put the quantizers back.
    """
    made: dict[int, Any] = {}
    for name, spec in specs.items():
        weight = weights[name]
        if id(weight.value) not in made:
            new = None if spec is None else calibrated_weight_quantizer(spec, weight.layer)
            made[id(weight.value)] = new
    for name in specs:
        undo.callback(weights[name].put, weights[name].quantizer)
        weights[name].put(made[id(weights[name].value)])
