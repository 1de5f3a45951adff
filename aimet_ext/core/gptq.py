"""GPTQ (arXiv 2210.17323) and coordinate descent.

All choose integers ``q``, the grid held, that lower for every output row

    E H Eᵀ − 2 E · pull,   E = Ŵ − W = (q − ideal) · step,

where ``ideal`` is the weight in units of the grid. All output rows go at once, so tensors are kept
transposed, ``[groups, in, rows]``, with one group unless the layer is a convolution in groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aimet_ext.core.affine import Grid
from aimet_ext.core.beams import beam_search
from aimet_ext.core.columns import Columns, Factor, column_blocks

# A move has to gain: ties, which rounding noise would turn back and forth, stay as they are.
_SHRINK = 1 - 1e-5
_NUMBERS = 2**22  # that are kept for each tensor while candidates of a range are rounded
_INNER = 16  # columns that are decided before the rest of their block takes notice


@torch.no_grad()
def gptq(
    weight: Tensor,
    grid: Grid,
    second: Tensor,
    pull: Tensor | None = None,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    beams: int = 1,
    block: int = 128,
    factor: Factor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Round column by column and compensate each error in the remaining columns (GPTQ).

    Column ``j`` takes the value that is best for its row if all later columns could still take
    any real value. With ``H = M Mᵀ``, ``M`` upper triangular, and ``t = pull M⁻ᵀ`` a row's
    objective is a constant and

        Σ_j (E_j M_jj + Σ_{i<j} E_i M_ij − t_j)².

    Real values of the later columns make all later terms 0, so ``E_j`` is chosen for term ``j``
    alone. The paper says the same with the inverse, which is not needed: its Cholesky factor of
    ``H⁻¹`` is ``M⁻¹``. With several beams every row keeps as many partial choices as that, those
    with the smallest sums so far, and branches each of them to the two nearest grid points.

    :param weight: ``[out, in]``, float32 or float64.
    :param grid: the grid to round to, held.
    :param second: ``H [in, in]`` or ``[groups, in, in]``.
    :param pull: ``[out, in]`` or None, see :class:`~aimet_ext.core.objective.SecondMoment`.
    :param damping: share of the mean diagonal that is added to the diagonal. Doubled until the
        factorisation succeeds, so that a singular H is no error.
    :param act_order: start with the columns whose inputs are largest.
    :param beams: partial choices kept per row; time grows in proportion.
    :param block: columns between two large matrix products; changes nothing but the time.
    :param factor: :meth:`Factor.of` this ``H``, damping and order, if it is known already.
    :param shift: :meth:`Factor.shift` of the pull, likewise.
    :returns: integers ``q [out, in]``. Columns that never see an input are rounded to nearest.
    :raises ValueError: H does not fit the weight, or no beam is asked for.
    """
    if beams < 1:
        raise ValueError(f"beams: at least 1 partial choice per row is required, got {beams}")
    problem = Columns.of(weight, grid, second, None)  # the pull is in the shift
    factor = factor or Factor.of(second, damping, act_order=act_order)
    order = factor.order
    if order is not None:
        problem = problem.permuted(order)
    if pull is None:
        shift = torch.zeros_like(problem.ideal)
    elif shift is None:
        shift = factor.shift(pull)
    shift = shift.to(weight.dtype)
    coupling = factor.coupling(weight.dtype)
    if beams == 1:
        codes = _nearest_plane(problem, coupling, problem.in_units(shift), block)
    else:
        cost = factor.diagonal.square().to(weight.dtype)
        codes = beam_search(problem, coupling, shift, cost, beams)
    if bool(problem.dead.any()):
        codes = torch.where(problem.dead, problem.nearest, codes)
    if order is not None:
        codes = torch.empty_like(codes).scatter_(1, order[:, :, None].expand_as(codes), codes)
    return problem.rows(codes)


@torch.no_grad()
def candidate_errors(
    weight: Tensor,
    second: Tensor,
    shift: Tensor | None,
    factor: Factor,
    *,
    block: int = 128,
) -> Callable[[Sequence[Grid]], Tensor]:
    """Return the function that gives the objective of every row as GPTQ rounds it to given grids.

    Grids have the same integers, and all go at once, in float32. What GPTQ leaves of its own
    objective is a sum over columns, ``Σ_j M_jj² (E_j − wish_j)²``, from which the
    objective without damping follows up to a constant of the row, for no more than the rounding
    costs.

    :param weight: ``[out, in]``.
    :param second: ``H [in, in]`` or ``[groups, in, in]``.
    :param shift: :meth:`Factor.shift` of the pull, None without one.
    :param factor: factor of ``H`` in the order of the weight.
    :param block: columns between two large matrix products.
    :returns: function from grids to ``[grids, out]``, up to a constant for each row.
    """
    groups, width = factor.upper.shape[:2]
    cost = (factor.diagonal.square() * factor.alive).float()
    damped = (factor.added * factor.alive).float()
    coupling, short, weight = factor.coupling(torch.float32), second.float(), weight.float()
    shift = None if shift is None else shift.float()

    def errors(grids: Sequence[Grid]) -> Tensor:
        at_once = max(1, _NUMBERS // (len(grids) * width)) if groups == 1 else len(weight)
        found = []
        for start in range(0, len(weight), at_once):
            rows = slice(start, start + at_once)
            each = [Columns.of(weight[rows], _grid_of(grid, rows), short, None) for grid in grids]
            problem = replace(
                each[0],
                ideal=torch.cat([one.ideal for one in each], -1),
                step=torch.cat([one.step for one in each], -1),
            )
            pulled = torch.zeros_like(problem.ideal)
            if shift is not None:
                own = shift if groups > 1 else shift[..., rows]
                pulled = problem.in_units(own.repeat(1, 1, len(grids)))
            total = _plane_errors(problem, coupling, pulled, block, cost, damped)
            if problem.is_even:
                total *= problem.step[:, 0].square()
            found.append(total.view(groups, len(grids), -1).transpose(0, 1).flatten(1))
        return torch.cat(found, 1)

    return errors


def _grid_of(grid: Grid, rows: slice) -> Grid:
    """Return the grid of some rows of a weight, none of which share a cell."""
    return replace(grid, scale=grid.scale[rows], offset=grid.offset[rows])


@torch.no_grad()
def coordinate_descent(
    weight: Tensor,
    codes: Tensor,
    grid: Grid,
    second: Tensor,
    pull: Tensor | None = None,
    *,
    sweeps: int = 8,
    block: int = 128,
) -> Tensor:
    """Move one code after another to the exact minimiser of its row's objective, others held.

        Ŵ_j ← nearest grid point to  Ŵ_j − g_j / H_jj,   g = E H − pull

    column after column, sweep after sweep, until nothing moves. No row's objective ever rises.

    :param weight: ``[out, in]``, float32 or float64.
    :param codes: integers to start from, ``[out, in]``.
    :param grid: the grid of the codes, held.
    :param second: ``H [in, in]`` or ``[groups, in, in]``.
    :param pull: ``[out, in]`` or None, see :class:`~aimet_ext.core.objective.SecondMoment`.
    :param sweeps: largest number of visits of a column.
    :param block: columns between two large matrix products; changes nothing but the time.
    :returns: integers ``[out, in]``. Columns that never see an input are left alone.
    :raises ValueError: H does not fit the weight.
    """
    problem = Columns.of(weight, grid, second, pull)
    if problem.pull is not None:
        problem = replace(problem, pull=problem.in_units(problem.pull))
    codes = problem.transposed(codes)
    error = (codes - problem.ideal) * problem.step_at(slice(None))
    kept, moving = codes.clone(), torch.arange(codes.shape[2], device=codes.device)
    for sweep in range(sweeps):
        moved = _sweep(problem, codes, error, block)  # of the rows at work
        kept[..., moving] = codes
        if not bool(moved.any()) or sweep + 1 == sweeps:
            break
        # A row that a sweep left as it was is done.
        moving, codes, error = moving[moved], codes[..., moved], error[..., moved]
        problem = problem.picked(moved)
    return problem.rows(kept)


def _nearest_plane(problem: Columns, coupling: Tensor, shift: Tensor, block: int) -> Tensor:
    """Return codes ``[groups, in, rows]`` of the greedy choice, one column at a time."""
    codes, error = torch.empty_like(problem.ideal), torch.empty_like(problem.ideal)
    for at in column_blocks(codes.shape[1], block):
        wish = _wish(problem, coupling, shift, error, at)
        codes[:, at], error[:, at] = _decide(
            wish, problem.ideal[:, at], coupling[:, at, at], problem, at
        )
    return codes


def _plane_errors(
    problem: Columns, coupling: Tensor, shift: Tensor, block: int, cost: Tensor, damped: Tensor
) -> Tensor:
    """Return the objective ``[groups, rows]`` of that choice, without damping."""
    error = torch.empty_like(problem.ideal)
    total = torch.zeros_like(problem.ideal[:, 0])
    for at in column_blocks(error.shape[1], block):
        wish = _wish(problem, coupling, shift, error, at)
        real = torch.empty_like(wish)
        codes, moves = _decide(
            wish, problem.ideal[:, at], coupling[:, at, at], problem, at, real=real
        )
        miss = real.sub_(codes).mul_(problem.step_at(at)).square_()
        total += miss.mul_(cost[:, at]).sum(1) - (moves.square() * damped[:, at]).sum(1)
        error[:, at] = moves
    return total


def _wish(problem: Columns, coupling: Tensor, shift: Tensor, error: Tensor, at: slice) -> Tensor:
    """Return where the codes of a block would go, by the errors of the columns before it."""
    past = slice(0, at.start)
    wish = torch.baddbmm(shift[:, at], coupling[:, at, past], error[:, past], alpha=-1)
    return wish.div_(problem.step_at(at)).add_(problem.ideal[:, at])


def _sweep(problem: Columns, codes: Tensor, error: Tensor, block: int) -> Tensor:
    """Visit every column once, in place; return which rows moved in any group, ``[rows]``."""
    moved = torch.zeros(codes.shape[2], dtype=torch.bool, device=codes.device)
    every = problem.diagonal
    for at in column_blocks(codes.shape[1], block):
        gradient = torch.bmm(problem.second[:, at], error)  # [groups, block, rows]
        if problem.pull is not None:
            gradient -= problem.pull[:, at]
        diagonal = every[:, at]
        wish = gradient.div_(diagonal).div_(problem.step_at(at)).mul_(-_SHRINK).add_(codes[:, at])
        coupling = problem.second[:, at, at] / diagonal * _SHRINK
        codes[:, at], moves = _decide(wish, codes[:, at], coupling, problem, at)
        moved |= (moves != 0).flatten(0, 1).any(0)
        error[:, at] += moves
    return moved


def _decide(
    wish: Tensor,
    origin: Tensor,
    coupling: Tensor,
    problem: Columns,
    at: slice,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Round the columns of a block in turn; a move from the origin shifts what later ones wish.

    :param wish: where each code would go if the block's other columns stayed at their origins,
        ``[groups, block, rows]``; overwritten.
    :param coupling: shift of row ``j``'s value by moves of columns ``i < j``,
        ``[groups, block, block]``.
    :param real: takes the numbers that are rounded, if given.
    :returns: codes, and their distances from the origin times the step.
    """
    moves = torch.empty_like(wish)
    step = problem.step_at(at)
    inverse = None if isinstance(step, float) else step.reciprocal()
    for inner in column_blocks(wish.shape[1], _INNER):
        values = wish[:, inner]
        if inner.start:
            past = slice(0, inner.start)
            shift = torch.bmm(coupling[:, inner, past], moves[:, past])
            values -= shift if inverse is None else shift.mul_(inverse[:, inner])
        _decide_each(
            values,
            origin[:, inner],
            coupling[:, inner, inner],
            (problem.grid.qmin, problem.grid.qmax),
            moves[:, inner],
            None if isinstance(step, float) else step[:, inner],
            None if real is None else real[:, inner],
        )
    return wish, moves


def _decide_each(
    values: Tensor,
    origin: Tensor,
    coupling: Tensor,
    limits: tuple[int, int],
    moves: Tensor,
    step: Tensor | None,
    real: Tensor | None,
) -> None:
    """Round columns ``[groups, few, rows]`` in place, each after the moves of those before it."""
    low, high = limits
    last = values.shape[1] - 1
    parts = values.unbind(1), origin.unbind(1), moves.unbind(1)
    for j, (code, begin, move) in enumerate(zip(*parts, strict=True)):
        if real is not None:
            real[:, j] = code
        code.round_().clamp_(low, high)
        torch.sub(code, begin, out=move)
        if step is not None:
            move.mul_(step[:, j])
        if j == last:
            break
        later = slice(j + 1, None)
        taken = moves[:, j : j + 1]
        if step is not None:
            taken = taken / step[:, later]
        values[:, later].addcmul_(coupling[:, later, j : j + 1], taken, value=-1)
