"""The data of one block at a time: what flows into its layers, and both streams past it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aimet_ext.data.cache import TensorCache, ValueCache
from aimet_ext.data.geometry import Geometry
from aimet_ext.walk.alternatives import alternative
from aimet_ext.walk.experts import Call, Inputs, Pool, Routed, pool_of, routed
from aimet_ext.walk.hooks import checked_weight, layer_input, replaced_forward, seen_input
from aimet_ext.walk.order import LayerOrder, layer_order
from aimet_ext.walk.stream import BlockStream

Weights = Mapping[str, Tensor]

NoteInput: TypeAlias = Callable[[Tensor, Tensor | None], None]


@dataclass
class _Part:
    """A child of a block whose output is that of its last layer, so that it need not run again.

    :param name: Name of the child, relative to the block.
    :param layer: Name of its last layer, relative to the block.
    :param wrap: Function from the layer's output to the child's.
    :param kept: By stream, batch by batch, inputs of the layer once they were seen, and in their
        place its outputs once they were computed.
    :param computed: Number of batches whose outputs were.
    """

    name: str
    layer: str
    wrap: Callable[[Tensor], Any]
    kept: dict[str, TensorCache] = field(default_factory=dict)
    computed: Counter[str] = field(default_factory=Counter)

    def drop(self, stream: str) -> None:
        """Forget what was kept of a stream."""
        self.computed.pop(stream, None)
        if cache := self.kept.pop(stream, None):
            cache.close()


class StreamedBlock:
    """A block with what flows into it in each stream, and the weights that each stream uses.

    While it is open, what its finished parts return is kept, so that a part runs once however many
    stages come after it. Layers are named within the block.

    :param module: Block; it must compute in float where layers' inputs are asked for.
    :param name: Full name of the block.
    :param flows: Inputs of the block by stream.
    """

    def __init__(self, module: nn.Module, name: str, flows: Mapping[str, BlockStream]) -> None:
        self.module = module
        self.name = name
        self.flows = flows
        self.calls = 0
        # Masks by the number of a batch for layers that read other tokens than the block's.
        self.masks: dict[str, Callable[[int], Tensor | None]] = {}
        self.returns: Callable[[Tensor], Any] = lambda hidden: hidden
        self._open = True
        self._parts: list[_Part] = []
        self._stages: list[tuple[str, ...]] = []
        self._is_roomy = False
        # Of the float stream: inputs of the stages' first layers, and outputs of the block.
        self._read: dict[str, TensorCache] = {}
        self._outputs: TensorCache | None = None
        self._calls: ValueCache | None = None  # of modules of experts, by name and stream
        self._called: set[tuple[int, tuple[str, str]]] = set()
        # By stream and parameter, weights in place of the block's own.
        self._params: dict[str, dict[str, Tensor]] = {stream: {} for stream in flows}

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._flow)

    @property
    def device(self) -> torch.device:
        """Device on which the block is called."""
        return self._flow.device

    @property
    def _flow(self) -> BlockStream:
        return next(iter(self.flows.values()))

    def look(self, layers: Sequence[str]) -> LayerOrder:
        """Return the order in which layers of the block are called, and note what can be kept.

        :raises ValueError: see :func:`aimet_ext.walk.order.layer_order`.
        """
        passes = [partial(self._flow.call, self.module, i) for i in range(len(self))]
        found = layer_order(self.module, layers, passes, f"{self.name}.")
        self.returns = found.returns
        self._parts = [_Part(part, layer, wrap) for part, (layer, wrap) in found.parts.items()]
        self._stages = found.stages
        return found

    def keep_all(self) -> None:
        """Run the float stream once for all stages, and keep parts however wide, if there is room.

        For a block whose own weights stay as they are, or are held before they change.
        """
        read = [names[0] for names in self._stages] if "float" in self.flows else []
        layers: list[Any] = [
            self.module.get_submodule(name) for name in (*read, *(p.layer for p in self._parts))
        ]
        numbers = sum(layer.weight[0].numel() for layer in layers)  # of a token
        size = max((layer.weight.element_size() for layer in layers), default=0)
        tokens = sum(math.prod(self._flow.shape(index)) for index in range(len(self)))
        needed = tokens * (numbers + self._flow.width) * size
        self._is_roomy = self._flow.hidden.has_room(needed)

    def hold(self, layer: str, weight: Tensor | None = None) -> None:
        """Have the float stream go on with a weight of this layer, if None as it is now."""
        if "float" in self._params:
            own: Any = self.module.get_submodule(layer).weight
            held = own.detach().clone() if weight is None else weight
            self._params["float"][f"{layer}.weight"] = held

    def decide(self, layer: str, weight: Tensor) -> None:
        """Have the quantized stream use this weight from now on.

        :raises ValueError: it is of another shape.
        """
        weight = checked_weight(f"{self.name}.{layer}", self.module.get_submodule(layer), weight)
        for part in self._parts:
            if part.layer == layer and part.computed["quantized"]:
                part.drop("quantized")
        if "quantized" in self._params:
            self._params["quantized"][f"{layer}.weight"] = weight

    def restart(self) -> None:
        """Forget the decisions, and what was kept of the quantized stream because of them."""
        self._params["quantized"] = {}
        for part in self._parts:
            part.drop("quantized")
        self._called = {called for called in self._called if called[1][1] != "quantized"}

    def inputs(self, layers: Sequence[str], streams: Sequence[str] = ()) -> Iterator[Inputs]:
        """Yield the input that layers share, batch by batch, with the weights decided so far.

        :param streams: Streams to read, all if empty.
        :raises RuntimeError: the block was closed.
        """
        module = self.module.get_submodule(layers[0])
        wanted = streams or tuple(self.flows)
        expert, other = routed(self.module, layers[0]), alternative(self.module, layers[0])
        kept = self._to_keep(layers, wanted) if other is None else None
        for index in range(len(self)):
            if not self._open:
                raise RuntimeError(
                    f"the stages of {self.name} are over; read their batches before a later "
                    "block's stage is asked for"
                )
            seen: Mapping[str, Tensor | None]
            mask = self.masks.get(layers[0], self._flow.mask)(index)
            if other is not None:
                runs = self._runs(wanted, index, layers[0])
                seen, mask = other.inputs(self.module, runs, mask)
            elif expert is None:
                seen = {stream: self._seen(stream, index, layers[0]) for stream in wanted}
            else:
                calls = self._all_calls(expert, wanted, index)
                seen = expert.inputs(self.module, calls, self._params)
                mask = expert.mask(self.module, calls, mask)
            found = {stream: no_tokens(module, seen.get(stream)) for stream in wanted}
            if kept is not None:
                for stream, cache in kept.kept.items():
                    if index == len(cache) and stream in found:
                        cache.append(found[stream])
            yield stage_inputs(f"{self.name}.{layers[0]}", module, index, found, mask)

    def pool(self, layers: Sequence[str], streams: Sequence[str] = ()) -> Pool | None:
        """Return the tokens of all experts, sent to the one whose layers these are.

        None if they are no expert's.
        """
        expert, other = routed(self.module, layers[0]), alternative(self.module, layers[0])
        streams, mask = streams or tuple(self.flows), self.masks.get(layers[0], self._flow.mask)
        if other is not None:

            def counts(index: int) -> Tensor:
                counted = mask(index)
                return torch.ones(0, dtype=torch.bool) if counted is None else counted.flatten()

            def inputs(index: int, taken: Tensor) -> Mapping[str, Tensor]:
                runs = self._runs(streams, index, layers[0])
                return other.inputs_of_all(self.module, runs, mask(index), taken)

            return pool_of(other.number, len(self), counts, inputs)
        if expert is None:
            return None

        def sent(index: int) -> Tensor:
            calls = self._all_calls(expert, streams, index)
            return expert.tokens(self.module, calls, mask(index))

        def sent_there(index: int, taken: Tensor) -> Mapping[str, Tensor]:
            calls = self._all_calls(expert, streams, index)
            return expert.inputs(self.module, calls, self._params, taken)

        shared = expert.module if expert.reads_hidden(self.module) else None
        return pool_of(expert.expert, len(self), sent, sent_there, shared)

    def _runs(
        self, streams: Sequence[str], index: int, layer: str
    ) -> dict[str, Callable[[], object]]:
        return {stream: partial(self._run, stream, index, layer) for stream in streams}

    def _all_calls(self, expert: Routed, streams: Sequence[str], index: int) -> dict[str, Call]:
        return {stream: self._call(expert, stream, index) for stream in streams}

    def _seen(self, stream: str, index: int, layer: str) -> Tensor | None:
        """Return what a layer reads in a batch; None if it is not called."""
        if stream == "float" and self._is_roomy:
            if self._outputs is None:
                self._run_float()
            return self._read[layer].read(index, self.device)
        run = partial(self._run, stream, index, layer)
        return seen_input([self.module.get_submodule(layer)], run)

    def _run_float(self) -> None:
        """Run the float stream past the block, and keep all that is going to be asked for."""
        flow = self.flows["float"]
        self._outputs = flow.new_cache()
        for names in self._stages:
            if not self._is_sent_to(names[0]):
                self._read[names[0]] = flow.new_cache(f"read-{len(self._read)}")
        notes: dict[str, NoteInput] = {
            name: lambda x, _, cache=cache: cache.append(x)  # type: ignore[misc]
            for name, cache in self._read.items()
        }
        for index in range(len(self)):
            with noted_inputs(self.module, notes, None):
                self._outputs.append(self._run("float", index))
            for name, cache in self._read.items():
                if len(cache) == index:  # it was not called
                    cache.append(no_tokens(self.module.get_submodule(name)))

    def _is_sent_to(self, layer: str) -> bool:
        """Return True if a router sends tokens to a layer."""
        return routed(self.module, layer) is not None or alternative(self.module, layer) is not None

    def _call(self, expert: Routed, stream: str, index: int) -> Call:
        """Return the call of an expert's module, which earlier layers decide; it is kept."""
        key = (expert.module, stream)
        if self._calls is None:
            self._calls = ValueCache(self._flow.hidden.cache_dir)
        if (index, key) not in self._called:
            run = partial(self._run, stream, index, expert.layer)
            self._calls.put(index, {key: expert.call(self.module, run)})
            self._called.add((index, key))
        return self._calls.read(index, [key], self.device)[key]

    def outputs(self, stream: str, notes: Mapping[str, NoteInput] | None = None) -> TensorCache:
        """Return the block's outputs in a stream, batch by batch; the stream stays where it is.

        :param notes: Functions that are given the input of a layer in each batch, and the mask of
            its rows, by the layer's name.
        """
        outputs = self.flows[stream].new_cache()
        try:
            for index in range(len(self)):
                with noted_inputs(self.module, notes or {}, self._flow.mask(index)):
                    outputs.append(self._run(stream, index))
        except BaseException:
            outputs.close()
            raise
        return outputs

    def advance(self, stream: str) -> None:
        """Move a stream past the block. A stream for which that failed is lost."""
        flow = self.flows[stream]
        if stream == "float" and self._outputs is not None:
            flow.hidden.close()
            flow.hidden, self._outputs = self._outputs, None
            return
        for index in range(len(flow)):
            flow.hidden[index] = self._run(stream, index)

    def close(self) -> None:
        """Drop what was kept of finished parts, and the weights."""
        self._open = False
        for part in self._parts:
            for stream in self.flows:
                part.drop(stream)
        for cache in (*self._read.values(), self._outputs, self._calls):
            if cache is not None:
                cache.close()
        self._parts, self._params = [], {stream: {} for stream in self.flows}

    def _to_keep(self, layers: Sequence[str], streams: Sequence[str]) -> _Part | None:
        """Return the part that these layers end, if there is room for its input."""
        for part in self._parts:
            if len(layers) == 1 and part.layer == layers[0]:
                layer: Any = self.module.get_submodule(part.layer)
                wide = not self._is_roomy and layer.weight.shape[1] > self._flow.width
                if wide or not isinstance(layer, nn.Linear):
                    return None
                for stream in streams:
                    if stream not in part.kept and not (stream == "float" and self._is_roomy):
                        part.kept[stream] = self.flows[stream].new_cache(f"part-{stream}")
                return part
        return None

    @torch.no_grad()
    def _run(self, stream: str, index: int, layer: str | None = None) -> Tensor:
        """Return the block's output for a batch; parts that are finished do not run.

        :param layer: Layer whose input is wanted; the part that it is in must run.
        """
        params = self._params[stream]
        self.calls += 1
        with ExitStack() as stack:
            for part in self._parts:
                done = stream in part.kept and index < len(part.kept[stream])
                if done and not (layer or "").startswith(f"{part.name}."):
                    stack.enter_context(self._replayed(part, stream, index))
            call = self.flows[stream].select(index)
            return call(lambda *a, **k: functional_call(self.module, params, a, k))

    def _replayed(self, part: _Part, stream: str, index: int) -> AbstractContextManager[None]:
        """Have a part of the block return what its last layer makes of what was kept."""
        kept = part.kept[stream].read(index, self.flows[stream].device)
        if index >= part.computed[stream]:
            weight = self._params[stream].get(f"{part.layer}.weight")
            named = {} if weight is None else {"weight": weight}
            kept = functional_call(self.module.get_submodule(part.layer), named, (kept,))
            if index == part.computed[stream] and part is not self._parts[-1]:
                part.kept[stream][index] = kept
                part.computed[stream] += 1
        output = part.wrap(kept)
        return replaced_forward(self.module.get_submodule(part.name), lambda: output)


@contextmanager
def noted_inputs(
    block: nn.Module, notes: Mapping[str, NoteInput], mask: Tensor | None
) -> Iterator[None]:
    """Open a context in which functions are given the inputs of a block's layers.

    :param notes: Functions of an input and the mask of its rows, by the layer's name.
    :param mask: Mask of the batch, bool ``[batch, seq]``.
    """
    with ExitStack() as hooks:
        for name, note in notes.items():
            layer = block.get_submodule(name)

            def hook(layer: nn.Module, args: Any, kwargs: Any, note: NoteInput = note) -> None:
                x = layer_input(args, kwargs)
                note(x, fit_mask(mask, x, Geometry.of(layer)))

            hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def no_tokens(layer: nn.Module, seen: Tensor | None = None) -> Tensor:
    """Return the input of a layer, that of no tokens if none was seen, as of an expert."""
    weight: Any = layer.weight
    return seen if seen is not None else weight.new_zeros(0, weight.shape[1])


def fit_mask(mask: Tensor | None, x: Tensor, geometry: Geometry) -> Tensor | None:
    """Return the mask of a layer's input vectors; None where it does not read the batch's tokens.

    :param mask: Mask of the batch, bool ``[batch, seq]``.
    :param x: Input of the layer, ``[batch, seq, in]`` or ``[batch * seq, in]``.
    :returns: bool of the leading dimensions of ``x``.
    """
    if mask is None or geometry.kernel_size:
        return None
    if mask.shape == x.shape[:-1]:
        return mask.to(x.device)
    return mask.flatten().to(x.device) if x.shape[:-1] == (mask.numel(),) else None


def stage_inputs(
    name: str, module: nn.Module, number: int, seen: Mapping[str, Tensor], mask: Tensor | None
) -> Inputs:
    """Return a batch's inputs of a stage, and which of their rows count.

    :param name: Name of the stage's first layer, whose module is ``module``.
    :param number: Number of the batch.
    :param seen: Input by stream.
    :param mask: Mask of the batch, bool ``[batch, seq]``.
    :raises ValueError: the streams differ in shape.
    """
    first, *others = seen.values()
    if any(other.shape != first.shape for other in others):
        raise ValueError(
            f"layer {name!r} must receive the same tokens in the float and in the quantized "
            f"stream, batch {number} has {list(first.shape)} and {list(others[0].shape)}, as "
            "experts do that tokens are routed to; use one stream or leave the layer out"
        )
    fitting = fit_mask(mask, first, Geometry.of(module))
    return seen.get("quantized"), seen.get("float"), fitting
