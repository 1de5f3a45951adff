"""The parameters of a model's parts with rotations multiplied in, and what was done to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aimet_ext.core.hadamard import Rotation
from aimet_ext.core.turns import Turn, gains_of, turn, without_gains
from aimet_ext.models.residual import ReadNorm, ResidualEnds, read_norms, value_pair, writers
from aimet_ext.models.topology import BlockTopology

Params = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Rotations:
    """The rotations of a model, or matrices ``[n, n]`` in their places while they are learnt.

    :param hidden: R1, of the hidden states; None without it.
    :param heads: R2 of each block, of the channels of a head, by the block's name.
    """

    hidden: Rotation | Tensor | None = None
    heads: Mapping[str, Rotation | Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Folded:
    """A part of a model after its rotations were multiplied in.

    :param params: All of its parameters; in float64 where it matters.
    :param turns: What was done to it, in order, each with the pair and kind for the ledger.
    """

    params: Params
    turns: list[tuple[str, str, list[Turn]]] = field(default_factory=list)

    def fold_gains(self, norm: ReadNorm) -> None:
        """Have the readers of a norm take over its gains."""
        offset = norm.gain_offset
        gains = gains_of(self.params, norm.module, offset)
        if bool((gains == 1).all()):
            return
        self.params.update(without_gains(self.params, norm.module, offset))
        inverse = torch.where(gains == 0, gains, 1 / gains)
        sides = [Turn(norm.module, "out", inverse)]
        for reader in norm.readers:
            sides.append(Turn(reader, "in", gains))
            self.params.update(turn(self.params, sides[-1]))
        self.turns.append((f"{norm.module} gains", "norm_gain", sides))

    def turn(self, pair: str, kind: str, sides: Sequence[Turn]) -> None:
        """Turn the channels of some layers."""
        changed = []
        for side in sides:
            found = turn(self.params, side)
            self.params.update(found)
            if found:
                changed.append(side)
        self.turns.append((pair, kind, changed))


def fold_block(params: Mapping[str, Tensor], block: BlockTopology, rotations: Rotations) -> Folded:
    """Return the parameters of a block with its rotations multiplied in.

    :param params: Named within the block; never changed.
    """
    folded, hidden = Folded(dict(params)), rotations.hidden
    if hidden is not None:
        factor = hidden if isinstance(hidden, Rotation) else hidden[None]
        norms = read_norms(block)
        for norm in norms:
            folded.fold_gains(norm)
        readers = [Turn(name, "in", factor) for norm in norms for name in norm.readers]
        outs = [*(norm.module for norm in norms), *writers(block)]
        made = [Turn(name, "out", factor) for name in outs]
        folded.turn("hidden states", "r1", [*readers, *made])
    if block.name in rotations.heads:
        head = rotations.heads[block.name]
        matrix = head.matrix if isinstance(head, Rotation) else head
        value, output = value_pair(block).sides
        columns = params[f"{output.module}.weight"].shape[1]
        rows = value.rows or (0, params[f"{value.module}.weight"].shape[0])
        folded.turn(
            "heads of values",
            "r2",
            [
                Turn(value.module, "out", _repeated(matrix, rows[1] - rows[0]), value.rows),
                Turn(output.module, "in", _repeated(matrix, columns)),
            ],
        )
    return folded


def _repeated(matrix: Tensor, width: int) -> Tensor:
    """Return ``[n, d, d]``, one matrix for all heads of a width."""
    return matrix.expand(width // len(matrix), -1, -1)


def fold_ends(params: Mapping[str, Tensor], ends: ResidualEnds, hidden: Rotation) -> Folded:
    """Return what stands before and behind the blocks with R1 multiplied in.

    :param params: By full names; never changed.
    """
    folded = Folded(dict(params))
    folded.fold_gains(ends.norm)
    sides = [Turn(name, "in", hidden) for name in (*ends.embeddings, *ends.norm.readers)]
    folded.turn("hidden states", "r1", [*sides, Turn(ends.norm.module, "out", hidden)])
    return folded
