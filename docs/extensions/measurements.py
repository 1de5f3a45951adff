"""The page of measurements: every file of benchmarks/results, with what made it."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

# Raw runs behind the rows, and what is drawn; the files have them.
RAW = {"bars", "curves", "runs"}
LONG = 20  # rows from which on a table is folded


@dataclass(frozen=True)
class Script:
    """A script of benchmarks, as its docstring describes it."""

    path: Path
    text: str

    @property
    def title(self) -> str:
        """The first line, up to a full stop or a semicolon at the end of a clause."""
        return re.split(r"[.;](?:\s|$)", self.text)[0]

    @property
    def pages(self) -> list[str]:
        """Pages that the script writes its results to, and says so at their top."""
        made = f"ritten by benchmarks/{self.path.name}"
        pages = (self.path.parent.parent / "docs").glob("*.rst")
        return sorted(page.stem for page in pages if made in page.read_text("utf-8")[:200])

    def about(self, key: str) -> str:
        """Return what is said of a section, or nothing."""
        name = rf"^    (?:[a-z]\w* )*{re.escape(key)}(?: [a-z]\w*)*  +(.+(?:\n {{6,}}\S.*)*)"
        found = re.search(name, self.text, re.M)
        return " ".join(found[1].split()) if found else ""

    def command(self, key: str) -> str:
        """Return the line that measures a section again; with options where it needs some."""
        plain = f"python benchmarks/{self.path.name}"
        if self.about(key):
            return f"{plain} --only {key}"
        used = re.search(rf"^    ({re.escape(plain)}.*)$", self.text, re.M)
        return used[1] if used else plain


def script_of(results: Path, key: str) -> Script:
    """Find the script of a section: that of the file's name, or that of the section's.

    :param results: file of results.
    :param key: name of the section.
    :raises ExtensionError: there is none.
    """
    folder = results.parent.parent
    found = [
        Script(path, ast.get_docstring(ast.parse(path.read_text("utf-8")), clean=False) or "")
        for path in (folder / f"{results.stem}.py", folder / f"{key}.py")
        if path.is_file()
    ]
    if not found:
        raise ExtensionError(
            f"measurements: {results.name}, section {key!r}: a script {results.stem}.py or "
            f"{key}.py is required in benchmarks; name the results after their script"
        )
    return found[0] if found[0].about(key) else found[-1]


def render(folder: Path) -> Iterator[str]:
    """Yield the lines of the page, as reStructuredText.

    :param folder: that of the results.
    """
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text("utf-8"))
        sections = {"": content} if "rows" in content else content
        script = script_of(path, next(iter(sections)))
        yield from ("", script.title, "=" * len(script.title))
        for key, section in sections.items():
            yield from _section(script_of(path, key), key, section)


def _section(script: Script, key: str, section: Mapping[str, Any]) -> Iterator[str]:
    title = _plain(section.get("title") or script.about(key) or key)
    if title:
        yield from ("", f"{key}: {title}" if script.about(key) else title)
        yield "-" * (len(key) + len(title) + 2)
    yield from ("", *_machine(section.get("machine", section)), "")
    if settings := _settings(section.get("settings", {})):
        yield from (f"Settings: {settings}.", "")
    yield from (".. code-block:: console", "", f"    $ {script.command(key)}", "")
    if script.pages:
        yield "The figures: " + ", ".join(f":doc:`{page}`" for page in script.pages) + "."
        return
    for name, rows in section.items():
        if name not in RAW and isinstance(rows, list) and rows and isinstance(rows[0], dict):
            yield from _table(rows)
    bars = section.get("bars", ())
    if bars:
        missed = [_plain(bar["bar"]) for bar in bars if not bar["reached"]]
        yield f"{len(bars) - len(missed)} of {len(bars)} bars set beforehand are reached."
        yield from ("", *(f"* Missed: {bar}" for bar in missed), "")


def _machine(machine: Mapping[str, Any]) -> Iterator[str]:
    if missing := {"date", "cores", "threads", "load"} - set(machine):
        raise ExtensionError(
            f"measurements: {sorted(missing)} of the machine are required in each section of "
            "results; write them with machine() of benchmarks/report.py"
        )
    versions = {k: v for k, v in machine.items() if re.fullmatch(r"\d+\.\d+[.\w+]*", str(v))}
    packages = [f"{name} {version}" for name, version in versions.items() if name != "load"]
    count = int(machine["threads"])
    yield (
        f"{machine['date']}, {machine['cores']} cores, {count} thread{'s' if count > 1 else ''}, "
        f"load {machine['load']:.1f}; {', '.join(packages)}."
    )


def _settings(settings: Mapping[str, Any]) -> str:
    given = ((k, v) for k, v in settings.items() if v not in (False, None, [], {}, ""))
    return ", ".join(f"``{name}`` {_plain(_cell(value))}" for name, value in given)


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a table; a mapping in a row becomes columns of its own."""
    flat = [
        {
            f"{name} {inner}" if inner else name: value
            for name, given in row.items()
            for inner, value in (given.items() if isinstance(given, dict) else [("", given)])
        }
        for row in rows
    ]
    head = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerows([_plain(_cell(row.get(name))) for name in head] for row in flat)
    indent = "    " if len(rows) >= LONG else ""
    if indent:
        yield from (f".. dropdown:: {len(rows)} rows", "")
    yield f"{indent}.. csv-table::"
    yield f"{indent}    :header: " + ", ".join(f'"{_plain(name)}"' for name in head)
    yield from ("", *(f"{indent}    {line}" for line in text.getvalue().splitlines()), "")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    return "" if value is None else str(value)


def _plain(text: str) -> str:
    """Return a text in which nothing is markup."""
    return re.sub(r"([*_`|\\])", r"\\\1", text)


class Measurements(SphinxDirective):
    """Directive ``measurements``: all files of results."""

    def run(self) -> list[nodes.Node]:
        """Return a section for each file."""
        folder = Path(self.env.srcdir).parent / "benchmarks/results"
        self.env.note_reread()
        return self.parse_text_to_nodes("\n".join(render(folder)), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("measurements", Measurements)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
