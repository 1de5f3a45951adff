"""Summaries of runs as text of at most a hundred columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING

from aimet_ext.drawing.page import duration, number, percent, size
from aimet_ext.reporting.parts import STATES, Quality, StateQuality, TechniqueResult

if TYPE_CHECKING:
    from aimet_ext.reporting.comparison import RunComparison
    from aimet_ext.reporting.run_report import RunReport

_WIDTH = 100
_MOST = 12  # rows of a list that are shown


def summary(run: RunReport) -> str:
    """Return the summary of a run."""
    lines = [f"{run.model}, {run.created}, aimet-ext {run.versions.get('aimet-ext', '')}".strip()]
    if run.quality is not None:
        lines += _quality(run.quality)
    lines += [line for result in run.techniques for line in _technique(result)]
    if run.weights:
        worst = max(run.weights, key=lambda use: use.at_edges)
        lines += _folded(
            f"weights: {len(run.weights)}, of {number(run.bits)} bits with scales; most at the "
            f"edges of its grid: {percent(worst.at_edges)} of {worst.name}"
        )
    if run.widths is not None:
        choices = ", ".join(f"{count} of {name}" for name, count in run.widths.choices.items())
        lines += _folded(f"widths: {choices}")
    if run.phases:
        rows = [
            (phase.name, duration(phase.seconds), size(phase.memory_bytes)) for phase in run.phases
        ]
        lines += _columns(("part", "time", "memory"), rows)
        lines.append(f"{duration(run.seconds)} in all")
    for warning in run.warnings[:_MOST]:
        lines += _folded(f"! {warning}")
    if (rest := len(run.warnings) - _MOST) > 0:
        lines.append(f"! and {rest} more")
    return "\n".join(lines)


def comparison(found: RunComparison) -> str:
    """Return the differences of two runs as text."""
    lines = [
        f"{letter}: {', '.join(filter(None, (name, run.model, run.created)))}"
        for letter, run, name in zip("AB", found.runs, found.names, strict=True)
    ]
    lines += _section("settings that differ", ("", "A", "B"), found.settings)
    more = f", {_MOST} of {len(found.grids)}" * (len(found.grids) > _MOST)
    lines += _section(f"grids that differ{more}", ("", "A", "B"), found.grids[:_MOST])
    shown = [(name, number(a), number(b), _change(a, b)) for name, a, b in found.measures]
    lines += _section("measures", ("", "A", "B", "B to A"), shown)
    if found.note:
        lines += _folded(f"! {found.note}")
    for measure, rows in found.losses.items():
        most = sorted(rows, key=lambda row: -row.distance)[:_MOST]
        cells = [(row.name, number(row.first), number(row.second), row.change) for row in most]
        more = f", the {len(most)} that differ most of {len(rows)}" * (len(rows) > len(most))
        lines += _section(f"{measure}{more}", ("", "A", "B", "B to A"), cells)
    rows_of_time = [
        (name, _time(a), _time(b), _memory(a), _memory(b)) for name, a, b in found.phases
    ]
    head = ("", "time A", "time B", "memory A", "memory B")
    return "\n".join([*lines, *_section("time and memory", head, rows_of_time)])


def _quality(quality: Quality) -> Iterator[str]:
    yield from _folded(f"on {quality.windows or 'some'} windows of {quality.text}")
    start = quality.states.get("float", StateQuality()).perplexity
    rows = []
    for name, state in quality.states.items():
        change = ""
        if start and state.perplexity is not None and name != "float":
            change = f"{state.perplexity / start - 1:+.1%}"
        measures = (number(state.kl), number(state.kl_high), percent(state.flips))
        rows.append((STATES[name], number(state.perplexity), change, *measures))
    head = ("", "perplexity", "", "KL", "99.9th perc.", "flips")
    yield from _columns(head, rows)
    if quality.recovered is not None:
        yield f"{quality.recovered:.0%} of the loss of plain rounding is gained back"


def _technique(result: TechniqueResult) -> Iterator[str]:
    text = f"{result.name}: {duration(result.seconds)}"
    if shares := result.shares():
        text += (
            f"; losses of {len(shares)} {result.unit}s are {percent(median(shares))} of plain "
            "rounding's (median)"
        )
    if (worst := result.worst()) is not None and worst.sqnr_db is not None:
        text += f"; lowest SQNR {worst.sqnr_db:.1f} dB ({worst.name})"
    numbers = "".join(f"; {name} {number(value)}" for name, value in result.numbers.items())
    yield from _folded(text + numbers)


def _section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if rows:
        yield f"\n{title}:"
        yield from _columns(head, rows)


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows in aligned columns, the first one to the left."""
    table = [tuple(map(_cell, row)) for row in (head, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    for first, *others in table:
        cells = (f"{c:>{w}}" for c, w in zip(others, widths[1:], strict=True))
        yield f"  {first:<{widths[0]}}  {'  '.join(cells)}".rstrip()


def _cell(text: str) -> str:
    """Return a text of one line of a column's width at most."""
    text = " ".join(text.split())
    return text if len(text) <= 48 else f"{text[:15]}…{text[-32:]}"


def _folded(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent="  ")


def _change(a: float | None, b: float | None) -> str:
    return f"{b / a - 1:+.1%}" if a and b is not None else ""


def _time(phase: tuple[float, int | None] | None) -> str:
    return "–" if phase is None else duration(phase[0])


def _memory(phase: tuple[float, int | None] | None) -> str:
    return "–" if phase is None else size(phase[1])
