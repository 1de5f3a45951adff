"""A weight that is to be rounded column after column, and the objective it is judged by.

Rounding methods choose integers ``q``, the grid held, that lower for every output row

    E H Eᵀ − 2 E · pull,   E = Ŵ − W = (q − ideal) · step,

where ``ideal`` is the weight in units of the grid. All output rows go at once, so tensors are kept
transposed, ``[groups, in, rows]``, with one group unless the layer is a convolution in groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aimet_ext.core.affine import Grid, quantize, spread

__all__ = ["Columns", "column_blocks"]


@dataclass(frozen=True, eq=False)
class Columns:
    """A weight in units of its grid, transposed.

    :param ideal: the real numbers that codes stand for, ``[groups, in, rows]``.
    :param step: scales, ``[groups, in, rows]``, or ``[groups, 1, rows]`` if equal along a row.
    :param second: ``H [groups, in, in]``.
    :param pull: ``[groups, in, rows]`` or None.
    :param nearest: codes of plain rounding, ``[groups, in, rows]``.
    """

    ideal: Tensor
    step: Tensor
    second: Tensor
    pull: Tensor | None
    nearest: Tensor
    qmin: int
    qmax: int

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
        ideal = _transposed(weight, groups) / step - zero
        nearest = _transposed(quantize(weight, grid).to(weight.dtype), groups)
        return cls(ideal, step, second, pull, nearest, grid.qmin, grid.qmax)

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
            nearest=pick(self.nearest),
        )

    def errors(self, codes: Tensor) -> Tensor:
        """Return the objective of every row, ``[groups, rows]``, in float64."""
        error = ((codes - self.ideal) * self.step).double()
        gradient = self.second.double() @ error
        if self.pull is not None:
            gradient -= 2 * self.pull
        return (gradient * error).sum(1)


def column_blocks(width: int, block: int) -> list[slice]:
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
