"""The search for a block's scales and ranges, by coordinate descent on second moments.

Each stage is searched after the stages before it are quantized, on the inputs that then reach it.
Weights stay untransformed here: with the multiplier ``m`` of its input columns a layer computes
``fq(W diag(m)) diag(1/m)``, which is what the transformed block computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from aimet_ext.core.affine import fake_quantize
from aimet_ext.core.awq import ScaledReader, awq_scales, best_scale
from aimet_ext.core.clipping import GridLayout, search_ranges
from aimet_ext.core.equivalence import (
    Reader,
    candidate_multipliers,
    search_smoothing,
)
from aimet_ext.core.objective import SecondMoment, row_errors
from aimet_ext.data.geometry import Geometry
from aimet_ext.techniques.blockwise.block import Block, BlockState
from aimet_ext.techniques.blockwise.inputs import Magnitudes, StageInputs
from aimet_ext.techniques.blockwise.pairs import ReadPair, read_pairs
from aimet_ext.walk.streamed import fit_mask

# Tokens of an expert for each input, below which those of all experts decide. With more of them its
# layers' errors fall as well, but the model's do not: its own tokens tell what errors upstream do.
_FEW_AN_INPUT = 0.25
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
            seen = (first[0].moment, first[0].sizes) if known else self._moment(layers)
            stage = _Stage(self.block, tuple(layers), *seen, self.importance, self.clip)
            stage.search(smooth, sweeps)
            for layer, weight in stage.effective(smooth).items():
                data.decide(layer, weight)
            self.stages.append(stage)
        data.restart()
        return self._state(smooth)

    @property
    def scarce(self) -> frozenset[str]:
        """Layers of experts that saw so few tokens that training would fit these alone."""
        return frozenset(
            layer for stage in self.stages for layer in stage.layers if stage.moment.leaned
        )

    def seeing(self, inputs: Sequence[StageInputs]) -> BlockSearch:
        """Take what was seen of the float model's inputs, stage by stage, to search on.

        :raises ValueError: they hold NaN or infinity.
        """
        for layers, seen in zip(self.block.stages, inputs, strict=True):
            moment = seen.moment(self.block.weight(layers[0]))
            sizes = seen.magnitudes
            self.stages.append(
                _Stage(self.block, tuple(layers), moment, sizes, self.importance, self.clip)
            )
        return self

    def _moment(self, layers: Sequence[str]) -> tuple[SecondMoment, Magnitudes]:
        """Return ``H`` and ``C`` of what reaches layers now, and its magnitudes.

        Those of an expert that few tokens reach lean on those of all, and are shrunk.
        """
        streams = ("quantized", "float") if self.float_target else ("quantized",)
        sizes = Magnitudes()
        moment = self.block.moment(layers, streams, lean_below=_FEW_AN_INPUT, also=[sizes.add])
        return moment.shrunk() if moment.leaned else moment, sizes

    @torch.no_grad()
    def ranges(self, start: Mapping[str, Tensor]) -> BlockState:
        """Choose ranges alone for these scales, on the moments that were seen."""
        smooth = self._scales(start)
        for stage in self.stages:
            stage.search(smooth, sweeps=0)
        return self._state(smooth)

    def smoothquant(self, alpha: float) -> dict[str, Tensor]:
        """Scale of each pair by SmoothQuant's formula, on the inputs that were seen."""
        scales = {}
        for stage in self.stages:
            for read in read_pairs(self.block, stage.layers):
                scales[read.pair.name] = read.smoothquant(stage.sizes.peak, alpha)
        return scales

    def awq(self, num_grid: int, duo_scaling: bool) -> dict[str, Tensor]:
        """Scale of each pair by AWQ's grid of exponents, on the inputs that were seen.

        :param duo_scaling: True to try candidates that weigh the weights as well.
        """
        scales = self._scales(None)
        for stage in self.stages:
            for read in read_pairs(self.block, stage.layers):
                scales[read.pair.name] = stage.awq(read, scales, num_grid, duo_scaling)
        return scales

    def clipped(self, smooth: Mapping[str, Tensor], num_grid: int) -> BlockState:
        """Clip ranges by AWQ's grid of shares, from 1 down to half, on the inputs that were seen.

        :param num_grid: Steps of the grid from 1 down to 0.
        """
        scales = self._scales(smooth)
        like = next(iter(scales.values()), torch.ones(()))
        shares = 1 - torch.arange(num_grid // 2 + 1).to(like) / num_grid
        for stage in self.stages:
            replace(stage, shares=shares).search(scales, sweeps=0)
        return self._state(scales)

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
    sizes: Magnitudes  # of input channels
    importance: Mapping[str, Tensor]
    clip: bool
    shares: Tensor | None = None  # of the full range that are tried, None for the usual ones

    # Of weights with their columns multiplied, rows as they were.
    grids: Grids = field(default_factory=dict)

    def search(self, smooth: dict[str, Tensor], sweeps: int) -> None:
        """Choose ranges, then scales and ranges in turn while that pays; changes ``smooth``."""
        self._choose_ranges(smooth, fresh=True)
        pairs = read_pairs(self.block, self.layers)
        if not pairs or sweeps == 0:
            return
        error = self._error(smooth)
        for _ in range(sweeps):
            for read in pairs:
                self._choose_smoothing(read, smooth)
            self._choose_ranges(smooth, fresh=False)
            before, error = error, self._error(smooth)
            if before - error < _LEAST_GAIN * abs(before):
                break

    def awq(
        self, read: ReadPair, smooth: Mapping[str, Tensor], num_grid: int, duo_scaling: bool
    ) -> Tensor:
        """Return the best scale for a pair by AWQ's grid, all other scales as they are."""
        readers = [
            ScaledReader(
                weight=(weight := self.block.weight(layer)),
                layout=self.block.layout(layer),
                pull=self.moment.pull(weight),
                row_weight=self.importance[layer],
            )
            for layer in read.readers
        ]
        size = read.by_entry(self.sizes.mean.to(readers[0].weight), "mean")
        relative = None
        if duo_scaling:
            rows = [len(reader.weight) for reader in readers]
            shares = [n * reader.relative() for n, reader in zip(rows, readers, strict=True)]
            relative = read.by_entry(torch.stack(shares).sum(0) / sum(rows), "mean")
        columns = self._columns(read.readers[0], smooth)
        candidates = awq_scales(size, relative, num_grid)
        return best_scale(readers, self.moment.second, columns, read.index, candidates)

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
            shares=self.shares,
            start=start,
        )

    def _choose_smoothing(self, read: ReadPair, smooth: dict[str, Tensor]) -> None:
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
        groups, name = read.groups, read.pair.name
        found = search_smoothing(
            readers,
            self.moment.second,
            columns,
            groups,
            candidate_multipliers(columns, _MULTIPLIERS, _REACH),
        )
        first = torch.stack([group[0] for group in groups])
        smooth[name] = self.block.scale(name, smooth) * (found / columns)[first]


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

    totals = {
        layer: block.weight(layer).new_zeros(len(block.weight(layer))) for layer in block.layers
    }
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
