"""GPTQ (arXiv 2210.17323), a beam search over the same tree, and coordinate descent."""

from __future__ import annotations

import torch
from torch import Tensor

from aimet_ext.core.affine import Grid
from aimet_ext.core.columns import Columns, column_blocks

__all__ = ["coordinate_descent", "gptq"]

# A move has to gain: ties, which rounding noise would turn back and forth, stay as they are.
_SHRINK = 1 - 1e-5
# Candidates that a beam search works on at a time, which keeps them in the processor's cache, and
# numbers that it keeps for all of them.
_LANES, _NUMBERS = 8192, 2**24


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
    :returns: integers ``q [out, in]``. Columns that never see an input are rounded to nearest.
    :raises ValueError: H does not fit the weight, or no beam is asked for.
    """
    if beams < 1:
        raise ValueError(f"beams: at least 1 partial choice per row is required, got {beams}")
    problem = Columns.of(weight, grid, second, pull)
    order = None
    if act_order:
        order = problem.second.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        problem = problem.permuted(order)
    factor = _upper_factor(problem.second, damping)  # M, float64
    diagonal = factor.diagonal(dim1=1, dim2=2)[:, :, None]  # [groups, in, 1]
    shift = torch.zeros_like(problem.ideal)
    if problem.pull is not None:
        shift = torch.linalg.solve_triangular(factor, problem.pull.double(), upper=True)
        shift = (shift / diagonal).to(weight.dtype)  # t_j / M_jj
    coupling = (factor.mT / diagonal).to(weight.dtype)  # [groups, j, i] holds M_ij / M_jj
    if beams == 1:
        codes = _nearest_plane(problem, coupling, shift, block)
    else:
        cost = diagonal.square().to(weight.dtype)
        codes = _beam_search(problem, coupling, shift, cost, beams)
    codes = torch.where(problem.dead, problem.nearest, codes)
    if order is not None:
        codes = torch.empty_like(codes).scatter_(1, order[:, :, None].expand_as(codes), codes)
    return problem.rows(codes)


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
    for _ in range(sweeps):
        if not _sweep(problem, codes, error, block):
            break
    return problem.rows(codes)


def _upper_factor(second: Tensor, damping: float) -> Tensor:
    """Return upper triangular ``M``, ``M Mᵀ = H + damping``, in float64; dead columns decoupled."""
    flipped = second.double().flip(1, 2)
    diagonal = flipped.diagonal(dim1=1, dim2=2)  # [groups, in]
    dead = diagonal <= 0
    mean = diagonal.sum(1, keepdim=True) / (~dead).sum(1, keepdim=True).clamp_min(1)
    mean = torch.where(mean > 0, mean, 1.0)
    while True:
        damped = flipped + torch.diag_embed(damping * mean + dead * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            return lower.flip(1, 2)
        damping = max(2 * damping, 1e-10)


def _nearest_plane(problem: Columns, coupling: Tensor, shift: Tensor, block: int) -> Tensor:
    """Return codes ``[groups, in, rows]`` of the greedy choice, one column at a time."""
    codes, error = torch.empty_like(problem.ideal), torch.empty_like(problem.ideal)
    for at in column_blocks(codes.shape[1], block):
        past = slice(0, at.start)
        wish = torch.baddbmm(shift[:, at], coupling[:, at, past], error[:, past], alpha=-1)
        wish = wish.div_(problem.step_at(at)).add_(problem.ideal[:, at])
        codes[:, at], error[:, at] = _decide(
            wish, problem.ideal[:, at], coupling[:, at, at], problem, at
        )
    return codes


def _sweep(problem: Columns, codes: Tensor, error: Tensor, block: int) -> bool:
    """Visit every column once, in place; whether anything moved."""
    moved = False
    for at in column_blocks(codes.shape[1], block):
        gradient = torch.bmm(problem.second[:, at], error)  # [groups, block, rows]
        if problem.pull is not None:
            gradient -= problem.pull[:, at]
        diagonal = problem.diagonal[:, at]
        wish = (gradient / diagonal).div_(problem.step_at(at)).mul_(-_SHRINK).add_(codes[:, at])
        coupling = problem.second[:, at, at] / diagonal * _SHRINK
        codes[:, at], moves = _decide(wish, codes[:, at], coupling, problem, at)
        if moves.any():
            moved = True
            error[:, at] += moves
    return moved


def _decide(
    wish: Tensor, origin: Tensor, coupling: Tensor, problem: Columns, at: slice
) -> tuple[Tensor, Tensor]:
    """Round the columns of a block in turn; a move from the origin shifts what later ones wish.

    :param wish: where each code would go if the block's other columns stayed at their origins,
        ``[groups, block, rows]``; overwritten.
    :param coupling: shift of row ``j``'s value by moves of columns ``i < j``,
        ``[groups, block, block]``.
    :returns: codes, and their distances from the origin times the step.
    """
    step = problem.step_at(at)
    inverse = step.reciprocal()
    moves = torch.empty_like(wish)
    for j in range(wish.shape[1]):
        here = slice(j, j + 1)
        code = wish[:, here]
        if j:
            code -= torch.bmm(coupling[:, here, :j], moves[:, :j]).mul_(inverse[:, here])
        code.round_().clamp_(problem.qmin, problem.qmax)
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
        best[..., part] = search.run(problem.qmin, problem.qmax)
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
        for at in column_blocks(width, self.block):
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
