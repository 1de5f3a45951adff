"""Scale pairs as the layers of one stage read them: which input column takes which entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aimet_ext.core.equivalence import ScalePair, smoothquant_scale
from aimet_ext.techniques.blockwise.block import Block


@dataclass(frozen=True, eq=False)
class ReadPair:
    """A scale pair and the layers of a stage that read it.

    :param readers: Names of the layers, which all take the same entries.
    :param index: Entry of the scale that each input column takes, shape [in].
    """

    block: Block
    pair: ScalePair
    readers: tuple[str, ...]
    index: Tensor

    @property
    def groups(self) -> list[Tensor]:
        """Columns that take each entry."""
        order = torch.argsort(self.index, stable=True)
        counts = torch.bincount(self.index, minlength=self.pair.size)
        return list(order.split(counts.tolist()))

    def by_entry(self, columns: Tensor, how: Literal["amax", "mean"]) -> Tensor:
        """Return the largest or the mean number of the columns of each entry.

        :param columns: Numbers by column, shape [in].
        """
        entries = columns.new_zeros(self.pair.size)
        return entries.scatter_reduce(0, self.index, columns, how, include_self=False)

    def entries(self, columns: Tensor) -> Tensor:
        """Return the entries of a scale whose multipliers of the input columns these are.

        :param columns: Shape [in]; equal for the columns of an entry.
        :raises ValueError: They are not, or not as many as there are columns.
        """
        layer = f"{self.block.name}.{self.readers[0]}"
        if len(columns) != len(self.index):
            raise ValueError(
                f"{layer}: a multiplier for each of {len(self.index)} columns is required, got "
                f"{len(columns)}"
            )
        columns = columns.to(self.block.weight(self.readers[0]))
        entries = self.by_entry(columns, "mean")
        if not torch.allclose(entries[self.index], columns, rtol=1e-4):
            raise ValueError(
                f"{layer}: columns that share a scale must have one multiplier, as all heads that "
                "read one value head do; these scales would change the float function"
            )
        return entries

    def smoothquant(self, peak: Tensor, alpha: float) -> Tensor:
        """Return the scale by SmoothQuant's formula.

        :param peak: Largest magnitude of each input column, shape [in].
        """
        weight = torch.stack([self.block.weight(name).abs().amax(0) for name in self.readers])
        return smoothquant_scale(
            self.by_entry(peak.to(weight), "amax"), self.by_entry(weight.amax(0), "amax"), alpha
        )


def read_pairs(block: Block, layers: Sequence[str]) -> list[ReadPair]:
    """Return the pairs that some layers read, where they take the same entries.

    Pairs of which a layer anywhere takes some entries alone are left out: no stage tells for all.
    """
    found = []
    for pair in block.pairs:
        own = [s.index for s in pair.sides if s.axis == "in" and s.index is not None]
        if any(len(index[index >= 0].unique()) < pair.size for index in own):
            continue
        indices: dict[str, Tensor] = {}
        for side in pair.sides:
            if side.axis == "in" and side.module in layers:
                weight = block.weight(side.module)
                width = weight.shape[1]
                index = torch.arange(width) if side.index is None else side.index
                if len(index) != width or bool((index < 0).any()):
                    break  # it reads some columns of them alone
                indices[side.module] = index.to(weight.device)
        else:
            first = next(iter(indices.values()), None)
            if first is not None and all(torch.equal(first, i) for i in indices.values()):
                found.append(ReadPair(block, pair, tuple(indices), first))
    return found
