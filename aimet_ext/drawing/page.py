"""Pages of one file each, from templates in which everything is escaped."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from aimet_ext.errors import require

if TYPE_CHECKING:
    from markupsafe import Markup

LONGEST = 160
"""Characters of a name on a page; the middle of a longer one is left out."""


def render(template: str, **values: Any) -> str:
    """Return the page of a template.

    :param template: Name of a file in ``templates``.
    :param values: Values by their names there; text is escaped.
    :raises MissingExtraError: jinja2 is not installed.
    """
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("aimet_ext.drawing"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "duration": duration,
        "size": size,
        "short": short,
    }
    return str(environment.get_template(template).render(**values))


def trusted(svg: str) -> Markup:
    """Return an SVG text of matplotlib, which escaped what it holds, as it is to stand in a page.

    :raises MissingExtraError: jinja2 is not installed.
    """
    require("jinja2", "report")
    from markupsafe import Markup

    return Markup(svg)


def bars(counts: Any, width: int, height: int) -> str:
    """Return the outline of a histogram as the path of an SVG, of a few bytes a bin.

    A figure of matplotlib has ten thousand bytes, and a model has hundreds of layers.

    :param counts: Counts of the bins.
    :param width: Width of all bins in pixels.
    :param height: Height of the largest one.
    """
    most, step = max([*counts, 1]), width / max(1, len(counts))
    ends = (f"V{height - height * n / most:.0f}H{(i + 1) * step:.0f}" for i, n in enumerate(counts))
    return f"M0 {height}{''.join(ends)}V{height}Z"


def number(value: float | None) -> str:
    """Return a number with four digits, a dash for none."""
    return "–" if value is None else f"{value:.4g}"


def percent(value: float | None) -> str:
    """Return a share as a percentage with three digits."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.3g} %"


def duration(seconds: float) -> str:
    """Return seconds for people: ``"0.4 s"``, ``"12 min 5 s"``, ``"3 h 20 min"``."""
    if seconds < 99.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(count: int | None) -> str:
    """Return a number of bytes for people: ``"1.5 GB"``."""
    if count is None:
        return "–"
    for unit, each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= each:
            return f"{count / each:.3g} {unit}"
    return f"{count} B"


def short(name: str) -> str:
    """Return a text of at most :data:`LONGEST` characters, without its middle if it is longer."""
    if len(name) <= LONGEST:
        return name
    half = LONGEST // 2
    return f"{name[: half - 1]}…{name[-half:]}"
