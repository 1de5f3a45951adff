"""The search for a block's scales and ranges, by coordinate descent on second moments.

Each stage is searched after the stages before it are quantized, on the inputs that then reach it.
Weights stay untransformed here: with the multiplier ``m`` of its input columns a layer computes
``fq(W diag(m)) diag(1/m)``, which is what the transformed block computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from aimet_ext.core.affine import fake_quantize
from aimet_ext.core.clipping import GridLayout, search_ranges
from aimet_ext.core.equivalence import (
    Reader,
    ScalePair,
    candidate_multipliers,
    search_smoothing,
    smoothquant_scale,
)
from aimet_ext.core.objective import SecondMoment, row_errors
from aimet_ext.data.moments import Geometry, sum_moments
from aimet_ext.techniques.blockwise.block import Block, BlockState
from aimet_ext.walk.streamed import fit_mask

_REACH = 1.5  # of a candidate multiplier, either way
_MULTIPLIERS = 24
_LEAST_GAIN = 1e-3  # relative, of a sweep, to go on
_PROBE_BATCHES = 4  # for the weight of output rows

Grids = dict[str, tuple[Tensor, Tensor]]


class BlockSearch:
    """The search on one block.

    :param clip: True to choose ranges; if false they hold every weight.
    :param float_target: True to search against the float stream, see :class:`SecondMoment`.
    """

    def __init__(self, block: Block, *, clip: bool = True, float_target: bool = True) -> None:
        self.block = block
        self.clip = clip
        self.float_target = float_target
        self.importance = _row_importance(block)
        self.stages: list[_Stage] = []

    @torch.no_grad()
    def run(self, start: Mapping[str, Tensor] | None = None, *, sweeps: int) -> BlockState:
        """Choose scales and ranges that lower every stage's output error, from a start.

        :param start: Scale of each pair; 1 for those not named.
        :param sweeps: Number of sweeps over the columns and the ranges of a stage; 0 leaves the
            scales as they are and chooses the ranges alone.
        """
        smooth, data = self._scales(start), self.block.data
        first = self.stages[:1]  # what reaches the first layers does not depend on decisions
        data.restart()
        self.stages = []
        for number, layers in enumerate(self.block.stages):
            known = number == 0 and first
            moment, peak = (first[0].moment, first[0].peak) if known else self._moment(layers)
            stage = _Stage(self.block, tuple(layers), moment, peak, self.importance, self.clip)
            stage.search(smooth, sweeps)
            for layer, weight in stage.effective(smooth).items():
                data.decide(layer, weight)
            self.stages.append(stage)
        data.restart()
        return self._state(smooth)

    def _moment(self, layers: Sequence[str]) -> tuple[SecondMoment, Tensor]:
        """Return ``H`` and ``C`` of what reaches layers now, and its peaks ``[in]``."""
        block, like = self.block, self.block.weight(layers[0])
        streams = ("quantized", "float") if self.float_target else ("quantized",)
        try:
            with block.adaptor.disabled_quantizers(block.name):
                total = sum_moments(
                    block.data.inputs(layers, streams),
                    block.module.get_submodule(layers[0]),
                    dtype=like.dtype,
                    mapped_dir=block.quantized_stream.hidden.cache_dir,
                )
            assert total is not None, "a run without batches"
            moment = total.result(like.dtype)
        except ValueError as error:
            named = ", ".join(f"{block.name}.{layer}" for layer in layers)
            raise ValueError(f"{named}: {error}") from error
        # Sums that are too large for a GPU are kept in a file.
        cross = None if moment.cross is None else moment.cross.to(like.device)
        return SecondMoment(moment.second.to(like.device), cross, moment.tokens), total.peak

    @torch.no_grad()
    def ranges(self, start: Mapping[str, Tensor]) -> BlockState:
        """Choose ranges alone for these scales, on the moments that :meth:`run` saw."""
        smooth = self._scales(start)
        for stage in self.stages:
            stage.search(smooth, sweeps=0)
        return self._state(smooth)

    def smoothquant(self, alpha: float) -> dict[str, Tensor]:
        """Scale of each pair by SmoothQuant's formula, on the inputs that :meth:`run` saw."""
        scales = {}
        for stage in self.stages:
            for pair, groups in stage.pairs():
                readers = [layer for layer in stage.layers if _reads(pair, layer)]
                weight = torch.stack([self.block.weight(r).abs().amax(0) for r in readers]).amax(0)
                scales[pair.name] = smoothquant_scale(
                    torch.stack([stage.peak[group].amax() for group in groups]),
                    torch.stack([weight[group].amax() for group in groups]),
                    alpha,
                )
        return scales

    def _scales(self, start: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        like = next(iter(self.block.params.values()))
        scales = {pair.name: like.new_ones(pair.size) for pair in self.block.pairs}
        scales.update({name: scale.clone() for name, scale in (start or {}).items()})
        return scales

    def _state(self, smooth: dict[str, Tensor]) -> BlockState:
        grids: Grids = {}
        for stage in self.stages:
            grids.update(stage.deployed(smooth))
        return BlockState(smooth, grids)


@dataclass(frozen=True, eq=False)
class _Stage:
    """Layers that read one input, and what their output error depends on."""

    block: Block
    layers: tuple[str, ...]
    moment: SecondMoment
    peak: Tensor  # largest magnitude of each input channel, [in]
    importance: Mapping[str, Tensor]
    clip: bool

    # Of weights with their columns multiplied, rows as they were.
    grids: Grids = field(default_factory=dict)

    def search(self, smooth: dict[str, Tensor], sweeps: int) -> None:
        """Choose ranges, then scales and ranges in turn while that pays; changes ``smooth``."""
        self._choose_ranges(smooth, fresh=True)
        pairs = self.pairs()
        if not pairs or sweeps == 0:
            return
        error = self._error(smooth)
        for _ in range(sweeps):
            for pair, groups in pairs:
                self._choose_smoothing(pair, groups, smooth)
            self._choose_ranges(smooth, fresh=False)
            before, error = error, self._error(smooth)
            if before - error < _LEAST_GAIN * abs(before):
                break

    def effective(self, smooth: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the quantized weights as the untransformed block sees them, by layer."""
        return {
            layer: self._quantized(layer, smooth).view_as(self.block.params[f"{layer}.weight"])
            for layer in self.layers
        }

    def deployed(self, smooth: Mapping[str, Tensor]) -> Grids:
        """Return raw scales and offsets for the weights with their rows multiplied as well."""
        result = {}
        for layer in self.layers:
            rows, columns = self.block.multipliers(layer, smooth)
            layout = self.block.layout(layer)
            scale, offset = self.grids[layer]
            if layout.is_row_wise(self.block.weight(layer)):
                result[layer] = (scale * rows.abs()[:, None], offset)
            elif bool((rows != 1).any()):
                weight = self.block.weight(layer) * rows[:, None]
                result[layer] = self._ranges_of(layer, weight, columns, rows, None)
            else:
                result[layer] = (scale, offset)
        return result

    def pairs(self) -> list[tuple[ScalePair, list[Tensor]]]:
        """Scale pairs that this stage reads, with the columns that take each entry."""
        found = []
        for pair in self.block.pairs:
            groups = _groups(self.block, pair, [n for n in self.layers if _reads(pair, n)])
            if groups is not None:
                found.append((pair, groups))
        return found

    def _columns(self, layer: str, smooth: Mapping[str, Tensor]) -> Tensor:
        return self.block.multipliers(layer, smooth)[1]

    def _quantized(self, layer: str, smooth: Mapping[str, Tensor]) -> Tensor:
        columns = self._columns(layer, smooth)
        grid = self.block.layout(layer).with_scale(*self.grids[layer])
        return fake_quantize(self.block.weight(layer) * columns, grid) / columns

    def _error(self, smooth: Mapping[str, Tensor]) -> float:
        total = 0.0
        for layer in self.layers:
            weight = self.block.weight(layer)
            error = self._quantized(layer, smooth) - weight
            rows = row_errors(error, self.moment.second, self.moment.pull(weight))
            total += float((rows * self.importance[layer]).sum())
        return total

    def _choose_ranges(self, smooth: Mapping[str, Tensor], *, fresh: bool) -> None:
        for layer in self.layers:
            start = None if fresh else self.grids[layer]
            weight = self.block.weight(layer)
            columns = self._columns(layer, smooth)
            rows = weight.new_ones(weight.shape[0])
            self.grids[layer] = self._ranges_of(layer, weight, columns, rows, start)

    def _ranges_of(
        self,
        layer: str,
        weight: Tensor,
        columns: Tensor,
        rows: Tensor,
        start: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        layout: GridLayout = self.block.layout(layer)
        if not self.clip:
            return layout.raw(*layout.bounds(weight * columns))
        return search_ranges(
            weight,
            layout,
            self.moment.second,
            self.moment.pull(weight),
            smooth=columns,
            row_weight=self.importance[layer] / rows.square(),
            start=start,
        )

    def _choose_smoothing(
        self, pair: ScalePair, groups: list[Tensor], smooth: dict[str, Tensor]
    ) -> None:
        readers = []
        for layer in self.layers:
            weight = self.block.weight(layer)
            readers.append(
                Reader(
                    weight=weight,
                    grid=self.block.layout(layer).with_scale(*self.grids[layer]),
                    pull=self.moment.pull(weight),
                    row_weight=self.importance[layer],
                )
            )
        columns = self._columns(self.layers[0], smooth)
        found = search_smoothing(
            readers,
            self.moment.second,
            columns,
            groups,
            candidate_multipliers(columns, _MULTIPLIERS, _REACH),
        )
        first = torch.stack([group[0] for group in groups])
        smooth[pair.name] = smooth[pair.name] * (found / columns)[first]


def _reads(pair: ScalePair, layer: str) -> bool:
    return any(side.axis == "in" and side.module == layer for side in pair.sides)


def _groups(block: Block, pair: ScalePair, readers: list[str]) -> list[Tensor] | None:
    """Return the columns that take each entry of a pair's scale; None unless readers agree."""
    indices = []
    for side in pair.sides:
        if side.axis == "in" and side.module in readers:
            width = block.weight(side.module).shape[1]
            if side.rows is not None and side.rows != (0, width):
                return None
            device = block.weight(side.module).device
            index = torch.arange(width) if side.index is None else side.index
            indices.append(index.to(device))
    if not indices or any(not torch.equal(indices[0], other) for other in indices[1:]):
        return None
    order = torch.argsort(indices[0], stable=True)
    counts = torch.bincount(indices[0], minlength=pair.size)
    return list(order.split(counts.tolist()))


@torch.enable_grad()
def _row_importance(block: Block) -> dict[str, Tensor]:
    """Return the mean squared gradient of a random projection of the output, by row ``[out]``.

    The diagonal of the Gauss-Newton matrix of the block's error in each layer's output.
    """
    outputs: dict[str, Tensor] = {}

    def keep(layer: str) -> object:
        def hook(_: nn.Module, args: object, output: Tensor) -> None:
            output.retain_grad()
            outputs[layer] = output

        return block.module.get_submodule(layer).register_forward_hook(hook)

    totals = {layer: block.weight(layer).new_zeros(()) for layer in block.layers}
    generator = torch.Generator().manual_seed(0)
    hooks = [keep(layer) for layer in block.layers]
    try:
        with block.adaptor.disabled_quantizers(block.name):
            for index in range(min(_PROBE_BATCHES, len(block.float_stream))):
                call = block.float_stream.select(index)
                traced = call.with_hidden(call.hidden.detach().requires_grad_())
                result = traced(block.module)[call.mask]  # [tokens, hidden]
                probe = torch.randn(result.shape, generator=generator).to(result)
                (result * probe).sum().backward()
                for layer, output in outputs.items():
                    gradient = output.grad
                    if gradient is not None:
                        wide = torch.promote_types(gradient.dtype, torch.float32)
                        module = block.module.get_submodule(layer)
                        mask = fit_mask(call.mask, gradient, Geometry.of(module))
                        rows = gradient if mask is None else gradient[mask]
                        power = rows.flatten(0, -2).to(wide).square().mean(0)  # [out]
                        totals[layer] = totals[layer] + power
    finally:
        for hook in hooks:
            hook.remove()  # type: ignore[attr-defined]
        block.module.zero_grad(set_to_none=True)
    mean = {}
    for stage in block.stages:
        average = torch.cat([totals[layer] for layer in stage]).mean().clamp_min(1e-30)
        for layer in stage:
            mean[layer] = totals[layer] / average + 1e-6
    return mean
