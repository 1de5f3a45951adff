"""The report of widths that were assigned: overrides, a recipe, a table, a curve, a drawing."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from aimet_ext.drawing.figures import pareto
from aimet_ext.drawing.page import render, trusted
from aimet_ext.files.folders import json_text, replace_file
from aimet_ext.recipes.recipe import Grid, Recipe
from aimet_ext.specs import LPBQ, Blockwise, PerTensor, QSpec

ASSIGNED = "assigned"
"""Name of the result, in its recipe and its drawing."""


def label(spec: QSpec) -> str:
    """Return a spec as short text, such as ``"int4"``, ``"int4:64"`` or ``"int4:lpbq64"``."""
    width = spec.width
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
        """Write it to a JSON file, atomically; numbers that JSON lacks are null."""
        replace_file(path, json_text(self.to_dict()).encode())

    def plot(self, path: str | Path) -> None:
        """Draw the divergence over the average bits, logarithmic: one point for each budget.

        :param path: ``.svg`` for the drawing alone, or ``.html`` for a page with it, the table and
            the numbers, which needs no other file.
        :raises ValueError: The path ends in neither.
        :raises MissingExtraError: matplotlib, or jinja2 for a page, is not installed.
        """
        kind = Path(path).suffix.lower()
        if kind not in (".svg", ".html"):
            raise ValueError(
                f"path must end in .svg or .html, the forms that are drawn, got {path}"
            )
        drawing = pareto(self.curve, self.marks()).file()
        replace_file(path, (drawing if kind == ".svg" else self._page(drawing)).encode())

    def marks(self) -> dict[str, tuple[float, float]]:
        """Return the points of :meth:`uniform` and of the result, estimated and measured."""
        return {
            **self.uniform(),
            ASSIGNED: (self.average_bits, self.kl),
            "measured": (self.average_bits, self.measured),
        }

    def _page(self, drawing: str) -> str:
        """Return a page with the drawing and the table of :meth:`__str__`."""
        return render(
            "widths.html",
            title=f"{self.average_bits:.4f} bits a weight, KL {self.measured:.4g} nats",
            drawing=trusted(drawing),
            table=str(self),
        )
