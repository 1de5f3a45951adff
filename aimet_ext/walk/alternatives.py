"""Modules of a list that a router sends tokens to, in code of any kind: what flows into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.data.batches import map_leaves
from aimet_ext.walk.hooks import seen_input
from aimet_ext.walk.routing import listed

Runs = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Alternative:
    """A layer of a module that stands in a list with others of its kind, behind a router.

    A router is what returns a number for each module of the list. Other streams, and runs with
    other inputs, take the decisions of the first stream's routers: then the same tokens come, in
    the same order.

    :param layer: Name of the layer, like the others relative to where it was looked for.
    :param number: Place of its module in the list.
    :param routers: Names of the routers.
    """

    layer: str
    number: int
    routers: tuple[str, ...]

    @torch.no_grad()
    def inputs(
        self, root: nn.Module, runs: Runs, mask: Tensor | None
    ) -> tuple[dict[str, Tensor | None], Tensor | None]:
        """Return the layer's input by stream, None if no token comes, and which rows count.

        Tokens that do not count are sent elsewhere, if the routers' outputs tell how.

        :param root: Module in which the layer was looked for.
        :param runs: Forward pass by stream.
        :param mask: Mask of the batch, bool ``[batch, seq]``.
        """
        decisions = self._decisions(root, runs)
        sent = self._send(decisions, mask, everyone=False)
        seen = self._seen(root, runs, decisions)
        first = next(iter(seen.values()))
        if sent and first is not None:
            mask = torch.ones(first.shape[:-1], dtype=torch.bool, device=first.device)
        return seen, mask

    @torch.no_grad()
    def inputs_of_all(
        self, root: nn.Module, runs: Runs, mask: Tensor | None, taken: Tensor
    ) -> dict[str, Tensor]:
        """Return the rows that count by stream if all tokens were sent to the layer's module.

        Nothing if the routers' outputs do not tell how.

        :param taken: Tokens to take of those that count, bool ``[tokens]``.
        """
        decisions = self._decisions(root, runs)
        if not self._send(decisions, mask, everyone=True):
            return {}
        seen = self._seen(root, runs, decisions)
        rows = {stream: x.flatten(0, -2) for stream, x in seen.items() if x is not None}
        if len(rows) < len(seen) or len({x.shape for x in rows.values()}) > 1:
            return {}
        among = taken if mask is None else taken[mask.flatten().to(taken.device)]
        return {s: x[among.to(x.device)] if len(x) == len(among) else x for s, x in rows.items()}

    def _send(self, decisions: dict[str, Any], mask: Tensor | None, *, everyone: bool) -> bool:
        """Change decisions: no token that does not count comes, and all others if asked for.

        :returns: False if their form does not tell how; then they are as they were.
        """
        made = list(decisions.values())
        if not made or not all(isinstance(each, Tensor) for each in made):
            return False
        flat = [each.flatten(0, -2) for each in made]  # [tokens, modules]
        if mask is not None and any(len(each) != mask.numel() for each in flat):
            return False
        for each in flat:
            if everyone:
                each[:, self.number] = each.amax(-1) + 1
            if mask is not None:
                padded = ~mask.flatten().to(each.device)
                each[padded, self.number] = each[padded].amin(-1) - 1
        decisions.update(
            {n: new.view_as(old) for (n, old), new in zip(decisions.items(), flat, strict=True)}
        )
        return True

    def _decisions(self, root: nn.Module, runs: Runs) -> dict[str, Any]:
        """Return the outputs of the routers in the first stream."""
        made: dict[str, Any] = {}
        with ExitStack() as hooks:
            for name in self.routers:

                def note(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
                    made.setdefault(name, map_leaves(_copied, output))

                hooks.callback(root.get_submodule(name).register_forward_hook(note).remove)
            seen_input([root.get_submodule(self.layer)], next(iter(runs.values())))
        return made

    def _seen(
        self, root: nn.Module, runs: Runs, decisions: Mapping[str, Any]
    ) -> dict[str, Tensor | None]:
        layer = root.get_submodule(self.layer)
        with _decided(root, decisions):
            return {stream: seen_input([layer], run) for stream, run in runs.items()}


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


@contextmanager
def _decided(root: nn.Module, decisions: Mapping[str, Any]) -> Iterator[None]:
    """Open a context in which routers return what is given."""
    with ExitStack() as hooks:
        for name, made in decisions.items():

            def give(_: nn.Module, args: Any, output: Any, made: Any = made) -> Any:
                return map_leaves(_copied, made)

            hooks.callback(root.get_submodule(name).register_forward_hook(give).remove)
        yield


def alternative(root: nn.Module, layer: str) -> Alternative | None:
    """Return a layer's place among modules that tokens are sent to, None if it has none."""
    place = listed(root, layer)
    return None if place is None else Alternative(layer, *place)
