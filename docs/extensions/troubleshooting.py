"""The page of error texts: the catalogue in docs/troubleshooting, filled in from the source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import yaml
from docutils import nodes
from messages import Message, messages
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

import aimet_ext

PACKAGE = Path(aimet_ext.__file__).parent


@dataclass(kw_only=True)
class Entry:
    """Messages of one cause.

    :param title: the symptom.
    :param cause: what leads to it.
    :param remedy: what to do.
    :param messages: parts of messages. A message belongs to the entry with the longest part in it.
    :param others: parts of messages of AIMET or another package.
    :param reports: parts of what reports say of layers that were left alone.
    :param where: files or folders (with ``/`` at the end) whose other messages belong here.
    """

    title: str
    cause: str
    remedy: str
    messages: Sequence[str] = ()
    others: Sequence[str] = ()
    reports: Sequence[str] = ()
    where: Sequence[str] = ()
    found: list[Message] = field(default_factory=list)


@dataclass(kw_only=True)
class Section:
    """Entries of one file of the catalogue."""

    title: str
    entries: list[Entry]


def catalogue(folder: Path) -> list[Section]:
    """Read the catalogue.

    :param folder: that of its YAML files, one a section.
    """
    read = (yaml.safe_load(path.read_text("utf-8")) for path in sorted(folder.glob("*.yaml")))
    return [
        Section(title=one["title"], entries=[Entry(**entry) for entry in one["entries"]])
        for one in read
    ]


def fill(sections: Sequence[Section], said: Sequence[Message]) -> list[str]:
    """Give each message to its entry, and return what does not fit.

    :param sections: the catalogue; the lists ``found`` of its entries are filled.
    :param said: messages of the package.
    """
    entries = [entry for section in sections for entry in section.entries]
    parts = [(part, entry) for entry in entries for part in entry.messages]
    places = [(place, entry) for entry in entries for place in entry.where]
    faults, used = [], set()
    for message in said:
        fits = [(part, entry) for part, entry in parts if part in message.text] or [
            (place, entry)
            for place, entry in places
            if message.source == place or (place.endswith("/") and message.source.startswith(place))
        ]
        if not fits:
            faults.append(f"in no entry: {message.source}: {message.text}")
            continue
        part, entry = max(fits, key=lambda each: len(each[0]))
        rivals = {each.title for p, each in fits if len(p) == len(part)}
        if len(rivals) > 1:
            faults.append(f"in two entries ({', '.join(sorted(rivals))}): {message.text}")
        used.add(part)
        entry.found.append(message)
    unused = [(part, entry) for part, entry in [*parts, *places] if part not in used]
    faults += [f"fits no message: {entry.title}: {part}" for part, entry in unused]
    return faults


class Troubleshooting(SphinxDirective):
    """Directive ``troubleshooting``: the whole catalogue, with its messages."""

    has_content: ClassVar[bool] = False

    def run(self) -> list[nodes.Node]:
        """Return a section for each file of the catalogue."""
        folder = Path(self.env.srcdir) / "troubleshooting"
        self.env.note_reread()
        sections = catalogue(folder)
        if faults := fill(sections, messages(PACKAGE)):
            raise ExtensionError("troubleshooting:\n" + "\n".join(faults))
        return self.parse_text_to_nodes("\n".join(render(sections)), allow_section_headings=True)


def render(sections: Sequence[Section]) -> Iterator[str]:
    """Yield the lines of the page, as reStructuredText."""
    for section in sections:
        yield from ("", section.title, "=" * len(section.title))
        for entry in section.entries:
            yield from ("", entry.title, "-" * len(entry.title), "")
            yield from (entry.cause, "", f"*What to do:* {entry.remedy}", "")
            texts = {text: ["of another package"] for text in entry.others}
            texts |= {text: ["in a report"] for text in entry.reports}
            for message in entry.found:
                texts.setdefault(message.text, []).append(message.error.lstrip("_"))
            for text, errors in texts.items():
                yield f"* ``{' '.join(text.split())}`` ({', '.join(dict.fromkeys(errors))})"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("troubleshooting", Troubleshooting)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
