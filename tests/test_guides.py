"""Guides of the documentation: what they say of recipes, AIMET and other packages is so."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import pathlib
import re
from typing import Any

import pytest
import torch

import aimet_ext
from aimet_ext.registry import TECHNIQUES, load

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
#: AIMET's functions that take anything and pass it on, and those that have the arguments.
PASSED_ON = {
    "aimet_torch.seq_mse.apply_seq_mse": "aimet_torch.seq_mse._apply_seq_mse",
    "aimet_torch.mixed_precision.choose_mixed_precision": (
        "aimet_torch._base.mixed_precision.choose_mixed_precision"
    ),
}


def rows(page: str, columns: int) -> list[list[str]]:
    """Return the rows of a page's list tables that have a number of columns, as texts."""
    return table_rows((DOCS / page).read_text("utf-8"), columns)


def table_rows(text: str, columns: int) -> list[list[str]]:
    """Return the rows of a text's list tables that have a number of columns."""
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


def attribute(dotted: str) -> Any:
    """Import what a dotted name stands for.

    :raises AttributeError: It does not exist.
    """
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise AttributeError(dotted)


def arguments(dotted: str) -> set[str]:
    """Return the names of a function's arguments, and of the settings it takes."""
    function = attribute(dotted)
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    row = TECHNIQUES.get(dotted.partition("aimet_ext.apply_")[2])
    settings = dataclasses.fields(load(row.params)) if row else ()
    return (named | {field.name for field in settings}) - {"self"}


def mapped() -> list[tuple[str, tuple[str, ...], str, str]]:
    """Return title, AIMET's functions, ours, and text of each part of the page."""
    page = (DOCS / "from_aimet.rst").read_text("utf-8")
    parts = re.split(r"^(.+)\n-{3,}$", page, flags=re.M)
    found = []
    for title, text in zip(parts[1::2], parts[2::2], strict=True):
        head, ours, body = re.split(r"→ :func:`~(\S+)`", text.partition("\n=====")[0])
        found.append((title, tuple(re.findall(r"``(\S+?)``", head)), ours, body))
    return found


@pytest.mark.parametrize(
    ("theirs", "ours", "body"), [pytest.param(*row[1:], id=row[0]) for row in mapped()]
)
def test_every_argument_of_aimet_is_on_the_page(
    theirs: tuple[str, ...], ours: str, body: str
) -> None:
    pytest.importorskip("aimet_onnx")
    wanted = set().union(*(arguments(PASSED_ON.get(name, name)) for name in theirs))
    given = [row for row in table_rows(body, 3) if row[0] != "AIMET's argument"]
    named = [name for row in given for name in re.findall(r"``(\w+)``", row[0])]
    assert sorted(named) == sorted(wanted)
    assert {row[1].strip("`") for row in given} - {"–"} <= arguments(ours)


def test_what_stays_with_aimet_exists() -> None:
    pytest.importorskip("aimet_onnx")
    page = (DOCS / "from_aimet.rst").read_text("utf-8")
    for name in re.findall(r"``(aimet_(?:torch|onnx)\.[\w.]+)``", page):
        assert attribute(name) is not None


def test_a_name_that_is_gone_is_noticed() -> None:
    with pytest.raises(AttributeError):
        attribute("aimet_torch.seq_mse.apply_seq_nmse")
    with pytest.raises(AttributeError):
        attribute("aimet_torch.seq_nmse.apply_seq_mse")


def test_every_file_of_an_export_is_on_the_page(tiny_model: Any, tmp_path: pathlib.Path) -> None:
    ids = torch.arange(3, 11)[None]
    sim = aimet_ext.create_sim(tiny_model("llama"), ids, activations=None)
    aimet_ext.apply_rotation(sim)
    sim.compute_encodings(lambda model: model(ids))
    aimet_ext.export(sim, tmp_path / "out", "PREFIX", ids)
    table = rows("deploying.rst", 3)
    named = {name for row in table for name in re.findall(r"``([\w.]+)/?``", row[0])}
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert len(written) > 8
    assert written <= named


def test_drawings_are_those_of_the_code(tmp_path: pathlib.Path) -> None:
    """Byte by byte with the matplotlib that drew them, else by their texts."""
    matplotlib = pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("figures", DOCS / "extensions/figures.py")
    assert spec is not None and spec.loader is not None
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    drawn = {path.name: path.read_text("utf-8") for path in figures.draw(tmp_path)}
    kept = {path.name: path.read_text("utf-8") for path in DOCS.glob("static/concepts/*.svg")}
    if f"Matplotlib v{matplotlib.__version__}," not in kept["grid.svg"]:
        drawn, kept = texts_of(drawn), texts_of(kept)
    assert drawn == kept
    page = (DOCS / "concepts.rst").read_text("utf-8")
    assert set(re.findall(r"image:: static/concepts/(\S+)", page)) == set(kept)
    for text in kept.values():
        assert "#777777" in text and "#000000" not in text and "fill: #ffffff" not in text


def texts_of(drawings: dict[str, str]) -> dict[str, str]:
    """Return what is written in drawings."""
    return {name: "|".join(re.findall(r">([^<>]+)</text>", it)) for name, it in drawings.items()}


EQUIVALENTS = sorted((DOCS / "equivalents").glob("*.yaml"))


@pytest.mark.parametrize("path", EQUIVALENTS, ids=lambda path: path.stem)
def test_a_configuration_of_another_package_is_a_recipe(path: pathlib.Path) -> None:
    recipe = aimet_ext.read_recipe(path)
    assert recipe.name == path.stem
    assert list(recipe.params())
    page = (DOCS / "from_others.rst").read_text("utf-8")
    assert f"literalinclude:: equivalents/{path.name}\n" in page


def test_settings_named_for_other_packages_exist() -> None:
    recipe = aimet_ext.read_recipe("w4a16-fast")
    named = [
        name for row in rows("from_others.rst", 3) for name in re.findall(r"``(.+?)``", row[1])
    ]
    assert len(named) > 50
    for name in named:
        owner, _, setting = name.partition(".")
        if owner in TECHNIQUES:
            fields = dataclasses.fields(load(TECHNIQUES[owner].params))
            assert setting in {field.name for field in fields}, name
        else:
            found = getattr(recipe, owner)
            assert not setting or hasattr(found, setting), name


def test_names_of_quark_are_those_of_its_pass_in_olive() -> None:
    pytest.importorskip("olive")
    module = importlib.import_module("olive.passes.quark_quantizer.quark_quantization")
    page = (DOCS / "from_others.rst").read_text("utf-8")
    part = page.partition("\nQuark\n=====\n")[2].partition("\n====")[0]
    given = [row for row in table_rows(part, 3) if row[0] != "Quark's"]
    named = {name for row in given for name in re.findall(r"``(\w+)``", row[0])}
    assert len(named) > 8
    assert named <= set(module.QuarkQuantization._default_config(None))
