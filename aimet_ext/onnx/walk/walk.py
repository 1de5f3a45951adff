"""Walking an ONNX graph from layer to layer, each node computed once in each stream."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from aimet_ext.data.batches import TARGET_IDS, TARGET_MASK, token_mask
from aimet_ext.data.cache import ValueCache
from aimet_ext.data.feeds import check_inputs
from aimet_ext.onnx.graph import OnnxGraph, Part
from aimet_ext.onnx.layers import OnnxLayer, weight_shape
from aimet_ext.onnx.values import input_specs
from aimet_ext.onnx.walk.schedule import PlannedStage, Section, plan_stages, plan_transitions
from aimet_ext.walk.order import LayerOrder
from aimet_ext.walk.walk import StagedWalk, Streams

_COMMON = "common"
_TOKENS = ("input_ids", "inputs_embeds")


class OnnxWalk(StagedWalk):
    """A walk that runs parts of a graph in onnxruntime, each node once per stream and batch.

    Between two stages, only values that a later node reads are kept; see
    :mod:`.schedule`. A session holds the weights of its part and lives as long as
    that runs. See :class:`aimet_ext.walk.walk.Walk`. Quantizers are seen through.

    A layer whose weight several nodes apply has its stage at the first of them. The stage then
    gives, for each batch, the inputs of all of them in turn, the later ones as the weights are now.

    :param graph: whose stored weights the float stream uses, unless they are held.
    :param layers: all layers of the graph by name, and other weights that ``effective`` holds.
    :param shells: the module that stands for each layer.
    :param batches: inputs of the graph by name, see
        :func:`aimet_ext.data.feeds.named_batches`. A 2-D ``attention_mask`` among them says
        which tokens count.
    :param names: the layers to walk to, linear layers and convolutions.
    :param streams: streams of inputs that the layers' stages give.
    :param effective: weights that the quantized stream uses from the start, by layer's name; each
        is asked for once, when it is reached.
    :param cache_dir: folder for memory-mapped caches; None keeps them in RAM.
    :param device: where the layers' inputs are handed out, the CPU if None.
    :param providers: onnxruntime's providers, the CPU's if None.
    :raises ValueError: a layer is unknown, named twice, or followed by a batch norm that was not
        folded; there are no batches, or one does not fit the graph's inputs.
    :raises TypeError: a layer is neither linear nor a convolution.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        layers: Mapping[str, OnnxLayer],
        shells: Mapping[str, nn.Module],
        batches: Sequence[Mapping[str, Tensor]],
        names: Sequence[str],
        *,
        streams: Streams = "quantized",
        effective: Mapping[str, Tensor] | None = None,
        cache_dir: str | Path | None = None,
        device: torch.device | str | None = None,
        providers: Sequence[Any] | None = None,
    ) -> None:
        _check_names(names, layers, "names")
        if not len(batches):
            raise ValueError("batches must hold at least one, got none; pass calibration data")
        specs = input_specs(graph.inputs)
        for number, batch in enumerate(batches):
            check_inputs(batch, specs, number)
        super().__init__({name: shells[name] for name in names}, streams, effective)
        self._graph, self._all = graph, layers
        self._batches = batches
        self._device = torch.device("cpu" if device is None else device)
        self._providers = providers
        _check_names(list(self._effective), layers, "effective")
        # Weights take the place of the stored ones until their last use.
        self._streams = tuple(self._weights)
        lanes = (_COMMON, *self._streams) if streams == "both" else self._streams
        self._caches = {lane: ValueCache(cache_dir) for lane in lanes}
        # Where a kept tensor is: in the common cache, or in that of each stream.
        self._common: set[str] = set()
        self._held: dict[str, set[str]] = {lane: set() for lane in lanes}
        self._stages = plan_stages(graph, layers, shells, names)
        reached = _reached(graph, TARGET_IDS)
        self._target = {n for s in self._stages if s.source in reached for n in s.layers}
        changed = {*names, *self._effective} if streams == "both" else None
        self._transitions = plan_transitions(graph, layers, self._stages, changed)
        self._order = LayerOrder(
            stages=[stage.layers for stage in self._stages],
            activations={n: relu for s in self._stages for n, relu in s.activations.items()},
        )
        self._open: frozenset[int] = frozenset()
        self._later: list[str] = []
        self._segments = 0
        self._peak = 0

    @property
    def cost(self) -> dict[str, Any]:
        """Runs of a part of the model so far, and the most bytes that were kept between them.

        ``later_uses`` are layers whose later uses had to be run ahead for their stage.
        """
        cost = {"walk": "onnx", "segments": self._segments, "peak_cached_bytes": self._peak}
        return {**cost, "later_uses": self._later} if self._later else cost

    def close(self) -> None:
        """Drop all caches."""
        super().close()
        for cache in self._caches.values():
            cache.close()

    def _checked(self, layer: str, weight: Tensor) -> Tensor:
        """Return a weight on the CPU, in the type of the stored one."""
        stored = self._all[layer]
        shape = weight_shape(self._graph, stored)
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"the weight of {layer!r} must be of shape {list(shape)}, got {list(weight.shape)}"
            )
        return weight.detach().to("cpu", self._graph.tensor_dtype(stored.weight))

    def _is_used(self, layer: str) -> bool:
        return any(use.node in self._open for use in self._all[layer].uses)

    def _advance(self, number: int) -> None:
        stage, transition = self._stages[number], self._transitions[number]
        self._open = transition.open
        self._run_sections(transition.sections, transition.keep)
        if stage.later:
            self._run_sections(transition.later, {*transition.keep, *stage.later})
            self._later += stage.layers

    def _run_sections(self, sections: Sequence[Section], keep: Collection[str]) -> None:
        """Run sections for all batches, and keep nothing else than these tensors."""
        runs = [
            (section, lane)
            for section in sections
            for lane in ((_COMMON,) if section.common else self._streams)
        ]
        wanted = [{(self._lane(n, lane), n) for n in s.inputs} for s, lane in runs]
        self._drop_but(keep, wanted)
        for number, (section, lane) in enumerate(runs):
            if section.common:
                self._common |= {*section.outputs}
            rest: set[tuple[str, str]] = set().union(*wanted[number + 1 :])
            gone = [(at, n) for at, n in wanted[number] - rest if n not in keep]
            self._run(section, lane, gone)
            self._drop_weights([section.nodes for section, _ in runs[number + 1 :]])
        self._drop_weights(())
        self._drop_but(keep, ())

    def _drop_weights(self, sections: Iterable[Collection[int]]) -> None:
        """Forget the weights that neither these sections nor later steps use."""
        nodes: set[int] = set().union(*sections)
        for weights in self._weights.values():
            for name in [name for name in weights if not self._is_used(name)]:
                if nodes.isdisjoint(use.node for use in self._all[name].uses):
                    del weights[name]

    def _drop_but(self, keep: Collection[str], wanted: Iterable[set[tuple[str, str]]]) -> None:
        """Forget all values but those to keep and those that are going to be read."""
        read = set().union(*wanted)
        for lane, held in self._held.items():
            gone = {name for name in held if name not in keep and (lane, name) not in read}
            for batch in range(len(self._batches)):
                self._caches[lane].drop(batch, gone)
            held -= gone

    def _run(self, section: Section, lane: str, gone: Sequence[tuple[str, str]]) -> None:
        """Run a section for all batches, each time forgetting what is read for the last time."""
        weights = self._weights.get(lane, {})
        if lane == "quantized":
            nodes = section.nodes
            self._load_effective(lambda n: any(use.node in nodes for use in self._all[n].uses))
        part = Part(
            self._graph,
            section.nodes,
            section.inputs,
            section.outputs,
            layers=self._all,
            weights=weights,
            providers=self._providers,
        )
        for number in range(len(self._batches)):
            values = {name: self._value(name, lane, number) for name in section.inputs}
            try:
                found = part.run(values)
            except Exception as error:
                raise RuntimeError(
                    f"the model failed on batch {number} with {type(error).__name__}: {error}"
                ) from error
            for at, name in gone:
                if at in self._caches:
                    self._caches[at].drop(number, [name])
            self._caches[lane].put(number, found)
            self._peak = max(self._peak, sum(cache.bytes for cache in self._caches.values()))
        for at, name in gone:
            self._held.get(at, set()).discard(name)
        self._held[lane] |= {*section.outputs}
        self._segments += 1

    def _lane(self, tensor: str, lane: str) -> str:
        """Return the cache that holds a tensor for a stream; empty for an input of the graph."""
        if tensor in self._graph.inputs:
            return ""
        return _COMMON if tensor in self._common else lane

    def _value(self, tensor: str, lane: str, batch: int) -> Tensor:
        at = self._lane(tensor, lane)
        if not at:
            return self._batches[batch][tensor]
        found: Tensor = self._caches[at].read(batch, [tensor])[tensor]
        return found

    def _seen(self, number: int, batch: int) -> Iterator[Mapping[str, Tensor]]:
        stage = self._stages[number]
        for source in (stage.source, *stage.later):
            lanes = {stream: self._lane(source, stream) for stream in self._streams}
            places = dict.fromkeys(lanes.values())
            found = {at: self._input(stage, source, at, batch) for at in places}
            yield {stream: found[at] for stream, at in lanes.items()}

    def _input(self, stage: PlannedStage, source: str, lane: str, batch: int) -> Tensor:
        x = self._value(source, lane, batch).to(self._device)
        if not stage.padded:
            return x
        return functional.pad(x, padding(self._all[stage.layers[0]], x.shape))

    def _mask(self, batch: int, layer: str) -> Tensor | None:
        """Return which new tokens of a batch count: a mask may cover cached ones too."""
        inputs, is_target = self._batches[batch], layer in self._target
        mask = token_mask(inputs, None, TARGET_MASK) if is_target else token_mask(inputs)
        if mask is None:
            return None
        names = (TARGET_IDS,) if is_target else _TOKENS
        tokens = next((inputs[n] for n in names if n in inputs and inputs[n].dim() > 1), mask)
        return mask[:, -tokens.shape[1] :]


def _reached(graph: OnnxGraph, name: str) -> set[str]:
    """Return the tensors that are computed of one, itself among them."""
    reached = {name}
    for node in graph.nodes:  # in the order of their execution
        if not reached.isdisjoint(node.input):
            reached.update(node.output)
    return reached


def padding(layer: OnnxLayer, shape: Sequence[int]) -> list[int]:
    """Return a convolution's padding for an input of this shape, as torch's ``pad`` takes it."""
    half = len(layer.kernel)
    begins, ends = list(layer.pads[:half]), list(layer.pads[half:])
    if layer.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        settings = zip(shape[2:], layer.kernel, layer.strides, layer.dilations, strict=True)
        for place, (size, kernel, stride, dilation) in enumerate(settings):
            last = (-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1
            total = max(0, last - size)
            less, more = total // 2, total - total // 2
            upper = layer.auto_pad == "SAME_UPPER"
            begins[place], ends[place] = (less, more) if upper else (more, less)
    sides = zip(reversed(begins), reversed(ends), strict=True)
    return [amount for side in sides for amount in side]


def _check_names(names: Iterable[str], layers: Mapping[str, OnnxLayer], parameter: str) -> None:
    """Refuse layers that are unknown or named twice."""
    seen: set[str] = set()
    for name in names:
        if name not in layers:
            raise ValueError(
                f"{parameter} must name layers of the graph, got {name!r}; it has "
                f"{', '.join(map(repr, [*layers][:4]))}{' …' if len(layers) > 4 else ''}"
            )
        if name in seen:
            raise ValueError(f"{parameter} must name each layer once, {name!r} is there twice")
        seen.add(name)
