"""Every text of an error is in the catalogue of troubleshooting, with its cause and remedy."""

from __future__ import annotations

import importlib
import pathlib
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import aimet_ext
from aimet_ext import cli

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
            also = (f"…{text}…" for text in (*entry.others, *entry.reports))
            for known in [*(m.text for m in entry.found), *also]:
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


KNOWN = "An option of the command line is missing, or is not known"
THERE = "A file is not there"
RANGE = "A setting is out of its range or not known"
QUANTIZE = ("quantize", str(aimet_ext.examples.model_dir()), "--output", "out")


def said_by_command(*arguments: str) -> str:
    """Return what the command line says of arguments that it does not take."""
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2, done.output
    return " ".join(done.stderr.split())


def said_by_click(kind: str, value: str, **options: Any) -> str:
    """Return what click says of a value, whose texts typer has in some versions."""
    click = pytest.importorskip("click")
    with pytest.raises(click.BadParameter) as caught:
        getattr(click, kind)(**options).convert(value, None, None)
    return caught.value.message  # type: ignore[no-any-return]


def said_in_report(make: Callable[..., Any]) -> str:
    ids = torch.arange(16)[None]
    sim = aimet_ext.create_sim(make("llama", tie_word_embeddings=True), ids, activations=None)
    return str(aimet_ext.apply_rtn(sim, progress=False).skipped)


TEXTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "Missing option '…'": (KNOWN, lambda _: said_by_command(*QUANTIZE[:2])),
    "Missing argument '…'": (KNOWN, lambda _: said_by_command("quantize")),
    "No such option: …": (KNOWN, lambda _: said_by_command(*QUANTIZE, "--nosuch")),
    "No such command '…'": (KNOWN, lambda _: said_by_command("nosuch")),
    "Got unexpected extra argument": (KNOWN, lambda _: said_by_command(*QUANTIZE, "more")),
    "requires an argument": (KNOWN, lambda _: said_by_command(*QUANTIZE[:3])),
    "does not take a value": (KNOWN, lambda _: said_by_command("recipes", "--json=3")),
    "Input should be greater than or equal to …": (
        RANGE,
        lambda _: said_by_command(*QUANTIZE, "--set", "omniquant.num_iterations=0"),
    ),
    "Input should be less than or equal to …": (
        RANGE,
        lambda _: said_by_command(*QUANTIZE, "--set", "omniquant.smooth_alpha=3"),
    ),
    "Input should be greater than …": (
        RANGE,
        lambda _: said_by_command(*QUANTIZE, "--set", "omniquant.lwc_lr=0"),
    ),
    "Input should be a valid …": (
        RANGE,
        lambda _: said_by_command(*QUANTIZE, "--set", "omniquant.lwc=3"),
    ),
    "Input should be '…' or '…'": (
        RANGE,
        lambda _: said_by_command(*QUANTIZE, "--set", "omniquant.lr_schedule=none"),
    ),
    "Unexpected keyword argument": (RANGE, lambda _: str(raised_by_an_unknown_field())),
    "is not in the range": (RANGE, lambda _: said_by_click("IntRange", "1", min=2)),
    "is not a valid …": (RANGE, lambda _: said_by_click("IntRange", "two")),
    "does not exist": (
        THERE,
        lambda _: said_by_command("evaluate", QUANTIZE[1], "--text", "nowhere.txt"),
    ),
    "is a directory": (THERE, lambda _: said_by_command("evaluate", QUANTIZE[1], "--text", ".")),
    "shares its weight with the embedding": ("Layers share one weight", said_in_report),
}


def raised_by_an_unknown_field() -> BaseException:
    with pytest.raises(ValueError) as caught:
        aimet_ext.QSpec(bits=4)  # type: ignore[arg-type]
    return caught.value


@pytest.mark.parametrize("text", TEXTS)
def test_what_the_command_line_and_checks_of_settings_say_is_found(
    sections: list, text: str, tiny_model: Callable[..., Any]
) -> None:
    title, provoke = TEXTS[text]
    said = provoke(tiny_model)
    assert re.search(".*".join(map(re.escape, text.split("…"))), said), said
    assert entry_of(sections, said) == title


def test_each_of_these_texts_is_provoked(sections: list) -> None:
    listed = [
        text
        for section in sections
        for entry in section.entries
        if entry.title in (KNOWN, RANGE, THERE) or entry.reports
        for text in (*entry.others, *entry.reports)
    ]
    assert sorted(listed) == sorted(TEXTS)


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
