"""The report of an analysis: a table, a JSON file and a drawing."""

from __future__ import annotations

import re
from dataclasses import field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from aimet_ext.drawing.figures import cost_bars
from aimet_ext.files.folders import json_text, replace_file

_SHOWN = 20  # rows of the table and the drawing
_HEAD = ("", "kind", "bits", "range", "SQNR", "KL alone", "KL removed")


@dataclass(frozen=True, kw_only=True)
class QuantizerReport:
    """The cost of one quantizer.

    :param name: Layer's parameter, module whose output it is, or tensor.
    :param kind: ``"weight"``, ``"activation"`` or ``"input"``.
    :param bitwidth: Bits of a value.
    :param symmetric: True if its grid has no offset.
    :param low: Smallest value of its range, over all cells.
    :param high: Largest value.
    :param sqnr_db: SQNR of the tensor in the float model, in dB; None where there is no error, or
        it was not computed.
    :param kl_alone: Divergence of the outputs with this quantizer alone, in nats.
    :param kl_removed: Fall of the divergence of all once this one is taken away, in nats; below 0
        where it would rise.
    :param exact: True if both were measured, false if they are estimates to second order.
    """

    name: str
    kind: str
    bitwidth: int
    symmetric: bool
    low: float
    high: float
    sqnr_db: float | None
    kl_alone: float
    kl_removed: float
    exact: bool = False

    def measured(self, alone: float, removed: float) -> QuantizerReport:
        """Return it with measured costs."""
        return replace(self, kl_alone=alone, kl_removed=removed, exact=True)

    @property
    def family(self) -> str:
        """Name with a star for each number between dots or slashes, as of a block."""
        return re.sub(r"(?<=[./])\d+(?=[./])", "*", self.name)

    def cells(self) -> tuple[str, ...]:
        """Return the columns of its row."""
        mark = "" if self.exact else "~"
        sqnr = "" if self.sqnr_db is None else f"{self.sqnr_db:.1f} dB"
        return (
            self.name,
            self.kind,
            str(self.bitwidth),
            f"{self.low:.3g} … {self.high:.3g}",
            sqnr,
            f"{mark}{self.kl_alone:.2e}",
            f"{mark}{self.kl_removed:.2e}",
        )


@dataclass(frozen=True, kw_only=True)
class AnalysisReport:
    """The costs of all quantizers of a simulation; ``print`` shows the worst ones.

    :param quantizers: Entries, the largest divergence alone first.
    :param kl: Divergence of the outputs with all quantizers, mean KL(float || quantized) in nats.
    :param rows: Rows of the outputs that were compared: tokens, or images.
    :param settings: Settings of the analysis.
    :param seconds: Time that it took.
    """

    quantizers: tuple[QuantizerReport, ...]
    kl: float
    rows: int
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float

    def __getitem__(self, name: str) -> QuantizerReport:
        """Return the entry of a quantizer.

        :raises KeyError: There is none of that name.
        """
        found = next((entry for entry in self.quantizers if entry.name == name), None)
        if found is None:
            raise KeyError(name)
        return found

    def families(self) -> dict[str, float]:
        """Return the sum of divergences alone of quantizers alike in all blocks, largest first."""
        sums: dict[str, float] = {}
        for entry in self.quantizers:
            sums[entry.family] = sums.get(entry.family, 0.0) + entry.kl_alone
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        shown = self.quantizers[:_SHOWN]
        table = [_HEAD, *(entry.cells() for entry in shown)]
        widths = [max(len(row[i]) for row in table) for i in range(len(_HEAD))]
        lines = [
            f"KL of {self.rows} outputs to the float model's: {self.kl:.4g} nats with all "
            f"{len(self.quantizers)} quantizers",
            *(_aligned(row, widths) for row in table),
        ]
        rest = len(self.quantizers) - len(shown)
        lines += [f"and {rest} more"] if rest else []
        families = [item for item in self.families().items() if "*" in item[0]][:5]
        if families:
            lines += ["sums of KL alone over the blocks:"]
            lines += [f"  {kl:.2e}  {name}" for name, kl in families]
        lines.append(f"~ is an estimate; {self.seconds:.1f} s in all")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain JSON values."""
        return TypeAdapter(AnalysisReport).dump_python(self, mode="json")

    def save(self, path: str | Path) -> None:
        """Write it to a JSON file, atomically; numbers that JSON lacks are null."""
        replace_file(path, json_text(self.to_dict()).encode())

    def plot(self, path: str | Path) -> None:
        """Draw the worst quantizers' divergences, alone and removed, to an SVG file.

        :raises ValueError: The path does not end in ``.svg``.
        :raises MissingExtraError: matplotlib is not installed.
        """
        if Path(path).suffix.lower() != ".svg":
            raise ValueError(f"path must end in .svg, the form that is drawn, got {path}")
        shown = self.quantizers[:_SHOWN]
        drawn = cost_bars(
            [e.name if len(e.name) <= 64 else f"…{e.name[-63:]}" for e in shown],
            [e.kl_alone for e in shown],
            [e.kl_removed for e in shown],
        )
        replace_file(path, drawn.file().encode())


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    first = f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}"
    pairs = zip(row[2:], widths[2:], strict=True)
    return "  ".join([first, *(f"{cell:>{width}}" for cell, width in pairs)])
