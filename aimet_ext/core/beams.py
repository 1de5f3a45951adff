"""A beam search over the tree of roundings that GPTQ descends greedily."""

from __future__ import annotations

import torch
from torch import Tensor

from aimet_ext.core.columns import Columns, column_blocks

# Candidates that a beam search works on at a time, which keeps them in the processor's cache, and
# numbers that it keeps for all of them.
_LANES, _NUMBERS = 8192, 2**24


def beam_search(
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
    """A beam search over the columns of some rows; the tensors as in :func:`beam_search`."""

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
