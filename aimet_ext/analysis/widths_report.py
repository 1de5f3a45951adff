"""The report of widths that were assigned: overrides, a recipe, a table, a curve, a drawing."""

from __future__ import annotations

import html
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from aimet_ext.config import LPBQ, Blockwise, PerTensor, QSpec
from aimet_ext.files.folders import replace_file
from aimet_ext.recipes.recipe import Grid, Recipe

ASSIGNED = "assigned"
"""Name of the result, in its recipe and its drawing."""


def label(spec: QSpec) -> str:
    """Return a spec as short text, such as ``"int4"``, ``"int4:64"`` or ``"int4:lpbq64"``."""
    width = f"{'int' if spec.symmetric else 'uint'}{spec.bitwidth}"
    shape = spec.granularity
    if isinstance(shape, PerTensor):
        return f"{width}:tensor"
    if isinstance(shape, Blockwise):
        return f"{width}:{shape.block_size}"
    if isinstance(shape, LPBQ):
        extra = "" if shape.scale_bits == 4 else f"/{shape.scale_bits}"
        return f"{width}:lpbq{shape.block_size}{extra}"
    return width


@dataclass(frozen=True, kw_only=True)
class LayerWidths:
    """The choices of one weight.

    :param names: Names of the layer in the checkpoint, several where they share the weight.
    :param weights: Numbers in the weight.
    :param choice: The choice that was made.
    :param bits: Bits with scales at each choice.
    :param kl: Divergence of the outputs in nats with this weight alone at each choice, estimated.
    """

    names: tuple[str, ...]
    weights: int
    choice: str
    bits: dict[str, int]
    kl: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class WidthsReport:
    """The widths that were assigned; ``print`` shows the table.

    :param layers: Weights in the order of the model.
    :param specs: The choices by name.
    :param bits: Bits of all these weights, scales included.
    :param weights: Numbers in all of them.
    :param kl: Sum of the divergences, in nats: what is expected of plain rounding.
    :param measured: Divergence with all of these weights rounded to nearest, on the same data.
    :param curve: Average bits and the least divergence there, at the budgets where the steps of
        single layers end.
    :param rows: Rows of the outputs that the estimate is of: tokens.
    :param settings: Settings of the call.
    :param seconds: Time that it took.
    """

    layers: tuple[LayerWidths, ...]
    specs: dict[str, QSpec]
    bits: int
    weights: int
    kl: float
    measured: float
    curve: tuple[tuple[float, float], ...]
    rows: int
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float

    @property
    def average_bits(self) -> float:
        """Bits for each number, scales included."""
        return self.bits / self.weights

    @property
    def bytes(self) -> int:
        """Bytes of these weights, scales included."""
        return -(-self.bits // 8)

    @property
    def overrides(self) -> dict[str, QSpec]:
        """Specs by name of layer, as :func:`~aimet_ext.create_sim` takes them."""
        return {name: self.specs[layer.choice] for layer in self.layers for name in layer.names}

    @property
    def recipe(self) -> Recipe:
        """Recipe with these grids, without techniques: the commonest one, the others by name.

        :raises ValueError: a recipe has no form for one of the choices.
        """
        grids = {}
        for name, spec in self.overrides.items():
            grids[name] = Grid.of(spec)
            if grids[name].spec() != spec:
                raise ValueError(
                    f"{name}: a recipe has one range a row, blocks, or LPBQ blocks with scales of "
                    f"4 bits, got {label(spec)}; pass overrides to create_sim instead"
                )
        counts: Counter[str] = Counter()
        for layer in self.layers:
            counts[layer.choice] += layer.weights
        common = Grid.of(self.specs[counts.most_common(1)[0][0]])
        return Recipe(
            name=ASSIGNED,
            description=(
                f"Widths assigned to {len(grids)} layers: {self.average_bits:.3f} bits a weight."
            ),
            weights=common,
            overrides={name: grid for name, grid in grids.items() if grid != common},
        )

    def uniform(self) -> dict[str, tuple[float, float]]:
        """Return the average bits and the estimated divergence of each choice for all layers."""
        return {
            name: (
                sum(layer.bits[name] for layer in self.layers) / self.weights,
                math.fsum(layer.kl[name] for layer in self.layers),
            )
            for name in self.specs
        }

    def __str__(self) -> str:
        head = ("layer", "weights", "choice", "bytes", *(f"KL {name}" for name in self.specs))
        table = [head, *map(self._row, self.layers)]
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = [
            f"{self.average_bits:.4f} bits a weight, {self.bytes} bytes; KL {self.measured:.4g} "
            f"nats over {self.rows} outputs, estimated {self.kl:.4g}",
            *(
                f"  all {name}: {bits:.4f} bits, estimated {kl:.4g}"
                for name, (bits, kl) in self.uniform().items()
            ),
            *(
                f"{row[0]:<{widths[0]}}  "
                + "  ".join(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
                for row in table
            ),
            f"{self.seconds:.1f} s in all",
        ]
        return "\n".join(lines)

    def _row(self, layer: LayerWidths) -> tuple[str, ...]:
        return (
            " = ".join(layer.names),
            str(layer.weights),
            layer.choice,
            str(-(-layer.bits[layer.choice] // 8)),
            *(f"{layer.kl[name]:.2e}" for name in self.specs),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain JSON values."""
        plain = TypeAdapter(WidthsReport).dump_python(self, mode="json")
        plain["specs"] = {name: spec.to_dict() for name, spec in self.specs.items()}
        return {**plain, "average_bits": self.average_bits, "bytes": self.bytes}

    def save(self, path: str | Path) -> None:
        """Write it to a JSON file, atomically."""
        replace_file(path, json.dumps(self.to_dict(), indent=2).encode())

    def plot(self, path: str | Path) -> None:
        """Draw the divergence over the average bits, logarithmic: one point for each budget.

        :param path: ``.svg`` for the drawing alone, or ``.html`` for a page with it, the table and
            the numbers, which needs no other file.
        :raises ValueError: The path ends in neither.
        """
        kind = Path(path).suffix.lower()
        if kind not in (".svg", ".html"):
            raise ValueError(
                f"path must end in .svg or .html, the forms that are drawn, got {path}"
            )
        marks = [
            *((name, *point, "#1f77b4") for name, point in self.uniform().items()),
            (ASSIGNED, self.average_bits, self.kl, "#d62728"),
            ("measured", self.average_bits, self.measured, "#2ca02c"),
        ]
        drawing = _drawing(self.curve, marks)
        replace_file(path, (drawing if kind == ".svg" else self._page(drawing)).encode())

    def _page(self, drawing: str) -> str:
        """Return a page with the drawing and the table of :meth:`__str__`."""
        title = f"{self.average_bits:.4f} bits a weight, KL {self.measured:.4g} nats"
        return (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'</head>\n<body style="font-family: sans-serif">\n<h1>{title}</h1>\n{drawing}'
            f"<pre>{html.escape(str(self))}</pre>\n</body></html>\n"
        )


def _drawing(
    curve: Sequence[tuple[float, float]], marks: Sequence[tuple[str, float, float, str]]
) -> str:
    """Return a line over a logarithmic axis of divergence, with marks on it and beside it."""
    wide, high, left, top = 560, 320, 70, 30
    points = [*curve, *((bits, kl) for _, bits, kl, _ in marks)]
    positive = [kl for _, kl in points if kl > 0] or [1.0]
    low, most = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    most = max(most, low + 1)
    first, last = min(bits for bits, _ in points), max(bits for bits, _ in points)

    def place(bits: float, kl: float) -> tuple[float, float]:
        across = (bits - first) / (last - first or 1.0)
        down = (most - math.log10(max(kl, 10.0**low))) / (most - low)
        return left + across * wide, top + down * high

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + wide + 110}" '
        f'height="{top + high + 50}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="18">estimated KL to the float model in nats, over bits a weight '
        "with scales</text>",
        f'<path d="M{left} {top}V{top + high}H{left + wide}" fill="none" stroke="#888"/>',
    ]
    for power in range(low, most + 1):
        _, y = place(first, 10.0**power)
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>')
    for bits in range(math.ceil(first), math.floor(last) + 1):
        x, _ = place(bits, 1.0)
        parts.append(f'<text x="{x:.1f}" y="{top + high + 18}" text-anchor="middle">{bits}</text>')
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
    parts.append(f'<polyline points="{line}" fill="none" stroke="#444" stroke-width="1.5"/>')
    parts += [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="#444"><title>{bits:.4f} bits, KL {kl:.3g}'
        "</title></circle>"
        for bits, kl in curve
        for x, y in [place(bits, kl)]
    ]
    for name, own, kl, color in marks:
        x, y = place(own, kl)
        side = -1 if name == ASSIGNED else 1  # of the mark, where the name stands
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>'
            f'<text x="{x + side * 7:.1f}" y="{y - side * 7 + 2:.1f}" fill="{color}" '
            f'text-anchor="{"start" if side > 0 else "end"}">{html.escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])
