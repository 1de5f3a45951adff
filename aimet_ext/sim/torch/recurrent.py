"""Recurrent layers of a torch simulation whose matrices are linear layers for a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from aimet_torch.nn import QuantizationMixin
from torch import nn

from aimet_ext.core.interrupts import uninterrupted
from aimet_ext.sim.protocol import RECURRENT
from aimet_ext.walk.recurrent import Unrolled, matrices


@contextmanager
def as_linear(model: nn.Module) -> Iterator[None]:
    """Open a context in which AIMET's recurrent layers compute with linear layers of AIMET.

    ``rnn.weight_hh_l0`` is a layer then, with the parameter and the quantizer of that name; both
    are in their places again behind the context. Nothing but these weights is quantized in it.
    """
    with ExitStack() as opened:
        for module in list(model.modules()):
            if isinstance(module, nn.RNNBase) and isinstance(module, QuantizationMixin):
                opened.enter_context(_opened(module))
        yield


@contextmanager
def _opened(module: Any) -> Iterator[None]:
    quantizers, parameters = module.param_quantizers, module._parameters
    order = list(parameters)
    layers = {name: _linear(parameters[name], quantizers[name]) for name in matrices(module)}
    try:
        for name, layer in layers.items():
            del parameters[name], quantizers._modules[name]
            module._modules[name] = layer
        vars(module)["forward"] = Unrolled(module)
        yield
    finally:
        with uninterrupted():
            vars(module).pop("forward", None)
            for name, layer in layers.items():
                module._modules.pop(name, None)
                parameters[name] = layer.weight
                quantizers._modules[name] = layer.param_quantizers["weight"]
            for name in order:  # as state dicts have them
                parameters[name] = parameters.pop(name)
                quantizers._modules[name] = quantizers._modules.pop(name)
            module._init_flat_weights()


def _linear(weight: nn.Parameter, quantizer: Any) -> Any:
    """Return a linear layer of AIMET with this very parameter and quantizer."""
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer: Any = QuantizationMixin.from_module(plain)
    layer.weight = weight
    layer.param_quantizers["weight"] = quantizer
    return layer.eval()


def reason_to_leave(module: Any) -> str | None:
    """Return why weights of a recurrent layer are not decided as it is now, None if all are."""
    kept = {name for name, found in module.param_quantizers.items() if found is not None}
    weights = sorted(name for name in kept if name.startswith("weight"))
    if isinstance(module, nn.RNNCellBase) and weights:
        return "a recurrent cell is called at each step, only layers of all steps are decided"
    if not isinstance(module, nn.RNNBase) or not weights:
        return None
    if all(name.startswith("weight_hr") for name in weights):
        return f"inputs of {', '.join(weights)} are states inside of its cell"
    return RECURRENT
