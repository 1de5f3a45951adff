"""Layers of a PyTorch simulation, by their names in the model and in its checkpoint."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from functools import cached_property
from typing import Any

from torch import nn

from aimet_ext.grids.assignment import fits
from aimet_ext.grids.fitting import WeightPlan
from aimet_ext.grids.patterns import LayerTable
from aimet_ext.grids.widening import plan_widening
from aimet_ext.models.huggingface import causal_lm, original_name
from aimet_ext.sim.protocol import SimAdaptor
from aimet_ext.sim.torch.setup import (
    calibrated_weight_quantizer,
    parameter_quantizers,
    put_quantizer,
)

__all__ = ["TorchTable"]


class TorchTable(LayerTable):
    """See :class:`aimet_ext.grids.patterns.LayerTable`."""

    def __init__(self, adaptor: SimAdaptor) -> None:
        self.parameters = parameter_quantizers(adaptor.sim)
        found = self.parameters.items()
        super().__init__(adaptor, {name: q["weight"] for name, q in found if "weight" in q})

    def matching(self, pattern: str) -> list[str]:
        """Names of the layers that fit a pattern under any of their names."""
        found = [self.names[id(m)] for m in self._modules(pattern)]
        return [name for name in dict.fromkeys(found) if name in self.layers]

    def of_type(self, word: str, excluded: Collection[str]) -> list[str] | None:
        """None: types are given as types."""
        return None

    def excluded(self, pattern: str) -> set[str] | None:
        """Names of the modules that fit a pattern and of all inside them."""
        found = self._modules(pattern)
        return {name for module in found for name in self.inside(module)} if found else None

    def is_name(self, pattern: str, name: str) -> bool:
        """Whether a pattern is the name of a layer, in the model or in its checkpoint."""
        return pattern in (name, original_name(name, self.model))

    def ends_with_name(self, pattern: str, name: str) -> bool:
        """Whether a pattern ends with the last part of a layer's name."""
        return pattern.endswith(name.rpartition(".")[2])

    def is_frozen(self, name: str) -> bool:
        """Whether an earlier technique froze the range of a layer's weight."""
        quantizer = self.quantizers[name]
        return quantizer is not None and not quantizer.is_overwrite_allowed()

    @cached_property
    def left_out(self) -> set[str]:
        """Names of embeddings and of the output layer of a language model."""
        language_model = causal_lm(self.model)
        output = None if language_model is None else language_model.get_output_embeddings()
        return {
            name
            for name, layer in self.layers.items()
            if layer is output or isinstance(layer, nn.Embedding)
        }

    def example(self) -> str:
        """What names look like."""
        return repr(original_name(next(iter(self.layers), ""), self.model))

    def apply(self, plan: WeightPlan, undo: ExitStack) -> dict[str, int]:
        """Pad MLPs where the plan says so, then replace quantizers."""
        padded: dict[str, int] = {}
        if plan.pad:
            widening = plan_widening(self.adaptor, plan, self.parameters)
            padded = widening.apply(self.model, undo.callback)
        made: dict[int, Any] = {}
        for name, spec in plan.specs.items():
            layer = self.layers[name]
            key = id(layer.weight)
            if key not in made:
                made[key] = None if spec is None else calibrated_weight_quantizer(spec, layer)
        for name in plan.specs:
            layer = self.layers[name]
            undo.callback(put_quantizer, layer, "weight", self.quantizers[name])
            put_quantizer(layer, "weight", made[id(layer.weight)])
        return padded

    def _modules(self, pattern: str) -> list[nn.Module]:
        """Modules that fit a pattern under any of their names, containers among them."""
        every = self.model.named_modules(remove_duplicate=False)
        return [module for name, module in every if fits(name, pattern, self.model)]
