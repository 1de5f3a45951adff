"""Inputs of the layers of experts, which get other tokens in each stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aimet_ext.data.batches import module_device
from aimet_ext.walk.hooks import first_call, seen_input
from aimet_ext.walk.routing import RoutedLayers, is_grouped, is_routed, tokens_of

# Hidden states [tokens, width], experts [tokens, k], weights [tokens, k].
Call: TypeAlias = tuple[Tensor, Tensor, Tensor]

# Input in the quantized and in the float stream (None if not asked for), and which tokens count:
# bool of the input's leading dimensions, None for all.
Inputs: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]

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
        given = (*found[0], *found[1].values())
        if is_grouped(experts) and len(given) == 1:
            return experts.routing(*given)  # type: ignore[operator]
        hidden, chosen, weights = given
        return hidden, chosen, weights

    @torch.no_grad()
    def inputs(
        self,
        root: nn.Module,
        calls: Mapping[str, Call],
        params: Mapping[str, Mapping[str, Tensor]],
        sent: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the layer's input by stream, nothing if no token goes there.

        All streams send the tokens of the first one to the expert: the error of a layer is that of
        the tokens that it gets in use, against what it makes of the same ones in float.

        :param root: Module in which the layer was looked for.
        :param calls: Arguments of the experts' module by stream.
        :param params: Parameters in place of the root's own, by stream.
        :param sent: Tokens to send there, bool ``[tokens]``, in place of those of the first stream.
        """
        chosen = _chosen(calls)
        if sent is None:
            alone = chosen.masked_fill(chosen != self.expert, _NOBODY)
        else:
            alone = torch.where(sent, self.expert, _NOBODY)[:, None]
        experts, layer = root.get_submodule(self.module), root.get_submodule(self.layer)
        found = {}
        for stream, (hidden, own_chosen, weights) in calls.items():
            if is_grouped(experts):
                # What another stream does not send there is zeros: it counts without an error.
                lacking = (own_chosen < 0) & (chosen >= 0)
                hidden = torch.where(lacking, next(iter(calls.values()))[0], hidden)
            prefix, given = f"{self.module}.", params[stream]
            own = {n.removeprefix(prefix): p for n, p in given.items() if n.startswith(prefix)}
            shares = weights if sent is None else weights[:, :1]
            run = partial(functional_call, experts, own, (hidden, alone, shares))
            seen = seen_input([layer], run)
            if seen is not None:
                found[stream] = seen
        return found

    def tokens(self, root: nn.Module, calls: Mapping[str, Call], mask: Tensor | None) -> Tensor:
        """Return which tokens count and are sent to any expert in the first stream, ``[tokens]``.

        :param mask: Mask of the batch, bool ``[batch, seq]``.
        """
        chosen, count = _chosen(calls), len(self._list(root))
        sent = ((chosen >= 0) & (chosen < count)).any(-1)
        real = self._real(root, chosen, mask)
        return sent if real is None else sent & real

    def reads_hidden(self, root: nn.Module) -> bool:
        """Return True if it reads the tokens themselves, as its like of all experts do."""
        lists = [m for m in root.get_submodule(self.module).children() if type(m) is RoutedLayers]
        return lists[0] is self._list(root)

    def _list(self, root: nn.Module) -> RoutedLayers:
        found = root.get_submodule(self.layer.rpartition(".")[0])
        assert isinstance(found, RoutedLayers)
        return found

    def mask(
        self, root: nn.Module, calls: Mapping[str, Call], mask: Tensor | None
    ) -> Tensor | None:
        """Return which of the expert's tokens count, None for all.

        :param calls: Arguments of the experts' module by stream.
        :param mask: Mask of the batch, bool ``[batch, seq]``.
        """
        chosen = _chosen(calls)
        real = self._real(root, chosen, mask)
        return None if real is None else real[tokens_of(self.expert, chosen)[1]]

    def _real(self, root: nn.Module, chosen: Tensor, mask: Tensor | None) -> Tensor | None:
        """Return which rows of ``chosen`` are of tokens that count, None for all."""
        if mask is not None and is_grouped(root.get_submodule(self.module)):
            mask = mask.expand(len(chosen) // mask.numel(), *mask.shape)
        if mask is None or mask.numel() != len(chosen):
            return None
        return mask.flatten().to(chosen.device)


@dataclass(frozen=True, eq=False)
class Pool:
    """Tokens of all experts of a module, sent to one of them: what it gets on other text.

    :param inputs: Function that returns the number of these tokens, without padding, and a new
        iterator over the inputs that the layers of a stage would have, batch by batch. It takes the
        number of tokens that is enough: from many more, every so many are taken.
    :param shared: Name for stages to which the same inputs come; None if there is no other.
    :param expert: Number of the expert that they are sent to.
    """

    inputs: Callable[[int], tuple[int, Iterator[Inputs]]]
    shared: str | None
    expert: int


def pool_of(
    expert: int,
    batches: int,
    sent: Callable[[int], Tensor],
    inputs: Callable[[int, Tensor], Mapping[str, Tensor]],
    shared: str | None = None,
) -> Pool:
    """Return a pool of what comes with every so many tokens, however they are cut into batches.

    :param batches: Number of batches.
    :param sent: Function from a batch's number to which of its tokens count, bool ``[tokens]``.
    :param inputs: Function from that and the tokens to take, to inputs by stream.
    """

    def drawn(every: Sequence[Tensor], step: int) -> Iterator[Inputs]:
        passed = 0
        for index, each in enumerate(every):
            taken = each & ((each.cumsum(0) - 1 + passed) % step == 0)
            passed += int(each.sum())
            if found := inputs(index, taken):
                yield found.get("quantized"), found.get("float"), None

    def read(enough: int) -> tuple[int, Iterator[Inputs]]:
        every = [sent(index) for index in range(batches)]
        total = sum(int(each.sum()) for each in every)
        return total, drawn(every, max(1, total // enough))

    return Pool(read, shared, expert)


def _chosen(calls: Mapping[str, Call]) -> Tensor:
    return next(iter(calls.values()))[1]


def routed(root: nn.Module, layer: str) -> Routed | None:
    """Return which expert's layer this is, None if it is no expert's."""
    if not is_routed(root, layer):
        return None
    holder, _, key = layer.rpartition(".")
    return Routed(layer, holder.rpartition(".")[0], int(key))
