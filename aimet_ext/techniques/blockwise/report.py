"""The report of a block-wise technique, for people and for files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aimet_ext.files.folders import replace_file

__all__ = ["BlockReport", "BlockwiseReport"]


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """The outcome of one block.

    Losses are mean squared errors of the block's output over all tokens that count, on the
    quantized stream, against the float stream's output.

    :param name: Name of the block.
    :param loss_nearest: Loss with plain nearest rounding and no transform.
    :param loss_before: Loss at the start of training.
    :param loss_after: Loss as deployed, computed by the simulation itself.
    :param sqnr_db: SQNR of the output as deployed, in dB.
    :param kept: Origin of the deployed state; ``"nearest"`` if nothing learnt was better.
    :param seconds: Time that the block took.
    :param peak_memory_bytes: Most memory the process (or the GPU, if the block was there) held.
    :param reset_encodings: Quantizers whose ranges no longer fit and were dropped.
    :param resumed: True if the block came from a checkpoint.
    """

    name: str
    loss_nearest: float
    loss_before: float
    loss_after: float
    sqnr_db: float
    kept: str
    seconds: float
    peak_memory_bytes: int
    reset_encodings: tuple[str, ...] = ()
    resumed: bool = False

    @classmethod
    def from_dict(cls, plain: dict[str, Any], *, resumed: bool) -> BlockReport:
        """Read back what :func:`dataclasses.asdict` gave."""
        names = tuple(plain["reset_encodings"])
        return cls(**{**plain, "reset_encodings": names, "resumed": resumed})


@dataclass(frozen=True, kw_only=True)
class BlockwiseReport:
    """The outcome of a block-wise technique such as OmniQuant; ``print`` shows a table.

    :param blocks: Entry of each block, in order.
    :param settings: Settings of the run.
    :param refused_pairs: Kinds of scale pairs that were asked for and not used, with the reason.
    :param seconds: Time of the whole run.
    """

    blocks: tuple[BlockReport, ...]
    settings: dict[str, Any]
    refused_pairs: dict[str, str] = field(default_factory=dict)
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return json.loads(json.dumps(asdict(self)))

    def save(self, path: str | Path) -> None:
        """Write it to a JSON file, atomically."""
        replace_file(path, json.dumps(self.to_dict(), indent=2).encode())

    def __str__(self) -> str:
        head = f"{'block':<28}{'nearest':>12}{'before':>12}{'after':>12}{'SQNR':>9}{'s':>8}  kept"
        rows = [
            f"{b.name:<28}{b.loss_nearest:>12.4g}{b.loss_before:>12.4g}{b.loss_after:>12.4g}"
            f"{b.sqnr_db:>7.1f}dB{b.seconds:>8.1f}  {b.kept}"
            for b in self.blocks
        ]
        lines = [head, *rows, f"{self.seconds:.1f} s in all"]
        lines += [f"pairs not used: {kind}: {why}" for kind, why in self.refused_pairs.items()]
        dropped = sum(len(b.reset_encodings) for b in self.blocks)
        if dropped:
            lines.append(
                f"{dropped} encodings no longer fit and were reset: run sim.compute_encodings"
            )
        return "\n".join(lines)
