"""Walking a model that cannot be traced: it runs again, up to the layers, for each stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.data.batches import (
    ForwardFn,
    call_model,
    map_tensors,
    module_device,
    token_mask,
)
from aimet_ext.data.values import StoredBatches, keep_batches
from aimet_ext.walk.hooks import Watch, layer_input
from aimet_ext.walk.layers import (
    check_folded,
    check_model,
    checked_weight,
    find_layers,
    fit_mask,
    geometries,
    known,
    relu_of,
    twice_called,
    uncalled,
)
from aimet_ext.walk.protocol import Activation, Inputs, Streams

__all__ = ["RerunWalk"]


class RerunWalk:
    """A walk that runs the model from its inputs for every stage and every look at its batches.

    It keeps nothing but weights, and asks nothing of the model but that layers are modules. Which
    of them read one tensor, and what reads their outputs, shows the first batch (and the next ones,
    until every layer was called). ``layers`` may be those of a part of the model. See
    :class:`aimet_ext.walk.protocol.Walk`. The model runs where it is, in evaluation mode, with its
    quantizers off.

    :param model: in evaluation mode.
    :param batches: tensors, tuples of positional or mappings of keyword arguments, or whatever
        ``forward_fn`` takes. Any iterable; anything but a list or tuple is copied.
    :param layers: names of linear layers and convolutions to walk to.
    :param streams: which inputs the layers' stages give.
    :param effective: weights that the quantized stream uses from the start, by module's name.
    :param forward_fn: called as ``forward_fn(model, batch)`` in place of the model itself.
    :param cache_dir: folder for memory-mapped copies of the batches; None keeps them in RAM.
    :param device: where the layers' inputs are handed out, the model's own if None.
    :param reason: why the model is run so often, for the report.
    :raises ValueError: a layer is unknown, called twice or never, or followed by a batch norm that
        was not folded; a weight's shape is wrong; there are no batches; the model is in training.
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
        reason: str | None = None,
    ) -> None:
        check_model(model)
        self._model = model
        self._layers = find_layers(model, layers)
        self._geometry = geometries(self._layers)
        fixed = find_layers(model, effective or {}, "effective")
        # In place of the modules' own: of the quantized stream, and of the float one where the
        # modules' own change.
        self._weights: dict[str, Tensor] = {}
        self._originals: dict[str, Tensor] = {}
        self._streams = streams
        if streams != "float":
            for name, weight in (effective or {}).items():
                self._weights[name] = checked_weight(name, fixed[name], weight)
        self._forward_fn = forward_fn
        self._device = module_device(model) if device is None else torch.device(device)
        self._batches = keep_batches(batches, cache_dir)
        self._reason = reason
        self._passes = 0
        self._pending: set[str] = set()
        self._stage: _Stage | None = None
        self._groups, self._activations = self._look()

    def stages(self) -> Iterator[_Stage]:
        """Each stage in turn, in the order of the layers' calls."""
        for layers in self._groups:
            assert not self._pending, f"{sorted(self._pending)} must be decided first"
            activations = {n: self._activations[n] for n in layers if n in self._activations}
            self._stage = _Stage(layers, activations, self._read)
            if self._streams != "float":
                self._pending = set(layers)
            yield self._stage
        self._stage = None

    def hold(self, layer: str) -> None:
        """Have the float stream go on with this layer's weight as it is now, for it will change.

        :raises ValueError: the layer was not asked for.
        """
        if self._streams != "quantized":
            weight: Any = known(self._layers, layer).weight
            self._originals[layer] = weight.detach().clone()

    def decide(self, layer: str, weight: Tensor) -> None:
        """Have the quantized stream use this weight from now on.

        :raises ValueError: the layer was not asked for, or the shape is wrong.
        """
        weight = checked_weight(layer, known(self._layers, layer), weight)
        if self._streams != "float":
            self._weights[layer] = weight
        self._pending.discard(layer)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers walked to."""
        return tuple(self._layers)

    @property
    def cost(self) -> dict[str, Any]:
        """Forward passes of a batch so far, most of them ended at a layer, and why."""
        cost: dict[str, Any] = {"walk": "rerun", "forward_passes": self._passes}
        return cost if self._reason is None else {**cost, "reason": self._reason}

    def close(self) -> None:
        """Drop the weights, and the batches if they were copied."""
        self._stage = None
        self._weights.clear()
        self._originals.clear()
        if isinstance(self._batches, StoredBatches):
            self._batches.close()

    def _look(self) -> tuple[list[tuple[str, ...]], dict[str, Activation]]:
        """Groups of layers that read one tensor, in order, and the ReLUs after layers."""
        seen: list[Watch] = []
        order: dict[str, None] = {}
        for number, batch in enumerate(self._batches):
            seen.append(self._watch(number, batch))
            order.update(dict.fromkeys(seen[-1].reads))
            if len(order) == len(self._layers):
                break
        else:
            raise uncalled(name for name in self._layers if name not in order)
        groups: dict[Any, list[str]] = {}
        partners = [watch.partners(self._geometry) for watch in seen]
        for name in order:
            groups.setdefault(tuple(found.get(name) for found in partners), []).append(name)
        activations = {}
        for name in order:
            readers = {watch.sole_reader(name) for watch in seen if name in watch.reads}
            reader = readers.pop() if len(readers) == 1 else None
            check_folded(name, reader)
            if relu := relu_of(reader):
                activations[name] = relu
        return [tuple(group) for group in groups.values()], activations

    def _watch(self, number: int, batch: Any) -> Watch:
        """What happens to the layers in the forward pass of a batch."""
        watch = Watch()
        with ExitStack() as hooks:
            for name, module in self._layers.items():
                watch.hook(name, module, hooks)
            with watch:
                self._run(number, batch, self._weights)
        if watch.twice is not None:
            raise twice_called(watch.twice)
        return watch

    def _read(self, stage: _Stage) -> Iterator[Inputs]:
        geometry = self._geometry[stage.layers[0]]
        for number, batch in enumerate(self._batches):
            if self._stage is not stage:
                raise RuntimeError(
                    f"the stage of {', '.join(stage.layers)} is over; read its batches before the "
                    "next stage is asked for"
                )
            quantized = float_ = None
            if self._streams != "float":
                quantized = self._capture(number, batch, stage.layers, self._weights)
            if self._streams == "both" and not self._weights:
                float_ = quantized
            elif self._streams != "quantized":
                float_ = self._capture(number, batch, stage.layers, self._originals)
            wanted = [quantized] * (self._streams != "float")
            wanted += [float_] * (self._streams != "quantized")
            if any(x is None for x in wanted):
                continue  # this batch does not reach the layer
            assert wanted[0] is not None
            mask = token_mask(batch, None if self._forward_fn else self._model)
            yield quantized, float_, fit_mask(mask, wanted[0], geometry)

    def _capture(
        self, number: int, batch: Any, layers: Sequence[str], weights: Mapping[str, Tensor]
    ) -> Tensor | None:
        """What the first of some layers to be called reads, None if none of them is."""
        found: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(layer_input(args, kwargs))
            raise _Reached

        with ExitStack() as hooks:
            for name in layers:
                handle = self._layers[name].register_forward_pre_hook(stop, with_kwargs=True)
                hooks.callback(handle.remove)
            self._run(number, batch, weights)
        return found[0].to(self._device) if found else None

    @torch.no_grad()
    def _run(self, number: int, batch: Any, weights: Mapping[str, Tensor]) -> None:
        self._passes += 1
        caller = _Caller(self._model, self._forward_fn)
        named = {f"model.{name}.weight": weight for name, weight in weights.items()}
        batch = map_tensors(torch.clone, batch)  # a model may change its inputs in place
        try:
            torch.func.functional_call(caller, named, (batch,), tie_weights=False)
        except _Reached:
            pass
        except Exception as error:
            who = "the model's forward pass" if self._forward_fn is None else "forward_fn"
            raise RuntimeError(
                f"{who} failed on batch {number} with {type(error).__name__}: {error}"
            ) from error


@dataclass(frozen=True, eq=False)
class _Stage:
    """See :class:`aimet_ext.walk.protocol.Stage`."""

    layers: tuple[str, ...]
    activations: Mapping[str, Activation]
    read: Callable[[_Stage], Iterator[Inputs]]

    def batches(self) -> Iterator[Inputs]:
        return self.read(self)


class _Reached(BaseException):
    """Ends a forward pass; no Exception, so that a ``forward_fn`` does not catch it by mistake."""


class _Caller(nn.Module):
    """A model and how to call it, as one module, so that weights can be swapped within."""

    def __init__(self, model: nn.Module, forward_fn: ForwardFn | None) -> None:
        super().__init__()
        self.model = model
        self.forward_fn = forward_fn

    def forward(self, batch: Any) -> Any:
        return call_model(self.model, batch, self.forward_fn)
