"""The walk to the layers of repeated blocks, and to those before and after the blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from aimet_ext.data.batches import ForwardFn, call_model, module_device
from aimet_ext.walk.experts import Inputs
from aimet_ext.walk.hooks import (
    checked_weight,
    counted_calls,
    replaced_forward,
    run_batch,
    seen_input,
    swapped_weights,
)
from aimet_ext.walk.order import LayerOrder, layer_order
from aimet_ext.walk.passes import BlockPass, WalkOptions, kinds_of, open_pass
from aimet_ext.walk.sides import Sides
from aimet_ext.walk.states import tokens_inside
from aimet_ext.walk.streamed import StreamedBlock, no_tokens, stage_inputs
from aimet_ext.walk.walk import RerunWalk, Stage, Streams, stream_names
from aimet_ext.walk.wiring import NotInSequence

Weights = Mapping[str, Tensor]


def find_stack(model: nn.Module, layers: Sequence[str], *, mixed: bool = False) -> list[str]:
    """Return the names of the repeated blocks that hold most of these layers, in order.

    Blocks are the children of one ``nn.ModuleList`` or ``nn.Sequential`` and of one class. Without
    any: an empty list.

    :param mixed: True to take blocks of several classes too.
    """
    best: list[str] = []
    most = 0
    around = Counter(prefix for layer in layers for prefix in _holders(layer))
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList if mixed else nn.ModuleList | nn.Sequential):
            continue
        if not mixed and len({type(child) for child in module}) != 1:
            continue
        blocks = [f"{name}.{key}".lstrip(".") for key, _ in module.named_children()]
        held = [around[block] for block in blocks]
        if sum(held) > most and (all(held) or sum(held) > len(layers) // 2):
            best, most = blocks, sum(held)
    return best


def _holders(layer: str) -> Iterator[str]:
    """Return the names of the modules around a layer."""
    keys = layer.split(".")
    return (".".join(keys[:depth]) for depth in range(1, len(keys)))


@dataclass(frozen=True)
class Stack:
    """Repeated blocks.

    :param blocks: Full names, in order.
    :param kinds: Result of :func:`~aimet_ext.walk.passes.kinds_of`, None to compute it.
    """

    blocks: tuple[str, ...]
    kinds: Sequence[int] | None = None


def find_stacks(
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[Any],
    forward_fn: ForwardFn | None = None,
) -> list[Stack]:
    """Return the stacks of blocks that layers can be walked to in, in the order of their calls.

    The first one found by :func:`find_stack` is among them unless it is not called block by block;
    others, such as that of an encoder beside a decoder's, if they are called whole before or after.
    There are none if a layer is called more than once.
    """
    stacks: list[Stack] = []
    left = list(layers)
    while blocks := find_stack(model, left):
        try:
            with counted_calls(model, (blocks[0], *left)) as calls:
                kinds = kinds_of(model, blocks, batches, forward_fn)
            if any(calls[name] > calls[blocks[0]] for name in left):
                break  # nor can what one block keeps of a layer stand for its other calls
        except NotInSequence:
            break  # the graph knows how data flows
        except Exception:  # noqa: BLE001  (of the batch: the walk says more)
            return stacks or [Stack(tuple(blocks))]
        stacks.append(Stack(tuple(blocks), kinds))
        left = [n for n in left if not any(n.startswith(f"{block}.") for block in blocks)]
    if len(stacks) < 2 or not batches:
        return stacks
    return in_turn(model, stacks, partial(call_model, model, batches[0], forward_fn))


@torch.no_grad()
def in_turn(model: nn.Module, stacks: Sequence[Stack], run: Callable[[], object]) -> list[Stack]:
    """Return the first of some stacks, and those that are called whole before or after it.

    :param run: Function that runs the model on one batch.
    """
    calls: list[int] = []

    def note(number: int, module: nn.Module, args: Any) -> None:
        calls.append(number)

    with ExitStack() as hooks:
        for number, stack in enumerate(stacks):
            for block in stack.blocks:
                module, hook = model.get_submodule(block), partial(note, number)
                hooks.callback(module.register_forward_pre_hook(hook).remove)
        run()
    kept = [0]
    for number in range(1, len(stacks)):
        turns = [n for n in calls if n in (*kept, number)]
        whole = 1 + sum(a != b for a, b in pairwise(turns)) == len(kept) + 1
        if whole and len(stacks[number].blocks) > 1:
            kept.append(number)
    return [stacks[number] for number in sorted(kept, key=calls.index)]


class BlockWalk:
    """A walk to the layers of repeated blocks, and to those before, between and after them.

    See :class:`aimet_ext.walk.walk.Walk`. Nothing but calls of modules is looked at, so a block
    may be of any architecture. The model must compute in float while it walks.

    :class:`~aimet_ext.walk.walk.ModelWalk` describes the other parameters.

    :param blocks: Full names of the repeated blocks, see :func:`find_stack`.
    :param batches: Batches of the dataloader, as a list.
    :param device: Device for the block that is worked on; None leaves it where it is.
    :param kinds: Result of :func:`~aimet_ext.walk.passes.kinds_of`, None to compute it.
    :param stacks: Several stacks of blocks in the order of their calls, such as those of an encoder
        and a decoder, in place of ``blocks`` and ``kinds``.
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
        stacks: Sequence[Stack] = (),
        **options: Unpack[WalkOptions],
    ) -> None:
        self.model = model
        self.stacks = tuple(stacks) or (Stack(tuple(blocks), kinds),)
        self.blocks = tuple(block for stack in self.stacks for block in stack.blocks)
        self._sides = options.get("sides") or Sides(forward_fn=options.get("forward_fn"))
        self.batches = batches
        self.layers = tuple(layers)
        self.effective = {} if effective is None or streams == "float" else effective
        self.forward_fn = options.get("forward_fn")
        self._options = options
        self._streams = streams
        # Weights outside the blocks that the streams do not take from the model.
        self._weights: dict[str, dict[str, Tensor]] = {name: {} for name in stream_names(streams)}
        self._passes: list[BlockPass] = []
        self._block: StreamedBlock | None = None
        # By stack that the streams have passed, function from hidden states to a block's output.
        self._returns: list[Callable[[Tensor], Any]] = []
        self._outside: RerunWalk | None = None
        self._stages = self._walk()

    @property
    def cost(self) -> dict[str, Any]:
        """Calls of the blocks so far, and what walking to the layers before them took."""
        calls = sum(each.calls for each in self._passes)
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
        before, after = self._around()
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
        for number, (stack, behind) in enumerate(zip(self.stacks, after, strict=True)):
            is_last = number + 1 == len(self.stacks)
            weights = {stream: self._swapped(stream, stack) for stream in self._weights}
            within = {stream: partial(self._behind, stream) for stream in weights}
            opened = open_pass(
                self.model,
                stack.blocks,
                self.batches,
                weights,
                stack.kinds,
                within if self._passes else None,
                **self._options,
            )
            del weights
            self._passes.append(opened)
            with closing(opened.blocks()) as blocks:
                for block in blocks:
                    done = is_last and not behind.stages and block.name == stack.blocks[-1]
                    returns = yield from self._block_stages(block, advance=not done)
            self._returns.append(returns)
            for names in behind.stages:
                relus = {n: behind.activations[n] for n in names if n in behind.activations}
                yield Stage(names, relus, partial(self._tail_inputs, names[0]))

    def close(self) -> None:
        """Drop all caches; a block that is worked on goes back to its device."""
        self._stages.close()
        for each in self._passes:
            each.close()
        if self._outside is not None:
            self._outside.close()

    def _block_stages(
        self, block: StreamedBlock, *, advance: bool
    ) -> Generator[Stage, None, Callable[[Tensor], Any]]:
        """Yield the stages of a block; then the streams go on past it.

        :returns: Function from hidden states to an output of the block's form.
        """
        prefix = f"{block.name}."
        self._block = block
        try:
            for name, _ in block.module.named_modules():
                if f"{prefix}{name}" in self.effective:
                    block.decide(name, self.effective[f"{prefix}{name}"])
            inside = [n.removeprefix(prefix) for n in self.layers if n.startswith(prefix)]
            block.masks = {
                name: partial(self._mask, f"{prefix}{name}")
                for name in inside
                if self._sides.differ(f"{prefix}{name}", block.name)
            }
            found = block.look(inside)
            block.keep_all()
            for names in found.stages:
                relus = {f"{prefix}{n}": r for n, r in found.activations.items() if n in names}
                full = tuple(f"{prefix}{name}" for name in names)
                yield Stage(full, relus, partial(block.inputs, names), block.pool(names))
            if advance:
                for stream in block.flows:
                    block.advance(stream)
        finally:
            self._block = None
        return found.returns

    # Outside the blocks.

    def _in_blocks(self, layer: str) -> bool:
        return any(layer.startswith(f"{block}.") for block in self.blocks)

    def _swapped(self, stream: str, stack: Stack | None = None) -> Weights:
        """Return the weights outside the blocks that a stream does not take from the model.

        :param stack: Blocks whose inputs are captured: the arguments of its later kinds may come
            from tables in the first ones.
        """
        if stream == "float":
            return self._weights[stream]
        run = () if stack is None else stack.blocks[: max(stack.kinds or [0])]
        outside = {
            name: self.effective[name]
            for name in self.effective
            if not self._in_blocks(name) or any(name.startswith(f"{block}.") for block in run)
        }
        return {**outside, **self._weights[stream]}

    def _around(self) -> tuple[list[str], list[LayerOrder]]:
        """Return layers before the first block, and stages of layers after each stack."""
        outside = [layer for layer in self.layers if not self._in_blocks(layer)]
        passes = [
            partial(run_batch, self.model, batch, number, self.forward_fn)
            for number, batch in enumerate(self.batches)
        ]
        return layers_around(self.model, self.stacks, outside, passes)

    def _mask(self, layer: str, index: int) -> Tensor | None:
        return self._sides.mask(self.batches[index], self.model, layer)

    def _tail_inputs(self, layer: str) -> Iterator[Inputs]:
        """Yield what reaches a layer after the last block that the streams passed, by batch."""
        module, behind = self.model.get_submodule(layer), self._passes[-1]
        elsewhere = self._sides.differ(layer, behind.names[-1])
        flow = next(iter(behind.flows.values()))
        for index in range(len(self.batches)):
            seen = {stream: self._tail_input(module, stream, index) for stream in behind.flows}
            mask = self._mask(layer, index) if elsewhere else flow.mask(index)
            yield stage_inputs(layer, module, index, seen, mask)

    @torch.no_grad()
    def _tail_input(self, module: nn.Module, stream: str, index: int) -> Tensor:
        """Return what reaches a layer, the blocks' outcome put in the place of the blocks."""
        with swapped_weights(self.model, self._swapped(stream)), self._behind(stream, index):
            run = partial(call_model, self.model, self.batches[index], self.forward_fn)
            seen = seen_input([module], run)
        flow = self._passes[-1].flows[stream]
        return no_tokens(module) if seen is None else seen.to(flow.device)

    @contextmanager
    def _behind(self, stream: str, index: int) -> Iterator[None]:
        """Open a context in which blocks that a stream passed return their outcome of a batch."""
        with ExitStack() as stack:
            for done, returns in zip(self._passes, self._returns, strict=False):
                blocks = [self.model.get_submodule(name) for name in done.names]
                outcome = done.flows[stream].hidden.read(index, module_device(blocks[0]))
                output = partial(returns, tokens_inside(outcome))
                for block in blocks:
                    stack.enter_context(replaced_forward(block, output))
            yield


def layers_around(
    model: nn.Module,
    stacks: Sequence[Stack],
    layers: Sequence[str],
    passes: Iterable[Callable[[], object]],
) -> tuple[list[str], list[LayerOrder]]:
    """Return the layers called before the first stack, and the order of those after each stack.

    :param stacks: Stacks of blocks in the order of their calls.
    :param layers: Names of layers in none of the blocks.
    :param passes: Functions that each run the model once.
    :raises ValueError: a layer is called between two blocks of a stack; else as
        :func:`layer_order`.
    """
    if not layers:
        return [], [LayerOrder() for _ in stacks]
    order: dict[str, int] = {}

    def note(name: str, module: nn.Module, args: Any) -> None:
        order.setdefault(name, len(order))

    ends = [(stack.blocks[0], stack.blocks[-1]) for stack in stacks]
    with ExitStack() as hooks:
        for name in dict.fromkeys((*layers, *(block for pair in ends for block in pair))):
            hook = model.get_submodule(name).register_forward_pre_hook(partial(note, name))
            hooks.callback(hook.remove)
        found = layer_order(model, layers, passes)
    regions: list[list[str]] = [[] for _ in (None, *stacks)]
    for name in found.order:
        behind = 0  # stacks
        for first, last in ends:
            begin, end = (order.get(block, len(order)) for block in (first, last))
            if begin < order[name] < end:
                raise ValueError(
                    f"layer {name!r} must be called before or after the repeated blocks "
                    f"({first} to {last}), it is called between them; leave it out"
                )
            behind += order[name] > end
        regions[behind].append(name)
    after = []
    for names in regions[1:]:
        stages = [tuple(n for n in stage if n in names) for stage in found.stages]
        after.append(replace(found, order=names, stages=[stage for stage in stages if stage]))
    return regions[0], after
