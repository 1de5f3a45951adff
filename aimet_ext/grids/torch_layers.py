"""Layers of a PyTorch simulation, by their names in the model and in its checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from functools import cached_property
from typing import Any

from torch import nn

from aimet_ext.grids.create import fits
from aimet_ext.grids.patterns import LayerTable
from aimet_ext.grids.widening import plan_widening
from aimet_ext.models.huggingface import causal_lm, original_name
from aimet_ext.sim.protocol import SimAdaptor
from aimet_ext.sim.torch.state import calibrated_weight_quantizer, layer_parameters
from aimet_ext.specs import QSpec, WeightPlan


class TorchTable(LayerTable):
    """See :class:`aimet_ext.grids.patterns.LayerTable`."""

    def __init__(self, adaptor: SimAdaptor) -> None:
        self.parameters = layer_parameters(adaptor.sim)
        own = self.parameters.items()
        self.weights = {name: p["weight"] for name, p in own if "weight" in p}
        super().__init__(adaptor, {name: w.quantizer for name, w in self.weights.items()})

    def matching(self, pattern: str) -> list[str]:
        found = [self.names[id(m)] for m in self._modules(pattern)]
        return [name for name in dict.fromkeys(found) if name in self.layers]

    def of_type(self, word: str, excluded: Collection[str]) -> list[str] | None:
        return None

    def excluded(self, pattern: str) -> set[str] | None:
        found = self._modules(pattern)
        return {name for module in found for name in self.inside(module)} if found else None

    def is_name(self, pattern: str, name: str) -> bool:
        return pattern in (name, original_name(name, self.model))

    def ends_with_name(self, pattern: str, name: str) -> bool:
        return pattern.endswith(name.rpartition(".")[2])

    def is_frozen(self, name: str) -> bool:
        return self.weights[name].frozen

    @cached_property
    def left_out(self) -> set[str]:
        language_model = causal_lm(self.model)
        output = None if language_model is None else language_model.get_output_embeddings()
        return {
            name
            for name, layer in self.layers.items()
            if layer is output or isinstance(layer, nn.Embedding)
        }

    def shown(self) -> list[str]:
        return [original_name(name, self.model) for name in self.layers]

    def apply(self, plan: WeightPlan, undo: ExitStack) -> dict[str, int]:
        padded: dict[str, int] = {}
        if plan.pad:
            widening = plan_widening(self.adaptor, plan, self.parameters)
            padded = widening.apply(self.model, undo.callback)
        self._set_specs(plan.specs, undo)
        return padded

    def _set_specs(self, specs: Mapping[str, QSpec | None], undo: ExitStack) -> None:
        """Give weights new quantizers, with ranges; layers that share a weight share one."""
        made: dict[int, Any] = {}
        for name, spec in specs.items():
            weight = self.weights[name]
            if id(weight.value) not in made:
                new = None if spec is None else calibrated_weight_quantizer(spec, weight.layer)
                made[id(weight.value)] = new
        for name in specs:
            undo.callback(self.weights[name].put, self.weights[name].quantizer)
            self.weights[name].put(made[id(self.weights[name].value)])

    def _modules(self, pattern: str) -> list[nn.Module]:
        """Return the modules that fit a pattern under any of their names, containers among them."""
        every = self.model.named_modules(remove_duplicate=False)
        return [module for name, module in every if fits(name, pattern, self.model)]
