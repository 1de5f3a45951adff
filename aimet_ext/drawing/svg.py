"""Figures of matplotlib as SVG text, in the colours of a file or of the page around them."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from aimet_ext.errors import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    "ink": "#1b1f25",
    "muted": "#656d77",
    "line": "#d5dbe1",
    "rounding": "#c2570c",
    "result": "#2563ec",
    "other": "#15803e",
}
"""Colours of a file by their roles; on a page each is the CSS variable of its role."""

INK, MUTED, LINE, ROUNDING, RESULT, OTHER = COLORS.values()

_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, and found by a search
    "text.parse_math": False,  # a $ in a name is a $
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.color": LINE,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}


class Drawing:
    """One figure and, once its context is closed, its text.

    :param width: Width in pixels.
    :param height: Height in pixels.
    """

    axes: Axes

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._text = ""

    def file(self) -> str:
        """Return an SVG file: on white, in colours of its own."""
        head, body = self._text.split(">", 1)
        return f'{head}>\n<rect width="100%" height="100%" fill="white"/>{body}'

    def inline(self, name: str) -> str:
        """Return it for a page, in whose colours it is drawn.

        :param name: Name that no other figure of the page has.
        """
        text = re.sub(r'\bid="', f'id="{name}-', self._text)
        text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
        for role, color in COLORS.items():
            text = text.replace(color, f"var(--{role})")
        return text

    def _read(self, figure: Any) -> None:
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with warnings.catch_warnings():
            # Of letters that its own font lacks: the reader's fonts count.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
        text = text.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
        text = text.replace("xlink:href=", "href=")
        self._text = re.sub(r"\n\s*", "\n", text)


@contextmanager
def drawing(width: int, height: int) -> Iterator[Drawing]:
    """Open a context in which a figure is drawn on ``axes``.

    :param width: Width in pixels.
    :param height: Height in pixels.
    :raises MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "report")
    from matplotlib import style
    from matplotlib.figure import Figure

    found = Drawing(width, height)
    salt = {"svg.hashsalt": f"{width} {height}"}  # ids that are the same in every run
    with style.context(["default", {**_STYLE, **salt}]):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        found.axes = figure.subplots()
        yield found
        found._read(figure)
