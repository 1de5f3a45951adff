"""Presets: the same settings however they are asked for, and settings beside them count."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

import aimet_ext
from aimet_ext.config import PRESETS, GPTQParams
from aimet_ext.integrations.olive_techniques import OliveTechnique
from aimet_ext.recipes.recipe import Recipe
from aimet_ext.registry import TECHNIQUES, load

ROWS = [row for row in TECHNIQUES.values() if row.decides not in ("grids", "activations")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_technique_has_them(row: Any) -> None:
    kind = load(row.params)
    assert kind(preset="balanced") == kind()
    assert set(kind.presets) <= set(PRESETS)
    for preset in PRESETS:
        found = kind(preset=preset)
        for name, value in kind.presets.get(preset, {}).items():
            assert getattr(found, name) == value != getattr(kind(), name)
    with pytest.raises((ValidationError, ValueError), match='"fast", "balanced", "best" is requ'):
        kind(preset="slow")


def test_settings_beside_a_preset_count() -> None:
    found = GPTQParams(preset="fast", refine_sweeps=5)
    assert found == GPTQParams(
        inp_symmetry="asym", scale_candidates=12, refine_sweeps=5, tokens_per_input=8.0
    )  # what docs/composition.rst says
    assert GPTQParams(preset="best", refine_sweeps=3).refine_sweeps == 3


def test_a_call_takes_one(make_sim: Any, ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = {
        preset: aimet_ext.apply_adaround(
            make_sim("llama"), [ids()], preset=preset, num_iterations=7, progress=False
        )
        for preset in ("fast", "balanced")
    }
    assert [r.settings["num_iterations"] for r in reports.values()] == [7, 7]
    assert [r.settings["refine_sweeps"] for r in reports.values()] == [2, 8]
    sim = make_sim("llama")
    with pytest.raises(ValueError, match=r"apply_gptq.*preset: .fast., .*got 'slow'"):
        aimet_ext.apply_gptq(sim, [ids()], preset="slow")


def test_the_number_of_a_preset_is_taken(make_sim: Any, ids: Any) -> None:
    report = aimet_ext.apply_seq_mse(make_sim("llama"), [ids()], preset="fast", progress=False)
    assert report.settings["num_candidates"] == 10


def test_olive_and_recipes_take_one() -> None:
    row = TECHNIQUES["gptq"]
    technique = OliveTechnique(row, "gptq")
    assert technique.validate_args(preset="fast", beams=2)
    with pytest.raises(ValueError, match="preset"):
        technique.validate_args(preset="slow")
    recipe = Recipe(techniques={"gptq": {"preset": "fast"}})
    assert recipe.params() == {"gptq": GPTQParams(preset="fast")}


@pytest.mark.parametrize(("number", "said"), [(40, 0), (2001, 1)])
def test_the_steps_of_aimets_adaround_are_no_sweeps(
    make_sim: Any, ids: Any, caplog: pytest.LogCaptureFixture, number: int, said: int
) -> None:
    left = [f"*{name}_proj" for name in ("q", "k", "v", "gate", "up", "down")]
    settings = {"num_iterations": number, "modules_to_exclude": left, "progress": False}
    aimet_ext.apply_adaround(make_sim("llama", layers=1), [ids()], **settings)
    assert caplog.text.count("counts sweeps over all codes of a layer, got 2001") == said
