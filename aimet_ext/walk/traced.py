"""The walk along a traced model's graph, each operation computed once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.data.batches import ForwardFn, map_tensors, module_device, tensors_in
from aimet_ext.data.cache import StoredBatches, ValueCache, keep_batches
from aimet_ext.walk.hooks import run_batch
from aimet_ext.walk.order import CalledAgain, layer_order
from aimet_ext.walk.trace import (
    Executor,
    NotTraceable,
    Segment,
    Values,
    Weights,
    equal,
    renewed,
    tensor_versions,
    trace_model,
)
from aimet_ext.walk.walk import ModelWalk, RerunWalk, Walk

LOGGER = logging.getLogger(__name__)


def walk_graph(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Sequence[str],
    *,
    forward_fn: ForwardFn | None = None,
    cache_dir: str | Path | None = None,
    leaves: Iterable[nn.Module] = (),
    **settings: Any,
) -> Walk:
    """Return a :class:`GraphWalk` where the model can be traced, else a :class:`RerunWalk`.

    A ``forward_fn`` is never traced. Why the model is run again for every stage is logged once and
    stands in the walk's ``cost``. See :class:`~aimet_ext.walk.walk.ModelWalk` for the parameters.
    """
    kept = keep_batches(batches, cache_dir)
    reason = "a forward_fn was given"
    try:
        if forward_fn is None:
            try:
                return GraphWalk(
                    model, kept, layers, cache_dir=cache_dir, leaves=leaves, **settings
                )
            except NotTraceable as error:
                reason = f"the model cannot be traced ({error})"
            except CalledAgain as error:
                reason = str(error).partition(";")[0]
        LOGGER.warning(
            "%s: the model runs again, up to the layers, for each of their stages", reason
        )
        return RerunWalk(model, kept, layers, forward_fn=forward_fn, reason=reason, **settings)
    except BaseException:
        if isinstance(kept, StoredBatches):
            kept.close()
        raise


class GraphWalk(ModelWalk):
    """A walk that runs each operation of a traced model once per stream and batch.

    Between two stages, only values that a later operation reads are kept. Each weight of
    ``effective`` is asked for once, when its module is reached.

    :param leaves: Modules with children that are called and not looked into.
    :param settings: Arguments of :class:`~aimet_ext.walk.walk.ModelWalk` but ``forward_fn``.
    :raises NotTraceable: the forward pass is no fixed graph, or the graph computes something else.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        layers: Sequence[str],
        *,
        cache_dir: str | Path | None = None,
        leaves: Iterable[nn.Module] = (),
        **settings: Any,
    ) -> None:
        super().__init__(model, batches, layers, cache_dir=cache_dir, **settings)
        self._home = module_device(model)
        self._cache_dir = cache_dir
        self._trace = trace_model(model, self._batches, self._layers, leaves)
        self._executor = Executor(self._trace)
        outputs: list[Any] = []

        def look() -> None:
            batch = map_tensors(torch.clone, self._batches[0])
            outputs.append(run_batch(model, batch, 0))

        self._order = layer_order(model, layers, [look])
        # Where each stage starts in the graph, and the node that gives its input.
        self._calls = [self._trace.call(names[0]) for names in self._order.stages]
        self._places = {name: self._trace.places(name) for name in (*layers, *self._fixed)}
        self._prove(outputs[0])
        # One cache for both streams as long as they are the same.
        self._caches = dict.fromkeys(self._weights, ValueCache(cache_dir))
        self._position = 0
        self._segments = 0
        self._peak = 0

    @property
    def cost(self) -> dict[str, Any]:
        """Runs of a part of the model so far, and the most bytes that were kept between them."""
        return {"walk": "graph", "segments": self._segments, "peak_cached_bytes": self._peak}

    def close(self) -> None:
        """Drop all caches."""
        super().close()
        for cache in self._caches.values():
            cache.close()

    def _advance(self, number: int) -> None:
        """Run everything up to a stage, for all batches."""
        stop = self._calls[number][0]
        start, self._position = self._position, stop
        trace, before = self._trace, self._caches
        called = {str(node.target) for node in trace.nodes[start:stop]}
        self._load_effective(lambda name: not called.isdisjoint(m for m, _ in self._places[name]))
        changed = self._placed("quantized") if "quantized" in self._weights else {}
        if self._same_streams and not called.isdisjoint(changed):
            self._caches = {"quantized": ValueCache(self._cache_dir), "float": before["float"]}
        segment = Segment(trace, start, stop, self._calls[-1][0] + 1)
        streams = [*self._caches][: 1 if self._same_streams else 2]
        weights = {stream: self._placed(stream) for stream in streams}
        for batch in range(len(self._batches)):
            for stream in streams:  # the float one last: it may drop what both read
                self._run(segment, batch, weights[stream], before[stream], self._caches[stream])
            self._peak = max(self._peak, sum(c.bytes for c in set(self._caches.values())))
        self._segments += 1
        for own in self._weights.values():
            for name in list(own):
                if all(trace.last_use[place] < stop for place, _ in self._places[name]):
                    del own[name]

    def _placed(self, stream: str) -> Weights:
        """Return a stream's weights by the modules of the graph that compute with them."""
        placed: Weights = {}
        for name, weight in self._weights[stream].items():
            for called, parameter in self._places[name]:
                placed.setdefault(called, {})[parameter] = weight
        return placed

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
        """Return what a segment reads: cached values and the batch's tensors."""
        values: Values = cache.read(batch, segment.read, self._home)
        if segment.inputs:
            tensors = dict(zip(self._trace.inputs, tensors_in(self._batches[batch]), strict=True))
            values |= {node: tensors[node].to(self._home, copy=True) for node in segment.inputs}
        return values

    def _seen(self, number: int, batch: int) -> Iterator[Mapping[str, Tensor]]:
        found: dict[ValueCache, Tensor] = {}
        for cache in self._caches.values():
            if cache not in found:
                found[cache] = self._input(cache, batch, number)
        yield {stream: found[cache] for stream, cache in self._caches.items()}

    def _input(self, cache: ValueCache, batch: int, number: int) -> Tensor:
        source = self._calls[number][1]
        if source.op == "placeholder":
            tensors = tensors_in(self._batches[batch])
            return tensors[self._trace.inputs.index(source)].to(self._device)
        return cache.read(batch, [source], self._device)[source]

    def _prove(self, expected: Any) -> None:
        """Compare the graph, run in segments, with the model's own output for the first batch."""
        trace, cache = self._trace, ValueCache()
        *_, output = trace.nodes
        end = len(trace.nodes)
        places = [0, *(start for start, _ in self._calls)]
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
