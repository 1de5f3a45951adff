"""Weights that several blocks share, which the first of them decides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from aimet_ext.sim.protocol import SimAdaptor, WeightQuantizer
from aimet_ext.walk.streamed import StreamedBlock


class SharedWeights:
    """The float weights of layers that an earlier block has rounded for them.

    :param adaptor: Adaptor of the simulation.
    """

    def __init__(self, adaptor: SimAdaptor) -> None:
        self._adaptor = adaptor
        self._names = adaptor.shared_weights()
        self._originals: dict[str, Tensor] = {}

    def hold(self, data: StreamedBlock) -> None:
        """Have the float stream pass a block with its weights as they were."""
        inside = f"{data.name}."
        for layer, weight in self._originals.items():
            if layer.startswith(inside):
                data.hold(layer.removeprefix(inside), weight)

    def copies(self, quantizers: Iterable[WeightQuantizer]) -> dict[str, Tensor]:
        """Return copies of the weights that layers share with others, by the names of these."""
        found: dict[str, Tensor] = {}
        for own in quantizers:
            twins = [n for n in self._names.get(own.name, ()) if n != own.name]
            every = ((n, self._adaptor.weight_quantizer(n)) for n in twins)
            twins = [n for n, other in every if other is not None and other.is_of(own)]
            if twins:
                found.update(dict.fromkeys(twins, own.weight.detach().clone()))
        return found

    def note(self, before: Mapping[str, Tensor]) -> None:
        """Keep those copies whose weights have changed since."""
        for layer, weight in before.items():
            now = self._adaptor.weight_quantizer(layer)
            if now is not None and not torch.equal(now.weight, weight):
                self._originals[layer] = weight
