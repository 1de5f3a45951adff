"""The figures of reports, from plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aimet_ext.drawing.svg import INK, MUTED, OTHER, RESULT, ROUNDING, Drawing, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 420, 250
"""Pixels of a figure: on a telephone it is hardly smaller, on a screen two stand side by side."""

_ROWS = 40  # rows of a map of codes that are as high as a name
_NAME = 24  # letters of a name in a figure
_DOTS = 60  # units up to which each has a dot of its own
MOST_UNITS = 600
"""Units that a figure shows; of more, every second one, or every third and so on."""

#: Average bits of a weight, and the divergence there.
Point = tuple[float, float]


def pareto(curve: Sequence[Point], marks: Mapping[str, Point]) -> Drawing:
    """Draw the least divergence at each budget, and named points beside it.

    :param curve: Points in the order of their bits.
    :param marks: Points by name; the last ones are the result.
    """
    marks = {name: place for name, place in marks.items() if all(map(math.isfinite, place))}
    with drawing(WIDTH, HEIGHT + 40) as found:
        axes, heights = found.axes, _finite([kl for _, kl in curve])
        places = [bits for bits, _ in curve]
        (line,) = axes.plot(places, heights, color=MUTED, marker="o", markersize=2.5)
        line.set_gid("curve")
        for name, (bits, kl) in marks.items():
            color = {"assigned": RESULT, "measured": OTHER}.get(name, ROUNDING)
            axes.plot([bits], [kl], "o", color=color, markersize=6)
            left = name == "assigned"
            axes.annotate(
                name if len(name) <= _NAME else f"{name[: _NAME - 1]}…",
                (bits, kl),
                (-7 if left else 7, -4 if left else 5),
                textcoords="offset points",
                ha="right" if left else "left",
                va="top" if left else "bottom",
                color=color,
            )
        _logarithmic(axes, [kl for _, kl in (*curve, *marks.values())])
        axes.margins(x=0.12)
        axes.set_xlabel("bits a weight, with scales")
        axes.set_ylabel("KL to the float model, nats")
    return found


def losses(series: Mapping[str, Sequence[float | None]], what: str, unit: str) -> Drawing:
    """Draw a loss of each unit of a model, in the order in which data flows.

    :param series: Losses by name; the first is drawn as plain rounding's.
    :param what: Axis of the losses.
    :param unit: Word for the units, such as ``"layer"``.
    """
    with drawing(WIDTH, HEIGHT) as found:
        axes, colors = found.axes, (ROUNDING, RESULT, OTHER)
        for (name, values), color in zip(series.items(), colors, strict=False):
            dots: Any = {"marker": "o", "markersize": 3} if len(values) <= _DOTS else {}
            every = step_of(values)
            numbers = _finite(values[::every])
            places = range(1, len(values) + 1, every)
            axes.plot(places, numbers, color=color, label=name, **dots)
        known = [value for values in series.values() for value in values if value is not None]
        _logarithmic(axes, known)
        _counted(axes, unit)
        axes.set_ylabel(what)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series), borderpad=0)
    return found


def shares(values: Sequence[float | None], unit: str, of: str) -> Drawing:
    """Draw the share of a loss that is left of each unit, in percent.

    :param values: Shares; None for a unit without one.
    :param unit: Word for the units, such as ``"layer"``.
    :param of: Words for what they are shares of.
    """
    with drawing(WIDTH, HEIGHT) as found:
        axes = found.axes
        heights = [100 * value for value in _finite(values)]
        if len(heights) <= _DOTS:
            axes.bar(range(1, len(heights) + 1), heights, 0.8, color=RESULT)
        else:
            _steps(axes, [0.0] * len(heights), heights, color=RESULT)
        axes.axhline(100, color=ROUNDING, linestyle="--")
        _counted(axes, unit)
        axes.set_ylabel(f"% of {of}")
        known = [height for height in heights if math.isfinite(height)]
        axes.set_ylim(0, min(max([110, *(1.05 * height for height in known)]), 400))
    return found


def code_map(rows: Sequence[Sequence[int]], qmin: int, qmax: int) -> Drawing:
    """Draw how often layers use each code: a row for a layer, darker for more.

    :param rows: Counts of the codes from the smallest to the largest, of each layer.
    :param qmin: Smallest code.
    :param qmax: Largest code.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    clear, full = to_rgba(RESULT, 0.0), to_rgba(RESULT, 1.0)
    shade = LinearSegmentedColormap.from_list("codes", [clear, full])
    dark = [[count / max(1, max(row)) for count in row] for row in rows[:: step_of(rows)]]
    with drawing(WIDTH, 70 + 12 * min(max(len(rows), 6), _ROWS)) as found:
        axes = found.axes
        axes.imshow(
            dark,
            cmap=shade,
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
            extent=(qmin - 0.5, qmax + 0.5, len(rows) + 0.5, 0.5),
        )
        axes.grid(visible=False)
        _whole(axes.xaxis)
        _whole(axes.yaxis)
        axes.set_xlabel("integer code")
        axes.set_ylabel("layer")
    return found


def edges(low: Sequence[float], high: Sequence[float]) -> Drawing:
    """Draw the shares of weights at the two ends of each layer's grid, in percent."""
    with drawing(WIDTH, HEIGHT) as found:
        axes = found.axes
        bottom = [100 * share for share in low]
        top = [below + 100 * share for below, share in zip(bottom, high, strict=True)]
        _steps(axes, [0.0] * len(low), bottom, color=ROUNDING, label="smallest code")
        _steps(axes, bottom, top, color=RESULT, label="largest code")
        axes.set_ylim(bottom=0)
        _counted(axes, "layer")
        axes.set_ylabel("% of the weights")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0)
    return found


def scale_ranges(low: Sequence[float], middle: Sequence[float], high: Sequence[float]) -> Drawing:
    """Draw smallest, median and largest scale of each layer."""
    low, middle, high = map(_finite, (low, middle, high))
    with drawing(WIDTH, HEIGHT) as found:
        axes = found.axes
        _steps(axes, low, high, color=RESULT, alpha=0.25)
        every = step_of(middle)
        axes.stairs(middle[::every], _between(middle), baseline=None, color=RESULT)
        _logarithmic(axes, [*low, *high])
        _counted(axes, "layer")
        axes.set_ylabel("scale")
    return found


def cost_bars(names: Sequence[str], alone: Sequence[float], removed: Sequence[float]) -> Drawing:
    """Draw what quantizers cost, the worst one first, over six decades.

    :param names: Names of the quantizers.
    :param alone: Divergence with each one alone, in nats.
    :param removed: Fall of the divergence once it is taken away.
    """
    with drawing(950, 70 + 24 * len(names)) as found:
        axes = found.axes
        most = max([1e-12, *alone, *removed])
        for values, color, shift, name in (
            (alone, RESULT, -0.2, "alone"),
            (removed, ROUNDING, 0.2, "removed"),
        ):
            places = [place + shift for place in range(len(names))]
            lengths = [max(value, 1e-6 * most) for value in values]
            axes.barh(places, lengths, 0.36, color=color, label=name)
        for place, value in enumerate(alone):
            axes.text(max(value, 1e-6 * most), place - 0.2, f" {value:.2g}", va="center", color=INK)
        axes.set_xscale("log")
        axes.set_xlim(1e-6 * most, 3 * most)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("KL to the float model in nats")
        axes.legend(loc="lower right")
    return found


def _finite(values: Sequence[float | None]) -> list[float]:
    """Return numbers, NaN in place of what has no place on an axis."""
    return [value if value is not None and math.isfinite(value) else math.nan for value in values]


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """Make the vertical axis logarithmic, where there is a positive value for it."""
    positive = [value for value in values if 0 < value < math.inf]
    if not positive:
        return
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log", nonpositive="mask")
    if max(positive) < 30 * min(positive):  # whole powers of ten would be hardly any ticks
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _steps(axes: Axes, low: Sequence[float], high: Sequence[float], **looks: Any) -> None:
    """Fill from one value to another of each unit: one path, however many there are."""
    every = step_of(high)
    looks = {"fill": True, "linewidth": 0, **looks}
    axes.stairs(high[::every], _between(high), baseline=low[::every], **looks)


def _between(values: Sequence[float]) -> list[float]:
    """Return the places halfway between the units shown, which are at 1, 2, 3 …"""
    every = step_of(values)
    shown = len(values[::every])
    return [1 + every * (number - 0.5) for number in range(shown + 1)]


def step_of(values: Sequence[Any]) -> int:
    """Return 2 where every second unit is shown, and so on."""
    return -(-len(values) // MOST_UNITS)


def _counted(axes: Axes, unit: str) -> None:
    axes.set_xlabel(unit)
    _whole(axes.xaxis)
    axes.margins(x=0.02)


def _whole(axis: Any) -> None:
    """Put ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
