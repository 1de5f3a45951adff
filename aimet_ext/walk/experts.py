"""Inputs of the layers of experts, which get other tokens in each stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aimet_ext.data.batches import module_device
from aimet_ext.walk.hooks import first_call, seen_input
from aimet_ext.walk.routing import is_routed, tokens_of

# Hidden states [tokens, width], experts [tokens, k], weights [tokens, k].
Call: TypeAlias = tuple[Tensor, Tensor, Tensor]

_NOBODY = -1


@dataclass(frozen=True)
class Routed:
    """A layer of an expert.

    :param layer: Name of the layer, like ``module`` relative to where it was looked for.
    :param module: Name of the module that holds the experts.
    :param expert: Number of the expert.
    """

    layer: str
    module: str
    expert: int

    def call(self, root: nn.Module, run: Callable[[], object]) -> Call:
        """Return the arguments of the experts' module in a run, those of no tokens if it is none.

        :param root: Module in which the layer was looked for.
        :param run: Forward pass, which ends there.
        """
        experts = root.get_submodule(self.module)
        found = first_call([experts], run)
        if found is None:
            chosen = torch.empty(0, 1, dtype=torch.long, device=module_device(experts))
            return chosen.float(), chosen, chosen.float()
        hidden, chosen, weights = (*found[0], *found[1].values())
        return hidden, chosen, weights

    @torch.no_grad()
    def inputs(
        self, root: nn.Module, calls: Mapping[str, Call], params: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the layer's input by stream, nothing if no token goes there.

        All streams send the tokens of the first one to the expert: the error of a layer is that of
        the tokens that it gets in use, against what it makes of the same ones in float.

        :param root: Module in which the layer was looked for.
        :param calls: Arguments of the experts' module by stream.
        :param params: Parameters in place of the root's own, by stream.
        """
        chosen = _chosen(calls)
        alone = chosen.masked_fill(chosen != self.expert, _NOBODY)
        experts, layer = root.get_submodule(self.module), root.get_submodule(self.layer)
        found = {}
        for stream, (hidden, _, weights) in calls.items():
            prefix, given = f"{self.module}.", params[stream]
            own = {n.removeprefix(prefix): p for n, p in given.items() if n.startswith(prefix)}
            run = partial(functional_call, experts, own, (hidden, alone, weights))
            seen = seen_input([layer], run)
            if seen is not None:
                found[stream] = seen
        return found

    def mask(self, calls: Mapping[str, Call], mask: Tensor | None) -> Tensor | None:
        """Return which of the expert's tokens count, None for all.

        :param calls: Arguments of the experts' module by stream.
        :param mask: Mask of the batch, bool ``[batch, seq]``.
        """
        chosen = _chosen(calls)
        if mask is None or mask.numel() != len(chosen):
            return None
        return mask.flatten().to(chosen.device)[tokens_of(self.expert, chosen)[1]]


def _chosen(calls: Mapping[str, Call]) -> Tensor:
    return next(iter(calls.values()))[1]


def routed(root: nn.Module, layer: str) -> Routed | None:
    """Return which expert's layer this is, None if it is no expert's."""
    if not is_routed(root, layer):
        return None
    holder, _, key = layer.rpartition(".")
    return Routed(layer, holder.rpartition(".")[0], int(key))
