"""Sums over the inputs of a stage of a block, from one pass of the float block."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from aimet_ext.core.objective import SecondMoment
from aimet_ext.data.geometry import Geometry
from aimet_ext.data.moments import MomentSum


class StageInputs:
    """Sums over the rows of a stage's inputs, as they come.

    :param name: Name of the stage's first layer, for messages.
    :param layer: That layer.
    :param moments: True to sum second moments as well.
    :param mapped_dir: Folder for sums that do not fit in memory.
    """

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        *,
        moments: bool,
        mapped_dir: str | Path | None = None,
    ) -> None:
        self.name = name
        self._geometry = Geometry.of(layer)
        self._moments, self._folder = moments, mapped_dir
        self._sum: MomentSum | None = None
        self.magnitudes = Magnitudes()

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Add a batch.

        :param x: Input of the layer.
        :param mask: Bool of its leading dimensions, true for what counts; None for all.
        :raises ValueError: It holds NaN or infinity.
        """
        for rows in self._geometry.chunks(x, mask):
            if self._moments:
                if self._sum is None:
                    wide = torch.promote_types(rows.dtype, torch.float32)
                    self._sum = MomentSum(
                        rows.shape[2], device=rows.device, dtype=wide, mapped_dir=self._folder
                    )
                try:
                    self._sum.add(rows)
                except ValueError as error:
                    raise ValueError(f"{self.name}: {error}") from error
            self.magnitudes.add(rows)

    def moment(self, like: Tensor) -> SecondMoment:
        """Return ``H`` on the device of a weight and in its type."""
        assert self._sum is not None, "a run without batches, or without moments"
        moment = self._sum.result(like.dtype)
        return SecondMoment(moment.second.to(like.device), None, moment.tokens)


class Magnitudes:
    """Largest and mean ``|x|`` of every element of a row.

    :ivar peak: Largest, shape [in].
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0
        self.peak = torch.zeros(())

    def add(self, rows: Tensor, float_rows: Tensor | None = None) -> None:
        """Add rows.

        :param rows: Shape [groups, tokens, in].
        :param float_rows: Not looked at: those of the float stream.
        """
        size = rows.flatten(0, 1).abs()  # [tokens, in]
        if not len(size):
            return
        peak, total = size.amax(0), size.sum(0, dtype=torch.float64)
        self._sum = total if self._sum is None else self._sum + total
        self.peak = torch.maximum(self.peak.to(peak), peak)
        self._count += len(size)

    @property
    def mean(self) -> Tensor:
        """Mean, shape [in]."""
        assert self._sum is not None, "a run without rows"
        return (self._sum / self._count).to(self.peak.dtype)

    def checked(self, name: str) -> Magnitudes:
        """Return these numbers, which are finite.

        :param name: Name of the layer, for the message.
        :raises ValueError: There were no rows, or one holds NaN or infinity.
        """
        if self._sum is None:
            raise ValueError(f"{name}: at least one token that counts is required, got none")
        if not bool(torch.isfinite(self._sum).all()):
            raise ValueError(
                f"{name}: inputs must be finite, got NaN or infinity; look for the layer upstream "
                "that overflows"
            )
        return self
