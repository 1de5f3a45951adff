"""Reports of techniques, for people and for files: what all share, blocks and rotations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from aimet_ext.files.folders import json_text, replace_file

TIED = "shares its weight with the embedding"
"""Reason for leaving an output layer alone, with nothing wrong: the embedding's grid is its own."""

U = TypeVar("U", bound="UnitReport")


class _Plain:
    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain JSON values."""
        return TypeAdapter(type(self)).dump_python(self, mode="json")


@dataclass(frozen=True, kw_only=True)
class UnitReport(_Plain):
    """Part of a report on one unit of a model, a layer or a block.

    :param name: Name of the unit.
    :param seconds: Seconds of work.
    :param resumed: True if it came from a checkpoint.
    """

    name: str
    seconds: float
    resumed: bool = False

    @classmethod
    def from_checkpoint(cls: type[U], plain: dict[str, Any]) -> U:
        """Read back the result of :meth:`to_dict`, checked."""
        return TypeAdapter(cls).validate_python({**plain, "resumed": True})


@dataclass(frozen=True, kw_only=True)
class Report(_Plain):
    """Base of all reports; ``print`` shows a table.

    :param settings: Settings of the run.
    :param seconds: Seconds of the whole run.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float

    @property
    def notes(self) -> list[str]:
        """Lines about what was left alone, refused or in short supply."""
        return []

    @property
    def infos(self) -> list[str]:
        """Lines about what is as it must be, but may be missed in the table."""
        return _tied(getattr(self, "skipped", {}))

    def save(self, path: str | Path) -> None:
        """Write it to a JSON file, atomically; numbers that JSON lacks are null."""
        replace_file(path, json_text(self.to_dict()).encode())


def left_alone(skipped: Mapping[str, str]) -> list[str]:
    """Return a line for each layer that was left alone, but for output layers that are tied."""
    return [
        f"left alone: {name}: {why}" for name, why in skipped.items() if not why.startswith(TIED)
    ]


def _tied(skipped: Mapping[str, str]) -> list[str]:
    return [
        f"{name} {why} and is rounded to nearest with it"
        for name, why in skipped.items()
        if why.startswith(TIED)
    ]


@dataclass(frozen=True, kw_only=True)
class BlockReport(UnitReport):
    """The outcome of one block.

    Losses are mean squared errors of the block's output over all tokens that count, on the
    quantized stream, against the float stream's output; with AutoRound less the share ``trim``.

    :param name: Name of the block.
    :param loss_nearest: Loss with plain nearest rounding and no transform.
    :param loss_before: Loss at the start of training.
    :param loss_after: Loss as deployed, computed by the simulation itself.
    :param sqnr_db: SQNR of the output as deployed, in dB.
    :param kept: Origin of the deployed state; ``"nearest"`` if nothing learnt was better.
    :param seconds: Time that the block took.
    :param peak_memory_bytes: Most memory the process (or the GPU, if the block was there) held.
    :param reset_encodings: Quantizers whose ranges no longer fit and were calibrated anew.
    :param resumed: True if the block came from a checkpoint.
    """

    loss_nearest: float
    loss_before: float
    loss_after: float
    sqnr_db: float
    kept: str
    peak_memory_bytes: int
    reset_encodings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BlockwiseReport(Report):
    """The outcome of a block-wise technique such as OmniQuant; ``print`` shows a table.

    :param blocks: Entry of each block, in order.
    :param settings: Settings of the run.
    :param refused_pairs: Kinds of scale pairs that were asked for and not used, with the reason.
    :param seconds: Time of the whole run.
    """

    blocks: tuple[BlockReport, ...]
    refused_pairs: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        head = (
            f"{'block':<28}{'rounding':>12}{'before':>12}{'deployed':>12}{'SQNR':>9}{'s':>8}  kept"
        )
        rows = [
            f"{b.name:<28}{b.loss_nearest:>12.4g}{b.loss_before:>12.4g}{b.loss_after:>12.4g}"
            f"{b.sqnr_db:>7.1f}dB{b.seconds:>8.1f}  {b.kept}"
            for b in self.blocks
        ]
        return "\n".join([head, *rows, f"{self.seconds:.1f} s in all", *self.notes])

    @property
    def notes(self) -> list[str]:
        """Scale pairs that were not used, and ranges that were calibrated anew."""
        lines = [f"pairs not used: {kind}: {why}" for kind, why in self.refused_pairs.items()]
        dropped = sum(len(b.reset_encodings) for b in self.blocks)
        if dropped:
            lines.append(
                f"{dropped} encodings no longer fit and were calibrated anew on the float inputs"
            )
        return lines


@dataclass(frozen=True, kw_only=True)
class RotatedPart(UnitReport):
    """Proof of one part of a model, a block or ``"ends"``: what stands before and behind them.

    :param name: Name of the block.
    :param deviation: Largest change of its output in float64, relative to the largest output.
    :param seconds: Seconds of work.
    :param resumed: False.
    """

    deviation: float


@dataclass(frozen=True, kw_only=True)
class RotationReport(Report):
    """The outcome of a rotation; ``print`` shows a table.

    :param rotations: Kind of each rotation that was folded into the weights, by its name.
    :param refused: Rotations that this model cannot have, with the reason.
    :param blocks: Proof of each part.
    :param deviation: Largest change of the float model's output, relative to the largest one, in
        the precision that the model computes in.
    :param losses: Mean KL divergence of the quantized model from the float one, on batches held
        out, where rotations were learnt: ``"none"`` without them, ``"start"``, ``"learnt"``.
    :param resumed: Steps of learning that came from a checkpoint.
    :param key_losses: Divergence that keys of 8 bits add, to second order, in nats a row of the
        outputs, where maps of keys were fitted: ``"plain"``, ``"hadamard"`` if there is such a
        matrix, ``"fitted"``.
    :param reset_encodings: Quantizers whose ranges no longer fit and were dropped.
    :param settings: Settings of the run.
    :param seconds: Seconds of the whole run.
    """

    rotations: dict[str, str]
    refused: dict[str, str] = field(default_factory=dict)
    blocks: tuple[RotatedPart, ...] = ()
    deviation: float
    losses: dict[str, float] = field(default_factory=dict)
    resumed: int = 0
    key_losses: dict[str, float] = field(default_factory=dict)
    reset_encodings: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{name}: {how}" for name, how in self.rotations.items()]
        for what, losses in (
            ("KL divergence from the float model", self.losses),
            ("KL divergence by keys of 8 bits, estimated", self.key_losses),
        ):
            worth = ", ".join(f"{name} {loss:.4g}" for name, loss in losses.items())
            lines += [f"{what}: {worth}"] if losses else []
        worst = max((part.deviation for part in self.blocks), default=0.0)
        lines.append(
            f"float outputs are off by {self.deviation:.1e}; {len(self.blocks)} parts in float64 "
            f"by at most {worst:.1e}; {self.seconds:.1f} s in all"
        )
        return "\n".join([*lines, *self.notes])

    @property
    def notes(self) -> list[str]:
        """Rotations that the model cannot have, and ranges that no longer fit."""
        lines = [f"not rotated: {name}: {why}" for name, why in self.refused.items()]
        if self.reset_encodings:
            lines.append(
                f"{len(self.reset_encodings)} encodings no longer fit and were reset: run "
                "sim.compute_encodings"
            )
        return lines
