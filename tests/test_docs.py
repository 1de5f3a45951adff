"""Documents and project files: complete, without code of their own, without machine paths."""

from __future__ import annotations

import pathlib
import re

import pytest
from typer.main import get_command

import aimet_ext
from aimet_ext import cli

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.rst"))
APIREF = sorted((ROOT / "apiref").rglob("*.rst"))
DIRECTIVE = re.compile(r"^\.\. auto(?:function|class|exception|module):: aimet_ext\.(\w+)$", re.M)
IGNORED = {".git", ".venv", "build", "_build", "__pycache__", "demo_output", "dist"}


def test_every_public_name_has_one_apiref_entry() -> None:
    found = [name for page in APIREF for name in DIRECTIVE.findall(page.read_text("utf-8"))]
    assert sorted(found) == sorted(set(aimet_ext.__all__) - {"__version__"})


def test_every_apiref_page_is_part_of_the_documents() -> None:
    text = "".join(page.read_text("utf-8") for page in PAGES)
    for page in APIREF:
        assert f".. include:: ../{page.relative_to(ROOT).as_posix()}" in text


@pytest.mark.parametrize("page", APIREF, ids=lambda page: page.stem)
def test_an_apiref_page_has_label_and_marker(page: pathlib.Path) -> None:
    text = page.read_text("utf-8")
    assert text.startswith(f".. _apiref-{page.parent.name}-{page.stem}:\n")
    assert text.count("\n.. # start-after\n") == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_hold_no_python_of_their_own(page: pathlib.Path) -> None:
    text = page.read_text("utf-8")
    blocks = re.findall(r"^ *\.\. (?:code|code-block|sourcecode|parsed-literal)::(.*)$", text, re.M)
    assert set(map(str.strip, blocks)) <= {"console", "text", "json"}
    assert not re.search(r"^ *\.\. (?:doctest|testcode)::|^\s*>>> ", text, re.M)
    assert not re.search(
        r"::$(?<!\.\. # start-after)", re.sub(r"^ *\.\. .*$", "", text, flags=re.M)
    )


# Pages without a snippet: why they need none.
WITHOUT_SNIPPET = {
    "api": "docstrings, whose examples stand there",
    "architecture": "the inside of the package",
    "benchmarks": "made of the results at every build",
    "formats": "files, not calls",
    "htp_patterns": "written by a benchmark",
    "index": "leads to the others",
    "installation": "commands of pip",
    "licences": "made of metadata at every build",
    "limits": "what there is no code for",
    "models": "written by a benchmark",
    "olive": "configurations, which tests/integrations/test_olive_page.py runs",
    "troubleshooting": "made of the catalogue at every build",
}


def test_pages_show_code_that_runs() -> None:
    """Each page includes a snippet, or a file of the tests; the others are few and justified."""
    shown = {
        page.stem
        for page in PAGES
        if re.search(r"literalinclude:: \.\./(?:snippets|tests)/", page.read_text("utf-8"))
    }
    assert {page.stem for page in PAGES} - shown == set(WITHOUT_SNIPPET)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_markers_that_pages_name_exist(page: pathlib.Path) -> None:
    text = page.read_text("utf-8")
    for target, options in re.findall(r"literalinclude:: (\S+)\n((?: +:[\w-]+:.*\n)*)", text):
        source = (page.parent / target).read_text("utf-8")
        for marker in re.findall(r":(?:start-after|end-before): (.*)", options):
            assert f"\n{marker}\n" in source


def test_the_page_of_the_command_line_names_every_option() -> None:
    page = (ROOT / "docs/command_line.rst").read_text("utf-8")
    for name, command in get_command(cli.app).commands.items():
        assert f"aimet-ext {name}" in page
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--"):
                    assert option in page, f"{name} {option}"
    for code in {0, 2, *cli.EXIT_CODES.values()}:
        assert f"    * - {code}\n" in page


def project_files() -> list[pathlib.Path]:
    """Return the text files of the project."""
    names = (".py", ".rst", ".md", ".toml", ".txt", ".json", "Makefile", "run", ".gitignore")
    return [
        path
        for path in sorted(ROOT.rglob("*"))
        if path.is_file()
        and path.name.endswith(names)
        and not IGNORED.intersection(path.relative_to(ROOT).parts)
    ]


def test_texts_name_no_machine() -> None:
    """No path of the machine this was written on, and no registry of packages."""
    # Put together here, so that this file passes its own test.
    patterns = "|".join(["/" + "work/", "/" + r"home/\w", "/" + r"root/", "/" + r"Users/\w"])
    hosts = "|".join(["py" + r"pi\.org", "file" + "://", "pip" + r"\.conf"])
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in project_files()
        if (match := re.search(f"{patterns}|{hosts}", path.read_text("utf-8")))
    ]
    assert found == []


def test_a_machine_path_would_be_found(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.md").write_text("see /" + "work/notes")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    with pytest.raises(AssertionError, match=r"notes\.md"):
        test_texts_name_no_machine()


def readme_links(text: str) -> list[str]:
    """Return the relative targets of a Markdown text's links, without their anchors."""
    targets = re.findall(r"\]\(([^)]+)\)", text)
    return [target.partition("#")[0] for target in targets if "://" not in target]


def test_the_readme_is_one_screen_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 66
    links = readme_links(text)
    assert [link for link in links if not (ROOT / link).exists()] == []
    for page in ("omniquant", "seq_mse", "gptq", "adaround", "lpbq", "snapdragon", "installation"):
        assert f"docs/{page}.rst" in links
    for anchor in re.findall(r"\(docs/(\w+\.rst#[\w-]+)\)", text):
        page, _, title = anchor.partition("#")
        titles = re.findall(r"^(.+)\n[=#~-]{3,}$", (ROOT / "docs" / page).read_text("utf-8"), re.M)
        assert title in [each.lower().replace(" ", "-") for each in titles], anchor


def test_the_readme_names_what_there_is_to_run() -> None:
    """Targets of the Makefile, commands, and the names that the import diff shows."""
    text = (ROOT / "README.md").read_text("utf-8")
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
    named = re.findall(r"^\$ make (\w+)", text, re.M)
    assert named == ["demo", "test"]
    assert set(named) <= set(targets)
    for command in re.findall(r"`aimet-ext ([\w-]+)", text):
        assert command in get_command(cli.app).commands
    (added,) = re.findall(r"^\+from aimet_ext import (.+)$", text, re.M)
    assert set(added.split(", ")) <= set(aimet_ext.__all__)


def undescribed(page: str) -> list[str]:
    """Return the packages and top-level modules that a page's table of packages lacks."""
    package = ROOT / "aimet_ext"
    names = [path.parent for path in package.rglob("__init__.py") if path.parent != package]
    names += [path.with_suffix("") for path in package.glob("*.py") if path.name != "__init__.py"]
    dotted = (".".join(path.relative_to(ROOT).parts) for path in sorted(names))
    rows = re.findall(r"^    \* - (``aimet_ext.+``)\n      - .*\w", page, re.M)
    return [name for name in dotted if f"``{name}``" not in "".join(rows)]


def test_every_package_is_described_in_the_architecture() -> None:
    page = (ROOT / "docs/architecture.rst").read_text("utf-8")
    assert undescribed(page) == []
    named = re.findall(r"``(\w+/[\w/]+?)/?``", page)
    missing = [name for name in named if not list((ROOT / "aimet_ext").glob(f"{name}*"))]
    assert [name for name in missing if not (ROOT / name).exists()] == []
    without = page.replace("``aimet_ext.walk``", "``aimet_ext.wok``")
    assert undescribed(without) == ["aimet_ext.walk"]


def test_the_version_of_the_changelog() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"## {aimet_ext.__version__}" in changes
