"""Walking a model of repeated blocks: one streamed pass, block by block, stage by stage.

Per token only the residual stream is kept, and while a block is worked on, of each of its parts
that are finished, what flows into the last layer. Nothing but calls of modules is looked at, so a
block may be of any architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aimet_ext.data.batches import ForwardFn, call_model, module_device
from aimet_ext.data.cache import TensorCache
from aimet_ext.data.moments import Geometry
from aimet_ext.walk.capture import capture_block_inputs
from aimet_ext.walk.layer_order import LayerOrder, layer_order, layers_around
from aimet_ext.walk.layers import checked_weight, fit_mask
from aimet_ext.walk.patches import replaced_forward, seen_input, swapped_weights
from aimet_ext.walk.protocol import Inputs, ReadStage, Stage, Streams
from aimet_ext.walk.rerun import RerunWalk
from aimet_ext.walk.same_arguments import check_same_arguments
from aimet_ext.walk.stream import BlockStream

__all__ = ["BlockWalk", "find_stack"]

Weights = Mapping[str, Tensor]


def find_stack(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Names of the repeated blocks that hold most of these layers, in order; none: an empty list.

    Blocks are the children of one ``nn.ModuleList`` and of one class.
    """
    best: list[str] = []
    most = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(child) for child in module}) != 1:
            continue
        blocks = [f"{name}.{key}".lstrip(".") for key, _ in module.named_children()]
        held = [sum(layer.startswith(f"{block}.") for layer in layers) for block in blocks]
        if sum(held) > most and (all(held) or sum(held) > len(layers) // 2):
            best, most = blocks, sum(held)
    return best


@dataclass
class _Part:
    """A child of a block whose output is that of its last layer, so that it need not run again.

    :param name: of the child, relative to the block.
    :param layer: its last layer, relative to the block.
    :param wrap: from the layer's output to the child's.
    :param inputs: what flows into the layer, batch by batch, once it was seen.
    """

    name: str
    layer: str
    wrap: Callable[[Tensor], Any]
    inputs: dict[str, TensorCache] = field(default_factory=dict)


class BlockWalk:
    """See :class:`aimet_ext.walk.protocol.Walk`. The model must compute in float while it walks.

    :param blocks: full names of the repeated blocks, see :func:`find_stack`.
    :param batches: of the dataloader, as a list.
    :param layers: full names of the layers to stop at.
    :param streams: which inputs are wanted.
    :param effective: weights of other layers in the quantized stream, by full name.
    :param forward_fn: called as ``forward_fn(model, batch)`` in place of ``model(batch)``.
    :param cache_dir: folder for memory-mapped caches; None keeps them in RAM.
    :param device: where the block that is worked on goes; None leaves it where it is.
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
        forward_fn: ForwardFn | None = None,
        cache_dir: str | Path | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.model = model
        self.blocks = tuple(blocks)
        self.batches = batches
        self.layers = tuple(layers)
        self.streams = streams
        self.effective = effective or {}
        self.forward_fn = forward_fn
        self.cache_dir = cache_dir
        self.device = device
        # Weights outside the blocks that the streams do not take from the model.
        self._decided: dict[str, Tensor] = {}
        self._originals: dict[str, Tensor] = {}
        self._wanted = ("quantized", "float") if streams == "both" else (streams,)
        self._flows: dict[str, BlockStream] = {}
        self._params: dict[str, dict[str, Tensor]] = {}
        self._block = ""
        self._parts: list[_Part] = []
        self._forwards = 0
        self._returns: Callable[[Tensor], Any] = lambda hidden: hidden
        self._outside: RerunWalk | None = None
        self._stages = self._walk()

    @property
    def cost(self) -> dict[str, Any]:
        """How the data was brought to the layers."""
        cost: dict[str, Any] = {"walk": "blocks", "blocks": len(self.blocks)}
        cost["block_calls"] = self._forwards
        if self._outside is not None:
            cost["before_the_blocks"] = self._outside.cost
        return cost

    def hold(self, layer: str) -> None:
        """Have the float stream go on with this layer's weight as it is now."""
        if "float" not in self._wanted:
            return
        weight = cast(Tensor, self.model.get_submodule(layer).weight).detach().clone()
        if self._block:
            self._params["float"][self._within(layer)] = weight
            return
        self._originals[layer] = weight
        if self._outside is not None and layer in self._outside.layers:
            self._outside.hold(layer)

    def decide(self, layer: str, weight: Tensor) -> None:
        """Have the quantized stream use this weight from now on."""
        weight = checked_weight(layer, self.model.get_submodule(layer), weight)
        if self._block:
            self._params["quantized"][self._within(layer)] = weight
            return
        self._decided[layer] = weight
        if self._outside is not None and layer in self._outside.layers:
            self._outside.decide(layer, weight)

    def _within(self, layer: str) -> str:
        """A layer's weight as the block names it."""
        return f"{layer.removeprefix(f'{self._block}.')}.weight"

    def stages(self) -> Iterator[Stage]:
        """Each stage in turn: before the blocks, in them, after them. Can be gone through once."""
        return self._stages

    def _walk(self) -> Generator[Stage]:
        before, after = self._sides()
        if before:
            self._outside = RerunWalk(
                self.model,
                self.batches,
                before,
                streams=self.streams,
                effective=self.effective,
                forward_fn=self.forward_fn,
                cache_dir=self.cache_dir,
                device=self.device,
            )
            yield from self._outside.stages()
        self._capture()  # which says what is wrong with a batch
        check_same_arguments(
            self.model,
            self.blocks,
            partial(call_model, self.model, self.batches[0], self.forward_fn),
        )
        for block in self.blocks:
            more = bool(after.stages) or block != self.blocks[-1]
            yield from self._block_stages(block, more)
        for names in after.stages:
            yield self._stage(names, after, partial(self._tail_inputs, names[0]))

    def close(self) -> None:
        """Drop all caches; a block that is worked on goes back to its device."""
        self._stages.close()
        for flow in self._flows.values():
            flow.close()
        self._drop_parts()
        self._flows = {}
        if self._outside is not None:
            self._outside.close()

    def _stage(
        self,
        names: tuple[str, ...],
        found: LayerOrder,
        read: Callable[[], Iterator[Inputs]],
        prefix: str = "",
    ) -> ReadStage:
        relus = {f"{prefix}{n}": found.activations[n] for n in names if n in found.activations}
        return ReadStage(tuple(f"{prefix}{name}" for name in names), relus, read)

    def _block_inputs(self, block: str, relative: tuple[str, ...]) -> Iterator[Inputs]:
        """What reaches layers of the block at hand, batch by batch."""
        kept = self._to_keep(relative)
        for index in range(self._count):
            if block != self._block:
                raise RuntimeError(
                    f"the stages of {block} are over; read their batches before a later block's "
                    "stage is asked for"
                )
            seen: dict[str, Tensor] = {}
            for stream in self._flows:
                seen[stream] = self._layer_input(relative[0], stream, index)
                if kept is not None and index == len(kept.inputs[stream]):
                    kept.inputs[stream].append(seen[stream])
            yield self._inputs(f"{block}.{relative[0]}", index, seen)

    def _tail_inputs(self, layer: str) -> Iterator[Inputs]:
        """What reaches a layer after the last block, batch by batch."""
        for index in range(self._count):
            seen = {stream: self._tail_input(layer, stream, index) for stream in self._flows}
            yield self._inputs(layer, index, seen)

    @property
    def _count(self) -> int:
        return len(next(iter(self._flows.values())))

    def _inputs(self, layer: str, index: int, seen: Mapping[str, Tensor]) -> Inputs:
        """A batch's inputs of a layer, and which of their tokens count."""
        first, *others = seen.values()
        if any(other.shape != first.shape for other in others):
            raise ValueError(
                f"layer {layer!r} must receive the same tokens in the float and in the quantized "
                f"stream, batch {index} has {list(first.shape)} and {list(others[0].shape)}, as "
                "experts do that tokens are routed to; use one stream or leave the layer out"
            )
        mask = next(iter(self._flows.values())).mask(index)
        geometry = Geometry.of(self.model.get_submodule(layer))
        return seen.get("quantized"), seen.get("float"), fit_mask(mask, first, geometry)

    # Where the layers are.

    def _sides(self) -> tuple[list[str], LayerOrder]:
        """Layers before the first block, and stages of layers after the last one."""
        outside = [layer for layer in self.layers if not self._in_blocks(layer)]
        passes = [partial(self._run_whole, number) for number in range(len(self.batches))]
        return layers_around(self.model, self.blocks, outside, passes)

    def _run_whole(self, number: int) -> None:
        try:
            call_model(self.model, self.batches[number], self.forward_fn)
        except Exception as error:
            who = "the model's forward pass" if self.forward_fn is None else "forward_fn"
            raise RuntimeError(
                f"{who} failed on batch {number} with {type(error).__name__}: {error}"
            ) from error

    def _capture(self) -> None:
        """Both streams at the first block."""
        for stream in self._wanted:
            with swapped_weights(self.model, self._weights(stream)):
                self._flows[stream] = capture_block_inputs(
                    self.model,
                    self.blocks[0],
                    self.batches,
                    self.forward_fn,
                    cache_dir=self.cache_dir,
                    device=self.device,
                )
        if len(self._wanted) == 2:
            self._flows["quantized"].share_arguments(self._flows["float"])

    def _weights(self, stream: str) -> Weights:
        """Weights outside the blocks that a stream does not take from the model."""
        if stream == "float":
            return self._originals
        outside = {n: self.effective[n] for n in self.effective if not self._in_blocks(n)}
        return {**outside, **self._decided}

    def _in_blocks(self, layer: str) -> bool:
        return any(layer.startswith(f"{block}.") for block in self.blocks)

    # One block.

    def _block_stages(self, block: str, more: bool) -> Iterator[Stage]:
        """The stages of a block; the streams go on past it if more follows."""
        module = self.model.get_submodule(block)
        prefix = f"{block}."
        inside = [n.removeprefix(prefix) for n in self.layers if n.startswith(prefix)]
        home = module_device(module)
        self._block = block
        try:
            if self.device is not None:
                module.to(self.device)
            fixed = {}
            for name, layer in module.named_modules():
                full = f"{block}.{name}"
                if full in self.effective:
                    fixed[f"{name}.weight"] = checked_weight(full, layer, self.effective[full])
            self._params = {"quantized": fixed, "float": {}}
            found = self._probe(inside)
            for names in found.stages:
                read = partial(self._block_inputs, block, names)
                yield self._stage(names, found, read, f"{block}.")
            if more:
                self._advance()
        finally:
            self._drop_parts()
            self._params, self._block = {}, ""
            if self.device is not None:
                module.to(home)

    def _probe(self, layers: list[str]) -> LayerOrder:
        """In which order the layers of the block are called, and which parts can be kept."""
        module = self.model.get_submodule(self._block)
        flow = next(iter(self._flows.values()))
        passes = [partial(flow.call, module, i) for i in range(len(flow))]
        found = layer_order(module, layers, passes, f"{self._block}.")
        self._returns = found.returns
        self._parts = [_Part(part, layer, wrap) for part, (layer, wrap) in found.parts.items()]
        return found

    def _to_keep(self, relative: tuple[str, ...]) -> _Part | None:
        """The part that these layers end, if its input is to be kept: no wider than the stream."""
        module = self.model.get_submodule(self._block)
        hidden = next(iter(self._flows.values())).width
        for part in self._parts:
            if len(relative) == 1 and part.layer == relative[0]:
                layer: Any = module.get_submodule(part.layer)
                if layer.weight.shape[1] > hidden or not isinstance(layer, nn.Linear):
                    return None
                for stream, flow in self._flows.items():
                    if stream not in part.inputs:
                        part.inputs[stream] = flow.new_cache(f"part-{stream}")
                return part
        return None

    def _layer_input(self, layer: str, stream: str, index: int) -> Tensor:
        module = self.model.get_submodule(f"{self._block}.{layer}")
        seen = seen_input(module, lambda: self._run(stream, index, layer))
        return _no_tokens(module) if seen is None else seen

    @torch.no_grad()
    def _run(self, stream: str, index: int, layer: str | None = None) -> Tensor:
        """The block's output for a batch, or as far as it goes; finished parts do not run."""
        module = self.model.get_submodule(self._block)
        params = self._params[stream]
        flow = self._flows[stream]
        self._forwards += 1
        with ExitStack() as stack:
            for part in self._parts:
                done = stream in part.inputs and index < len(part.inputs[stream])
                if done and layer != part.layer:
                    stack.enter_context(self._replayed(part, stream, index))
            return flow.select(index)(lambda *a, **k: functional_call(module, params, a, k))

    def _replayed(self, part: _Part, stream: str, index: int) -> AbstractContextManager[None]:
        """Have a part of the block return what its last layer makes of what was kept."""
        module = self.model.get_submodule(self._block)
        weight = self._params[stream].get(f"{part.layer}.weight")
        inputs = part.inputs[stream].read(index, self._flows[stream].device)
        named = {} if weight is None else {"weight": weight}
        layer = module.get_submodule(part.layer)
        output = part.wrap(functional_call(layer, named, (inputs,)))
        return replaced_forward(module.get_submodule(part.name), lambda: output)

    def _advance(self) -> None:
        for stream, flow in self._flows.items():
            for index in range(len(flow)):
                flow.hidden[index] = self._run(stream, index)

    def _drop_parts(self) -> None:
        for part in self._parts:
            for cache in part.inputs.values():
                cache.close()
        self._parts = []

    # After the blocks.

    @torch.no_grad()
    def _tail_input(self, layer: str, stream: str, index: int) -> Tensor:
        """What reaches a layer, the model run with the blocks' outcome in the blocks' place."""
        flow = self._flows[stream]
        blocks = [self.model.get_submodule(block) for block in self.blocks]
        outcome = flow.hidden.read(index, module_device(blocks[0]))
        module = self.model.get_submodule(layer)
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(replaced_forward(block, lambda: self._returns(outcome)))
            stack.enter_context(swapped_weights(self.model, self._weights(stream)))
            run = partial(call_model, self.model, self.batches[index], self.forward_fn)
            seen = seen_input(module, run)
        return _no_tokens(module) if seen is None else seen.to(flow.device)


def _no_tokens(layer: nn.Module) -> Tensor:
    """The input of a layer that no token of a batch reaches, an expert."""
    weight = cast(Tensor, layer.weight)
    return weight.new_zeros(0, weight.shape[1])
