"""The page of what HTP computes says what was measured, and the words follow from the figures."""

from __future__ import annotations

import importlib
import json
import pathlib
from types import ModuleType

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("onnx")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("htp_patterns")


def test_the_page_is_made_of_the_results(script: ModuleType) -> None:
    content = json.loads(script.RESULTS.read_text("utf-8"))
    assert script.PAGE.read_text("utf-8") == script.render(content)


def test_every_pattern_has_its_results(script: ModuleType) -> None:
    content = json.loads(script.RESULTS.read_text("utf-8"))
    measured = [(row["group"], row["name"]) for row in content["rows"]]
    assert measured == [(each.group, each.name) for each in script.patterns()]
    assert len(set(measured)) == len(measured)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([80.0, 80.0, 51.0], "right"),
        ([80.0, 80.0, 49.0], "right; coarse on v79"),
        ([3.0, 49.0, 80.0], "right; coarse on v75; wrong on v73"),
        (["refused", 80.0, 80.0], "right; refused on v73"),
        (["refused", "refused", 2.0], "refused; wrong on v79"),
        (["refused"] * 3, "refused"),
    ],
)
def test_words(script: ModuleType, values: list[float | str], word: str) -> None:
    targets = ("htp_v73", "htp_v75", "htp_v79")
    assert script.verdict(dict(zip(targets, values, strict=True)), 16) == word
