"""Layers that a walk goes to: found by name, their weights checked, and what reads their output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from aimet_ext.data.moments import Geometry
from aimet_ext.walk.protocol import Activation

__all__ = [
    "check_folded",
    "check_model",
    "checked_weight",
    "find_layers",
    "fit_mask",
    "geometries",
    "is_batch_norm",
    "known",
    "relu_of",
    "twice_called",
    "uncalled",
]

# In place or not, the function is the same; handed out is the one that leaves its input alone.
_RELUS: Mapping[Callable[..., Tensor], Activation] = {
    torch.relu: functional.relu,
    torch.relu_: functional.relu,
    functional.relu: functional.relu,
    Tensor.relu: functional.relu,
    Tensor.relu_: functional.relu,
    functional.relu6: functional.relu6,
}
_BATCH_NORMS = (functional.batch_norm, torch.batch_norm)


def find_layers(
    model: nn.Module, names: Iterable[str], parameter: str = "layers"
) -> dict[str, nn.Module]:
    """The modules of these names, each with a weight.

    :param parameter: what to call the names in an error.
    :raises ValueError: a name is given twice or is not in the model, or a module has no weight.
    """
    found: dict[str, nn.Module] = {}
    for name in names:
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(
                f"{parameter} must name modules of {type(model).__name__}, got {name!r}: {error}"
            ) from error
        if name in found or module in found.values():
            raise ValueError(
                f"{parameter} must name each module once, {name!r} is there twice (a module may "
                "have several names); remove one"
            )
        if getattr(module, "weight", None) is None:
            raise ValueError(
                f"{parameter} must name modules with a weight, {name!r} "
                f"({type(module).__name__}) has none; leave it out"
            )
        found[name] = module
    return found


def known(layers: Mapping[str, nn.Module], name: str) -> nn.Module:
    """One of the layers walked to.

    :raises ValueError: it is none of them.
    """
    if name not in layers:
        raise ValueError(
            f"layer must be one of the {len(layers)} walked to, got {name!r}; see the stage's "
            "layers"
        )
    return layers[name]


def check_model(model: nn.Module) -> None:
    """Refuse a model that computes something else in training than in use.

    :raises ValueError: it is in training mode.
    """
    if model.training:
        raise ValueError(
            f"the model must be in evaluation mode, {type(model).__name__} is in training mode; "
            "call model.eval()"
        )


def geometries(layers: Mapping[str, nn.Module]) -> dict[str, Geometry]:
    """How each layer's input becomes rows.

    :raises TypeError: a layer is neither linear nor a convolution; it is named.
    """
    found = {}
    for name, module in layers.items():
        try:
            found[name] = Geometry.of(module)
        except TypeError as error:
            raise TypeError(f"layer {name!r}: {error}") from error
    return found


def checked_weight(name: str, module: nn.Module, weight: Tensor) -> Tensor:
    """A weight to compute with in place of the module's own, on its device, in its dtype.

    :raises ValueError: it has another shape.
    """
    own = module.weight
    assert isinstance(own, Tensor)
    if weight.shape != own.shape:
        raise ValueError(
            f"the weight of {name!r} must be of shape {list(own.shape)}, got {list(weight.shape)}"
        )
    return weight.detach().to(own)


def fit_mask(mask: Tensor | None, x: Tensor, geometry: Geometry) -> Tensor | None:
    """Which of a layer's input vectors count, None where the tokens of the batch are not seen.

    :param mask: bool ``[batch, seq]`` of the batch.
    :param x: the layer's input, ``[batch, seq, in]`` or ``[batch * seq, in]``.
    :returns: bool of the leading dimensions of ``x``.
    """
    if mask is None or geometry.kernel_size:
        return None
    if mask.shape == x.shape[:-1]:
        return mask.to(x.device)
    return mask.flatten().to(x.device) if x.shape[:-1] == (mask.numel(),) else None


def relu_of(reader: object) -> Activation | None:
    """The activation that a module, a function or a tensor's method is, if it is a ReLU."""
    if isinstance(reader, nn.ReLU):
        return functional.relu
    if isinstance(reader, nn.ReLU6):
        return functional.relu6
    if isinstance(reader, str):  # the name of a tensor's method
        return functional.relu if reader in ("relu", "relu_") else None
    return _RELUS.get(reader) if callable(reader) else None


def is_batch_norm(reader: object) -> bool:
    """Whether a module or a function is a batch norm."""
    return isinstance(reader, _BatchNorm) or reader in _BATCH_NORMS


def check_folded(layer: str, sole_reader: object) -> None:
    """Refuse a layer whose output goes through a batch norm first.

    :param sole_reader: the module or function that alone reads the layer's output.
    :raises ValueError: it is a batch norm.
    """
    if is_batch_norm(sole_reader):
        raise ValueError(
            f"the batch norm after layer {layer!r} must be folded into it before the simulation "
            "is built; call aimet_torch.batch_norm_fold.fold_all_batch_norms(model, input_shapes)"
        )


def twice_called(layer: str) -> ValueError:
    """The error for a layer that reads several inputs in one forward pass."""
    return ValueError(
        f"a layer must be called once in a forward pass, {layer!r} is called again; "
        "leave it out, or give each call a layer of its own"
    )


def uncalled(layers: Iterable[str]) -> ValueError:
    """The error for layers that are no part of the forward pass."""
    return ValueError(
        f"these layers never received data: {', '.join(layers)}; leave them out, or calibrate "
        "with batches that reach them"
    )
