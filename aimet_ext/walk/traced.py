"""Walking a model without blocks along its graph, each operation computed once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.data.batches import ForwardFn, call_model, map_tensors, module_device, token_mask
from aimet_ext.data.moments import Geometry
from aimet_ext.data.values import StoredBatches, ValueCache, keep_batches
from aimet_ext.walk.layers import check_model, checked_weight, find_layers, fit_mask, known
from aimet_ext.walk.protocol import Inputs, ReadStage, Streams, Walk
from aimet_ext.walk.rerun import RerunWalk
from aimet_ext.walk.segments import (
    Executor,
    Segment,
    Values,
    Weights,
    equal,
    renewed,
    tensor_versions,
)
from aimet_ext.walk.trace import Group, NotTraceable, batch_tensors, trace_model

__all__ = ["GraphWalk", "walk_graph"]

LOGGER = logging.getLogger(__name__)


def walk_graph(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Sequence[str],
    *,
    streams: Streams = "quantized",
    effective: Mapping[str, Tensor] | None = None,
    forward_fn: ForwardFn | None = None,
    cache_dir: str | Path | None = None,
    device: torch.device | str | None = None,
) -> Walk:
    """A :class:`GraphWalk` where the model can be traced, else a :class:`RerunWalk`.

    A ``forward_fn`` is never traced. Why the model is run again for every stage is logged once and
    stands in the walk's ``cost``. See :class:`GraphWalk` for the parameters.

    :param forward_fn: called as ``forward_fn(model, batch)`` in place of the model itself.
    """
    kept = keep_batches(batches, cache_dir)
    reason = "a forward_fn was given"
    settings: dict[str, Any] = {"streams": streams, "effective": effective, "device": device}
    try:
        if forward_fn is None:
            try:
                return GraphWalk(model, kept, layers, cache_dir=cache_dir, **settings)
            except NotTraceable as error:
                reason = f"the model cannot be traced ({error})"
        LOGGER.warning(
            "%s: the model runs again, up to the layers, for each of their stages", reason
        )
        return RerunWalk(model, kept, layers, forward_fn=forward_fn, reason=reason, **settings)
    except BaseException:
        if isinstance(kept, StoredBatches):
            kept.close()
        raise


class GraphWalk:
    """A walk that runs each operation of a traced model once per stream and batch.

    Between two stages, only values that a later operation reads are kept. See
    :class:`aimet_ext.walk.protocol.Walk`. The model runs where it is, in evaluation mode, with its
    quantizers off.

    :param model: in evaluation mode.
    :param batches: tensors, tuples of positional or mappings of keyword arguments. Any iterable;
        anything but a list or tuple is copied.
    :param layers: names of linear layers and convolutions to walk to.
    :param streams: which inputs the layers' stages give.
    :param effective: weights that the quantized stream uses from the start, by module's name; each
        is asked for once, when its module is reached.
    :param cache_dir: folder for memory-mapped caches; None keeps them in RAM, on the CPU.
    :param device: where the layers' inputs are handed out, the model's own if None.
    :raises NotTraceable: the forward pass is no fixed graph, or the graph computes something else.
    :raises ValueError: a layer is unknown, called twice or never, or followed by a batch norm that
        was not folded; a weight's shape is wrong; there are no batches; the model is in training.
    :raises TypeError: a layer is neither linear nor a convolution.
    :raises RuntimeError: the model's forward pass failed.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        layers: Sequence[str],
        *,
        streams: Streams = "quantized",
        effective: Mapping[str, Tensor] | None = None,
        cache_dir: str | Path | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_model(model)
        self._home = module_device(model)
        self._device = self._home if device is None else torch.device(device)
        self._layers = find_layers(model, layers)
        effective = {} if effective is None or streams == "float" else effective
        fixed = find_layers(model, effective, "effective")
        self._cache_dir = cache_dir
        self._batches = keep_batches(batches, cache_dir)
        self._trace = trace_model(model, self._batches, self._layers)
        self._executor = Executor(self._trace)
        self._prove(model)
        self._masks = [token_mask(batch, model) for batch in self._batches]
        # In place of the modules' own, until their last call: of the quantized stream, and of the
        # float one where the modules' own change.
        self._weights: Weights = {}
        self._originals: Weights = {}
        self._effective = {
            name: lambda name=name: checked_weight(name, fixed[name], effective[name])
            for name in fixed
        }
        self._pending: set[str] = set()
        first = ValueCache(cache_dir)
        names = ("quantized", "float") if streams == "both" else (streams,)
        # One cache for both streams as long as they are the same.
        self._caches = dict.fromkeys(names, first)
        self._position = 0
        self._group: Group | None = None
        self._segments = 0
        self._peak = 0

    def stages(self) -> Iterator[ReadStage]:
        """Each stage in turn, in the order of the layers' calls."""
        for group in self._trace.groups:
            assert not self._pending, f"{sorted(self._pending)} must be decided first"
            self._group = None
            self._advance(group.start)
            self._group = group
            if "quantized" in self._caches:
                self._pending = set(group.layers)
            geometry = Geometry.of(self._layers[group.layers[0]])

            def read(group: Group = group, geometry: Geometry = geometry) -> Iterator[Inputs]:
                return self._read(group, geometry)

            yield ReadStage(group.layers, group.activations, read)
        self._group = None

    def hold(self, layer: str) -> None:
        """Have the float stream go on with this layer's weight as it is now, for it will change.

        :raises ValueError: the layer was not asked for.
        """
        if "float" in self._caches:
            weight: Any = known(self._layers, layer).weight
            self._use(self._originals, layer, weight.detach().clone())

    def decide(self, layer: str, weight: Tensor) -> None:
        """Have the quantized stream use this weight from now on.

        :raises ValueError: the layer was not asked for, or the shape is wrong.
        """
        weight = checked_weight(layer, known(self._layers, layer), weight)
        if "quantized" in self._caches:
            self._use(self._weights, layer, weight)
        self._pending.discard(layer)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers walked to."""
        return tuple(self._layers)

    @property
    def cost(self) -> dict[str, Any]:
        """Runs of a part of the model so far, and the most bytes that were kept between them."""
        return {"walk": "graph", "segments": self._segments, "peak_cached_bytes": self._peak}

    def close(self) -> None:
        """Drop all caches."""
        self._group = None
        self._weights.clear()
        self._originals.clear()
        for cache in self._caches.values():
            cache.close()
        if isinstance(self._batches, StoredBatches):
            self._batches.close()

    def _use(self, weights: Weights, layer: str, weight: Tensor) -> None:
        for called, parameter in self._trace.places(layer):
            weights.setdefault(called, {})[parameter] = weight

    def _advance(self, stop: int) -> None:
        """Run everything up to a position, for all batches."""
        start, self._position = self._position, stop
        trace, before = self._trace, self._caches
        called = {str(node.target) for node in trace.nodes[start:stop]}
        self._load_effective(called)
        if self._same_streams and not called.isdisjoint(self._weights):
            self._caches = {"quantized": ValueCache(self._cache_dir), "float": before["float"]}
        segment = Segment(trace, start, stop, trace.groups[-1].start + 1)
        streams = [*self._caches][: 1 if self._same_streams else 2]
        for batch in range(len(self._batches)):
            for stream in streams:  # the float one last: it may drop what both read
                weights = self._originals if stream == "float" else self._weights
                self._run(segment, batch, weights, before[stream], self._caches[stream])
            self._peak = max(self._peak, sum(c.bytes for c in set(self._caches.values())))
        self._segments += 1
        for weights in (self._weights, self._originals):
            for name in [name for name in weights if trace.last_call[name] < stop]:
                del weights[name]

    def _load_effective(self, called: set[str]) -> None:
        """Ask for the weights of modules that are called now for the first time."""
        for name, weight in list(self._effective.items()):
            if not called.isdisjoint(module for module, _ in self._trace.places(name)):
                self._use(self._weights, name, weight())
                del self._effective[name]

    @property
    def _same_streams(self) -> bool:
        return len(set(self._caches.values())) < len(self._caches)

    def _run(
        self,
        segment: Segment,
        batch: int,
        weights: Weights,
        source: ValueCache,
        target: ValueCache,
    ) -> None:
        """Run a segment for a batch, from the values in one cache to those in another."""
        values = self._values(segment, batch, source)
        versions = {node: tensor_versions(values[node]) for node in segment.read}
        values = self._executor.run_segment(segment, values, weights)
        if source is target:
            target.drop(batch, set(segment.read) - set(segment.kept))
            values = renewed(values, versions)
        target.put(batch, values)

    def _values(self, segment: Segment, batch: int, cache: ValueCache) -> Values:
        """What a segment reads: cached values and the batch's tensors."""
        values: Values = cache.read(batch, segment.read, self._home)
        if segment.inputs:
            tensors = dict(
                zip(self._trace.inputs, batch_tensors(self._batches[batch]), strict=True)
            )
            values |= {node: tensors[node].to(self._home, copy=True) for node in segment.inputs}
        return values

    def _read(self, group: Group, geometry: Geometry) -> Iterator[Inputs]:
        for batch in range(len(self._batches)):
            if self._group is not group:
                raise RuntimeError(
                    f"the stage of {', '.join(group.layers)} is over; read its batches before the "
                    "next stage is asked for"
                )
            found: dict[ValueCache, Tensor] = {}
            for cache in self._caches.values():
                if cache not in found:
                    found[cache] = self._input(cache, batch, group)
            quantized, float_ = (
                found[self._caches[stream]] if stream in self._caches else None
                for stream in ("quantized", "float")
            )
            like = quantized if quantized is not None else float_
            assert like is not None
            yield quantized, float_, fit_mask(self._masks[batch], like, geometry)

    def _input(self, cache: ValueCache, batch: int, group: Group) -> Tensor:
        if group.source.op == "placeholder":
            tensors = batch_tensors(self._batches[batch])
            return tensors[self._trace.inputs.index(group.source)].to(self._device)
        return cache.read(batch, [group.source], self._device)[group.source]

    @torch.no_grad()
    def _prove(self, model: nn.Module) -> None:
        """Compare the graph, run in segments, with the model itself on the first batch."""
        batch = self._batches[0]
        try:
            expected = call_model(model, map_tensors(torch.clone, batch))
        except Exception as error:
            raise RuntimeError(
                f"the model's forward pass failed on batch 0 with {type(error).__name__}: {error}"
            ) from error
        trace, cache = self._trace, ValueCache()
        *_, output = trace.nodes
        end = len(trace.nodes)
        places = [0, *(group.start for group in trace.groups)]
        try:
            for start, stop in pairwise(places):
                self._run(Segment(trace, start, stop, end), 0, {}, cache, cache)
            rest = Segment(trace, places[-1], end, end, kept=[output])
            values = self._executor.run_segment(rest, self._values(rest, 0, cache), {})
        except Exception as error:
            raise NotTraceable(f"its graph fails: {type(error).__name__}: {error}") from error
        finally:
            cache.close()
        if not equal(values[output], expected):
            raise NotTraceable("its graph computes something else on the first batch")
