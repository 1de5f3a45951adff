"""Walks from layer to layer, in the order in which data flows: protocol, bases, and the plainest.

A walk hands out stages, groups of layers that read one input. Once all layers of a stage are
decided it moves on, so that each later stage sees what the decided layers make of the data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from aimet_ext.data.batches import ForwardFn, map_tensors, module_device
from aimet_ext.data.cache import StoredBatches, keep_batches
from aimet_ext.walk.alternatives import Alternative, alternative
from aimet_ext.walk.experts import Call, Inputs, Pool, Routed, pool_of, routed
from aimet_ext.walk.hooks import checked_weight, run_batch, seen_input, seen_inputs, swapped_weights
from aimet_ext.walk.order import Activation, LayerOrder, layer_order
from aimet_ext.walk.sides import Sides
from aimet_ext.walk.streamed import stage_inputs

Streams: TypeAlias = Literal["quantized", "float", "both"]


def stream_names(streams: Streams) -> tuple[str, ...]:
    """Return the names of the streams that are asked for."""
    return ("quantized", "float") if streams == "both" else (streams,)


@dataclass(frozen=True, eq=False)
class Stage:
    """Layers that read one input.

    :param layers: Full names.
    :param activations: The ReLU that alone reads a layer's output, by layer, where there is one.
    :param batches: Function that returns a new iterator over the layers' input, batch by batch;
        it is computed anew at each call.
    :param pool: Tokens of all experts, if the layers are one's.
    """

    layers: tuple[str, ...]
    activations: Mapping[str, Activation]
    batches: Callable[[], Iterator[Inputs]]
    pool: Pool | None = None


class Walk(Protocol):
    """All stages of a model in order."""

    def stages(self) -> Iterator[Stage]:
        """Yield each stage; all layers of one must be decided before the next is asked for."""

    def hold(self, layer: str) -> None:
        """Have the float stream go on with this layer's weight as it is now, for it will change."""

    def decide(self, layer: str, weight: Tensor) -> None:
        """Have the quantized stream use this weight from now on, of the layer's shape."""

    @property
    def cost(self) -> dict[str, Any]:
        """Kind of the walk and the work that it took, for the report."""

    def close(self) -> None:
        """Drop all caches."""


def layers_by_name(
    model: nn.Module, names: Iterable[str], parameter: str = "layers"
) -> dict[str, nn.Module]:
    """Return the modules of these names, each with a weight.

    :param parameter: Word for the names in an error.
    :raises ValueError: a name is given twice or is not in the model, or a module has no weight.
    """
    found: dict[str, nn.Module] = {}
    for name in names:
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(
                f"{parameter} must name modules of {type(model).__name__}, got {name!r}: {error}"
            ) from error
        if name in found or module in found.values():
            raise ValueError(
                f"{parameter} must name each module once, {name!r} is there twice (a module may "
                "have several names); remove one"
            )
        if getattr(module, "weight", None) is None:
            raise ValueError(
                f"{parameter} must name modules with a weight, {name!r} "
                f"({type(module).__name__}) has none; leave it out"
            )
        found[name] = module
    return found


def known(layers: Mapping[str, nn.Module], name: str) -> nn.Module:
    """Return one of the layers walked to.

    :raises ValueError: it is none of them.
    """
    if name not in layers:
        raise ValueError(
            f"layer must be one of the {len(layers)} walked to, got {name!r}; see the stage's "
            "layers"
        )
    return layers[name]


def check_model(model: nn.Module) -> None:
    """Refuse a model that computes something else in training than in use.

    :raises ValueError: it is in training mode.
    """
    if model.training:
        raise ValueError(
            f"the model must be in evaluation mode, {type(model).__name__} is in training mode; "
            "call model.eval()"
        )


class StagedWalk:
    """Base of the walks that know all stages from the start: their turns, and weights by stream.

    :param layers: Modules of the layers to walk to, by name.
    :param streams: Streams whose inputs the stages give.
    :param effective: Weights that the quantized stream uses from the start, by module's name.
    """

    _batches: Sequence[Any]

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        streams: Streams,
        effective: Mapping[str, Tensor] | None,
    ) -> None:
        self._layers = layers
        self._effective = {} if effective is None or streams == "float" else effective
        # By stream, weights in place of the layers' own.
        self._weights: dict[str, dict[str, Tensor]] = {name: {} for name in stream_names(streams)}
        self._waiting = set(self._effective)  # to be asked for when they are reached
        self._pending: set[str] = set()
        self._current = -1
        self._order = LayerOrder()

    def stages(self) -> Iterator[Stage]:
        """Yield each stage in turn, in the order of the layers' calls."""
        for number, layers in enumerate(self._order.stages):
            assert not self._pending, f"{sorted(self._pending)} must be decided first"
            self._current = -1
            self._advance(number)
            self._current = number
            if "quantized" in self._weights:
                self._pending = set(layers)
            relus = {n: relu for n, relu in self._order.activations.items() if n in layers}
            yield Stage(layers, relus, partial(self._read, number), self._pool(number))
        self._current = -1

    def hold(self, layer: str) -> None:
        """Have the float stream go on with this layer's weight as it is now, for it will change.

        :raises ValueError: the layer was not asked for.
        """
        weight: Any = known(self._layers, layer).weight
        if "float" in self._weights and self._is_used(layer):
            self._weights["float"][layer] = weight.detach().clone()

    def decide(self, layer: str, weight: Tensor) -> None:
        """Have the quantized stream use this weight from now on.

        :raises ValueError: the layer was not asked for, or the shape is wrong.
        """
        known(self._layers, layer)
        weight = self._checked(layer, weight)
        if "quantized" in self._weights and self._is_used(layer):
            self._weights["quantized"][layer] = weight
        self._waiting.discard(layer)
        self._pending.discard(layer)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers walked to."""
        return tuple(self._layers)

    def close(self) -> None:
        """Drop the weights."""
        self._current = -1
        for weights in self._weights.values():
            weights.clear()

    def _advance(self, number: int) -> None:
        """Make ready for a stage."""

    def _is_used(self, layer: str) -> bool:
        """Return True if a layer's weight is still going to be used."""
        return True

    def _checked(self, layer: str, weight: Tensor) -> Tensor:
        """Return a weight to compute with in place of the layer's own.

        :raises ValueError: the shape is wrong.
        """
        return checked_weight(layer, self._layers[layer], weight)

    def _load_effective(self, is_reached: Callable[[str], bool]) -> None:
        """Ask for the weights of ``effective`` whose layers are reached now for the first time."""
        for name in sorted(self._waiting):
            if is_reached(name):
                self._weights["quantized"][name] = self._checked(name, self._effective[name])
                self._waiting.discard(name)

    def _read(self, number: int) -> Iterator[Inputs]:
        name = self._order.stages[number][0]
        for batch in range(len(self._batches)):
            self._check_open(number)
            for seen in self._seen(number, batch):
                mask = self._mask(batch, name)
                yield stage_inputs(name, self._layers[name], batch, seen, mask)
                self._check_open(number)

    def _check_open(self, number: int) -> None:
        if self._current != number:
            raise RuntimeError(
                f"the stage of {', '.join(self._order.stages[number])} is over; read its batches "
                "before the next stage is asked for"
            )

    def _seen(self, number: int, batch: int) -> Iterator[Mapping[str, Tensor]]:
        """Yield the input of a stage for a batch by stream, each time its weights are applied.

        Nothing for a batch that does not get there.
        """
        raise NotImplementedError

    def _mask(self, batch: int, layer: str) -> Tensor | None:
        """Return which tokens of a batch count for a layer; None where it does not say."""
        raise NotImplementedError

    def _pool(self, number: int) -> Pool | None:
        """Return what comes to a stage of tokens that are sent elsewhere, if any can be."""
        return None


class ModelWalk(StagedWalk):
    """Base of the walks over a torch model; see :class:`Walk`.

    The model runs where it is, in evaluation mode, with
    its quantizers off.

    :param model: Model in evaluation mode.
    :param batches: Tensors, tuples of positional or mappings of keyword arguments, or whatever
        ``forward_fn`` takes. Any iterable; anything but a list or tuple is copied.
    :param layers: Names of linear layers and convolutions to walk to.
    :param streams: Streams whose inputs the stages give.
    :param effective: Weights that the quantized stream uses from the start, by module's name.
    :param forward_fn: Function called as ``forward_fn(model, batch)`` in place of the model itself.
    :param cache_dir: Folder for memory-mapped caches; None keeps them in RAM, on the CPU.
    :param device: Device on which the layers' inputs are handed out, the model's own if None.
    :param sides: Result of :func:`~aimet_ext.walk.sides.find_sides`; None for a model that reads
        one sequence.
    :raises CalledAgain: a layer is called more than once, and this walk does not take it.
    :raises ValueError: a layer is unknown, never called, or followed by a batch norm that was not
        folded; a weight's shape is wrong; there are no batches; the model is in training.
    :raises TypeError: a layer is neither linear nor a convolution.
    :raises RuntimeError: the forward pass of a batch failed.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        layers: Sequence[str],
        *,
        streams: Streams = "quantized",
        effective: Mapping[str, Tensor] | None = None,
        forward_fn: ForwardFn | None = None,
        cache_dir: str | Path | None = None,
        device: torch.device | str | None = None,
        sides: Sides | None = None,
    ) -> None:
        check_model(model)
        super().__init__(layers_by_name(model, layers), streams, effective)
        self._model = model
        self._fixed = layers_by_name(model, self._effective, "effective")
        self._forward_fn = forward_fn
        self._sides = Sides(forward_fn=forward_fn) if sides is None else sides
        self._device = module_device(model) if device is None else torch.device(device)
        self._batches = keep_batches(batches, cache_dir)

    def close(self) -> None:
        """Drop the weights, and the batches if they were copied."""
        super().close()
        if isinstance(self._batches, StoredBatches):
            self._batches.close()

    def _checked(self, layer: str, weight: Tensor) -> Tensor:
        module = self._layers.get(layer) or self._fixed[layer]
        return checked_weight(layer, module, weight)

    def _mask(self, batch: int, layer: str) -> Tensor | None:
        return self._sides.mask(self._batches[batch], self._model, layer)


class RerunWalk(ModelWalk):
    """A walk that runs the model from its inputs for every stage and every look at its batches.

    It keeps nothing but weights, and asks nothing of the model but that layers are modules.
    ``layers`` may be those of a part of the model. A layer that is called several times in a pass
    gets the inputs of all calls. In the quantized stream it computes in float itself until it is
    decided, as later layers do: inputs that come through them lack their errors. Calls that one
    stream has more than the other have no partner there and are left out, which ``cost`` tells.

    :param together: Names of further modules that hold a layer's weight, by layer. They compute
        with what is decided for it, and their calls count as its own.
    :param reason: Reason why the model is run so often, for the report.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        layers: Sequence[str],
        *,
        together: Mapping[str, Sequence[str]] = MappingProxyType({}),
        reason: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, batches, layers, **settings)
        self._together = together
        self._reason = reason
        self._passes = 0
        self._known: dict[str, tuple[Routed | None, Alternative | None]] = {}
        self._real: Tensor | None = None  # tokens that count of those that a router sent last
        self._alone: dict[tuple[str, int], int] = {}  # calls without partner, by layer and batch
        self._load_effective(lambda name: True)
        weights = self._weights.get("quantized", {})
        passes = (partial(self._run, n, weights) for n in range(len(self._batches)))
        self._order = layer_order(model, layers, passes, repeats=True, together=together)

    @property
    def cost(self) -> dict[str, Any]:
        """Forward passes of a batch so far, most of them ended at a layer, and the reason.

        Calls that were left out, as the other stream has fewer, stand in it by layer.
        """
        cost: dict[str, Any] = {"walk": "rerun", "forward_passes": self._passes}
        if self._reason is not None:
            cost["reason"] = self._reason
        alone: Counter[str] = Counter()
        for (layer, _), calls in self._alone.items():
            alone[layer] += calls
        return {**cost, "calls_left_out": dict(alone)} if alone else cost

    def _seen(self, number: int, batch: int) -> Iterator[Mapping[str, Tensor]]:
        names = self._order.stages[number]
        layers = [self._layers[name] for name in names]
        expert, other = self._places(names[0])
        mask = self._real = super()._mask(batch, names[0])
        if names[0] in self._order.repeated:
            every = [names[0], *self._together.get(names[0], ())]
            modules = [self._model.get_submodule(name) for name in every]
            found = self._once(batch, partial(seen_inputs, modules))
            counts = [len(inputs) for inputs in found.values()]
            if extra := max(counts) - min(counts):
                self._alone.update({(name, batch): extra for name in names})
            for each in zip(*(inputs[: min(counts)] for inputs in found.values()), strict=True):
                yield {s: x.to(self._device) for s, x in zip(found, each, strict=True)}
            return
        seen: Any  # by stream
        if other is not None:
            seen, self._real = other.inputs(self._model, self._runs(batch), mask)
        elif expert is not None:
            calls = self._calls(expert, batch)
            seen = expert.inputs(self._model, calls, self._params())
            self._real = expert.mask(self._model, calls, mask)
        else:
            seen = self._once(batch, partial(seen_input, layers))
        if seen and all(found is not None for found in seen.values()):
            yield {stream: found.to(self._device) for stream, found in seen.items()}

    def _mask(self, batch: int, layer: str) -> Tensor | None:
        return self._real

    def _pool(self, number: int) -> Pool | None:
        (name, *_) = self._order.stages[number]
        expert, other = self._places(name)
        masks = partial(super()._mask, layer=name)

        def sent(batch: int) -> Tensor:
            if expert is not None:
                return expert.tokens(self._model, self._calls(expert, batch), masks(batch))
            mask = masks(batch)
            return torch.ones(0, dtype=torch.bool) if mask is None else mask.flatten()

        def inputs(batch: int, taken: Tensor) -> Mapping[str, Tensor]:
            if expert is not None:
                return expert.inputs(self._model, self._calls(expert, batch), self._params(), taken)
            assert other is not None
            return other.inputs_of_all(self._model, self._runs(batch), masks(batch), taken)

        if expert is not None:
            return pool_of(expert.expert, len(self._batches), sent, inputs)
        return None if other is None else pool_of(other.number, len(self._batches), sent, inputs)

    def _places(self, layer: str) -> tuple[Routed | None, Alternative | None]:
        """Return a layer's place among experts, of either kind."""
        if layer not in self._known:
            self._known[layer] = routed(self._model, layer), alternative(self._model, layer)
        return self._known[layer]

    def _calls(self, expert: Routed, batch: int) -> dict[str, Call]:
        return self._once(batch, partial(expert.call, self._model))

    def _once(self, batch: int, look: Callable[[Callable[[], object]], Any]) -> dict[str, Any]:
        """Return what a function finds in a run of each stream, of one run until they differ."""
        found: dict[str, Any] = {}
        for stream, run in self._runs(batch).items():
            same = bool(found) and not self._weights["quantized"]  # nothing is decided yet
            found[stream] = found["quantized"] if same else look(run)
        return found

    def _runs(self, batch: int) -> dict[str, Callable[[], object]]:
        return {s: partial(self._run, batch, weights) for s, weights in self._weights.items()}

    def _params(self) -> dict[str, dict[str, Tensor]]:
        return {
            stream: {f"{name}.weight": weight for name, weight in weights.items()}
            for stream, weights in self._weights.items()
        }

    @torch.no_grad()
    def _run(self, number: int, weights: Mapping[str, Tensor]) -> Any:
        self._passes += 1
        batch = map_tensors(torch.clone, self._batches[number])  # a model may change its inputs
        every = {
            name: weight
            for layer, weight in weights.items()
            for name in (layer, *self._together.get(layer, ()))
        }
        with swapped_weights(self._model, every):
            return run_batch(self._model, batch, number, self._forward_fn)
