"""The deployment of one layer: written to the simulation, read back, compared with rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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
from aimet_ext.core.objective import SecondMoment
from aimet_ext.sim.protocol import WeightQuantizer
from aimet_ext.walk.order import Activation

_ALL_ROWS, _EVERY = 1024, 32
_AT_ONCE = 256


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """A layer to decide. Weights and grids are those of its matrix ``[out, in]``.

    :param stored: Weight in the dtype it is stored in.
    :param weight: Weight in the dtype of the moments, float32 at least, to compute with.
    :param bias: Bias ``[out]``, or None.
    :param frozen: Grid that an earlier technique decided; None where it may be chosen.
    :param least: Smallest scale of each row with which its bias fits int32, ``[out]``.
    :param moment: Second moment of its inputs.
    :param samples: Inputs and the ReLU that follows, where the technique asked for them.
    :param upstream: Error of its output by those of the layers before it, which no choice changes.
    """

    name: str
    stored: Tensor
    weight: Tensor
    bias: Tensor | None
    least: Tensor
    layout: GridLayout
    frozen: Grid | None
    moment: SecondMoment
    pull: Tensor | None
    samples: SampleSum | None = None
    upstream: float = 0.0

    @classmethod
    def of(
        cls,
        name: str,
        quantizer: WeightQuantizer,
        bias: Tensor | None,
        moment: SecondMoment,
        samples: SampleSum | None,
        input_steps: int = 0,
        upstream: float = 0.0,
    ) -> Problem:
        """Make the problem of a layer of a simulation.

        :param input_steps: Steps of the grid of its input, 0 if that is float.
        """
        original = quantizer.weight.detach().flatten(1)
        stored = original.to(moment.second.device, copy=True)  # the original may be replaced
        weight = stored.to(torch.promote_types(stored.dtype, moment.second.dtype))
        bias = None if bias is None else bias.detach().to(weight)
        held = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return cls(
            name=name,
            stored=stored,
            weight=weight,
            bias=bias,
            least=bias_scale(held, moment.peak, input_steps),
            layout=quantizer.layout,
            frozen=quantizer.matrix_grid(weight.device) if quantizer.frozen else None,
            moment=moment,
            pull=moment.pull(weight),
            samples=samples,
            upstream=upstream,
        )

    def errors(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective of a quantized weight and its errors to report, ``[out]`` each.

        The errors to report are those on the data as they came.
        """
        return self.moment.errors(values.to(self.weight) - self.weight, self.pull)

    def nearest_grid(self) -> Grid:
        """Return the grid of plain rounding: the frozen one, or one that holds every weight."""
        if self.frozen is not None:
            return self.frozen
        scale, offset = self.layout.raw(*self.layout.bounds(self.stored.float()))
        return self.layout.with_scale(short_scale(self.raised(scale)), offset)

    def raised(self, scale: Tensor) -> Tensor:
        """Return scales of the grid's cells with which the biases fit int32."""
        if scale.shape[1] > 1 or not bool(self.least.any()):
            return scale  # blocks have float biases
        least = self.least[:, None] if len(scale) == len(self.least) else self.least.max()
        return torch.maximum(scale, least.to(scale))

    def signal(self) -> float:
        """Return the mean square of the float output over all tokens, summed over rows."""
        return float(self.moment.errors(self.weight, None)[1].sum(dtype=torch.float64))


@dataclass(frozen=True, eq=False, kw_only=True)
class Decision:
    """Decision of a technique for a layer.

    :param scale: Scale of every cell (raw, for LPBQ), with ``offset``; None leaves the range of
        plain rounding, or the frozen one.
    :param range: Smallest and largest value of every cell, in place of a scale.
    :param codes: Function from the grid, as the simulation has it, to the integers ``[out, in]``;
        None where the weight stays as it is and is rounded to nearest.
    :param judge: Objective of every row for quantized values, where it is not the problem's own.
    :param compare: True to give rows back to plain rounding where that is better.
    """

    scale: Tensor | None = None
    offset: Tensor | None = None
    range: tuple[Tensor, Tensor] | None = None
    codes: Callable[[Grid], Tensor] | None = None
    judge: Callable[[Tensor], Tensor] | None = None
    compare: bool = True


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Losses of plain rounding and as deployed, and number of rows that plain rounding keeps.

    :param upstream: Part of either loss that the layers before cause; 0 where it is not told apart.
    """

    nearest: float
    after: float
    upstream: float
    signal: float
    rows_nearest: int


@torch.no_grad()
def deploy(
    problem: Problem, quantizer: WeightQuantizer, decide: Callable[[Problem], Decision]
) -> Outcome:
    """Decide a layer, write the range, read the grid back, round on that, keep what is better."""
    plain = problem.nearest_grid()
    decision = decide(problem)
    if decision.range is not None:
        quantizer.set_range(*(bound.float() for bound in decision.range))
    elif decision.scale is not None:
        _write(quantizer, decision.scale, decision.offset)
    elif problem.frozen is None:
        _write(quantizer, plain.scale, plain.offset)
    grid = quantizer.matrix_grid(problem.weight.device)
    if problem.frozen is None and bool((problem.raised(grid.scale) > grid.scale).any()):
        _write(quantizer, problem.raised(grid.scale), grid.offset)
        grid = quantizer.matrix_grid(problem.weight.device)
    codes = quantize(problem.stored, grid) if decision.codes is None else decision.codes(grid)
    values = settled(codes, grid, problem.stored.dtype)
    nearest = fake_quantize(problem.stored, plain)
    judge, upstream = decision.judge, 0.0
    if judge is None:
        errors, upstream = problem.errors, problem.upstream
    else:

        def errors(values: Tensor) -> tuple[Tensor, Tensor]:
            return (judge(values),) * 2

    (ours, after), (plain_ones, before) = errors(values), errors(nearest)
    given_back = torch.zeros_like(after, dtype=torch.bool)
    if decision.compare:
        judged = [(after, before), (ours, plain_ones)]
        if problem.frozen is None and not problem.layout.is_row_wise(problem.weight):
            # Rows share cells of a range that was chosen: all or none.
            judged = [(first.sum(), second.sum()) for first, second in judged]
        for first, second in judged:
            given_back |= ~(first <= second)
    if bool(given_back.any()):
        grid, codes = _give_back(problem, quantizer, plain, grid, codes, given_back)
        after = errors(settled(codes, grid, problem.stored.dtype))[1]
    if decision.codes is not None:
        _write_weight(problem, quantizer, codes, grid)
    quantizer.freeze()
    return Outcome(
        nearest=max(0.0, float(before.sum(dtype=torch.float64)) + upstream),
        after=max(0.0, float(after.sum(dtype=torch.float64)) + upstream),
        upstream=upstream,
        signal=problem.signal(),
        rows_nearest=int(given_back.sum()),
    )


def _give_back(
    problem: Problem,
    quantizer: WeightQuantizer,
    plain: Grid,
    grid: Grid,
    codes: Tensor,
    rows: Tensor,
) -> tuple[Grid, Tensor]:
    """Replace some rows by plain rounding."""
    if problem.frozen is None:
        where = rows[:, None] if plain.scale.shape[0] == len(rows) else rows[:1, None]
        scale = torch.where(where, plain.scale.to(grid.scale), grid.scale)
        offset = torch.where(where, plain.offset.to(grid.offset), grid.offset)
        _write(quantizer, scale, offset)
        grid = quantizer.matrix_grid(problem.weight.device)
    return grid, torch.where(rows[:, None], quantize(problem.stored, grid), codes)


def _write(quantizer: WeightQuantizer, scale: Tensor, offset: Tensor | None) -> None:
    own = None if quantizer.layout.symmetric or offset is None else offset.float()
    quantizer.set_scale(short_scale(scale.float()), own)


def _write_weight(problem: Problem, quantizer: WeightQuantizer, codes: Tensor, grid: Grid) -> None:
    """Put the rounded values in the weight's place.

    :raises RuntimeError: The simulation would round them to something else.
    """
    values = settled(codes, grid, problem.stored.dtype)
    check_settled(problem.name, values, grid)
    quantizer.set_weight(values.view(quantizer.weight.shape))


class UpstreamError:
    """Mean square of a layer's output for what its inputs lost, ``Σ ‖W (x − x̂)‖²`` by row.

    After the first rows a few are taken, as it only serves the report: other ones of each chunk,
    since the first row of a sequence is often the largest by far.

    :param weight: Weight ``[out, in]``.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        self._rows, self._sum, self._chunks = 0, 0.0, 0
        self._mass = 0.0
        self._lost: list[Tensor] = []  # [groups, n, in] each, not yet multiplied

    def add(self, rows: Tensor, originals: Tensor, weights: Tensor | None = None) -> None:
        """Take in rows of both streams, ``[groups, n, in]``; the same object if there is one.

        :param weights: Weight of each row, ``[groups, n]``; None if all count alike.
        """
        step = 1 if self._rows < _ALL_ROWS else _EVERY
        self._rows += rows.shape[1]
        self._mass += rows.shape[1] if weights is None else float(weights.mean(0).sum())
        if originals is rows or not rows.shape[1]:
            return
        taken = slice(self._chunks % min(step, rows.shape[1]), None, step)
        self._chunks += step > 1
        lost = originals[:, taken].to(self._weight) - rows[:, taken].to(self._weight)
        share = rows.shape[1] / lost.shape[1]
        if weights is None:
            lost *= share**0.5
        else:
            lost *= (share * weights[:, taken]).to(lost).sqrt()[..., None]
        self._lost.append(lost)
        if sum(each.shape[1] for each in self._lost) >= _AT_ONCE:
            self._multiply()

    def _multiply(self) -> None:
        if self._lost:
            lost = torch.cat(self._lost, 1)
            grouped = self._weight.view(len(lost), -1, lost.shape[2])  # [groups, out / groups, in]
            self._sum += float((lost @ grouped.mT).square().sum(dtype=torch.float64))
            self._lost.clear()

    @property
    def mean(self) -> float:
        """Mean over rows, summed over the outputs."""
        self._multiply()
        return self._sum / (self._mass or 1)


class SampleSum:
    """Rows drawn without preference from all that come, however they are cut into batches.

    Every row gets a random key, the rows with the largest keys stay.

    :param count: Rows to keep, at most.
    :param activation: The ReLU that follows the layer.
    :param seed: Seed of the keys.
    """

    def __init__(self, count: int, activation: Activation, seed: int = 0) -> None:
        self.count = count
        self.activation = activation
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0, dtype=torch.float64)
        self._rows: Tensor | None = None
        self._originals: Tensor | None = None
        self._weights: Tensor | None = None

    def add(self, rows: Tensor, originals: Tensor, weights: Tensor | None = None) -> None:
        """Take in rows of both streams.

        :param rows: Rows of the quantized stream, ``[groups, n, in]``.
        :param originals: Rows of the float stream; the same object where there is only one stream.
        :param weights: Weight of each row, ``[groups, n]``; None if all count alike.
        """
        one = originals is rows
        keys = torch.rand(rows.shape[1], dtype=torch.float64, generator=self._generator)
        keys = torch.cat([self._keys, keys])
        chosen = keys.topk(min(self.count, len(keys))).indices.sort().values
        self._rows = _pick(self._rows, rows, chosen)
        self._originals = self._rows if one else _pick(self._originals, originals, chosen)
        if weights is not None:
            self._weights = _pick(self._weights, weights, chosen)
        self._keys = keys[chosen]

    @property
    def inputs(self) -> Tensor:
        """Rows of the quantized stream, ``[groups, n, in]``."""
        assert self._rows is not None
        return self._rows

    @property
    def originals(self) -> Tensor:
        """The same rows in the float stream."""
        assert self._originals is not None
        return self._originals

    @property
    def weights(self) -> Tensor | None:
        """Weights of these rows, 1 on average, ``[groups, n]``; None if all count alike."""
        if self._weights is None:
            return None
        mean = self._weights.mean(1, keepdim=True)
        return torch.where(mean > 0, self._weights / mean, 1.0)


def _pick(kept: Tensor | None, new: Tensor, chosen: Tensor) -> Tensor:
    """Return ``cat([kept, new], 1)[:, chosen]`` without the whole of it."""
    chosen = chosen.to(new.device)
    if kept is None:
        return new[:, chosen].clone()
    old = chosen < kept.shape[1]
    return torch.cat([kept[:, chosen[old]], new[:, chosen[~old] - kept.shape[1]]], 1)
