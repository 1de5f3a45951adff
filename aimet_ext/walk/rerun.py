"""Walks over a whole model: their common base, and the walk that runs the model for each stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.data.batches import ForwardFn, map_tensors, module_device, token_mask
from aimet_ext.data.cache import StoredBatches, keep_batches
from aimet_ext.walk.hooks import checked_weight, run_batch, seen_input, swapped_weights
from aimet_ext.walk.layers import (
    Inputs,
    LayerOrder,
    Stage,
    Streams,
    check_model,
    known,
    layer_order,
    layers_by_name,
    stage_inputs,
    stream_names,
)


class ModelWalk:
    """Base of the walks over a whole model: stages in order, and the weights of each stream.

    See :class:`aimet_ext.walk.layers.Walk`. The model runs where it is, in evaluation mode, with
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
    ) -> None:
        check_model(model)
        self._model = model
        self._layers = layers_by_name(model, layers)
        self._effective = {} if effective is None or streams == "float" else effective
        self._fixed = layers_by_name(model, self._effective, "effective")
        self._forward_fn = forward_fn
        self._device = module_device(model) if device is None else torch.device(device)
        self._batches = keep_batches(batches, cache_dir)
        # By stream, weights in place of the modules' own.
        self._weights: dict[str, dict[str, Tensor]] = {name: {} for name in stream_names(streams)}
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
            yield Stage(layers, relus, partial(self._read, number))
        self._current = -1

    def hold(self, layer: str) -> None:
        """Have the float stream go on with this layer's weight as it is now, for it will change.

        :raises ValueError: the layer was not asked for.
        """
        weight: Any = known(self._layers, layer).weight
        if "float" in self._weights:
            self._weights["float"][layer] = weight.detach().clone()

    def decide(self, layer: str, weight: Tensor) -> None:
        """Have the quantized stream use this weight from now on.

        :raises ValueError: the layer was not asked for, or the shape is wrong.
        """
        weight = checked_weight(layer, known(self._layers, layer), weight)
        if "quantized" in self._weights:
            self._weights["quantized"][layer] = weight
        self._pending.discard(layer)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers walked to."""
        return tuple(self._layers)

    def close(self) -> None:
        """Drop the weights, and the batches if they were copied."""
        self._current = -1
        for weights in self._weights.values():
            weights.clear()
        if isinstance(self._batches, StoredBatches):
            self._batches.close()

    def _advance(self, number: int) -> None:
        """Make ready for a stage."""

    def _seen(self, number: int, batch: int) -> Mapping[str, Tensor]:
        """Return the input of a stage for a batch by stream; nothing if it does not get there."""
        raise NotImplementedError

    def _read(self, number: int) -> Iterator[Inputs]:
        names = self._order.stages[number]
        for batch in range(len(self._batches)):
            if self._current != number:
                raise RuntimeError(
                    f"the stage of {', '.join(names)} is over; read its batches before the next "
                    "stage is asked for"
                )
            if seen := self._seen(number, batch):
                model = None if self._forward_fn else self._model
                mask = token_mask(self._batches[batch], model)
                yield stage_inputs(names[0], self._layers[names[0]], batch, seen, mask)


class RerunWalk(ModelWalk):
    """A walk that runs the model from its inputs for every stage and every look at its batches.

    It keeps nothing but weights, and asks nothing of the model but that layers are modules.
    ``layers`` may be those of a part of the model.

    :param reason: Reason why the model is run so often, for the report.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        layers: Sequence[str],
        *,
        reason: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, batches, layers, **settings)
        self._reason = reason
        self._passes = 0
        for name, module in self._fixed.items():
            weight = checked_weight(name, module, self._effective[name])
            self._weights["quantized"][name] = weight
        weights = self._weights.get("quantized", {})
        passes = (partial(self._run, n, weights) for n in range(len(self._batches)))
        self._order = layer_order(model, layers, passes)

    @property
    def cost(self) -> dict[str, Any]:
        """Forward passes of a batch so far, most of them ended at a layer, and the reason."""
        cost: dict[str, Any] = {"walk": "rerun", "forward_passes": self._passes}
        return cost if self._reason is None else {**cost, "reason": self._reason}

    def _seen(self, number: int, batch: int) -> Mapping[str, Tensor]:
        layers = [self._layers[name] for name in self._order.stages[number]]
        seen: dict[str, Tensor] = {}
        for stream, weights in self._weights.items():
            if seen and not self._weights["quantized"]:
                seen[stream] = seen["quantized"]  # nothing is decided yet
                continue
            found = seen_input(layers, partial(self._run, batch, weights))
            if found is None:
                return {}  # this batch does not reach the layers
            seen[stream] = found.to(self._device)
        return seen

    @torch.no_grad()
    def _run(self, number: int, weights: Mapping[str, Tensor]) -> Any:
        self._passes += 1
        batch = map_tensors(torch.clone, self._batches[number])  # a model may change its inputs
        with swapped_weights(self._model, weights):
            return run_batch(self._model, batch, number, self._forward_fn)
