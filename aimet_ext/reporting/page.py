"""Runs as pages: the figures, and what of a large model fits on one."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from aimet_ext.drawing import figures
from aimet_ext.drawing.page import bars, render, trusted
from aimet_ext.reporting.comparison import RunComparison
from aimet_ext.reporting.parts import STATES, TechniqueResult, WeightUse, share_at_edges
from aimet_ext.reporting.run_report import RunReport
from aimet_ext.reporting.text import grids, measured

MOST_ROWS = figures.MOST_UNITS
"""Layers that a page lists; of a larger model the ones that are worst off, in their order."""

_MOST_MAPS = 3  # of codes: one for each width
_MOST_NOTES = 60
_LONGEST_NOTE = 600


def run_page(run: RunReport) -> str:
    """Return the report of a run as HTML.

    :raises MissingExtraError: matplotlib or jinja2 is not installed.
    """
    return render(
        "run.html",
        run=run,
        states=STATES,
        techniques=[
            {**_technique(i, result), "later": [r.name for r in run.techniques[i + 1 :]]}
            for i, result in enumerate(run.techniques)
        ],
        grids=grids(run.weights),
        weights=_weights(run.weights),
        pareto=_pareto(run),
        recipe=_recipe(run),
        notes=[note[:_LONGEST_NOTE] for note in run.warnings[:_MOST_NOTES]],
        more_notes=max(0, len(run.warnings) - _MOST_NOTES),
        longest=max((phase.seconds for phase in run.phases), default=1.0) or 1.0,
    )


def comparison_page(found: RunComparison) -> str:
    """Return two runs side by side as HTML.

    :raises MissingExtraError: matplotlib or jinja2 is not installed.
    """
    losses = []
    for i, (measure, rows) in enumerate(found.losses.items()):
        series = {"A": [row.first for row in rows], "B": [row.second for row in rows]}
        worst = sorted(enumerate(rows), key=lambda pair: -pair[1].distance)[:MOST_ROWS]
        drawn = figures.losses(series, "loss", "unit").inline(f"loss{i}")
        ratios = [row.second / row.first if row.first > 0 else None for row in rows]
        changes = figures.shares(ratios, "unit", "the loss of A").inline(f"change{i}")
        listed = [row for _, row in sorted(worst, key=lambda pair: pair[0])]
        drawings = [
            ("Loss as deployed of each unit that both runs have.", trusted(drawn)),
            ("Loss of B as a share of that of A; below the line B is better.", trusted(changes)),
        ]
        losses.append({"measure": measure, "figures": drawings, "rows": listed, "all": rows})
    return render(
        "comparison.html",
        runs=dict(zip("AB", zip(found.runs, found.names, strict=True), strict=True)),
        note=found.note,
        settings=found.settings[:MOST_ROWS],
        grids=found.grids[:MOST_ROWS],
        measures=[
            (name, measured(name, a), measured(name, b), a, b) for name, a, b in found.measures
        ],
        losses=losses,
        phases=found.phases,
    )


def _technique(number: int, result: TechniqueResult) -> dict[str, Any]:
    """Return a technique with its figure and the units to list."""
    drawn: list[tuple[str, Any]] = []
    of = "the loss before" if result.unit == "range" else "plain rounding's loss"
    if len(result.units) > 1 and result.shares():
        series = {
            "before" if result.unit == "range" else "plain rounding": [
                unit.rounding for unit in result.units
            ],
            "as deployed": [unit.result for unit in result.units],
        }
        losses = figures.losses(series, "loss", result.unit).inline(f"loss{number}")
        left = figures.shares([unit.share for unit in result.units], result.unit, of)
        drawn = [
            (f"Loss of each {result.unit}, in the order in which data flows.", trusted(losses)),
            (
                f"What is left of {of}; below the line is better.",
                trusted(left.inline(f"s{number}")),
            ),
        ]
    shares = result.shares()
    places = range(len(result.units))
    by_loss = sorted(places, key=lambda i: -(result.units[i].share or 0.0))[:MOST_ROWS]
    return {
        "result": result,
        "figures": drawn,
        "of": of,
        "share": median(shares) if shares else None,
        "better": sum(share < 1 for share in shares),
        "compared": len(shares),
        "worst": next(iter(result.worst()), None),
        "units": [result.units[i] for i in sorted(by_loss)],
    }


def _weights(uses: Sequence[WeightUse]) -> dict[str, Any] | None:
    """Return the figures of all weights, and the weights to list with their histograms."""
    if not uses:
        return None
    places = sorted(range(len(uses)), key=lambda i: -uses[i].at_edges)[:MOST_ROWS]
    listed = [
        (i + 1, uses[i], bars(uses[i].codes, 160, 48), bars(uses[i].scales, 160, 48))
        for i in sorted(places)
    ]
    edges = figures.edges([use.low_edge for use in uses], [use.high_edge for use in uses])
    scales = figures.scale_ranges(
        *([getattr(use, f"scale_{name}") for use in uses] for name in ("low", "median", "high"))
    )
    return {
        "uses": uses,
        "listed": listed,
        "maps": _code_maps(uses),
        "edges": trusted(edges.inline("edges")),
        "scales": trusted(scales.inline("scales")),
        "at_edges": share_at_edges(uses),
    }


def _code_maps(uses: Sequence[WeightUse]) -> list[tuple[str, Any]]:
    """Return maps of the codes of layers with one grid each, and their titles."""
    groups: dict[tuple[int, int], list[WeightUse]] = {}
    for use in uses:
        groups.setdefault((use.qmin, use.qmax), []).append(use)
    largest = sorted(groups.items(), key=lambda item: -len(item[1]))[:_MOST_MAPS]
    return [
        (
            f"{len(group)} layers with codes {low} … {high}",
            trusted(figures.code_map([u.codes for u in group], low, high).inline(f"map{i}")),
        )
        for i, ((low, high), group) in enumerate(largest)
    ]


def _pareto(run: RunReport) -> Any:
    if run.widths is None:
        return None
    marks = {mark.name: (mark.bits, mark.kl) for mark in run.widths.marks}
    return trusted(figures.pareto(run.widths.curve, marks).inline("pareto"))


def _recipe(run: RunReport) -> str:
    """Return the recipe as YAML."""
    if run.recipe is None:
        return ""
    import yaml  # type: ignore[import-untyped]

    return str(yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=80))
