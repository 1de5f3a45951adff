"""Adaptive rounding (after arXiv 2004.10568): all roundings of a layer decided together.

The codes of a weight are relaxed to real numbers ``q`` and follow the gradient of

    ½ L(q) / (curvature · step²) + strength · ½ Σ h (1 − h),   h = q − ⌊q⌋,

``L`` a row's output error, while ``strength`` rises from 0 to 1. The regulariser is the paper's
``1 − |2h − 1|^β`` with β = 2, up to a factor. In units of its own curvature every weight then has
one and the same threshold: at strength 1 the sum is concave in each code, so that all have to
choose, whatever the layer. Three things differ from the paper, each for a lower error in fewer
steps: the strength is annealed, not β; ``q`` itself moves, not a parameter behind a sigmoid; and a
code may pass through a grid point, where the paper only rounds up or down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from aimet_ext.core.affine import Grid
from aimet_ext.core.columns import Columns
from aimet_ext.core.objective import best_rows

# Codes that are worked on at a time: small enough for the processor's cache.
_AT_ONCE = 2**15
_POWER_STEPS = 30


@torch.no_grad()
def adaround(
    weight: Tensor,
    grid: Grid,
    second: Tensor,
    pull: Tensor | None = None,
    *,
    num_iterations: int = 500,
    start: Tensor | None = None,
    start_strength: float | None = None,
    momentum: float = 0.93,
    learning_rate: float = 1.0,
) -> Tensor:
    """Anneal relaxed codes on ``E H Eᵀ − 2 E · pull``: one product with H a step, no sampling.

    :param weight: ``[out, in]``, float32 or float64.
    :param grid: the grid to round to, held.
    :param second: ``H [in, in]`` or ``[groups, in, in]``.
    :param pull: ``[out, in]`` or None, see :class:`~aimet_ext.core.objective.SecondMoment`.
    :param num_iterations: steps from strength 0 to 1, at most: where no code changes any more in
        the second half, the work is done.
    :param start: integers to start from, ``[out, in]``; None to start at the weight itself.
    :param start_strength: strength of the regulariser at first. By default 0, and 0.15 with
        ``start``, so that what GPTQ found is improved rather than forgotten.
    :param momentum: share of a step that goes on in the next.
    :param learning_rate: length of a step, 1 for the inverse of the largest curvature.
    :returns: integers ``[out, in]``: for every row the best of the result, ``start`` and plain
        rounding.
    :raises ValueError: H does not fit the weight.
    """
    problem = Columns.of(weight, grid, second, pull)
    first = None if start is None else problem.transposed(start)
    strengths = _strengths(num_iterations, first, start_strength)
    rate = learning_rate / _largest_curvature(problem)  # [groups, 1, 1]
    scaled = problem.second / problem.diagonal
    codes = torch.empty_like(problem.ideal)
    for at in _parts(codes):
        ideal, step = problem.ideal[at], problem.step[at]
        constant = None if problem.pull is None else problem.pull[at] / problem.diagonal[at[0]]
        gradient = _QuadraticGradient(scaled[at[0]], ideal, step, constant)
        begin = _begin(problem, first)[at]
        relaxed = _Relaxed(begin, problem.grid.qmin, problem.grid.qmax)
        codes[at] = _anneal(relaxed, gradient, strengths, rate[at[0]], momentum)
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
    strengths = _strengths(num_iterations, first, start_strength)
    codes = _anneal(relaxed, gradient, strengths, rate, momentum)
    return problem.rows(best_rows(_candidates(problem, first, codes), samples.errors))


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


class _QuadraticGradient:
    """Slope of ``½ (E H Eᵀ − 2 E · pull) / (H_jj step²)`` by code."""

    def __init__(self, scaled: Tensor, ideal: Tensor, step: Tensor, pull: Tensor | None) -> None:
        self._scaled = scaled.contiguous()  # H_ji / H_jj
        self._ideal = ideal.contiguous()
        self._varies = step.shape[1] > 1  # else it cancels
        self._step = step.contiguous()
        self._constant = None if pull is None else (pull / step).contiguous()
        self._error = torch.empty_like(self._ideal)
        self._slope = torch.empty_like(self._ideal)

    def __call__(self, codes: Tensor) -> Tensor:
        torch.sub(codes, self._ideal, out=self._error)
        if self._varies:
            self._error.mul_(self._step)
        torch.bmm(self._scaled, self._error, out=self._slope)
        if self._varies:
            self._slope.div_(self._step)
        if self._constant is not None:
            self._slope.sub_(self._constant)
        return self._slope


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


def _strengths(count: int, first: Tensor | None, begin: float | None) -> list[float]:
    if count < 1:
        raise ValueError(f"num_iterations: at least 1 is required, got {count}")
    begin = (0.0 if first is None else 0.15) if begin is None else begin
    return [begin + (1 - begin) * (index + 1) / count for index in range(count)]


def _largest_curvature(problem: Columns) -> Tensor:
    """Return the largest eigenvalue of ``H_ij / sqrt(H_ii H_jj)`` of every group."""
    root = problem.diagonal.rsqrt()
    return _largest_eigenvalue(lambda v: root * torch.bmm(problem.second, root * v), root)


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


def _parts(codes: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Yield parts of about as many codes as fit the cache: rows of one group, or whole groups."""
    groups, width, rows = codes.shape
    some_groups = max(1, _AT_ONCE // (width * rows))
    some_rows = max(64, _AT_ONCE // width)
    for group in range(0, groups, some_groups):
        for row in range(0, rows, some_rows):
            yield slice(group, group + some_groups), slice(None), slice(row, row + some_rows)


def _minibatches(count: int, batch: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Yield indices of samples without end, every sample once a round."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    while True:
        order = torch.randperm(count, generator=generator, device=generator.device)
        yield from order.split(batch)
