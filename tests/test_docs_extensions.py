"""The extensions that make pages: formulas without a script, pages without a network."""

from __future__ import annotations

import importlib
import pathlib
import re
from types import ModuleType

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
pytest.importorskip("sphinx")


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "docs/extensions")
    return importlib.import_module(request.param)


@pytest.mark.parametrize("extension", ["mathml"], indirect=True)
def test_a_formula_becomes_mathml(extension: ModuleType) -> None:
    assert re.sub(r"\s", "", extension.mathml("E = Q(W)")).startswith(
        '<mathxmlns="http://www.w3.org/1998/Math/MathML"><mi>E</mi><mo>=</mo><mi>Q</mi>'
    )
    aligned = extension.mathml("a &= b \\\\ c &= d", block=True)
    assert 'display="block"' in aligned
    assert aligned.count("<mtr>") == 2


@pytest.mark.parametrize("extension", ["mathml"], indirect=True)
def test_a_command_that_is_unknown_stops_the_build(extension: ModuleType) -> None:
    with pytest.raises(Exception, match=r"LaTeX is required, got.*\\nocommand"):
        extension.mathml(r"\nocommand{x}")


@pytest.mark.parametrize("extension", ["offline"], indirect=True)
def test_what_pages_load_from_elsewhere_is_found(
    extension: ModuleType, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "clean.html").write_text(
        '<a href="https://example.org">elsewhere</a><script src="_static/a.js"></script>'
        '<math xmlns="http://www.w3.org/1998/Math/MathML"></math><link href="../b.css">'
    )
    (tmp_path / "clean.css").write_text("a { background: url(data:image/png;base64,//8=) }")
    assert list(extension.external(tmp_path)) == []
    (tmp_path / "page.html").write_text('<script src="https://cdn.example/m.js"></script>')
    (tmp_path / "more.html").write_text('<link rel="stylesheet" href="//cdn.example/s.css">')
    (tmp_path / "s.css").write_text('@import "https://cdn.example/font.css";')
    assert list(extension.external(tmp_path)) == [
        "more.html: //cdn.example/s.css",
        "page.html: https://cdn.example/m.js",
        "s.css: https://cdn.example/font.css",
    ]
