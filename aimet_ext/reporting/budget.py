"""The choice of widths that a run follows, beside its recipe and in its report."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aimet_ext.files.folders import replace_file
from aimet_ext.reporting.parts import Budget, Mark
from aimet_ext.reporting.reading import plain_of, read_checked

if TYPE_CHECKING:
    from aimet_ext.analysis.widths_report import WidthsReport
    from aimet_ext.recipes.recipe import Recipe


def budget_of(report: WidthsReport, recipe: Recipe | None = None) -> Budget:
    """Return what the report of a run keeps of a choice of widths.

    :param report: Result of :func:`aimet_ext.assign_widths`.
    :param recipe: Recipe with its grids; None for the report's own.
    """
    choices = [layer.choice for layer in report.layers]
    return Budget(
        curve=report.curve,
        marks=tuple(Mark(name=name, bits=b, kl=kl) for name, (b, kl) in report.marks().items()),
        choices={name: choices.count(name) for name in report.specs if name in choices},
        rows=report.rows,
        grids="" if recipe is None else _hash(recipe),
    )


def save_beside(recipe_path: Path, report: WidthsReport, recipe: Recipe) -> None:
    """Write the choice of widths beside the recipe that it became.

    :param recipe_path: File of the recipe.
    """
    content = plain_of(budget_of(report, recipe))
    replace_file(_beside(recipe_path), json.dumps(content, allow_nan=False).encode())


def read_beside(recipe_path: Path, recipe: Recipe) -> Budget | None:
    """Return the choice of widths beside a recipe; None without one, or of other grids.

    :raises CorruptFileError: the file beside it is damaged.
    """
    place = _beside(recipe_path)
    found = read_checked(place, Budget) if place.is_file() else None
    return found if found is not None and found.grids == _hash(recipe) else None


def _beside(recipe_path: Path) -> Path:
    return recipe_path.with_name(f"{recipe_path.stem}.widths.json")


def _hash(recipe: Recipe) -> str:
    """Return a hash of the grids inside the blocks."""
    plain: dict[str, Any] = recipe.to_dict()
    grids = [plain.get("weights"), plain.get("overrides")]
    return hashlib.sha256(json.dumps(grids, sort_keys=True).encode()).hexdigest()
