"""Guides of the documentation: what they say of recipes, AIMET and other packages is so."""

from __future__ import annotations

import pathlib
import re

import aimet_ext

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"


def rows(page: str, columns: int) -> list[list[str]]:
    """Return the rows of a page's list tables that have a number of columns, as texts."""
    text = (DOCS / page).read_text("utf-8")
    found = []
    for row in re.findall(r"^    \* - .*\n(?:      .*\n)*", text, re.M):
        cells = re.split(r"^    (?:\*|  ?)? ?- ?", row, flags=re.M)[1:]
        found.append([" ".join(cell.split()) for cell in cells])
    return [row for row in found if len(row) == columns]


def test_the_figures_of_recipes_are_those_that_were_measured() -> None:
    """A message shows the rows as they should stand in the page."""
    wanted = []
    for name in aimet_ext.recipe_names():
        recipe = aimet_ext.read_recipe(name)
        plan = recipe.calibration
        for it in recipe.measured:
            lost, gained = it.rounding - it.float_perplexity, it.rounding - it.quantized
            figures = (it.float_perplexity, it.rounding, it.quantized)
            wanted.append(
                [
                    f"``{name}``",
                    *(f"{figure:.3f}" for figure in figures),
                    f"{100 * gained / lost:.0f} %",
                    f"{it.seconds:.0f}",
                    f"{plan.num_batches} × {plan.seq_length} tokens",
                ]
            )
    shown = [row for row in rows("choose.rst", 7) if row[0] != "Recipe"]
    assert sorted(shown) == sorted(wanted)


def test_recipes_and_functions_that_guides_name_exist() -> None:
    text = "".join(path.read_text("utf-8") for path in DOCS.glob("*.rst"))
    named = set(re.findall(r"``(w\d\w*(?:-[a-z0-9]+)+|w\da\d+)``", text))
    assert named <= set(aimet_ext.recipe_names())
    functions = set(re.findall(r"``(apply_\w+)\(?", (DOCS / "choose.rst").read_text("utf-8")))
    assert functions <= set(aimet_ext.__all__)
