"""The use that weights make of their grids: integer codes and scales."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aimet_ext.analysis.weight_costs import stored_bits
from aimet_ext.analysis.widths_report import label
from aimet_ext.core.affine import Grid, quantize
from aimet_ext.reporting.parts import WeightUse
from aimet_ext.sim.protocol import WeightQuantizer, adapt

_COUNTED = 1 << 22  # weights of a layer whose codes are counted, at most about
_CODE_BINS, _SCALE_BINS = 64, 24
_LEVELS = 1 << 16  # codes of a grid up to which an array has room for each


@torch.no_grad()
def weight_uses(sim: Any) -> tuple[WeightUse, ...]:
    """Return the use of its grid by each weight of a simulation, tied weights once.

    Weights whose quantizer has no range yet are left out.

    :param sim: Simulation.
    """
    adaptor = adapt(sim)
    shared, found, seen = adaptor.shared_weights(), [], set[str]()
    for name, quantizer in adaptor.weight_quantizers().items():
        # Gains of norms have no rows, and next to no weights.
        weight = quantizer.weight
        if name not in seen and quantizer.initialized and weight.dim() > 1 and weight.numel():
            found.append(weight_use(name, quantizer))
            seen.update(shared.get(name, (name,)))
    return tuple(found)


def weight_use(name: str, quantizer: WeightQuantizer) -> WeightUse:
    """Return the use that the weight of a quantizer makes of its grid.

    :param name: Name of the layer.
    """
    weight = quantizer.weight.detach().flatten(1)  # [out, in]
    grid = quantizer.matrix_grid(weight.device)
    codes, levels = _codes(weight, grid), grid.qmax - grid.qmin + 1
    counted, bins = codes.numel(), min(_CODE_BINS, levels)
    used = _occurrences(codes, levels).double() / max(1, counted)
    scales, spec = grid.scale.flatten().double(), quantizer.spec()
    return WeightUse(
        name=name,
        grid=label(spec),
        bitwidth=quantizer.bitwidth,
        weights=weight.numel(),
        bits=stored_bits(spec, weight, scales.numel()),
        counted=counted,
        qmin=grid.qmin,
        qmax=grid.qmax,
        codes=tuple(torch.bincount(codes * bins // levels, minlength=bins).tolist()),
        low_edge=int((codes == 0).sum()) / max(1, counted),
        high_edge=int((codes == levels - 1).sum()) / max(1, counted),
        codes_used=len(used),
        entropy=-float((used * used.log2()).sum()) + 0.0,  # 0 and not -0
        cells=scales.numel(),
        scales=tuple(_histogram(scales.log2()).long().tolist()),
        scale_low=float(scales.min()),
        scale_median=float(scales.median()),
        scale_high=float(scales.max()),
    )


def _codes(weight: Tensor, grid: Grid) -> Tensor:
    """Return the codes of a weight ``[out, in]``, or of some of its rows, counted from 0.

    What has no code is left out: NaN, or 0 on a scale of 0.
    """
    rows = len(weight)
    step = max(1, weight.numel() // _COUNTED)
    if grid.shape[0] not in (1, rows):  # cells of several rows, which cannot be looked at alone
        step = 1
    if step > 1 and grid.shape[0] == rows:
        grid = replace(grid, scale=grid.scale[::step], offset=grid.offset[::step])
    looked_at = weight[::step].float()
    codes = quantize(looked_at, grid).flatten()
    codes = codes[codes.isfinite()].long() - grid.qmin
    return codes.clamp_(0, grid.qmax - grid.qmin)  # float32 rounds the ends of 32 bits


def _occurrences(codes: Tensor, levels: int) -> Tensor:
    """Return how often each code occurs that does."""
    if levels > _LEVELS:
        return codes.unique(return_counts=True)[1]
    counts = torch.bincount(codes)
    return counts[counts > 0]


def _histogram(logarithms: Tensor) -> Tensor:
    """Return counts of equal bins of what is finite, of one bin where all of it is alike."""
    logarithms = logarithms[logarithms.isfinite()]
    if not len(logarithms):
        return torch.tensor([0])
    low, high = logarithms.min(), logarithms.max()
    if high - low < 1e-9:
        return torch.tensor([len(logarithms)])
    return torch.histc(logarithms, _SCALE_BINS, float(low), float(high)).cpu()
