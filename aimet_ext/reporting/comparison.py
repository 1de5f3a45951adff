"""Two runs side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from aimet_ext.config import PRESETS
from aimet_ext.files.folders import replace_file
from aimet_ext.recipes.recipe import preset_settings
from aimet_ext.reporting.parts import STATES, Phase, share_at_edges
from aimet_ext.reporting.run_report import RunReport

_MEASURES = {
    "perplexity": "perplexity",
    "kl": "mean KL",
    "kl_high": "99.9th percentile of KL",
    "flips": "share of flips",
}
_Cost = tuple[float, int | None]  # seconds, bytes of memory


@dataclass(frozen=True)
class LossPair:
    """Losses of one unit in two runs.

    :param name: Name of the layer or block.
    :param first: Loss in the first run.
    :param second: Loss in the second run.
    """

    name: str
    first: float
    second: float

    @property
    def distance(self) -> float:
        """Logarithm of the larger loss over the smaller one."""
        if self.first == self.second:
            return 0.0
        low, high = sorted((self.first, self.second))
        return math.log(high / low) if low > 0 else math.inf

    @property
    def change(self) -> str:
        """Relative change from the first to the second, as text."""
        return f"{self.second / self.first - 1:+.1%}" if self.first > 0 else ""


class RunComparison:
    """The differences of two runs; ``print`` shows them.

    :param first: Report of one run.
    :param second: Report of the other.
    :param names: Names of both to show, such as their folders.

    >>> print(aimet_ext.RunReport.read("a").compare(aimet_ext.RunReport.read("b")))
    """

    def __init__(
        self, first: RunReport, second: RunReport, names: Sequence[str] = ("", "")
    ) -> None:
        self.first, self.second, self.names = first, second, names

    @cached_property
    def settings(self) -> list[tuple[str, str, str]]:
        """Name and both values of each setting, version or fact of the machine that differs."""
        one = dict(_flat(_settings(self.first, self.second)))
        other = dict(_flat(_settings(self.second, self.first)))
        return [
            (name, one.get(name, "–"), other.get(name, "–"))
            for name in dict.fromkeys([*one, *other])
            if one.get(name) != other.get(name)
        ]

    @cached_property
    def grids(self) -> list[tuple[str, str, str]]:
        """Name of each layer whose grid differs, with both grids."""
        one, other = ({use.name: use.grid for use in run.weights} for run in self.runs)
        return [
            (name, one.get(name, "float"), other.get(name, "float"))
            for name in dict.fromkeys([*one, *other])
            if one.get(name) != other.get(name)
        ]

    @cached_property
    def measures(self) -> list[tuple[str, float | None, float | None]]:
        """Name and both values of each measure of the whole model that either run has."""
        one, other = (dict(_measures(run)) for run in self.runs)
        return [(name, one.get(name), other.get(name)) for name in dict.fromkeys([*one, *other])]

    @cached_property
    def losses(self) -> dict[str, list[LossPair]]:
        """Losses as deployed of the units that both runs have, by what was measured.

        Where several techniques of a run measured the same, the last one counts.
        """
        one, other = (_losses(run) for run in self.runs)
        found = {
            measure: [
                LossPair(name, loss, other[measure][name])
                for name, loss in units.items()
                if name in other[measure]
            ]
            for measure, units in one.items()
            if measure in other
        }
        return {measure: rows for measure, rows in found.items() if rows}

    @cached_property
    def phases(self) -> list[tuple[str, _Cost | None, _Cost | None]]:
        """Name, and seconds and bytes in both runs, of each part of them, and of all together."""
        one, other = (_costs(run) for run in self.runs)
        return [(name, one.get(name), other.get(name)) for name in _in_order(one, other)]

    @property
    def note(self) -> str:
        """Say that the measures of the models cannot be compared; empty where they can."""
        if all(run.quality for run in self.runs) and not _same_windows(*self.runs):
            return "measures of A and B were taken on other windows and cannot be compared"
        return ""

    @property
    def runs(self) -> tuple[RunReport, RunReport]:
        """Both reports."""
        return self.first, self.second

    def __str__(self) -> str:
        from aimet_ext.reporting.text import comparison

        return comparison(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the differences as plain JSON values."""
        return {
            "models": [self.first.model, self.second.model],
            "names": list(self.names),
            "note": self.note,
            "settings": {name: [a, b] for name, a, b in self.settings},
            "grids": {name: [a, b] for name, a, b in self.grids},
            "measures": {name: [_plain(a), _plain(b)] for name, a, b in self.measures},
            "losses": {
                measure: {row.name: [_plain(row.first), _plain(row.second)] for row in rows}
                for measure, rows in self.losses.items()
            },
            "phases": {name: [_described(a), _described(b)] for name, a, b in self.phases},
        }

    def save_html(self, path: str | Path) -> None:
        """Write both runs side by side as a page of one file, atomically.

        :raises MissingExtraError: matplotlib or jinja2 is not installed.
        """
        from aimet_ext.reporting.page import comparison_page

        replace_file(path, comparison_page(self).encode())


def _settings(run: RunReport, other: RunReport) -> dict[str, Any]:
    """Return the settings of a run without what is said elsewhere: grids of layers, by layer.

    :param other: Run to compare with: settings of a technique that it lacks are of no interest.
    """
    recipe = {key: value for key, value in (run.recipe or {}).items() if key != "overrides"}
    # A recipe says what create_sim was called with.
    own = {k: v for k, v in run.settings.items() if k != "create_sim" or run.recipe is None}
    return {
        "model": run.model,
        "techniques": ", then ".join(result.name for result in run.techniques),
        **_technique_settings(run, other),
        "recipe": {key: value for key, value in recipe.items() if key != "techniques"},
        "settings": own,
        "text": run.quality and run.quality.measured_on,
        "versions": run.versions,
        "machine": run.machine,
    }


def _given(run: RunReport) -> dict[str, Mapping[str, Any]]:
    """Return the settings of techniques that the recipe of a run gives, presets among them."""
    found: dict[str, Mapping[str, Any]] = {}
    for each in (run.recipe or {}).get("techniques", ()):
        found |= each if isinstance(each, Mapping) else {each: {}}
    return found


def _technique_settings(run: RunReport, other: RunReport) -> dict[str, dict[str, Any]]:
    """Return the settings of the techniques that two runs have, those of the first run.

    Where the presets differ these are named, and what follows from them is left out.
    """
    both = {each.name for each in other.techniques}
    one, two, found = _given(run), _given(other), {}
    for result in run.techniques:
        if result.name not in both:
            continue
        own, others = one.get(result.name, {}), two.get(result.name, {})
        names = [each.get("preset", PRESETS[1]) for each in (own, others)]
        settings = dict(result.settings)
        if names[0] != names[1]:
            implied = {key for name in names for key in preset_settings(result.name, name)}
            implied -= {*own, *others}
            settings = {k: v for k, v in settings.items() if k not in implied}
            settings["preset"] = names[0]
        found[result.name] = settings
    return found


def _same_windows(one: RunReport, other: RunReport) -> bool:
    """Return whether two runs were measured on the same tokens, as far as they tell."""
    texts = [run.quality and run.quality.measured_on for run in (one, other)]
    # Windows follow those that were calibrated on, and are cut as these are.
    plans = [run.recipe.get("calibration", {}) for run in (one, other) if run.recipe is not None]
    cuts = [
        (
            *map(plan.get, ("files", "text_field", "seq_length")),
            plan.get("num_batches", 0) * plan.get("batch_size", 0),
        )
        for plan in plans
    ]
    return texts[0] == texts[1] and (len(cuts) < 2 or cuts[0] == cuts[1])


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield plain values by names, each behind those of what it is in."""
    if isinstance(value, Mapping) and value:
        for key, each in value.items():
            yield from _flat(each, f"{name} {key}" if name else str(key))
    elif value not in ({}, None):
        yield name, str(value)


def _measures(run: RunReport) -> Iterator[tuple[str, float | None]]:
    for state, found in (run.quality.states if run.quality else {}).items():
        for name, words in _MEASURES.items():
            if (value := getattr(found, name)) is not None:
                yield f"{words}, {STATES[state]}", value
    if run.bits is not None:
        yield "bits a weight, with scales", run.bits
        yield "share of codes at the edges", share_at_edges(run.weights)


def _losses(run: RunReport) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for result in run.techniques:
        units = {unit.name: unit.result for unit in result.units if unit.result is not None}
        if units:
            found.setdefault(result.measure, {}).update(units)
    return found


def _costs(run: RunReport) -> dict[str, _Cost]:
    found: dict[str, _Cost] = {}
    for phase in run.phases:
        found[phase.name] = _joined(found.get(phase.name), phase)
    if run.rest:
        found["the rest"] = run.rest, None
    if found:
        found["in all"] = run.seconds, run.memory_bytes
    return found


def _joined(cost: _Cost | None, phase: Phase) -> _Cost:
    if cost is None:
        return phase.seconds, phase.memory_bytes
    known = [size for size in (cost[1], phase.memory_bytes) if size is not None]
    return cost[0] + phase.seconds, max(known, default=None)


def _in_order(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names of both, the rest and the sum last."""
    last = ["the rest", "in all"]
    names = dict.fromkeys([*one, *other])
    return [name for name in names if name not in last] + [name for name in last if name in names]


def _described(cost: _Cost | None) -> dict[str, Any] | None:
    return None if cost is None else {"seconds": cost[0], "memory_bytes": cost[1]}


def _plain(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
