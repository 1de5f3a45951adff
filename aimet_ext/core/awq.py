"""AWQ's scales: input channels with large activations are rounded more finely.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
arXiv 2306.00978. The paper multiplies input column ``j`` of a weight by ``s_j = mean|x_j|^a`` and
takes the exponent of a grid with the lowest output error. That error needs the second moments of
the inputs alone, so no candidate costs a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aimet_ext.core.affine import fake_quantize, to_blocks
from aimet_ext.core.clipping import GridLayout
from aimet_ext.core.objective import row_errors

_SOME_ROWS = 96  # of a reader, that tell good candidates from bad ones


@dataclass(frozen=True, eq=False)
class ScaledReader:
    """A layer that reads the scaled channels.

    :param weight: ``[out, in]``, before scaling.
    :param layout: grid of its scaled weight.
    :param pull: linear term of its error ``[out, in]``, or None.
    :param row_weight: cost of an error of each output row, ``[out]``.
    """

    weight: Tensor
    layout: GridLayout
    pull: Tensor | None
    row_weight: Tensor

    def relative(self) -> Tensor:
        """Return the mean over rows of every weight's share of its cell's largest, ``[in]``."""
        blocks = to_blocks(self.weight, self.layout.shape).abs()  # [g0, rows, g1, columns]
        tiny = torch.finfo(blocks.dtype).tiny
        return (blocks / blocks.amax((1, 3), keepdim=True).clamp_min(tiny)).mean((0, 1)).flatten()

    def some(self) -> ScaledReader:
        """Return the reader with some of its rows only, itself where it has few."""
        step = len(self.weight) // _SOME_ROWS
        if step < 2 or not self.layout.is_row_wise(self.weight):
            return self
        weight = self.weight[::step]
        return ScaledReader(
            weight=weight,
            layout=replace(self.layout, shape=(len(weight), *self.layout.shape[1:])),
            pull=None if self.pull is None else self.pull[::step],
            row_weight=self.row_weight[::step],
        )

    def error(self, second: Tensor, columns: Tensor) -> Tensor:
        """Return ``Σ row_weight · (E H Eᵀ − 2 E · pull)`` of plain rounding, scaled, ``[]``.

        :param second: ``H [in, in]`` of the inputs before scaling.
        :param columns: multiplier of every input column, ``[in]``.
        """
        scaled = self.weight * columns
        grid = self.layout.with_scale(*self.layout.raw(*self.layout.bounds(scaled)))
        error = fake_quantize(scaled, grid).div_(columns).sub_(self.weight)
        return row_errors(error, second, self.pull) @ self.row_weight


def awq_scales(activation: Tensor, weight: Tensor | None, num_grid: int) -> Iterator[Tensor]:
    """Yield candidate scales: 1, then ``activation^a``, then ``activation^a / weight^(1 − a)``.

    For ``a = 0, 1/n, …, (n − 1)/n``, each divided by its geometric mean: a common factor cancels.
    Channels that are zero throughout get 1.

    :param activation: mean magnitude of every input channel, ``[in]``.
    :param weight: mean share of a weight of its cell's largest, ``[in]``; None for the first form
        alone.
    :param num_grid: number ``n`` of exponents.
    """
    live = activation > 0 if weight is None else (activation > 0) & (weight > 0)
    tiny = torch.finfo(activation.dtype).tiny
    logs = activation.clamp_min(tiny).log()
    for shift in (None,) if weight is None else (None, weight.clamp_min(tiny).log()):
        for step in range(num_grid):
            a = step / num_grid
            log = a * logs if shift is None else a * logs - (1 - a) * shift
            mean = log[live].mean() if bool(live.any()) else log.new_zeros(())
            yield torch.where(live, (log - mean).exp(), torch.ones_like(log))


def best_scale(
    readers: Sequence[ScaledReader],
    second: Tensor,
    columns: Tensor,
    index: Tensor,
    candidates: Iterator[Tensor],
) -> Tensor:
    """Return the candidate with the lowest error of plain rounding, of equal ones the first.

    :param readers: all layers that read the channels.
    :param second: ``H [in, in]`` of their inputs before scaling.
    :param columns: multipliers besides, that other scales give the columns, ``[in]``.
    :param index: entry of the scale that each column takes, ``[in]``.
    :param candidates: scales, at least one. Of readers with many rows, some rows tell which
        quarter of the candidates is looked at on all of them; the first one is in any case.
    """

    def errors(of: Sequence[ScaledReader], scales: Sequence[Tensor]) -> list[float]:
        return [
            sum(float(each.error(second, columns * scale[index])) for each in of)
            for scale in scales
        ]

    scales = list(candidates)
    some = [reader.some() for reader in readers]
    if any(few is not reader for few, reader in zip(some, readers, strict=True)):
        rough = torch.tensor(errors(some, scales))
        order = rough.argsort(stable=True)[: -(-len(scales) // 4)]
        scales = [scales[number] for number in sorted({0, *order.tolist()})]
    found = errors(readers, scales)
    return scales[found.index(min(found))]
