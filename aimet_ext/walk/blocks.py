"""The walk to the layers of repeated blocks, and to those before and after the blocks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from aimet_ext.data.batches import call_model, module_device
from aimet_ext.walk.experts import Inputs
from aimet_ext.walk.hooks import (
    LayerOrder,
    checked_weight,
    layer_order,
    replaced_forward,
    run_batch,
    seen_input,
    swapped_weights,
)
from aimet_ext.walk.passes import BlockPass, WalkOptions, open_pass
from aimet_ext.walk.streamed import StreamedBlock, no_tokens, stage_inputs
from aimet_ext.walk.walk import RerunWalk, Stage, Streams, stream_names

Weights = Mapping[str, Tensor]


def find_stack(model: nn.Module, layers: Sequence[str], *, mixed: bool = False) -> list[str]:
    """Return the names of the repeated blocks that hold most of these layers, in order.

    Blocks are the children of one ``nn.ModuleList`` and of one class. Without any: an empty list.

    :param mixed: True to take blocks of several classes too.
    """
    best: list[str] = []
    most = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        if not mixed and len({type(child) for child in module}) != 1:
            continue
        blocks = [f"{name}.{key}".lstrip(".") for key, _ in module.named_children()]
        held = [sum(layer.startswith(f"{block}.") for layer in layers) for block in blocks]
        if sum(held) > most and (all(held) or sum(held) > len(layers) // 2):
            best, most = blocks, sum(held)
    return best


class BlockWalk:
    """A walk to the layers of repeated blocks, and to those before and after them.

    See :class:`aimet_ext.walk.walk.Walk`. Nothing but calls of modules is looked at, so a block
    may be of any architecture. The model must compute in float while it walks.

    :class:`~aimet_ext.walk.walk.ModelWalk` describes the other parameters.

    :param blocks: Full names of the repeated blocks, see :func:`find_stack`.
    :param batches: Batches of the dataloader, as a list.
    :param device: Device for the block that is worked on; None leaves it where it is.
    :param kinds: Result of :func:`~aimet_ext.walk.passes.kinds_of`, None to compute it.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        batches: Sequence[Any],
        layers: Sequence[str],
        *,
        streams: Streams = "quantized",
        effective: Weights | None = None,
        kinds: Sequence[int] | None = None,
        **options: Unpack[WalkOptions],
    ) -> None:
        self.model = model
        self.blocks = tuple(blocks)
        self._kinds = kinds
        self.batches = batches
        self.layers = tuple(layers)
        self.effective = {} if effective is None or streams == "float" else effective
        self.forward_fn = options.get("forward_fn")
        self._options = options
        self._streams = streams
        # Weights outside the blocks that the streams do not take from the model.
        self._weights: dict[str, dict[str, Tensor]] = {name: {} for name in stream_names(streams)}
        self._pass: BlockPass | None = None
        self._block: StreamedBlock | None = None
        self._returns: Callable[[Tensor], Any] = lambda hidden: hidden
        self._outside: RerunWalk | None = None
        self._stages = self._walk()

    @property
    def cost(self) -> dict[str, Any]:
        """Calls of the blocks so far, and what walking to the layers before them took."""
        calls = 0 if self._pass is None else self._pass.calls
        cost: dict[str, Any] = {"walk": "blocks", "blocks": len(self.blocks)}
        cost["block_calls"] = calls + (0 if self._block is None else self._block.calls)
        if self._outside is not None:
            cost["before_the_blocks"] = self._outside.cost
        return cost

    def hold(self, layer: str) -> None:
        """Have the float stream go on with this layer's weight as it is now."""
        if self._block is not None:
            self._block.hold(layer.removeprefix(f"{self._block.name}."))
        elif "float" in self._weights:
            weight: Any = self.model.get_submodule(layer).weight
            self._weights["float"][layer] = weight.detach().clone()
            if self._outside is not None and layer in self._outside.layers:
                self._outside.hold(layer)

    def decide(self, layer: str, weight: Tensor) -> None:
        """Have the quantized stream use this weight from now on."""
        if self._block is not None:
            self._block.decide(layer.removeprefix(f"{self._block.name}."), weight)
            return
        weight = checked_weight(layer, self.model.get_submodule(layer), weight)
        if "quantized" in self._weights:
            self._weights["quantized"][layer] = weight
        if self._outside is not None and layer in self._outside.layers:
            self._outside.decide(layer, weight)

    def stages(self) -> Iterator[Stage]:
        """Return the stages before the blocks, in them and after them, an iterator to use once."""
        return self._stages

    def _walk(self) -> Generator[Stage]:
        before, after = self._sides()
        if before:
            self._outside = RerunWalk(
                self.model,
                self.batches,
                before,
                streams=self._streams,
                effective=self.effective,
                **self._options,
            )
            yield from self._outside.stages()
        weights = {stream: self._swapped(stream) for stream in self._weights}
        self._pass = open_pass(
            self.model, self.blocks, self.batches, weights, self._kinds, **self._options
        )
        del weights
        with closing(self._pass.blocks()) as blocks:
            for block in blocks:
                yield from self._block_stages(block, bool(after.stages))
        for names in after.stages:
            relus = {n: after.activations[n] for n in names if n in after.activations}
            yield Stage(names, relus, partial(self._tail_inputs, names[0]))

    def close(self) -> None:
        """Drop all caches; a block that is worked on goes back to its device."""
        self._stages.close()
        if self._pass is not None:
            self._pass.close()
        if self._outside is not None:
            self._outside.close()

    def _block_stages(self, block: StreamedBlock, after: bool) -> Iterator[Stage]:
        """Yield the stages of a block; the streams go on past it if more follows."""
        prefix = f"{block.name}."
        self._block = block
        try:
            for name, _ in block.module.named_modules():
                if f"{prefix}{name}" in self.effective:
                    block.decide(name, self.effective[f"{prefix}{name}"])
            inside = [n.removeprefix(prefix) for n in self.layers if n.startswith(prefix)]
            found = block.look(inside)
            block.keep_all()
            self._returns = found.returns
            for names in found.stages:
                relus = {f"{prefix}{n}": r for n, r in found.activations.items() if n in names}
                full = tuple(f"{prefix}{name}" for name in names)
                yield Stage(full, relus, partial(block.inputs, names), block.pool(names))
            if after or block.name != self.blocks[-1]:
                for stream in block.flows:
                    block.advance(stream)
        finally:
            self._block = None

    # Outside the blocks.

    def _in_blocks(self, layer: str) -> bool:
        return any(layer.startswith(f"{block}.") for block in self.blocks)

    def _swapped(self, stream: str) -> Weights:
        """Return the weights outside the blocks that a stream does not take from the model."""
        if stream == "float":
            return self._weights[stream]
        outside = {n: self.effective[n] for n in self.effective if not self._in_blocks(n)}
        return {**outside, **self._weights[stream]}

    def _sides(self) -> tuple[list[str], LayerOrder]:
        """Return layers before the first block, and stages of layers after the last one."""
        outside = [layer for layer in self.layers if not self._in_blocks(layer)]
        passes = [
            partial(run_batch, self.model, batch, number, self.forward_fn)
            for number, batch in enumerate(self.batches)
        ]
        return layers_around(self.model, self.blocks, outside, passes)

    def _tail_inputs(self, layer: str) -> Iterator[Inputs]:
        """Yield what reaches a layer after the last block, batch by batch."""
        assert self._pass is not None
        module = self.model.get_submodule(layer)
        flows = self._pass.flows
        for index in range(len(self.batches)):
            seen = {stream: self._tail_input(module, stream, index) for stream in flows}
            mask = next(iter(flows.values())).mask(index)
            yield stage_inputs(layer, module, index, seen, mask)

    @torch.no_grad()
    def _tail_input(self, module: nn.Module, stream: str, index: int) -> Tensor:
        """Return what reaches a layer, the blocks' outcome put in the place of the blocks."""
        assert self._pass is not None
        flow = self._pass.flows[stream]
        blocks = [self.model.get_submodule(block) for block in self.blocks]
        outcome = flow.hidden.read(index, module_device(blocks[0]))
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(replaced_forward(block, lambda: self._returns(outcome)))
            stack.enter_context(swapped_weights(self.model, self._swapped(stream)))
            run = partial(call_model, self.model, self.batches[index], self.forward_fn)
            seen = seen_input([module], run)
        return no_tokens(module) if seen is None else seen.to(flow.device)


def layers_around(
    model: nn.Module,
    blocks: Sequence[str],
    layers: Sequence[str],
    passes: Iterable[Callable[[], object]],
) -> tuple[list[str], LayerOrder]:
    """Return the layers called before the first block, and the order of those after the last.

    :param layers: Names of layers in none of the blocks.
    :param passes: Functions that each run the model once.
    :raises ValueError: a layer is called between two blocks; else as :func:`layer_order`.
    """
    if not layers:
        return [], LayerOrder()
    order: dict[str, int] = {}

    def note(name: str, module: nn.Module, args: Any) -> None:
        order.setdefault(name, len(order))

    with ExitStack() as hooks:
        for name in (*layers, blocks[0], blocks[-1]):
            hook = model.get_submodule(name).register_forward_pre_hook(partial(note, name))
            hooks.callback(hook.remove)
        found = layer_order(model, layers, passes)
    begin, end = (order.get(block, len(order)) for block in (blocks[0], blocks[-1]))
    for name in found.order:
        if begin < order[name] < end:
            raise ValueError(
                f"layer {name!r} must be called before or after the repeated blocks "
                f"({blocks[0]} to {blocks[-1]}), it is called between them; leave it out"
            )
    before = [name for name in found.order if order[name] < begin]
    stages = [tuple(name for name in names if name not in before) for names in found.stages]
    after = [name for name in found.order if name not in before]
    return before, replace(found, order=after, stages=[names for names in stages if names])
