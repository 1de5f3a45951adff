"""A block as an optimisation problem: float parameters, grids, inputs and targets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aimet_ext.core.affine import (
    Grid,
    bias_scale,
    check_settled,
    fake_quantize,
    quantize,
    settled,
    short_scale,
)
from aimet_ext.core.clipping import GridLayout
from aimet_ext.core.equivalence import ScalePair, expand, powers_of_two, stored_scales, transform
from aimet_ext.core.objective import SecondMoment, squared_error
from aimet_ext.data.cache import TensorCache
from aimet_ext.data.moments import sum_moments
from aimet_ext.sim.points import Point
from aimet_ext.sim.protocol import Range, SimAdaptor, WeightQuantizer
from aimet_ext.techniques.blockwise.inputs import StageInputs
from aimet_ext.techniques.pooled import pooled_moment
from aimet_ext.walk.stream import BlockCall, BlockStream
from aimet_ext.walk.streamed import StreamedBlock

Params = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class BlockState:
    """The decisions of a technique for a block; tensors are never changed.

    :param smooth: Scale of each pair ``[pair.size]``, by the pair's name.
    :param grids: Raw scale and offset of each layer's cells, for the transformed weight. Ranges of
        layers not named are left open: they hold every weight meanwhile.
    :param codes: Integers of a layer's weight on its grid ``[out, in]``, which take its place.
        Weights of layers not named stay float, and are rounded to nearest.
    """

    smooth: Mapping[str, Tensor] = field(default_factory=dict)
    grids: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    codes: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Choice:
    """The outcome of a technique's search on a block.

    :param state: Best state that was found.
    :param kept: Way in which it was found, for the report.
    :param score: Score of the state with which the search began, see :meth:`Block.score`; None for
        plain rounding.
    """

    state: BlockState
    kept: str
    score: float | None = None


@dataclass(frozen=True, eq=False)
class Block:
    """A block of the simulation while it is worked on.

    :param number: Number of the block among the ``count`` blocks of the model.
    :param data: Inputs of the block and of its layers in the float and in the quantized model.
    :param stages: Layers to quantize, relative names, those that share an input together.
    :param quantizers: Weight quantizers of those layers.
    :param pairs: Scale pairs that were proved.
    :param exact: Names of the pairs whose scales are powers of two, as the block amplifies what
        other ones round.
    :param params: Float parameters as they were, float32 (or float64), detached.
    :param targets: Outputs of the float block on the float stream.
    :param adaptor: Adaptor of the simulation.
    :param activation_bits: Most bits of an integer activation in it, 0 where all are float.
    :param inputs: Sums over the inputs of each stage in the float model, where the technique asked
        for them.
    :param judged: Tokens that count in a score, about, in evenly spaced batches; None for all.
    :param trim: Share of the outputs that do not, those that are furthest off.
    :param quantize_activations: True to have the activation quantizers on, with static ranges that
        are calibrated anew for whatever parameters are scored, and are deployed in the end.
    :param ranges: Those ranges, by the quantizers' names.
    :param beside: Full names of its quantized matrices that are not decided with it. Its
        quantized model computes with these on their grids.
    """

    number: int
    count: int
    data: StreamedBlock
    stages: Sequence[Sequence[str]]
    quantizers: Mapping[str, WeightQuantizer]
    pairs: Sequence[ScalePair]
    exact: Collection[str]
    params: Params
    targets: TensorCache
    adaptor: SimAdaptor
    activation_bits: int
    inputs: Sequence[StageInputs] = ()
    judged: int | None = None
    trim: float = 0.0
    quantize_activations: bool = False
    ranges: dict[str, Range] = field(default_factory=dict)
    beside: Sequence[str] = ()

    @property
    def name(self) -> str:
        """Full name."""
        return self.data.name

    @property
    def module(self) -> nn.Module:
        """The simulation's own block."""
        return self.data.module

    @property
    def float_stream(self) -> BlockStream:
        """Inputs of the block in the float model."""
        return self.data.flows["float"]

    @property
    def quantized_stream(self) -> BlockStream:
        """Inputs of the block in the model quantized so far, or as if that were float."""
        return self.data.flows.get("quantized", self.float_stream)

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers to quantize, in dependency order."""
        return tuple(layer for stage in self.stages for layer in stage)

    def weight(self, layer: str) -> Tensor:
        """Return the float weight of a layer as a matrix ``[out, in]``."""
        return self.params[f"{layer}.weight"].flatten(1)

    def layout(self, layer: str) -> GridLayout:
        """Return the grid of a layer's weight as a matrix."""
        return self.quantizers[layer].layout

    def chosen(self, smooth: Mapping[str, Tensor]) -> list[tuple[ScalePair, Tensor]]:
        """Return the pairs that have a scale, with it, in the order they are folded in."""
        return [(p, self.scale(p.name, smooth)) for p in self.pairs if p.name in smooth]

    def scale(self, pair: str, smooth: Mapping[str, Tensor]) -> Tensor:
        """Return the scale of a pair as it is folded in."""
        return powers_of_two(smooth[pair]) if pair in self.exact else smooth[pair]

    def multipliers(self, layer: str, smooth: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the factors of a layer's rows ``[out]`` and columns ``[in]`` in a transform."""
        weight = self.weight(layer)
        rows, columns = weight.new_ones(weight.shape[0]), weight.new_ones(weight.shape[1])
        for pair in self.pairs:
            for side in pair.sides:
                if side.module == layer and pair.name in smooth:
                    values = self.scale(pair.name, smooth)
                    if side.axis == "out":
                        rows = rows * expand(side, values, len(rows))
                    else:
                        columns = columns * expand(side, values, len(columns))
        return rows, columns

    def quantized(
        self, smooth: Mapping[str, Tensor], quantize: Callable[[str, Tensor], Tensor]
    ) -> Params:
        """Return the block's parameters after a transform, with quantized weights; differentiable.

        :param smooth: Scale of each pair; pairs not named stay as they are.
        :param quantize: Function from a layer and its transformed weight ``[out, in]``, in the
            dtype it is stored in, to its quantized weight.
        """
        params = {**self.params, **transform(self.params, self.chosen(smooth))}
        stored = dict(self.module.named_parameters())
        params = {name: value.to(stored[name].dtype) for name, value in params.items()}
        for layer in self.layers:
            weight = params[f"{layer}.weight"]
            params[f"{layer}.weight"] = quantize(layer, weight.flatten(1)).view_as(weight)
        return params

    def state_params(self, state: BlockState) -> Params:
        """Return the block's parameters in a state, as they will be deployed."""

        def rounded(layer: str, weight: Tensor) -> Tensor:
            grid = self.grid(layer, state.grids.get(layer), weight)
            if layer in state.codes:
                return settled(state.codes[layer], grid, weight.dtype)
            return fake_quantize(weight, grid)

        with torch.no_grad():
            return self.quantized(state.smooth, rounded)

    def grid(self, layer: str, raw: tuple[Tensor, Tensor] | None, weight: Tensor) -> Grid:
        """Return the grid of a layer: the frozen one, or that of raw scales and offsets.

        :param raw: See :class:`BlockState`; None for the range that holds the weight.
        :param weight: Transformed weight ``[out, in]``.
        """
        layout, quantizer = self.layout(layer), self.quantizers[layer]
        if quantizer.frozen:
            return quantizer.matrix_grid(weight.device)
        return layout.with_scale(*(raw or layout.raw(*layout.bounds(weight))))

    def run(self, call: BlockCall, params: Params | None = None) -> Tensor:
        """Return hidden states ``[batch, seq, ..., hidden]`` of the block for a call.

        :param params: Parameters in place of the block's own.
        """
        if params is None:
            return call(self.module)
        return call(lambda *a, **k: functional_call(self.module, params, a, k))

    def score(self, params: Params | None = None) -> float:
        """Return the mean squared error of the output over the tokens that count, less ``trim``.

        :param params: Parameters to judge; None for the simulation's own block with its weight
            quantizers.
        """
        if params is not None:
            self.calibrate(params)
        total, count = 0.0, 0
        with torch.no_grad(), self.float_weights(params is not None), self.activations():
            for index in self._judged():
                call = self.quantized_stream.select(index)
                target = self.targets.read(index, self.quantized_stream.device)
                output = self.run(call, params)
                error, elements = squared_error(output, target, call.mask, self.trim)
                total, count = total + error, count + elements
        return total / max(count, 1)

    def signal(self) -> float:
        """Return the mean square of the targets, over the tokens that count."""
        total, count = 0.0, 0
        for index in self._judged():
            target, mask = self.targets[index], self.quantized_stream.mask(index)
            power, elements = squared_error(target, torch.zeros_like(target), mask)
            total, count = total + power, count + elements
        return total / max(count, 1)

    def _judged(self) -> range:
        """Return the numbers of the batches that count in a score."""
        stream = self.quantized_stream
        tokens = sum(batch * seq for batch, seq in map(stream.shape, range(len(stream))))
        return range(0, len(stream), max(1, tokens // (self.judged or tokens)))

    def moment(
        self,
        layers: Sequence[str],
        streams: Sequence[str],
        *,
        dtype: torch.dtype | None = None,
        lean_below: float = 0.0,
        also: Sequence[Callable[[Tensor, Tensor], None]] = (),
    ) -> SecondMoment:
        """Return second moments of what reaches layers of one input, with the weights decided.

        :param streams: ``"quantized"``, and ``"float"`` for ``C`` as well.
        :param dtype: Type of the result, None for that of the float parameters.
        :param lean_below: Tokens for each input below which those of an expert lean on those of
            all, as far as they are noisy.
        :param also: Functions that are given the rows of both streams too: its own, or those of
            all where it has none.
        :raises ValueError: An input holds NaN or infinity.
        """
        like = self.weight(layers[0])
        try:
            with self.adaptor.disabled_quantizers(self.name):
                total = sum_moments(
                    self.data.inputs(layers, streams),
                    self.module.get_submodule(layers[0]),
                    dtype=like.dtype,
                    mapped_dir=self.quantized_stream.hidden.cache_dir,
                    also=also,
                )
                dtype = dtype or like.dtype
                seen = total is not None and total.tokens > 0
                none = SecondMoment.of_none(like.shape[1], dtype, like)
                moment = total.result(dtype) if total is not None and seen else none
                few = moment.tokens < lean_below * like.shape[1] and moment.is_noisy
                pool = self.data.pool(layers, streams) if few else None
                if pool is not None:
                    every, among = pooled_moment(
                        pool,
                        self.module.get_submodule(layers[0]),
                        dtype=dtype,
                        mapped_dir=self.quantized_stream.hidden.cache_dir,
                        also=() if seen else also,
                    )
                    moment = moment if every is None else moment.leaning(every, among)
        except ValueError as error:
            named = ", ".join(f"{self.name}.{layer}" for layer in layers)
            raise ValueError(f"{named}: {error}") from error
        # Sums that are too large for a GPU are kept in a file.
        cross = None if moment.cross is None else moment.cross.to(like.device)
        return replace(moment, second=moment.second.to(like.device), cross=cross)

    def float_weights(self, off: bool = True) -> Any:
        """Return a context without parameter quantizers; if not ``off``, the layers keep theirs.

        Matrices beside them keep theirs either way. Those of norm gains are off: a transform has
        made their ranges wrong.
        """
        kept = [*self.beside, *(() if off else (f"{self.name}.{layer}" for layer in self.layers))]
        return self.adaptor.disabled_quantizers(self.name, activations=False, keep=kept)

    def activations(self) -> Any:
        """Return a context that turns the activation quantizers off, or gives them the ranges."""
        if self.quantize_activations:
            return self.adaptor.with_ranges(self.name, self.ranges)
        return self.adaptor.disabled_quantizers(self.name, weights=False)

    @torch.no_grad()
    def calibrate(self, params: Params) -> None:
        """Set the static ranges of activations for these parameters, if activations count.

        Ranges hold all that the quantized stream brings; those that were frozen before stay.
        """
        if not self.quantize_activations:
            return

        def run() -> None:
            for index in self._judged():
                self.run(self.quantized_stream.select(index), params)

        seen = self.adaptor.tensor_ranges(self.name, run)
        for name, point in self.points.items():
            if point.frozen and point.low is not None and point.high is not None:
                self.ranges[name] = (point.low, point.high)
            elif name in seen:
                self.ranges[name] = point.covering(seen[name])

    @cached_property
    def points(self) -> dict[str, Point]:
        """Quantizers of activations by name, as they were before the block was worked on."""
        own = self.adaptor.activation_quantizers(self.name)
        return {point.place: point for point in self.adaptor.points(own).values()}

    def nearest(self, *, rounded: bool = False) -> BlockState:
        """Return plain rounding of the original weights on their full, or frozen, ranges.

        :param rounded: True for weights that are replaced by their integers.
        """
        grids, codes = {}, {}
        for layer in self.layers:
            layout = self.layout(layer)
            stored = self.weight(layer).to(self.quantizers[layer].weight.dtype)
            scale, offset = grids[layer] = layout.raw(*layout.bounds(stored.float()))
            if rounded:
                grid = self.grid(layer, (self.deployable(layer, scale), offset), stored)
                grids[layer], codes[layer] = (grid.scale, grid.offset), quantize(stored, grid)
        return BlockState({}, grids, codes)

    def deployable(self, layer: str, scale: Tensor) -> Tensor:
        """Return raw scales that a simulation gives back, and with which the bias fits int32."""
        least = self._least.get(layer)
        if least is not None and scale.shape[1] == 1:
            least = least.to(scale)
            scale = torch.maximum(scale, least if len(scale) == len(least) else least.max())
        return short_scale(scale.float())

    @torch.no_grad()
    def as_stored(self, state: BlockState) -> BlockState:
        """Return a state with the scales that its norms carry once their gains are stored."""
        pairs = self.chosen(state.smooth)
        dtypes = {name: value.dtype for name, value in self.module.named_parameters()}
        stored = stored_scales(self.params, pairs, dtypes)
        return replace(
            state,
            smooth={
                pair.name: given if pair.name in self.exact else scale
                for (pair, given), scale in zip(pairs, stored, strict=True)
            },
        )

    @torch.no_grad()
    def deploy(self, state: BlockState) -> None:
        """Fold a state's scales into the weights and set the quantizers.

        Weights that the state leaves open get ranges that hold them; with all open, so are the
        ranges of activations. Integers are put on the grid that the simulation gives back.
        """
        least = {}
        if state.grids and not state.codes:
            least = self._bias_scales(self.quantized(state.smooth, lambda _, weight: weight))
        for layer, (scale, offset) in state.grids.items():
            quantizer = self.quantizers[layer]
            symmetric = quantizer.layout.symmetric
            if layer in least and scale.shape == least[layer].shape:
                scale = torch.maximum(scale, least[layer].to(scale))
            if not quantizer.frozen:
                quantizer.set_scale(scale.float(), None if symmetric else offset.float())
        changed = transform(self.params, self.chosen(state.smooth))
        for layer, codes in state.codes.items():
            stored = self.quantizers[layer].weight
            grid = self.quantizers[layer].matrix_grid(codes.device)
            values = settled(codes, grid, stored.dtype)
            check_settled(f"{self.name}.{layer}", values, grid)
            changed[f"{layer}.weight"] = values.view(stored.shape)
        for name, parameter in self.module.named_parameters():
            if name in self.params:
                parameter.copy_(changed.get(name, self.params[name]))
        self.adaptor.commit(self.name)
        for layer, quantizer in self.quantizers.items():
            if layer not in state.grids and not quantizer.frozen:
                quantizer.calibrate()
        self.calibrate(self.state_params(state))
        for name, bounds in self.ranges.items() if state.grids else ():
            if not self.points[name].frozen:
                self.adaptor.write_range(self.points[name], *bounds)

    def take_ranges(self) -> None:
        """Take the ranges of activations from the simulation, where they are deployed."""
        if self.quantize_activations:
            for point in self.adaptor.points(self.points).values():
                if point.low is not None and point.high is not None:
                    self.ranges[point.place] = (point.low, point.high)

    @cached_property
    def _least(self) -> dict[str, Tensor]:
        """Smallest scales for the biases of the float block."""
        return self._bias_scales(self.quantized({}, lambda _, weight: weight))

    def _bias_scales(self, params: Params) -> dict[str, Tensor]:
        """Return the smallest scales ``[out, 1]`` with which each layer's bias fits int32.

        :param params: Float parameters of the block, transformed.
        """
        bits, peaks = self.activation_bits, dict[str, float]()
        found = {layer: params.get(f"{layer}.bias") for layer in self.layers if bits}
        biases = {n: bias for n, bias in found.items() if bias is not None and bool(bias.any())}
        if not biases:
            return {}

        def watch(layer: str) -> Any:
            def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                peaks[layer] = max(peaks.get(layer, 0.0), float(args[0].abs().max()))

            return self.module.get_submodule(layer).register_forward_pre_hook(note)

        hooks = [watch(layer) for layer in biases]
        try:
            replace(self, judged=None).score(params)
        finally:
            for hook in hooks:
                hook.remove()
        return {
            layer: bias_scale(bias, peaks.get(layer, 0.0), 2**bits - 1)[:, None]
            for layer, bias in biases.items()
        }
