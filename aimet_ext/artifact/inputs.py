"""Inputs that a torch model is traced with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from aimet_ext.data.batches import as_tensors, call_arguments, module_device


@dataclass(frozen=True)
class Inputs:
    """Inputs that a model is traced with: positional arguments, and the names of the tensors.

    :param args: None stands for an optional argument that is left out.
    """

    args: tuple[Any, ...]
    names: tuple[str, ...]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in the ONNX file."""
        found = (value for value in self.args if isinstance(value, Tensor))
        return dict(zip(self.names, found, strict=True))

    def in_float32(self) -> Inputs:
        """Return the inputs as a model in float32 takes them."""
        floating = (isinstance(v, Tensor) and v.is_floating_point() for v in self.args)
        args = (v.float() if real else v for v, real in zip(self.args, floating, strict=True))
        return Inputs(tuple(args), self.names)


def positional_inputs(model: nn.Module, dummy_input: Any) -> Inputs:
    """Return a dummy input as the model's positional arguments, on the model's device.

    :param dummy_input: tensor, tuple or list of positional arguments, or mapping of keyword
        arguments; ``labels`` are left out.
    :raises TypeError: it is none of these, does not fit ``model.forward``, or gives by keyword what
        has no place among the positional arguments.
    """
    sample = as_tensors(dummy_input)
    if not isinstance(sample, Tensor | tuple | list | Mapping):
        raise TypeError(
            "dummy_input must be a tensor, a tuple of positional arguments or a mapping of keyword "
            f"arguments, got {type(dummy_input).__name__}"
        )
    given, named = call_arguments(sample)
    signature = inspect.signature(model.forward)
    bound = signature.bind(*given, **named)
    last = list(bound.arguments)[-1]
    bound.apply_defaults()
    order = list(bound.arguments)
    values: dict[str, Any] = {}
    for name in order[: order.index(last) + 1]:
        value, kind = bound.arguments[name], signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            values.update({f"{name}_{place}": item for place, item in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            raise TypeError(
                "dummy_input must give the arguments that an ONNX file has by position, but "
                f"{type(model).__name__}.forward takes {', '.join(value)} by keyword only; pass a "
                "tuple of tensors"
            )
        else:
            values[name] = value
    device = module_device(model)
    args = tuple(v.to(device) if isinstance(v, Tensor) else v for v in values.values())
    return Inputs(args, tuple(name for name, v in values.items() if isinstance(v, Tensor)))
