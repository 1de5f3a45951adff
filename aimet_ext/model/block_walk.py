"""Walking a model of repeated blocks: one streamed pass, block by block, stage by stage.

Per token only the residual stream is kept, and while a block is worked on, of each of its parts
that are finished, what flows into the last layer. Nothing but calls of modules is looked at, so a
block may be of any architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aimet_ext.model.batches import ForwardFn, call_model
from aimet_ext.model.cache import TensorCache
from aimet_ext.model.capture import capture_block_inputs
from aimet_ext.model.layer_order import LayerOrder, layer_order
from aimet_ext.model.rerun import RerunWalk
from aimet_ext.model.stream import BlockStream
from aimet_ext.model.walk import Activation, Inputs, Stage, Streams

__all__ = ["BlockWalk", "find_stack"]

Weights = Mapping[str, Tensor]


class _Reached(BaseException):
    """Ends a forward pass at the layer whose input was wanted."""


def find_stack(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Names of the repeated blocks that hold most of these layers, in order; none: an empty list.

    Blocks are the children of one ``nn.ModuleList`` and of one class.
    """
    best: list[str] = []
    most = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(child) for child in module}) != 1:
            continue
        blocks = [f"{name}.{key}" for key, _ in module.named_children()]
        held = sum(layer.startswith(f"{name}.") for layer in layers)
        inside = all(any(n.startswith(f"{block}.") for n in layers) for block in blocks)
        if held > most and (inside or held > len(layers) // 2):
            best, most = blocks, held
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


@dataclass(frozen=True, eq=False)
class _BlockStage:
    """Layers of a block that read one input."""

    walk: BlockWalk
    block: str
    relative: tuple[str, ...]
    activations: Mapping[str, Activation]

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(f"{self.block}.{name}" for name in self.relative)

    def batches(self) -> Iterator[Inputs]:
        return self.walk.block_inputs(self.relative)


@dataclass(frozen=True, eq=False)
class _TailStage:
    """Layers after the last block that read one input."""

    walk: BlockWalk
    layers: tuple[str, ...]
    activations: Mapping[str, Activation] = field(default_factory=dict)

    def batches(self) -> Iterator[Inputs]:
        return self.walk.tail_inputs(self.layers[0])


class BlockWalk:
    """See :class:`aimet_ext.model.walk.Walk`. The model must compute in float while it walks.

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
        self.decided: dict[str, Tensor] = {}
        self._originals: dict[str, Tensor] = {}
        self._wanted = ("quantized", "float") if streams == "both" else (streams,)
        self._flows: dict[str, BlockStream] = {}
        self._params: dict[str, dict[str, Tensor]] = {}
        self._block = ""
        self._parts: list[_Part] = []
        self._forwards = 0
        self._returns: Callable[[Tensor], Any] = lambda hidden: hidden
        self._outside: RerunWalk | None = None

    @property
    def cost(self) -> dict[str, Any]:
        """How the data was brought to the layers."""
        cost: dict[str, Any] = {
            "walk": "blocks",
            "blocks": len(self.blocks),
            "block_calls": self._forwards,
        }
        if self._outside is not None:
            cost["before_the_blocks"] = self._outside.cost
        return cost

    def hold(self, layer: str) -> None:
        """Have the float stream go on with this layer's weight as it is now."""
        if "float" not in self._wanted:
            return
        weight = cast(Tensor, self.model.get_submodule(layer).weight).detach().clone()
        if self._block:
            self._params["float"][f"{layer.removeprefix(f'{self._block}.')}.weight"] = weight
            return
        self._originals[layer] = weight
        if self._outside is not None and layer in self._outside.layers:
            self._outside.hold(layer)

    def decide(self, layer: str, weight: Tensor) -> None:
        """Have the quantized stream use this weight from now on."""
        self.decided[layer] = weight.detach()
        if self._outside is not None and layer in self._outside.layers:
            self._outside.decide(layer, weight)
        if layer.startswith(f"{self._block}.") and self._block:
            name = f"{layer.removeprefix(f'{self._block}.')}.weight"
            parameter = self.model.get_submodule(layer).weight
            self._params["quantized"][name] = weight.detach().to(parameter)

    def stages(self) -> Iterator[Stage]:
        """Each stage in turn: before the blocks, in them, after them."""
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
        self._capture()
        for block in self.blocks:
            yield from self._block_stages(block)
        for names in after:
            yield _TailStage(self, names)

    def close(self) -> None:
        """Drop all caches."""
        for flow in self._flows.values():
            flow.close()
        self._drop_parts()
        self._flows = {}
        if self._outside is not None:
            self._outside.close()

    def block_inputs(self, relative: tuple[str, ...]) -> Iterator[Inputs]:
        """What reaches layers of the block at hand, batch by batch."""
        kept = self._to_keep(relative)
        count = len(next(iter(self._flows.values())))
        for index in range(count):
            seen: dict[str, Tensor] = {}
            for stream in self._flows:
                seen[stream] = self._layer_input(relative[0], stream, index)
                if kept is not None and index == len(kept.inputs[stream]):
                    kept.inputs[stream].append(seen[stream])
            mask = self._mask(index, next(iter(seen.values())))
            yield seen.get("quantized"), seen.get("float"), mask

    def tail_inputs(self, layer: str) -> Iterator[Inputs]:
        """What reaches a layer after the last block, batch by batch."""
        count = len(next(iter(self._flows.values())))
        for index in range(count):
            seen = {stream: self._tail_input(layer, stream, index) for stream in self._flows}
            mask = self._mask(index, next(iter(seen.values())))
            yield seen.get("quantized"), seen.get("float"), mask

    # Where the layers are.

    def _sides(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Layers before the first block, and stages of layers after the last one."""
        inside = tuple(f"{block}." for block in self.blocks)
        outside = [layer for layer in self.layers if not layer.startswith(inside)]
        if not outside:
            return [], []
        marker = next(layer for layer in self.layers if layer.startswith(inside))
        found = layer_order(
            self.model,
            [*outside, marker],
            [partial(call_model, self.model, b, self.forward_fn) for b in self.batches],
        )
        before = found.order[: found.order.index(marker)]
        after = [stage for stage in found.stages if not {*before, marker} & {*stage}]
        return before, after

    def _capture(self) -> None:
        """Both streams at the first block."""
        for stream in self._wanted:
            with _swapped(self.model, self._weights(stream)):
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
        self.decided, self._originals = {}, {}

    def _weights(self, stream: str) -> Weights:
        """Weights outside the blocks that a stream does not take from the model."""
        if stream == "float":
            return self._originals
        outside = {n: self.effective[n] for n in self.effective if not self._in_blocks(n)}
        return {**outside, **self.decided}

    def _in_blocks(self, layer: str) -> bool:
        return any(layer.startswith(f"{block}.") for block in self.blocks)

    # One block.

    def _block_stages(self, block: str) -> Iterator[Stage]:
        module = self.model.get_submodule(block)
        inside = [
            layer.removeprefix(f"{block}.")
            for layer in self.layers
            if layer.startswith(f"{block}.")
        ]
        home = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._block = block
        try:
            if self.device is not None:
                module.to(self.device)
            fixed = {}
            for name, layer in module.named_modules():
                if f"{block}.{name}" in self.effective:
                    own = cast(Tensor, layer.weight)
                    fixed[f"{name}.weight"] = self.effective[f"{block}.{name}"].to(own)
            self._params = {"quantized": fixed, "float": {}}
            found = self._probe(inside)
            for names in found.stages:
                activations = {
                    f"{block}.{name}": found.activations[name]
                    for name in names
                    if name in found.activations
                }
                yield _BlockStage(self, block, names, activations)
            self._advance()
        finally:
            self._drop_parts()
            self._params, self._block, self.decided = {}, "", {}
            if self.device is not None:
                module.to(home)

    def _probe(self, layers: list[str]) -> LayerOrder:
        """In which order the layers of the block are called, and which parts can be kept."""
        module = self.model.get_submodule(self._block)
        flow = next(iter(self._flows.values()))
        found = layer_order(
            module, layers, [partial(flow.call, module, i) for i in range(len(flow))]
        )
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
        module = self.model.get_submodule(self._block)
        seen: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise _Reached

        hook = module.get_submodule(layer).register_forward_pre_hook(stop)
        try:
            with suppress(_Reached):
                self._run(stream, index, layer)
        finally:
            hook.remove()
        return seen[0] if seen else self._empty(layer)

    def _empty(self, layer: str) -> Tensor:
        """No token of this batch reaches the layer, an expert."""
        weight: Any = self.model.get_submodule(f"{self._block}.{layer}").weight
        return weight.new_zeros(0, weight.shape[1])

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

    @contextmanager
    def _replayed(self, part: _Part, stream: str, index: int) -> Iterator[None]:
        """Have a part of the block return what its last layer makes of what was kept."""
        module = self.model.get_submodule(self._block)
        layer = module.get_submodule(part.layer)
        weight = self._params[stream].get(f"{part.layer}.weight")
        inputs = part.inputs[stream].read(index, self._flows[stream].device)
        named = {} if weight is None else {"weight": weight}
        output = part.wrap(functional_call(layer, named, (inputs,)))
        child: Any = module.get_submodule(part.name)
        own = vars(child).get("forward")
        child.forward = lambda *args, **kwargs: output
        try:
            yield
        finally:
            if own is None:
                del child.forward
            else:
                child.forward = own

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
        seen: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise _Reached

        outcome = self._flows[stream].hidden.read(index, self._flows[stream].device)
        hook = self.model.get_submodule(layer).register_forward_pre_hook(stop)
        try:
            with (
                self._skipped(outcome),
                _swapped(self.model, self._weights(stream)),
                suppress(_Reached),
            ):
                call_model(self.model, self.batches[index], self.forward_fn)
        finally:
            hook.remove()
        return seen[0]

    @contextmanager
    def _skipped(self, outcome: Tensor) -> Iterator[None]:
        """Have every block return the outcome of the last one."""
        modules: list[Any] = [self.model.get_submodule(block) for block in self.blocks]
        own = [vars(module).get("forward") for module in modules]
        home = next((p.device for p in modules[0].parameters()), outcome.device)
        try:
            for module in modules:
                module.forward = lambda *a, **k: self._returns(outcome.to(home))
            yield
        finally:
            for module, forward in zip(modules, own, strict=True):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward

    def _mask(self, index: int, inputs: Tensor) -> Tensor | None:
        mask = next(iter(self._flows.values())).mask(index)
        return mask.to(inputs.device) if inputs.shape[: mask.dim()] == mask.shape else None


@contextmanager
def _swapped(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Context in which layers compute with other weights."""
    kept = []
    try:
        for name in weights:
            parameter: Any = model.get_submodule(name).weight
            kept.append((parameter, parameter.data))
            parameter.data = weights[name].to(parameter)
        yield
    finally:
        for parameter, data in reversed(kept):
            parameter.data = data
