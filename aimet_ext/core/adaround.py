"""Adaptive rounding (after arXiv 2004.10568): all roundings of a layer decided together.

The codes of a weight are relaxed to real numbers ``q`` that lower

    ½ L(q) / (curvature · step²) + strength · ½ Σ h (1 − h),   h = q − ⌊q⌋,

``L`` a row's output error, while ``strength`` rises from 0 to 1. The regulariser is the paper's
``1 − |2h − 1|^β`` with β = 2, up to a factor. In units of its own curvature every weight then has
one and the same threshold: at strength 1 the sum is concave in each code, so that all have to
choose, whatever the layer. Three things differ from the paper, each for a lower error in fewer
steps: the strength is annealed, not β; ``q`` itself moves, not a parameter behind a sigmoid; and a
code may pass through a grid point, where the paper only rounds up or down.

On second moments the sum is lowered column after column, each at its exact minimum: coordinate
descent whose rounding is soft at first, and hard at last. Behind an activation, by gradients of
minibatches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from aimet_ext.core.affine import Grid
from aimet_ext.core.columns import Columns, column_blocks
from aimet_ext.core.objective import best_rows

# Columns between two large matrix products, and columns that move at once: one at a time would gain
# little, and take many small operations.
_BLOCK, _TOGETHER = 128, 8
# Length of the step of columns that move at once, in inverses of their largest curvature.
_STRETCH = 1.4
_HARD = 1 - 1e-3  # strength from which on soft rounding stays as it is
_POWER_STEPS = 30


@torch.no_grad()
def adaround(
    weight: Tensor,
    grid: Grid,
    second: Tensor,
    pull: Tensor | None = None,
    *,
    num_iterations: int = 40,
    start: Tensor | None = None,
    momentum: float = 0.6,
    learning_rate: float = 1.0,
) -> Tensor:
    """Lower ``E H Eᵀ − 2 E · pull`` by coordinate descent with a rounding that hardens.

    :param weight: ``[out, in]``, float32 or float64.
    :param grid: the grid to round to, held.
    :param second: ``H [in, in]`` or ``[groups, in, in]``.
    :param pull: ``[out, in]`` or None, see :class:`~aimet_ext.core.objective.SecondMoment`.
    :param num_iterations: visits of a column while the strength rises from 0 to 1, at most: it is
        done when nothing moves. Each costs about as much as a product of the weight with H.
    :param start: integers to start from, ``[out, in]``; None to start at the weight itself.
    :param momentum: share of a visit's move that is added before the next one.
    :param learning_rate: length of a step, 1 for the best one measured.
    :returns: integers ``[out, in]``: for every row the best of the result, ``start`` and plain
        rounding.
    :raises ValueError: H does not fit the weight.
    """
    problem = Columns.of(weight, grid, second, pull)
    first = None if start is None else problem.transposed(start)
    strengths = _strengths(num_iterations, 0.0)
    descent = _SoftDescent(problem, _begin(problem, first), learning_rate)
    codes = descent.run(strengths, momentum)
    return problem.rows(best_rows(_candidates(problem, first, codes), problem.errors))


@torch.no_grad()
def adaround_samples(
    weight: Tensor,
    bias: Tensor | None,
    grid: Grid,
    inputs: Tensor,
    targets: Tensor,
    activation: Callable[[Tensor], Tensor],
    *,
    counts: Tensor | None = None,
    num_iterations: int = 500,
    batch: int = 2048,
    start: Tensor | None = None,
    start_strength: float | None = None,
    momentum: float = 0.95,
    learning_rate: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Anneal relaxed codes on ``‖f(targets) − f(Ŵ x̂ + b)‖²``, minibatch by minibatch.

    :param weight: ``[out, in]``, float32 or float64.
    :param bias: ``[out]`` or None.
    :param grid: the grid to round to, held.
    :param inputs: the quantized stream's inputs ``x̂ [groups, n, in]``.
    :param targets: the float layer's outputs before the activation, bias included, ``[n, out]``.
    :param activation: ``f``, element by element and differentiable.
    :param counts: weight of each sample, ``[groups, n]``, 1 on average or of that order; None
        if all count alike.
    :param num_iterations: steps from strength 0 to 1, at most.
    :param batch: samples of a step.
    :param start: integers to start from, ``[out, in]``; None to start at the weight itself.
    :param start_strength: strength of the regulariser at first; as in :func:`adaround`.
    :param momentum: share of a step that goes on in the next.
    :param learning_rate: length of a step, 1 for the inverse of the largest curvature.
    :param generator: draws the minibatches; None for one with a fixed seed.
    :returns: integers ``[out, in]``: for every row the best of the result, ``start`` and plain
        rounding, on all samples.
    :raises ValueError: the inputs do not fit the weight.
    """
    counted = inputs if counts is None else inputs * counts.to(inputs)[..., None]
    second = torch.einsum("gni,gnj->gij", counted, inputs) / inputs.shape[1]
    problem = Columns.of(weight, grid, second, None)
    samples = _Samples(problem, weight, bias, inputs.to(weight.dtype), targets, activation, counts)
    first = None if start is None else problem.transposed(start)
    curvature = samples.curvature()
    rate = learning_rate / samples.largest_curvature(curvature, batch)
    batches = _minibatches(inputs.shape[1], batch, generator)
    scale = curvature * problem.step

    def gradient(codes: Tensor) -> Tensor:
        return samples.gradient(codes, next(batches)).div_(scale)

    relaxed = _Relaxed(_begin(problem, first), problem.grid.qmin, problem.grid.qmax)
    if start_strength is None:
        start_strength = 0.0 if first is None else 0.15
    strengths = _strengths(num_iterations, start_strength)
    codes = _anneal(relaxed, gradient, strengths, rate, momentum)
    return problem.rows(best_rows(_candidates(problem, first, codes), samples.errors))


class _SoftDescent:
    """Coordinate descent on codes that are rounded softly.

    A few columns move at once, by a step that suits their correlation: ``rate``, the inverse of
    the largest curvature among them, and stretched, but not beyond a column's own minimum. With
    ``k = rate · strength`` the sum's part of a code is least, within the gap of ``wish``, at

        ⌊wish⌋ + clamp((wish − ⌊wish⌋ − k / 2) / (1 − k), 0, 1),   wish = q − rate · slope.

    :param begin: codes to start from, ``[groups, in, rows]``.
    """

    def __init__(self, problem: Columns, begin: Tensor, learning_rate: float) -> None:
        self._rate = learning_rate * _rates(problem)  # [groups, in, 1]
        rate = self._rate / problem.diagonal
        self._scaled = problem.second * rate
        pull = problem.pull
        self._constant = None if pull is None else problem.in_units(pull) * rate
        self._ideal = problem.ideal
        self._step = None if problem.is_even else problem.step
        self._limits = problem.grid.qmin, problem.grid.qmax
        self._codes = begin.clamp(*self._limits)

    def run(self, strengths: list[float], momentum: float) -> Tensor:
        """Return the codes after all sweeps, or as soon as none moves."""
        codes = self._codes
        before, error = codes.clone(), torch.empty_like(codes)
        for strength in strengths:
            ahead = torch.lerp(before, codes, 1 + momentum)
            before.copy_(codes)
            # Up to the ends of a gap; what is on the grid stays.
            torch.clamp(ahead, codes.floor(), codes.ceil(), out=codes)
            torch.sub(codes, self._ideal, out=error)
            if self._step is not None:
                error.mul_(self._step)
            self._sweep(error, strength)
            if torch.equal(codes, before):
                break
        return codes.round_()

    def _sweep(self, error: Tensor, strength: float) -> None:
        """Visit every column once."""
        keep = (self._rate * strength).clamp_(max=_HARD)
        gain = (1 - keep).reciprocal_()
        loss = keep.mul_(gain).mul_(-0.5)
        for at in column_blocks(error.shape[1], _BLOCK):
            slope = torch.bmm(self._scaled[:, at], error)  # rate · slope, [groups, block, rows]
            if self._constant is not None:
                slope -= self._constant[:, at]
            coupling, moves = self._scaled[:, at, at], torch.empty_like(slope)
            codes, step = self._codes[:, at], None if self._step is None else self._step[:, at]
            for few in column_blocks(slope.shape[1], _TOGETHER):
                wish, code, move = slope[:, few], codes[:, few], moves[:, few]
                if few.start:
                    past = slice(0, few.start)
                    wish += torch.bmm(coupling[:, few, past], moves[:, past])
                if step is not None:
                    wish.div_(step[:, few])
                torch.sub(code, wish, out=wish)
                floor = wish.floor()
                wish -= floor
                torch.addcmul(loss[:, at][:, few], wish, gain[:, at][:, few], out=wish)
                wish.clamp_(0, 1).add_(floor).clamp_(*self._limits)
                torch.sub(wish, code, out=move)
                code.copy_(wish)
                if step is not None:
                    move.mul_(step[:, few])
            error[:, at] += moves


class _Relaxed:
    """Real-valued codes that move through the gaps between grid points and come to rest on them.

    On a grid point the regulariser has a kink: a code stays there while the error's slope is less
    than ``strength / 2``. A step never leaps over a grid point, and momentum ends on it.
    """

    def __init__(self, codes: Tensor, qmin: int, qmax: int) -> None:
        self.codes = codes.clamp(qmin, qmax)
        self._qmin, self._qmax = qmin, qmax
        self._velocity = torch.zeros_like(self.codes)
        self._floor, self._ceiling, self._inside, self._next = (
            torch.empty_like(self.codes) for _ in range(4)
        )

    def step(self, slope: Tensor, strength: float, rate: Tensor, momentum: float) -> None:
        """Move all codes once. In-place float arithmetic alone: masks would take longer.

        :param slope: gradient of the error, in units of the curvature; overwritten.
        """
        codes, floor, ceiling, inside = self.codes, self._floor, self._ceiling, self._inside
        torch.floor(codes, out=floor)
        torch.ceil(codes, out=ceiling)
        torch.sub(ceiling, floor, out=inside)  # 1 in a gap, 0 on a grid point
        on_grid = torch.nn.functional.softshrink(slope, strength / 2)
        # The slope of strength · ½ h (1 − h) is strength · (½ − h), h = codes − floor.
        slope.add_(floor, alpha=strength).sub_(codes, alpha=strength).add_(strength / 2)
        torch.lerp(on_grid, slope, inside, out=slope)
        velocity = self._velocity.mul_(inside).mul_(momentum).sub_(slope.mul_(rate))
        torch.add(codes, velocity, out=self._next)
        # Up to the ends of a gap, or from a grid point to the next ones.
        torch.minimum(self._next, floor.add_(1), out=self._next)
        torch.maximum(self._next, ceiling.sub_(1), out=self._next)
        self._next.clamp_(self._qmin, self._qmax)
        torch.sub(self._next, codes, out=velocity)
        self.codes, self._next = self._next, codes


class _Samples:
    """The output error behind an activation, and its derivatives by the weight."""

    def __init__(
        self,
        problem: Columns,
        weight: Tensor,
        bias: Tensor | None,
        inputs: Tensor,
        targets: Tensor,
        activation: Callable[[Tensor], Tensor],
        counts: Tensor | None,
    ) -> None:
        groups = inputs.shape[0]
        self._counts = None if counts is None else counts.to(weight.dtype)[..., None]
        self._problem, self._inputs, self._activation = problem, inputs, activation
        self._weight = problem.transposed(weight)  # [groups, in, rows]
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.to(weight.dtype)
        self._bias = bias.view(groups, 1, -1)
        outputs = targets.to(weight.dtype).view(len(targets), groups, -1).transpose(0, 1)
        self._targets, self._slope = self._derivative(outputs, None)  # [groups, n, rows]

    def curvature(self) -> Tensor:
        """Return the mean of ``(f'(z) x_j)²``, per code; never 0, ``[groups, in, rows]``."""
        count = self._inputs.shape[1]
        curvature = self._inputs.square().mT @ self._counted(self._slope.square()) / count
        return torch.maximum(curvature, 1e-3 * self._problem.diagonal)

    def largest_curvature(self, curvature: Tensor, count: int) -> Tensor:
        """Return every row's largest curvature, in units of ``curvature``, from some samples."""
        inputs, weights = self._inputs[:, :count], self._slope.square()
        weights = self._counted(weights)[:, :count]
        root = curvature.rsqrt()

        def product(vector: Tensor) -> Tensor:
            return inputs.mT @ (weights * (inputs @ (vector * root))) * root / inputs.shape[1]

        return _largest_eigenvalue(product, root)

    def gradient(self, codes: Tensor, chosen: Tensor) -> Tensor:
        """Return half the gradient of the mean squared error of some samples by ``Ŵ``."""
        inputs = self._inputs[:, chosen]
        problem = self._problem
        values = torch.addcmul(self._weight, codes - problem.ideal, problem.step)
        outputs = torch.baddbmm(self._bias, inputs, values)
        _, back = self._derivative(outputs, self._targets[:, chosen])
        if self._counts is not None:
            back = back * self._counts[:, chosen]
        return torch.bmm(inputs.mT, back).div_(len(chosen))

    def errors(self, codes: Tensor) -> Tensor:
        """Return every row's mean squared error, ``[groups, rows]``, in float64."""
        values = self._weight + (codes - self._problem.ideal) * self._problem.step
        total = torch.zeros_like(self._bias[:, 0], dtype=torch.float64)
        for at in range(0, self._inputs.shape[1], 8192):
            part = slice(at, at + 8192)
            outputs = self._activation(torch.baddbmm(self._bias, self._inputs[:, part], values))
            squares = (outputs - self._targets[:, part]).square()
            if self._counts is not None:
                squares *= self._counts[:, part]
            total += squares.sum(1, dtype=torch.float64)
        return total / self._inputs.shape[1]

    def _counted(self, numbers: Tensor) -> Tensor:
        """Return numbers of all samples ``[groups, n, rows]`` times how much each sample counts."""
        return numbers if self._counts is None else numbers * self._counts

    def _derivative(self, outputs: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ``f(z)``, and ``f'(z)`` times its distance from the targets (times 1 without)."""
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            values = self._activation(leaf)
            ahead = torch.ones_like(values) if targets is None else values.detach() - targets
            (slope,) = torch.autograd.grad(values, leaf, ahead)
        return values.detach(), slope


def _begin(problem: Columns, first: Tensor | None) -> Tensor:
    """Return the codes at which the relaxation starts, ``[groups, in, rows]``."""
    begin = problem.ideal if first is None else first
    return torch.where(problem.dead, problem.nearest, begin)


def _candidates(problem: Columns, first: Tensor | None, codes: Tensor) -> list[Tensor]:
    return [problem.nearest, *([] if first is None else [first]), codes]


def _anneal(
    relaxed: _Relaxed,
    gradient: Callable[[Tensor], Tensor],
    strengths: list[float],
    rate: Tensor,
    momentum: float,
) -> Tensor:
    """Return the codes after all steps, or as soon as none has changed for a tenth of them."""
    patience = max(len(strengths) // 10, 1)
    before: Tensor | None = None
    for index, strength in enumerate(strengths):
        relaxed.step(gradient(relaxed.codes), strength, rate, momentum)
        if 2 * index >= len(strengths) and index % patience == 0:
            codes = relaxed.codes.round()
            if before is not None and torch.equal(before, codes):
                return codes
            before = codes
    return relaxed.codes.round()


def _strengths(count: int, begin: float) -> list[float]:
    if count < 1:
        raise ValueError(f"num_iterations: at least 1 is required, got {count}")
    return [begin + (1 - begin) * (index + 1) / count for index in range(count)]


def _rates(problem: Columns) -> Tensor:
    """Return the step of each column, in inverses of its curvature, ``[groups, in, 1]``."""
    rates, root = torch.empty_like(problem.diagonal), problem.diagonal.rsqrt()
    for few in column_blocks(rates.shape[1], _TOGETHER):
        own = problem.second[:, few, few] * root[:, few] * root[:, few].mT  # correlations
        largest = torch.linalg.eigvalsh(own)[:, -1:, None]
        rates[:, few] = _STRETCH / largest.clamp_min(_STRETCH)
    return rates


def _largest_eigenvalue(product: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Return the largest eigenvalue of every group by power iteration, at least 1.

    :param product: function that multiplies the matrix with a vector ``[groups, in, columns]``.
    :param like: tensor of a vector's shape and type.
    :returns: ``[groups, 1, columns]``.
    """
    vector, norm = torch.ones_like(like), torch.ones_like(like[:, :1])
    for _ in range(_POWER_STEPS):
        vector = product(vector / norm)
        norm = vector.norm(dim=1, keepdim=True).clamp_min(1e-3)
    return norm.clamp_min(1.0)


def _minibatches(count: int, batch: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Yield indices of samples without end, every sample once a round."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    while True:
        order = torch.randperm(count, generator=generator, device=generator.device)
        yield from order.split(batch)
