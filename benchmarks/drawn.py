"""The plot of ``accuracy.py``: what methods recover of rounding's loss, over the time they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_OURS, _OTHERS = "#1f6feb", ("#d1242f", "#9a6700", "#8250df", "#57606a")


def draw(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Write an SVG file of the rows of one setting, see ``accuracy.HEAD``.

    Colours are readable on light and on dark ground, the ground itself is transparent.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "aimet_ext"})
    grey = "#7d8590"
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    colours = iter(_OTHERS)
    libraries = {"aimet_ext": _OURS}
    for row in rows:
        if row["recovered %"] is None:
            continue
        side, _, name = row["method"].rpartition(":")
        library = "aimet_ext" if side in ("", "recipe") else side
        colour = libraries.setdefault(library, next(colours) if library not in libraries else "")
        ours = library == "aimet_ext"
        place = row["processor s"] / 60, row["recovered %"]
        axes.plot(*place, "o" if ours else "s", color=colour, markersize=8 if ours else 7)
        axes.annotate(
            name.replace(",", ", "), place, xytext=(7, 4), textcoords="offset points",
            color=colour, fontsize=8.5,
        )  # fmt: skip
    for library, colour in libraries.items():
        axes.plot([], [], "o" if library == "aimet_ext" else "s", color=colour, label=library)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.15)  # room for the last name
    axes.xaxis.set_major_locator(
        FixedLocator([n * 10**e for e in range(-2, 4) for n in (1, 1.5, 2, 3, 5, 7)])
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_ylim(top=100)
    axes.set_xlabel("processor minutes, one thread", color=grey)
    axes.set_ylabel("rounding's loss recovered, %", color=grey)
    axes.set_title(title, color=grey, fontsize=10)
    axes.legend(frameon=False, labelcolor=grey, loc="lower right")
    axes.grid(color=grey, alpha=0.25, which="both", linewidth=0.6)
    axes.tick_params(colors=grey, which="both")
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.savefig(path, transparent=True, metadata={"Date": None})
    pyplot.close(figure)
