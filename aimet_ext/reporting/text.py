"""Summaries of runs as text of at most a hundred columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from aimet_ext.drawing.page import duration, number, percent, size
from aimet_ext.reporting.parts import (
    STATES,
    Quality,
    StateName,
    StateQuality,
    TechniqueResult,
    WeightUse,
    bits_by_grid,
)

if TYPE_CHECKING:
    from aimet_ext.reporting.comparison import RunComparison
    from aimet_ext.reporting.run_report import RunReport

_WIDTH = 100
_MOST = 12  # rows of a list that are shown
_MOST_GRIDS = 3
_WORST = 3  # units of a technique that are named


def summary(run: RunReport) -> str:
    """Return the summary of a run."""
    lines = [f"{run.model}, {run.created}, aimet-ext {run.versions.get('aimet-ext', '')}".strip()]
    if run.quality is not None:
        lines += quality_table(run.quality)
    lines += techniques(run.techniques)
    if run.weights:
        worst = max(run.weights, key=lambda use: use.at_edges)
        lines += _folded(
            f"weights: {len(run.weights)}, of {number(run.bits)} bits with scales"
            f"{grids(run.weights)}; most at the edges of its grid: {percent(worst.at_edges)} of "
            f"{worst.name}"
        )
    if run.widths is not None:
        choices = ", ".join(f"{count} of {name}" for name, count in run.widths.choices.items())
        lines += _folded(f"widths: {choices}")
    if run.phases:
        rows = [
            (phase.name, duration(phase.seconds), size(phase.memory_bytes)) for phase in run.phases
        ]
        rows += [("the rest", duration(run.rest), "")] if run.rest else []
        lines += _columns(("part", "time", "memory"), rows)
        lines.append(f"{duration(run.seconds)} in all")
    return "\n".join([*lines, *remarks(run.warnings, run.infos)])


def remarks(warnings: Sequence[str], infos: Sequence[str]) -> Iterator[str]:
    """Yield warnings, marked, and what else is worth a line, as far as there is room."""
    for mark, said in (("! ", warnings), ("", infos)):
        for each in said[:_MOST]:
            yield from _folded(f"{mark}{each}")
        if (rest := len(said) - _MOST) > 0:
            yield f"{mark}and {rest} more"


def grids(uses: Sequence[WeightUse]) -> str:
    """Return in brackets which grids the average bits are of; empty for one grid."""
    found = bits_by_grid(uses)
    parts = [f"{percent(share)} {name} of {number(bits)}" for name, share, bits in found]
    more = f", {len(parts) - _MOST_GRIDS} more grids" * (len(parts) > _MOST_GRIDS)
    return f" ({', '.join(parts[:_MOST_GRIDS])}{more})" if len(parts) > 1 else ""


def comparison(found: RunComparison) -> str:
    """Return the differences of two runs as text."""
    lines = [
        f"{letter}: {', '.join(filter(None, (name, run.model, run.created)))}"
        for letter, run, name in zip("AB", found.runs, found.names, strict=True)
    ]
    lines += _section("settings that differ", ("", "A", "B"), found.settings)
    more = f", the first {_MOST} of {len(found.grids)}" * (len(found.grids) > _MOST)
    lines += _section(f"grids that differ{more}", ("", "A", "B"), found.grids[:_MOST])
    shown = [
        (name, measured(name, a), measured(name, b), _change(a, b)) for name, a, b in found.measures
    ]
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


def quality_table(quality: Quality, words: Mapping[StateName, str] = STATES) -> Iterator[str]:
    """Yield the measures of the states of a model as a table, with what they are of.

    :param words: Words for the states.
    """
    divergence = any(state.kl is not None for state in quality.states.values())
    yield from _folded(f"on {quality.measured_on}")
    if divergence:
        yield "(KL to the float model: divergence of the next token; flips: another is likeliest)"
    start = quality.states.get("float", StateQuality()).perplexity
    rows = []
    for name, state in quality.states.items():
        change = ""
        if start and state.perplexity is not None and name != "float":
            change = f"{state.perplexity / start - 1:+.1%}"
        measures = (number(state.kl), number(state.kl_high), percent(state.flips))
        rows.append((words[name], number(state.perplexity), change, *measures * divergence))
    head = ("", "perplexity", "", *("mean KL", "99.9th perc.", "flips") * divergence)
    yield from _columns(head, rows)
    if quality.recovered is not None and quality.recovered >= 0:
        yield f"{quality.recovered:.0%} of the loss of plain rounding is gained back"
    elif quality.recovered is not None:
        times = f"{1 - quality.recovered:.1f}"
        yield f"as deployed the loss is {times} times that of plain rounding of the weights alone"


def measured(name: str, value: float | None) -> str:
    """Return a measure of a model: shares as percentages, other numbers as they are."""
    return percent(value) if name.startswith("share of") else number(value)


def techniques(results: Sequence[TechniqueResult]) -> Iterator[str]:
    """Yield the summaries of techniques in order, each as it left the model to the later ones."""
    for place, result in enumerate(results, 1):
        yield from technique(result, [later.name for later in results[place:]])


def technique(result: TechniqueResult, later: Sequence[str] = ()) -> Iterator[str]:
    """Yield the summary of a technique's outcome, and the units that are worst off.

    :param later: Techniques that followed, of which losses tell nothing.
    """
    text = f"{result.name}: {duration(result.seconds)}"
    if later and result.units:
        text += f"; before {' and '.join(later)}"
    if shares := result.shares():
        text += (
            f"; losses of {len(shares)} {result.unit}s are {percent(median(shares))} of plain "
            "rounding's (median)"
        )
    text += "".join(f"; {line}" for line in _numbers(result.numbers))
    worst = result.worst(_WORST)
    if by_itself := any(unit.own is not None for unit in worst):
        text += "; most of the output lost in a layer itself, and with what comes in:"
    elif by_ratio := any(unit.sqnr_db is not None for unit in worst):
        text += "; lowest SQNR:"
    elif worst:
        text += "; highest losses:"
    yield from _folded(text)
    for unit in worst:
        if by_itself:
            measure = f"{percent(unit.own):>7}  {percent(unit.result):>7}"
        else:
            measure = f"{unit.sqnr_db:.1f} dB" if by_ratio else percent(unit.share)
        yield f"  {measure:>8}  {unit.name}"


def _numbers(numbers: Mapping[str, float]) -> Iterator[str]:
    """Yield further measures, those before and after in one."""
    for name, value in numbers.items():
        what, _, when = name.rpartition(", ")
        after = numbers.get(f"{what}, after")
        if when == "before" and after is not None:
            yield f"{what} {number(value)} to {number(after)}, {_change(value, after)}"
        elif when != "after" or f"{what}, before" not in numbers:
            yield f"{name} {number(value)}"


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
