"""A check of the built pages: what a browser loads with them is beside them, not on the network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

# Attributes that a browser follows by itself; those of <a> wait for a click.
_LOADED = {
    **dict.fromkeys(("audio", "embed", "iframe", "img", "script", "source", "video"), "src"),
    "link": "href",
    "object": "data",
}
_IN_STYLES = re.compile(r"""(?:url\(|@import\s)\s*["']?((?:https?:)?//[^"')\s]+)""")


class _Loads(HTMLParser):
    """Addresses on the network that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the address of an element that loads one."""
        address = dict(attrs).get(_LOADED.get(tag, "")) or ""
        if re.match(r"(https?:)?//", address):
            self.found.append(address)


def external(folder: Path) -> Iterator[str]:
    """Yield ``file: address`` for everything that pages and styles load from elsewhere.

    :param folder: that of the built pages.
    """
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".html", ".css"):
            continue
        text = path.read_text("utf-8")
        page = _Loads()
        if path.suffix == ".html":
            page.feed(text)
        for address in [*page.found, *_IN_STYLES.findall(text)]:
            yield f"{path.relative_to(folder).as_posix()}: {address}"


def _check(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html" and (found := list(external(app.outdir))):
        raise ExtensionError(
            "offline: pages that load nothing from the network are required, but\n"
            + "\n".join(found)
            + "\nPut these files into docs/static."
        )


def setup(app: Sphinx) -> dict[str, bool]:
    """Check after every build."""
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
