"""A line that stands in the source of pages, for who reads them unbuilt; a build takes it out."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

NOTE = (
    "*Unbuilt, this page lacks its snippets and tables:* ``make docs`` *writes it whole to* "
    "``docs/_build/html``.\n\n"
)
INCLUDES = re.compile(
    r"^ *\.\. (?:include|literalinclude|troubleshooting|measurements|licences)::", re.M
)
"""Directives of which a viewer of sources shows nothing."""


def take_out(_app: Sphinx, _page: str, source: list[str]) -> None:
    """Take the line out of a page that is built."""
    source[0] = source[0].replace(NOTE, "", 1)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register what is done when a page is read."""
    app.connect("source-read", take_out)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
