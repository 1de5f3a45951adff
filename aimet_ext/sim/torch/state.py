"""Quantizers of a PyTorch simulation: those of parameters, and all as tensors and JSON values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from aimet_torch.nn import BaseQuantizationMixin
from aimet_torch.quantization.affine import (
    AffineQuantizerBase,
    GroupedBlockQuantizeDequantize,
    QuantizeDequantize,
)
from aimet_torch.quantization.base import QuantizerBase
from torch import Tensor, nn

from aimet_ext.core.interrupts import uninterrupted
from aimet_ext.files.encodings import Layout
from aimet_ext.sim.torch.setup import quiet, weight_quantizer_for
from aimet_ext.specs import QSpec

_STATIC = (
    "shape",
    "qmin",
    "qmax",
    "symmetric",
    "block_size",
    "block_grouping",
    "decompressed_bw",
    "zero_point_shift",
    "exponent_bits",
    "mantissa_bits",
)
MADE = (QuantizeDequantize.__name__, GroupedBlockQuantizeDequantize.__name__)


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

    @property
    def bounds(self) -> tuple[Tensor, Tensor] | None:
        """Lower and upper bound of each cell, None without a range."""
        if not self.quantizer.is_initialized():
            return None
        return self.quantizer.min.detach(), self.quantizer.max.detach()

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
            with uninterrupted():
                for key, kept in own.items():
                    self.layer.param_quantizers[key] = kept
        return quantizer


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


def named_quantizers(root: nn.Module, name: str = "") -> list[tuple[str, Any]]:
    """Return every quantizer inside a module by name, a shared one under all its names.

    :param name: Name of the module, put before those inside it.
    """
    every = root.named_modules(remove_duplicate=False, prefix=name)
    return [(inner, module) for inner, module in every if isinstance(module, QuantizerBase)]


def unset_quantizers(sim: Any) -> list[str]:
    """Return the names of the quantizers without a range."""
    return [name for name, found in named_quantizers(sim.model) if not found.is_initialized()]


def put_quantizer(root: nn.Module, name: str, quantizer: nn.Module | None) -> None:
    """Put a quantizer in the place of that name, None: leave the tensor float."""
    container, _, key = name.rpartition(".")
    setattr(root.get_submodule(container), key, quantizer)


def freeze(quantizers: Iterable[Any]) -> None:
    """Keep ``compute_encodings`` and training from changing these ranges."""
    for quantizer in quantizers:
        quantizer.allow_overwrite(False)
        quantizer.requires_grad_(False)


def uninitialize(quantizer: Any) -> None:
    """Make AIMET see a quantizer's parameters as never set, so that calibration fills them."""
    for name, parameter in list(quantizer.named_parameters(recurse=False)):
        quantizer.register_quantization_parameter(name, parameter)


def quantizer_state(quantizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return copies of a quantizer's parameters, and its flags as JSON values."""
    own = quantizer.named_parameters(recurse=False)
    tensors = {name: parameter.detach().clone() for name, parameter in own}
    bounds = ("min", "max") if isinstance(quantizer, AffineQuantizerBase) else ()
    return tensors, {
        "initialized": quantizer.is_initialized(),
        "overwrite": {key: quantizer.is_overwrite_allowed(key) for key in bounds},
    }


@torch.no_grad()
def restore_quantizer(
    quantizer: Any, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], prefix: str = ""
) -> None:
    """Put back what :func:`quantizer_state` returned.

    :param prefix: Prefix of the parameters' names in ``tensors``.
    """
    for name, parameter in quantizer.named_parameters(recurse=False):
        parameter.copy_(tensors[prefix + name])
    if not meta["initialized"]:
        uninitialize(quantizer)
    quantizer.allow_overwrite(**meta["overwrite"])


def pack_quantizers(
    named: Iterable[tuple[str, Any]], separator: str = "."
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return quantizers as tensors and JSON values.

    :returns: their parameters as ``{quantizer}{separator}{parameter}``, and for each quantizer its
        class and grid, whether it is initialized and frozen, or the name of the quantizer that is
        the same object.
    """
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    first: dict[int, str] = {}
    for name, quantizer in named:
        if first.setdefault(id(quantizer), name) != name:
            described[name] = {"same_as": first[id(quantizer)]}
            continue
        state, meta = quantizer_state(quantizer)
        tensors.update({f"{name}{separator}{key}": value for key, value in state.items()})
        described[name] = {**describe_quantizer(quantizer), "state": meta}
    return tensors, described


def quantizers_to_tensors(sim: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all quantizers of a simulation by their names in ``sim.model``."""
    return pack_quantizers(named_quantizers(sim.model))


def load_quantizers(
    sim: Any, tensors: Mapping[str, Tensor], described: Mapping[str, Mapping[str, Any]]
) -> None:
    """Make a sim's quantizers what :func:`quantizers_to_tensors` described.

    Quantizers that fit keep their object; others are made anew, and those not described go.

    :raises ValueError: the sim lacks a place for a quantizer, or one is of a class that cannot be
        made anew; all such are named and nothing is changed.
    """
    existing = dict(named_quantizers(sim.model))
    made: dict[str, Any] = {}
    faults = []
    for name, description in described.items():
        if "same_as" in description:
            continue
        static = {key: value for key, value in description.items() if key != "state"}
        if name in existing and describe_quantizer(existing[name]) == static:
            made[name] = existing[name]
        elif not _has_place(sim.model, name):
            faults.append(f"{name} (the model has no such place)")
        elif static["class"] not in MADE:
            faults.append(f"{name} (a {static['class']} must be set in the sim before)")
        else:
            made[name] = make_quantizer(static)
    if faults:
        raise ValueError(
            "a sim of the model that was exported is required, but these quantizers do not fit: "
            + ", ".join(faults)
        )
    for name in existing.keys() - described.keys():
        put_quantizer(sim.model, name, None)
    device = next((t.device for t in sim.model.parameters()), None)
    for name, description in described.items():
        quantizer = made[description.get("same_as", name)]
        if existing.get(name) is not quantizer:
            put_quantizer(sim.model, name, quantizer)
        if name in made:
            restore_quantizer(quantizer.to(device), tensors, description["state"], f"{name}.")


def describe_quantizer(quantizer: Any) -> dict[str, Any]:
    """Return the properties of a quantizer that calibration leaves alone, as JSON values."""
    found = {key: getattr(quantizer, key) for key in _STATIC if hasattr(quantizer, key)}
    plain = {key: _plain(value) for key, value in found.items()}
    keys = sorted(key for key, _ in quantizer.named_parameters(recurse=False))
    return {"class": type(quantizer).__name__, "parameters": keys, **plain}


def _plain(value: Any) -> Any:
    """Return JSON values; a copy made by ``copy.deepcopy`` has tensors in its block size."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, Tensor) else value


def make_quantizer(static: Mapping[str, Any]) -> Any:
    """Return a new quantizer, without a range, of what :func:`describe_quantizer` returned."""

    def tuple_of(key: str) -> tuple[int, ...] | None:
        return None if static[key] is None else tuple(static[key])

    shape, block_size = tuple(static["shape"]), tuple_of("block_size")
    if static["class"] == GroupedBlockQuantizeDequantize.__name__:
        quantizer = GroupedBlockQuantizeDequantize(
            shape,
            (static["qmax"] - static["qmin"]).bit_length(),
            static["symmetric"],
            static["decompressed_bw"],
            block_size=block_size,
            block_grouping=tuple_of("block_grouping"),
        )
        quantizer.qmin, quantizer.qmax = static["qmin"], static["qmax"]
        return quantizer
    return QuantizeDequantize(
        shape,
        static["qmin"],
        static["qmax"],
        static["symmetric"],
        block_size=block_size,
        zero_point_shift=static["zero_point_shift"],
    )


def _has_place(model: nn.Module, name: str) -> bool:
    """Return True if a layer has a container with that place for a quantizer."""
    parent, _, key = name.rpartition(".")
    try:
        container: Any = model.get_submodule(parent)
    except AttributeError:
        return False
    return int(key) < len(container) if key.isdigit() else key in container
