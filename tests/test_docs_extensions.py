"""The extensions that make pages: formulas, measurements, licences."""

from __future__ import annotations

import importlib
import json
import pathlib
import re
from email.message import Message
from importlib import metadata
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


@pytest.mark.parametrize("extension", ["measurements"], indirect=True)
def test_the_page_of_measurements_holds_every_file(extension: ModuleType) -> None:
    folder = ROOT / "benchmarks/results"
    text = "\n".join(extension.render(folder))
    commands = re.findall(r"^    \$ python (\S+)", text, re.M)
    dates = re.findall(r"^\d{4}-\d\d-\d\d, \d+ cores?, .*python 3.*aimet_ext", text, re.M)
    contents = [json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")]
    sections = sum(1 if "rows" in content else len(content) for content in contents)
    assert len(commands) == len(dates) == sections
    assert all((ROOT / command).is_file() for command in commands)


@pytest.mark.parametrize("extension", ["measurements"], indirect=True)
def test_new_results_appear_by_themselves(extension: ModuleType, tmp_path: pathlib.Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "speed.py").write_text(
        '"""How fast; at all.\n\n    python speed.py [--only b]\n\n'
        '    a  one\n    b  two,\n       three\n"""'
    )
    machine = {"date": "2026-01-02", "cores": 2, "threads": 1, "load": 0.5, "torch": "2.9.0"}
    rows = [{"name": "x_y", "seconds": 0.123456, "kept": True, "at": {"v1": 1, "v2": None}}]
    section = {"machine": machine, "rows": rows, "bars": [{"bar": "at most 1", "reached": False}]}
    (tmp_path / "results/speed.json").write_text(json.dumps({"b": section}))
    lines = list(extension.render(tmp_path / "results"))
    assert lines[1] == "How fast"
    assert "b: two, three" in lines
    assert "2026-01-02, 2 cores, 1 thread, load 0.5; torch 2.9.0." in lines
    assert "    $ python benchmarks/speed.py --only b" in lines
    assert '    :header: "name", "seconds", "kept", "at v1", "at v2"' in lines
    assert '    "x\\_y","0.1235","yes","1",""' in lines
    assert "* Missed: at most 1" in lines
    (tmp_path / "results/speed.json").write_text(json.dumps({"b": {"rows": rows}}))
    with pytest.raises(Exception, match=r"'cores', 'date', 'load', 'threads'. of the machine are"):
        list(extension.render(tmp_path / "results"))
    (tmp_path / "results/lost.json").write_text(json.dumps({"c": section}))
    with pytest.raises(Exception, match=r"lost.json, section 'c': a script lost.py or c.py is"):
        list(extension.render(tmp_path / "results"))


@pytest.mark.parametrize("extension", ["licences"], indirect=True)
def test_dependencies_have_licences_and_extras(extension: ModuleType) -> None:
    page = (ROOT / "docs/licences.rst").read_text("utf-8")
    extras = [name for line in re.findall(r"licences:: (.+)", page) for name in line.split()]
    assert set(extras) == set(metadata.metadata("aimet-ext").get_all("Provides-Extra")) - {"all"}
    packages = {each.name.lower(): each for each in extension.dependencies("aimet-ext", extras)}
    direct = [each for each in packages.values() if each.direct]
    assert [each.name for each in direct if each.licence == extension.UNSTATED] == []
    required = {
        canonicalize_name(Requirement(text).name) for text in metadata.requires("aimet-ext")
    }
    assert required - {canonicalize_name(each.name) for each in direct} == {"aimet-ext"}
    assert packages["torch"].extras == set()
    assert packages["peft"].extras == {"lora"}
    assert "onnx" in packages["flatbuffers"].extras
    assert not packages["flatbuffers"].direct


@pytest.mark.parametrize("extension", ["licences"], indirect=True)
@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ([("License-Expression", "MIT"), ("License", "x")], "MIT"),
        ([("Classifier", "License :: OSI Approved :: BSD License")], "BSD License"),
        ([("Classifier", "License :: OSI Approved"), ("License", "Zlib\n\nText")], "Zlib"),
        ([], "not stated"),
    ],
)
def test_the_most_exact_statement_counts(
    extension: ModuleType, fields: list[tuple[str, str]], licence: str
) -> None:
    said = Message()
    for name, value in fields:
        said[name] = value
    assert extension.licence_of(said) == licence


@pytest.mark.parametrize("extension", ["unbuilt"], indirect=True)
def test_a_page_that_is_not_whole_in_its_source_says_so_there_alone(extension: ModuleType) -> None:
    for page in sorted((ROOT / "docs").glob("*.rst")):
        text = page.read_text("utf-8")
        assert text.count(extension.NOTE) == bool(extension.INCLUDES.search(text)), page.name
        source = [text]
        extension.take_out(None, page.stem, source)
        assert extension.NOTE not in source[0]
        assert len(source[0]) == len(text) - text.count(extension.NOTE) * len(extension.NOTE)
