"""Range searches as AIMET does them: every candidate multiplied with every token, cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from search_reference import quantized_by_loop
from torch import Tensor

from aimet_ext.core.affine import fake_quantize
from aimet_ext.core.clipping import GridLayout
from aimet_ext.core.objective import moment_product, row_errors


@dataclass
class Problem:
    """A weight and its inputs.

    :param weight: ``[out, in]``, heavy-tailed.
    :param rows: tokens of the quantized stream ``[groups, tokens, in]``, whose channels differ in
        size and hang together.
    :param originals: the same of the float stream.
    """

    weight: Tensor
    rows: Tensor
    originals: Tensor

    @property
    def second(self) -> Tensor:
        second = self.rows.mT @ self.rows / self.rows.shape[1]
        return second[0] if len(second) == 1 else second

    @property
    def cross(self) -> Tensor:
        cross = self.rows.mT @ (self.originals - self.rows) / self.rows.shape[1]
        return cross[0] if len(cross) == 1 else cross

    @property
    def pull(self) -> Tensor:
        return moment_product(self.weight, self.cross.mT)

    def errors(
        self, layout: GridLayout, scale: Tensor, offset: Tensor, pull: Tensor | None = None
    ) -> Tensor:
        """Objective of every row of the grid as it is deployed."""
        error = fake_quantize(self.weight, layout.with_scale(scale, offset)) - self.weight
        return row_errors(error, self.second, pull)


def problem(
    seed: int = 0,
    out: int = 8,
    width: int = 12,
    *,
    groups: int = 1,
    tokens: int = 30,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """The same one for a seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = normal(out, width) * normal(out, width).abs() + 0.1
    mix = 0.4 * normal(groups, width, width) + torch.eye(width)
    rows = normal(groups, tokens, width) @ mix * normal(width).mul(0.5).exp()
    originals = rows + 0.2 * normal(*rows.shape) @ mix
    return Problem(weight.to(dtype), rows.to(dtype), originals.to(dtype))


def layout_of(
    kind: str, out: int, width: int, *, bits: int = 4, symmetric: bool = True, block: int = 4
) -> GridLayout:
    """A grid by name: ``per_tensor``, ``per_channel``, ``blockwise`` or ``lpbq``."""
    shape = {"per_tensor": (1, 1), "per_channel": (out, 1)}.get(kind, (out, width // block))
    lpbq = kind == "lpbq"
    return GridLayout(
        shape=shape,
        qmin=-(2 ** (bits - 1)) if symmetric else 0,
        qmax=2 ** (bits - 1) - 1 if symmetric else 2**bits - 1,
        symmetric=symmetric,
        block_size=(1, block) if shape[1] > 1 else None,
        block_grouping=(1, -1) if lpbq else None,
        scale_bits=4 if lpbq else None,
    )


def candidate_by_loop(
    low: float, high: float, layout: GridLayout, number: int, count: int
) -> tuple[float, float]:
    """Range that calibration makes of a share of a range that holds zero."""
    low, high = low / count * (number + 1), high / count * (number + 1)
    if not layout.symmetric:
        return low, high
    steps = layout.qmax - layout.qmin
    up, down = steps // 2, steps - steps // 2
    delta = max(high / up, -low / down)
    return -down * delta, up * delta


def losses_by_loop(
    p: Problem, layout: GridLayout, count: int, *, both: bool
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Loss of every row and block ``[out, blocks]``, and ranges, of every candidate.

    :param both: the target is the float stream's output, else that of the float weight on the
        quantized stream.
    """
    low, high = layout.bounds(p.weight)
    out, blocks = p.weight.shape[0], layout.shape[1]
    columns = p.weight.shape[1] // blocks
    losses, ranges = [], []
    for number in range(count):
        new_low, new_high = torch.empty_like(low), torch.empty_like(high)
        for i in range(low.shape[0]):
            for j in range(blocks):
                new_low[i, j], new_high[i, j] = candidate_by_loop(
                    float(low[i, j]), float(high[i, j]), layout, number, count
                )
        scale, offset = layout.raw(new_low, new_high)
        values = quantized_by_loop(p.weight, scale, offset, layout.qmin, layout.qmax, 0.0)
        loss = torch.zeros(out, blocks, dtype=p.weight.dtype)
        for r in range(out):
            group = r * len(p.rows) // out
            quantized = p.rows[group]
            target = p.originals[group] if both else quantized
            for j in range(blocks):
                at = slice(j * columns, (j + 1) * columns)
                output = quantized[:, at] @ values[r, at]
                loss[r, j] = (output - target[:, at] @ p.weight[r, at]).square().sum()
        losses.append(loss)
        ranges.append((new_low, new_high))
    return losses, ranges


def compatible_by_loop(
    p: Problem, layout: GridLayout, count: int, *, both: bool
) -> tuple[Tensor, Tensor]:
    """The range of the candidate with the lowest loss; a shared one is the widest of all rows'."""
    losses, ranges = losses_by_loop(p, layout, count, both=both)
    low, high = (torch.empty_like(bound) for bound in ranges[0])
    winners = [
        [_first_lowest([loss[r, j] for loss in losses]) for j in range(layout.shape[1])]
        for r in range(p.weight.shape[0])
    ]
    for i in range(layout.shape[0]):
        for j in range(layout.shape[1]):
            rows = range(len(winners)) if layout.shape[0] == 1 else [i]
            winner = max(winners[r][j] for r in rows)
            low[i, j], high[i, j] = ranges[winner][0][i, j], ranges[winner][1][i, j]
    return low, high


def _first_lowest(losses: Sequence[Tensor]) -> int:
    values = [float(loss) for loss in losses]
    return values.index(min(values))
