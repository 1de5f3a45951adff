"""What a layer-wise technique did, layer by layer, for people and for files."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aimet_ext.core.objective import sqnr_db
from aimet_ext.files.folders import replace_file

__all__ = ["LayerReport", "LayerwiseReport"]


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What happened to one layer.

    Losses are mean squared errors of the layer's output over all tokens that count, summed over
    its rows. With ``inp_symmetry="asym"`` a constant is left out, which no choice can change, so
    that they may be negative. Where a ReLU follows and counts, they are taken behind it.

    :param name: of the layer.
    :param spec: its grid.
    :param bitwidth: of its weight.
    :param loss_nearest: of plain nearest rounding.
    :param loss_after: as deployed.
    :param signal: mean square of the float output, likewise.
    :param rows_nearest: output rows for which plain rounding was better and was kept.
    :param rows: output rows.
    :param tokens: rows of input that the losses are taken over.
    :param storage: where its second moments were: ``"memory"``, or ``"mapped"`` files where they
        would not fit.
    :param seconds: of work.
    :param resumed: whether it came from a checkpoint.
    """

    name: str
    spec: str
    bitwidth: int
    loss_nearest: float
    loss_after: float
    signal: float
    rows_nearest: int
    rows: int
    tokens: int
    storage: str
    seconds: float
    resumed: bool = False

    @property
    def sqnr_db(self) -> float:
        """Of the output as deployed; NaN where a constant of the loss is not known."""
        if self.loss_after < 0 or self.loss_nearest < 0:
            return math.nan
        return sqnr_db(self.signal, self.loss_after)


@dataclass(frozen=True, kw_only=True)
class LayerwiseReport:
    """What a layer-wise technique did; ``print`` shows a table.

    :param technique: name of the technique.
    :param layers: one entry each, in the order in which data flows.
    :param skipped: layers that were left alone, with the reason.
    :param settings: of the run.
    :param cost: how the calibration data was brought to the layers.
    :param seconds: of the whole run.
    """

    technique: str
    layers: tuple[LayerReport, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return json.loads(json.dumps(asdict(self)))

    def save(self, path: str | Path) -> None:
        """Write it to a JSON file, atomically."""
        replace_file(path, json.dumps(self.to_dict(), indent=2).encode())

    def __str__(self) -> str:
        width = max([20, *(len(layer.name) + 2 for layer in self.layers)])
        head = f"{'layer':<{width}}{'bits':>4}{'nearest':>12}{'after':>12}{'s':>8}  grid"
        rows = [
            f"{layer.name:<{width}}{layer.bitwidth:>4}{layer.loss_nearest:>12.4g}"
            f"{layer.loss_after:>12.4g}{layer.seconds:>8.2f}  {layer.spec}"
            for layer in self.layers
        ]
        lines = [f"{self.technique}:", head, *rows, f"{self.seconds:.1f} s in all"]
        lines += [f"left alone: {name}: {why}" for name, why in self.skipped.items()]
        mapped = [layer.name for layer in self.layers if layer.storage == "mapped"]
        if mapped:
            lines.append(f"second moments in mapped files, for want of memory: {', '.join(mapped)}")
        return "\n".join(lines)
