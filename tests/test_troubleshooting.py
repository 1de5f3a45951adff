"""Every text of an error is in the catalogue of troubleshooting, with its cause and remedy."""

from __future__ import annotations

import importlib
import pathlib
import re
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

import aimet_ext

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs/troubleshooting"
pytest.importorskip("sphinx")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "docs/extensions")
    return importlib.import_module("troubleshooting")


@pytest.fixture
def sections(page: ModuleType) -> list:
    sections = page.catalogue(FOLDER)
    page.fill(sections, page.messages(page.PACKAGE))
    return sections


def entry_of(sections: list, text: str) -> str | None:
    """Return the title of the entry that lists a message as a user sees it."""
    for section in sections:
        for entry in section.entries:
            for known in [*(m.text for m in entry.found), *(f"…{t}…" for t in entry.others)]:
                parts = map(re.escape, known.split("…"))
                if re.search(".*".join(parts), text, re.DOTALL):
                    return entry.title
    return None


def test_every_message_is_in_one_entry(page: ModuleType) -> None:
    sections = page.catalogue(FOLDER)
    assert page.fill(sections, page.messages(page.PACKAGE)) == []
    entries = [entry for section in sections for entry in section.entries]
    assert len({entry.title for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.found, entry.title
        assert len(entry.cause.split()) >= 6, entry.title
        assert len(entry.remedy.split()) >= 4, entry.title


def test_a_message_without_an_entry_and_an_entry_without_a_message_are_found(
    page: ModuleType, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "new.py").write_text(
        "def f(x):\n"
        "    if x: raise ValueError(f'a brown {x} is required')\n"
        "    raise TypeError(g(x))\n"
        "def g(x):\n"
        "    text = 'a red one' if x else f'a green one, got {x}'\n"
        "    return text\n"
        "def h(names, problem): raise ValueError(f'{names}: {problem}')\n"
        "h('a', 'each must be blue')\n"
        "def i(error): raise KeyError(f'layer: {error}')\n"
    )
    said = page.messages(tmp_path)
    assert sorted(message.text for message in said) == [
        "a brown … is required",
        "a green one, got …",
        "a red one",
        "a: each must be blue",
    ]
    entry = page.Entry(title="Colours", cause="", remedy="", messages=["a brown", "red", "pink"])
    faults = page.fill([page.Section(title="", entries=[entry])], said)
    assert faults == [
        "in no entry: new.py: a green one, got …",
        "in no entry: new.py: a: each must be blue",
        "fits no message: Colours: pink",
    ]


@pytest.mark.parametrize(
    ("title", "call"),
    [
        (
            "The first argument is no simulation or model of the required kind",
            lambda: aimet_ext.apply_rtn(torch.nn.Linear(2, 2)),
        ),
        ("A name is not there", lambda: aimet_ext.apply_gptk),
        ("The text file cannot be read", lambda: aimet_ext.examples.documents("test")),
        ("A file is not there", lambda: aimet_ext.load_scales("nowhere")),
        (
            "The grid is not possible for this layer",
            lambda: aimet_ext.QSpec.parse("four"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_error_as_a_user_sees_it_is_found(
    sections: list, title: str, call: Callable[[], object]
) -> None:
    with pytest.raises(Exception) as caught:
        call()
    assert entry_of(sections, str(caught.value)) == title


def test_errors_that_pages_quote_are_found(sections: list) -> None:
    quoted = [
        text
        for path in (ROOT / "docs").glob("*.rst")
        for text in re.findall(r"``\w*(?:Error|Refused): ([^`]+)``", path.read_text("utf-8"))
    ]
    parts = [
        part
        for section in sections
        for entry in section.entries
        for part in [*entry.messages, *entry.others]
    ]
    assert quoted
    assert [text for text in quoted if not any(part in text for part in parts)] == []
