"""GPTQ (arXiv 2210.17323), a beam search over the same tree, and coordinate descent.

All choose integers ``q``, the grid held, that lower for every output row

    E H Eᵀ − 2 E · pull,   E = Ŵ − W = (q − ideal) · step,

where ``ideal`` is the weight in units of the grid. All output rows go at once, so tensors are kept
transposed, ``[groups, in, rows]``, with one group unless the layer is a convolution in groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from aimet_ext.core.affine import Grid, quantize, spread

# A move has to gain: ties, which rounding noise would turn back and forth, stay as they are.
_SHRINK = 1 - 1e-5
# Candidates that a beam search works on at a time, which keeps them in the processor's cache, and
# numbers that it keeps for all of them.
_LANES, _NUMBERS = 8192, 2**24
_INNER = 16  # columns that are decided before the rest of their block takes notice


@dataclass(frozen=True, eq=False)
class Columns:
    """A weight in units of its grid, transposed.

    :param ideal: the real numbers that codes stand for, ``[groups, in, rows]``.
    :param step: scales, ``[groups, in, rows]``, or ``[groups, 1, rows]`` if equal along a row.
    :param second: ``H [groups, in, in]``.
    :param pull: ``[groups, in, rows]`` or None.
    :param weight: the weight as it came, ``[out, in]``.
    :param order: order of the columns in every group, ``[groups, in]``; None for that of the
        weight.
    """

    ideal: Tensor
    step: Tensor
    second: Tensor
    pull: Tensor | None
    weight: Tensor
    grid: Grid
    order: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, grid: Grid, second: Tensor, pull: Tensor | None) -> Columns:
        """Lay out a problem.

        :param weight: ``[out, in]``.
        :param second: ``H [in, in]``, or ``[groups, in, in]`` where ``groups`` divides ``out``.
        :param pull: ``[out, in]`` or None, see :class:`~aimet_ext.core.objective.SecondMoment`.
        :raises ValueError: H does not fit the weight.
        """
        out, width = weight.shape
        groups = 1 if second.dim() == 2 else second.shape[0]
        if second.shape[-2:] != (width, width) or out % groups:
            raise ValueError(
                f"second moments [in, in] or [groups, in, in] of a weight {tuple(weight.shape)} "
                f"are required, got {tuple(second.shape)}"
            )
        second = second.to(weight.dtype).view(groups, width, width)
        step = _cells(grid.scale, weight, groups)
        zero = _cells(grid.offset, weight, groups) + grid.zero_point_shift
        if pull is not None:  # what never sees an input has no target to be pulled to
            alive = second.diagonal(dim1=1, dim2=2) > 0
            pull = _transposed(pull.to(weight.dtype), groups) * alive[:, :, None]
        ideal = _transposed(weight, groups).div_(step).sub_(zero)
        return cls(ideal, step, second, pull, weight, grid)

    @cached_property
    def nearest(self) -> Tensor:
        """Codes of plain rounding, ``[groups, in, rows]``."""
        codes = self.transposed(quantize(self.weight, self.grid))
        return codes if self.order is None else codes.take_along_dim(self.order[:, :, None], 1)

    @property
    def diagonal(self) -> Tensor:
        """``H_jj``, 1 where no input was ever seen, ``[groups, in, 1]``."""
        diagonal = self.second.diagonal(dim1=1, dim2=2)[:, :, None]
        return torch.where(diagonal > 0, diagonal, 1.0)

    @property
    def dead(self) -> Tensor:
        """Columns whose input is always 0, bool ``[groups, in, 1]``."""
        return self.second.diagonal(dim1=1, dim2=2)[:, :, None] <= 0

    def step_at(self, columns: slice) -> Tensor:
        """Return the scales of some columns, ``[groups, columns, rows]``."""
        return self.step.expand_as(self.ideal)[:, columns]

    def transposed(self, codes: Tensor) -> Tensor:
        """Return ``[out, in]`` as a new tensor ``[groups, in, rows]``."""
        return _transposed(codes.to(self.ideal.dtype), self.ideal.shape[0])

    def rows(self, codes: Tensor) -> Tensor:
        """Return ``[groups, in, rows]`` as ``[out, in]``."""
        return codes.mT.reshape(-1, codes.shape[1])

    def permuted(self, order: Tensor) -> Columns:
        """Return the columns of every group in another order ``[groups, in]``."""

        def pick(tensor: Tensor) -> Tensor:
            return tensor.take_along_dim(order[:, :, None], 1)

        return replace(
            self,
            ideal=pick(self.ideal),
            step=self.step if self.step.shape[1] == 1 else pick(self.step),
            second=pick(self.second).take_along_dim(order[:, None, :], 2),
            pull=None if self.pull is None else pick(self.pull),
            order=order,
        )

    def picked(self, rows: Tensor) -> Columns:
        """Return some rows of every group, by a mask ``[rows]``."""
        pull = None if self.pull is None else self.pull[..., rows]
        return replace(self, ideal=self.ideal[..., rows], step=self.step[..., rows], pull=pull)

    def errors(self, codes: Tensor) -> Tensor:
        """Return the objective of every row, ``[groups, rows]``, in float64."""
        error = ((codes - self.ideal) * self.step).double()
        gradient = self.second.double() @ error
        if self.pull is not None:
            gradient -= 2 * self.pull
        return (gradient * error).sum(1)


def _column_blocks(width: int, block: int) -> list[slice]:
    """Return consecutive slices of at most ``block`` columns."""
    return [slice(start, min(start + block, width)) for start in range(0, width, block)]


def _transposed(tensor: Tensor, groups: int) -> Tensor:
    return tensor.reshape(groups, -1, tensor.shape[1]).mT.clone(
        memory_format=torch.contiguous_format
    )


def _cells(values: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Return the numbers of the grid's cells for every weight, ``[groups, in or 1, rows]``."""
    varies = values.dim() > 0 and values.shape[-1] > 1
    return _transposed(spread(values, weight if varies else weight[:, :1]), groups)


@dataclass(frozen=True, eq=False)
class Factor:
    """``H + damping = M Mᵀ``, ``M`` upper triangular: one for all layers that read one input.

    :param upper: ``M``, float64, ``[groups, in, in]``; columns without an input are decoupled.
    :param added: number that was added to the diagonal, ``[groups, 1, 1]``.
    :param order: order of the columns, ``[groups, in]``; None for that of the weights.
    """

    upper: Tensor
    added: Tensor
    order: Tensor | None

    @classmethod
    def of(cls, second: Tensor, damping: float = 0.01, *, act_order: bool = False) -> Factor:
        """Factorise a second moment; the parameters are those of :func:`gptq`."""
        second = second.double().view(-1, *second.shape[-2:])
        order = None
        if act_order:
            diagonal = second.diagonal(dim1=1, dim2=2)
            order = diagonal.argsort(dim=1, descending=True, stable=True)
            second = second.take_along_dim(order[:, :, None], 1)
            second = second.take_along_dim(order[:, None, :], 2)
        return cls(*_upper_factor(second, damping), order)

    @cached_property
    def diagonal(self) -> Tensor:
        """``M_jj``, ``[groups, in, 1]``."""
        return self.upper.diagonal(dim1=1, dim2=2)[:, :, None]

    def coupling(self, dtype: torch.dtype) -> Tensor:
        """Return ``M_ij / M_jj`` at ``[groups, j, i]``."""
        return (self.upper.mT / self.diagonal).to(dtype)

    def shift(self, pull: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``t_j / M_jj`` with ``t = pull M⁻ᵀ``, ``[groups, in, rows]``."""
        shift = torch.linalg.solve_triangular(self.upper, pull.double(), upper=True)
        return (shift / self.diagonal).to(dtype)


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
    :returns: integers ``q [out, in]``. Columns that never see an input are rounded to nearest.
    :raises ValueError: H does not fit the weight, or no beam is asked for.
    """
    if beams < 1:
        raise ValueError(f"beams: at least 1 partial choice per row is required, got {beams}")
    problem = Columns.of(weight, grid, second, pull)
    factor = factor or Factor.of(second, damping, act_order=act_order)
    order = factor.order
    if order is not None:
        problem = problem.permuted(order)
    shift = torch.zeros_like(problem.ideal)
    if problem.pull is not None:
        shift = factor.shift(problem.pull, weight.dtype)
    coupling = factor.coupling(weight.dtype)
    if beams == 1:
        codes = _nearest_plane(problem, coupling, shift, block)
    else:
        cost = factor.diagonal.square().to(weight.dtype)
        codes = _beam_search(problem, coupling, shift, cost, beams)
    if bool(problem.dead.any()):
        codes = torch.where(problem.dead, problem.nearest, codes)
    if order is not None:
        codes = torch.empty_like(codes).scatter_(1, order[:, :, None].expand_as(codes), codes)
    return problem.rows(codes)


@torch.no_grad()
def candidate_errors(
    weight: Tensor,
    grids: Sequence[Grid],
    second: Tensor,
    pull: Tensor | None,
    factor: Factor,
    *,
    block: int = 128,
) -> Tensor:
    """Return the objective of every row as GPTQ rounds it to each of several grids.

    All grids go at once, in float32. What GPTQ leaves of its own objective is a sum over columns,
    ``Σ_j M_jj² (E_j − wish_j)²``, from which the objective without damping follows up to a
    constant of the row, for no more than the rounding costs.

    :param weight: ``[out, in]``.
    :param grids: grids with the same integers.
    :param second: ``H [in, in]`` or ``[groups, in, in]``.
    :param pull: ``[out, in]`` or None.
    :param factor: factor of ``H`` in the order of the weight.
    :param block: columns between two large matrix products.
    :returns: ``[grids, out]``, up to a constant for each row.
    """
    groups, width = factor.upper.shape[:2]
    alive = second.diagonal(dim1=-2, dim2=-1).view(groups, width, 1) > 0
    cost = (factor.diagonal.square() * alive).float()
    damped = (factor.added * alive).float()
    coupling, short = factor.coupling(torch.float32), second.float()
    at_once = max(1, _NUMBERS // (4 * len(grids) * width)) if groups == 1 else len(weight)
    found = []
    for start in range(0, len(weight), at_once):
        rows = slice(start, start + at_once)
        part, own = weight[rows].float(), None if pull is None else pull[rows]
        each = [Columns.of(part, _grid_of(grid, rows), short, own) for grid in grids]
        problem = replace(
            each[0],
            ideal=torch.cat([one.ideal for one in each], -1),
            step=torch.cat([one.step for one in each], -1),
        )
        shift = torch.zeros_like(problem.ideal)
        if problem.pull is not None:
            shift = factor.shift(problem.pull, torch.float32).repeat(1, 1, len(grids))
        total = _plane_errors(problem, coupling, shift, block, cost, damped)
        found.append(total.view(groups, len(grids), -1).transpose(0, 1).flatten(1))
    return torch.cat(found, 1)


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
    codes = problem.transposed(codes)
    error = (codes - problem.ideal) * problem.step
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


def _upper_factor(second: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return upper triangular ``M``, ``M Mᵀ = H + damping``, and the number that was added.

    Columns without an input are decoupled.
    """
    flipped = second.flip(1, 2)
    diagonal = flipped.diagonal(dim1=1, dim2=2)  # [groups, in]
    dead = diagonal <= 0
    mean = diagonal.sum(1, keepdim=True) / (~dead).sum(1, keepdim=True).clamp_min(1)
    mean = torch.where(mean > 0, mean, 1.0)
    while True:
        damped = flipped + torch.diag_embed(damping * mean + dead * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            return lower.flip(1, 2), (damping * mean)[:, :, None]
        damping = max(2 * damping, 1e-10)


def _nearest_plane(problem: Columns, coupling: Tensor, shift: Tensor, block: int) -> Tensor:
    """Return codes ``[groups, in, rows]`` of the greedy choice, one column at a time."""
    codes, error = torch.empty_like(problem.ideal), torch.empty_like(problem.ideal)
    for at in _column_blocks(codes.shape[1], block):
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
    for at in _column_blocks(error.shape[1], block):
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
    for at in _column_blocks(codes.shape[1], block):
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
    step = problem.step_at(at)
    inverse = step.reciprocal()
    moves = torch.empty_like(wish)
    low, high = problem.grid.qmin, problem.grid.qmax

    def settle(columns: slice, begin: int) -> Tensor:
        """Return the wishes of columns after the moves of those from ``begin`` on."""
        values = wish[:, columns]
        if columns.start > begin:
            past = slice(begin, columns.start)
            shift = torch.bmm(coupling[:, columns, past], moves[:, past])
            values -= shift.mul_(inverse[:, columns])
        return values

    for inner in _column_blocks(wish.shape[1], _INNER):
        settle(inner, 0)
        for j in range(inner.start, inner.stop):
            here = slice(j, j + 1)
            code = settle(here, inner.start)
            if real is not None:
                real[:, here] = code
            code.round_().clamp_(low, high)
            torch.sub(code, origin[:, here], out=moves[:, here]).mul_(step[:, here])
    return wish, moves


def _beam_search(
    problem: Columns, coupling: Tensor, shift: Tensor, cost: Tensor, beams: int
) -> Tensor:
    """Return the codes ``[groups, in, rows]`` with the smallest sum that the search finds."""
    groups, width, rows = problem.ideal.shape
    best = torch.empty_like(problem.ideal)
    step = problem.step.expand_as(problem.ideal)
    at_once = max(1, min(_LANES, _NUMBERS // width) // (beams * groups))
    for start in range(0, rows, at_once):
        part = slice(start, start + at_once)
        search = _Beams(
            problem.ideal[..., part], step[..., part], coupling, cost, shift[..., part], beams
        )
        best[..., part] = search.run(problem.grid.qmin, problem.grid.qmax)
    return best


class _Beams:
    """A beam search over the columns of some rows; the tensors as in :func:`_beam_search`."""

    block = 32

    def __init__(
        self,
        ideal: Tensor,
        step: Tensor,
        coupling: Tensor,
        cost: Tensor,
        shift: Tensor,
        beams: int,
    ) -> None:
        self.ideal, self.step, self.coupling, self.cost = ideal, step, coupling, cost
        self.beams = beams
        groups, _, rows = ideal.shape
        # Of every column still to come: what its error would be by choice, [g, in, rows, beams].
        self.wish = shift[..., None].repeat(1, 1, 1, beams)
        self.total = shift.new_full((groups, rows, beams), torch.inf)
        self.total[..., 0] = 0  # all beams are the same at first: only one counts
        self.codes: list[Tensor] = []
        self.parents: list[Tensor] = []

    def run(self, qmin: int, qmax: int) -> Tensor:
        """Return the codes of the best beam, ``[groups, in, rows]``."""
        width = self.ideal.shape[1]
        for at in _column_blocks(width, self.block):
            self._advance(at, qmin, qmax)
        best = torch.zeros_like(self.parents[0][..., :1], dtype=torch.long)  # beams are sorted
        path = []
        for codes, parents in zip(reversed(self.codes), reversed(self.parents), strict=True):
            path.append(codes.gather(-1, best).squeeze(-1))
            best = parents.gather(-1, best).long()
        return torch.stack(path[::-1], 1).to(self.ideal.dtype)

    def _advance(self, at: slice, qmin: int, qmax: int) -> None:
        """Branch and prune over a block of columns, then update the later columns."""
        groups, _, rows = self.ideal.shape
        size = at.stop - at.start
        error = self.wish.new_empty(groups, size, rows, self.beams)
        origin = torch.arange(self.beams, device=error.device).expand(groups, rows, -1)
        for j in range(size):
            column = at.start + j
            wish = self.wish[:, column].gather(-1, origin)  # [groups, rows, beams]
            if j:
                lower = self.coupling[:, column : column + 1, at.start : column]
                done = error[:, :j].reshape(groups, j, -1)
                wish = wish - torch.bmm(lower, done).view_as(wish)
            chosen, parent = self._branch(column, wish, qmin, qmax)
            if j:
                error[:, :j] = error[:, :j].gather(-1, parent[:, None].expand(-1, j, -1, -1))
            torch.sub(chosen, self.ideal[:, column, :, None], out=error[:, j])
            error[:, j] *= self.step[:, column, :, None]
            origin = origin.gather(-1, parent)
        if at.stop < self.ideal.shape[1]:
            later = self.wish[:, at.stop :]
            later = later.gather(-1, origin[:, None].expand(-1, later.shape[1], -1, -1))
            self.wish[:, at.stop :] = torch.baddbmm(
                later.flatten(2),
                self.coupling[:, at.stop :, at],
                error.flatten(2),
                alpha=-1,
            ).view_as(later)

    def _branch(self, column: int, wish: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        """Extend every beam by its two nearest codes; return the best ones and their parents."""
        step = self.step[:, column, :, None]
        real = wish / step + self.ideal[:, column, :, None]
        first = real.round()
        other = torch.where(real > first, first + 1, first - 1)
        codes = torch.cat([first, other], -1).clamp_(qmin, qmax)  # [groups, rows, 2 beams]
        miss = (codes - torch.cat([real, real], -1)).mul_(step).square_()
        total = torch.cat([self.total, self.total], -1)
        total += miss.mul_(self.cost[:, column, :, None])
        twice = codes[..., : self.beams] == codes[..., self.beams :]
        total[..., self.beams :].masked_fill_(twice, torch.inf)
        self.total, index = total.topk(self.beams, -1, largest=False, sorted=True)
        parent, chosen = index % self.beams, codes.gather(-1, index)
        self.codes.append(chosen.to(torch.int16))
        self.parents.append(parent.to(torch.int32))
        return chosen, parent
