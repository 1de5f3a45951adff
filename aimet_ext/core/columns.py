"""A layer's rounding laid out in columns, and the factor of its inputs' second moment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from aimet_ext.core.affine import Grid, quantize, spread


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

    @property
    def is_even(self) -> bool:
        """True if every row has one step: in units of that, the best choices are the same."""
        return self.step.shape[1] == 1

    def step_at(self, columns: slice) -> Tensor | float:
        """Return the scales of some columns, ``[groups, columns, rows]``, in units of the row's."""
        return 1.0 if self.is_even else self.step[:, columns]

    def in_units(self, numbers: Tensor) -> Tensor:
        """Return derivatives by the weight ``[groups, in, rows]``, in units of the row's step."""
        return numbers / self.step if self.is_even else numbers

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


@dataclass(frozen=True, eq=False)
class Factor:
    """``H + damping = M Mᵀ``, ``M`` upper triangular: one for all layers that read one input.

    :param upper: ``M``, float64, ``[groups, in, in]``; columns without an input are decoupled.
    :param added: number that was added to the diagonal, ``[groups, 1, 1]``.
    :param alive: columns that ever see an input, bool ``[groups, in, 1]``.
    :param order: order of the columns, ``[groups, in]``; None for that of the weights.
    """

    upper: Tensor
    added: Tensor
    alive: Tensor
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
        alive = second.diagonal(dim1=1, dim2=2)[:, :, None] > 0
        return cls(*_upper_factor(second, damping), alive, order)

    @cached_property
    def diagonal(self) -> Tensor:
        """``M_jj``, ``[groups, in, 1]``."""
        return self.upper.diagonal(dim1=1, dim2=2)[:, :, None]

    def coupling(self, dtype: torch.dtype) -> Tensor:
        """Return ``M_ij / M_jj`` at ``[groups, j, i]``."""
        return (self.upper.mT / self.diagonal).to(dtype)

    def shift(self, pull: Tensor) -> Tensor:
        """Return ``t_j / M_jj`` with ``t = pull M⁻ᵀ``, ``[groups, in, rows]``.

        :param pull: ``[out, in]``; columns that never see an input have no target to be pulled to.
        """
        columns = _transposed(pull.double(), len(self.upper))
        if self.order is not None:
            columns = columns.take_along_dim(self.order[:, :, None], 1)
        shift = torch.linalg.solve_triangular(self.upper, columns.mul_(self.alive), upper=True)
        return shift.div_(self.diagonal).to(pull.dtype)


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
