"""The weights of a PyTorch model that get widths, with gradients and errors by hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from aimet_ext.analysis.weight_costs import Fisher, Numbers, Unit, stored_bits
from aimet_ext.core.interrupts import uninterrupted
from aimet_ext.data.batches import ForwardFn, call_model, iterate_batches
from aimet_ext.models.hidden import expose_weights
from aimet_ext.models.huggingface import causal_lm, original_name, prepare_model
from aimet_ext.sim.points import Run, first_output
from aimet_ext.sim.protocol import SimAdaptor
from aimet_ext.specs import QSpec, fit_blocks
from aimet_ext.walk.hooks import evaluating, layer_input


@dataclass(frozen=True, eq=False)
class ModelWeights:
    """See :class:`aimet_ext.analysis.weight_costs.Subject`.

    :param module: Module that computes in float.
    """

    module: nn.Module
    batches: Sequence[Any]
    forward_fn: ForwardFn | None

    @property
    def mask_model(self) -> Any:
        """Return the module, where it is called as it is."""
        return None if self.forward_fn else self.module

    def _run(self, batch: Any) -> Tensor:
        return first_output(call_model(self.module, batch, self.forward_fn))

    def units(
        self, specs: Sequence[QSpec], left_out: Callable[[Sequence[str]], set[str]]
    ) -> list[Unit]:
        """Return the weights of linear layers but the output layer."""
        from aimet_ext.sim.torch.setup import minmax_quantizer_for

        module = self.module
        layers = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
        original = {name: original_name(name, module) for name in layers}
        excluded = left_out([*original.values(), *layers])
        language_model = causal_lm(module)
        output = None if language_model is None else language_model.get_output_embeddings()
        lookups = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        layers = {
            name: layer
            for name, layer in layers.items()
            if not {name, original[name]} & excluded
            if layer is not output and id(layer.weight) not in lookups
        }
        plans = [fit_blocks(layers, dict.fromkeys(layers, spec)).specs for spec in specs]
        units: dict[int, Unit] = {}
        for name, layer in layers.items():
            if (known := units.get(id(layer.weight))) is not None:
                known.names.append(original[name])
                known.layers.append(layer)
                continue
            own = [spec for plan in plans if (spec := plan[name]) is not None]
            quantizers: list[Any] = [minmax_quantizer_for(spec, layer.weight) for spec in own]
            cells = [math.prod(quantizer.shape) for quantizer in quantizers]
            units[id(layer.weight)] = Unit(
                names=[original[name]],
                layers=[layer],
                bits=[stored_bits(s, layer.weight, n) for s, n in zip(own, cells, strict=True)],
                quantizers=quantizers,
            )
        return list(units.values())

    @contextmanager
    def watched(self, fisher: Fisher) -> Iterator[Run]:
        """Open a context with a run whose gradients meet the units."""
        with ExitStack() as hooks:
            for unit in fisher.units:
                hook = _watching(unit, fisher)
                for layer in unit.layers:
                    hooks.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
            yield self._run

    @contextmanager
    def changed(self, numbers: Numbers) -> Iterator[Run]:
        """Open a context with a run in which weights are rounded by their choices."""
        with ExitStack() as hooks:
            for unit, number in numbers:
                added = _adding(unit.error(number))
                for layer in unit.layers:
                    hooks.callback(layer.register_forward_hook(added, with_kwargs=True).remove)
            yield self._run


def _watching(unit: Unit, fisher: Fisher) -> Callable[..., Tensor]:
    """Return a hook that meets a unit's gradients."""

    def after(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
        x = layer_input(args, kwargs).detach().as_subclass(Tensor)
        unit.reached = unit.reached or x.numel() > 0
        version = x._version
        # A new tensor, which what follows may change in place; and one with a gradient in the
        # first layers too.
        moved: Tensor = output.as_subclass(Tensor) + fisher.root.to(output)

        def meet(slope: Tensor) -> None:
            if x._version != version:
                raise ValueError(
                    f"{unit.names[0]}: an input that stays as it is is required, but what "
                    "follows the layer changes it in place; compute out of place there"
                )
            # Tokens of several samples may stand in one dimension, as before experts.
            apart = x.dim() >= fisher.dims and len(x) == fisher.samples
            count = len(x) if apart else 1
            inputs = x.reshape(count, -1, x.shape[-1])
            slopes = slope.detach().reshape(count, -1, slope.shape[-1])
            unit.meet(own.T @ x_own for own, x_own in zip(slopes, inputs, strict=True))

        moved.register_hook(meet)
        return moved

    return after


def _adding(error: Tensor) -> Callable[..., Tensor]:
    """Return a hook that adds the output of a weight's error."""

    def after(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
        moved: Tensor = output.as_subclass(Tensor)
        return moved + functional.linear(layer_input(args, kwargs), error)

    return after


@contextmanager
def weights_of_module(
    model: nn.Module, dataloader: Any, forward_fn: ForwardFn | None
) -> Iterator[ModelWeights]:
    """Open a context with the weights of a causal LM or another module."""
    from aimet_ext.sim.torch.unknown import is_registered

    given = hasattr(model, "get_output_embeddings")
    module = expose_weights(prepare_model(model) if given else model, is_registered)
    batches = list(iterate_batches(dataloader, opaque=forward_fn is not None))
    if not batches:
        raise ValueError("dataloader must give at least one batch, it gave none")
    with evaluating(module), _without_gradients(module):
        yield ModelWeights(module, batches, forward_fn)


@contextmanager
def weights_of_sim(
    adaptor: SimAdaptor, dataloader: Any, forward_fn: ForwardFn | None
) -> Iterator[ModelWeights]:
    """Open a context with the float weights of a simulation of aimet_torch."""
    batches = adaptor.batches(dataloader, opaque=forward_fn is not None)
    with adaptor.preserved_state():
        module = adaptor.model.eval().requires_grad_(False)
        with adaptor.disabled_quantizers():
            yield ModelWeights(module, batches, forward_fn)


@contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.requires_grad_(False)
    try:
        yield
    finally:
        with uninterrupted():
            for parameter in wanted:
                parameter.requires_grad_(True)
