"""The report of a run: made, written, read back and shown."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic.dataclasses import dataclass

from aimet_ext.files.folders import replace_file
from aimet_ext.files.manifest import versions
from aimet_ext.reporting.parts import (
    STATES,
    Budget,
    Phase,
    Quality,
    StateQuality,
    TechniqueResult,
    WeightUse,
)
from aimet_ext.reporting.reading import plain_of, read_checked
from aimet_ext.specs import STRICT

if TYPE_CHECKING:
    from aimet_ext.analysis.widths_report import WidthsReport
    from aimet_ext.core.divergence import Divergence
    from aimet_ext.recipes.recipe import Recipe
    from aimet_ext.reporting.comparison import RunComparison
    from aimet_ext.reporting.recorder import Recorder

REPORT_JSON, REPORT_HTML = "report.json", "report.html"
"""Names of a run's report in its folder."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunReport:
    """The settings of a run, its cost and its result; ``print`` shows a summary.

    :param model: Name of the model.
    :param created: Time at which it was made, in UTC.
    :param machine: Facts about the machine.
    :param versions: Versions of the packages.
    :param settings: Settings of the run: those of ``create_sim``, and others that were given.
    :param recipe: Recipe that repeats the run, with texts by the names of their files alone; None
        where there was none.
    :param techniques: Outcome of each technique, in order: losses of blocks and layers beside
        those of plain rounding.
    :param weights: Use that each weight makes of its grid: integer codes and scales.
    :param quality: Perplexities and divergences; None where they were not measured.
    :param phases: Time and memory of each part of the run.
    :param elapsed: Seconds of the whole run, those between its parts too; None where only the parts
        are known.
    :param warnings: Warnings, and what techniques left alone or refused.
    :param infos: What is as it must be, but may be missed: an output layer that has the embedding's
        grid.
    :param widths: Choice of the widths; None where they were not assigned.
    :param format: Version of the form of the file.
    """

    model: str
    created: str
    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    techniques: tuple[TechniqueResult, ...] = ()
    weights: tuple[WeightUse, ...] = ()
    quality: Quality | None = None
    phases: tuple[Phase, ...] = ()
    elapsed: float | None = None
    warnings: tuple[str, ...] = ()
    infos: tuple[str, ...] = ()
    widths: Budget | None = None
    format: Literal[1] = 1

    @classmethod
    def of(
        cls,
        sim: Any,
        reports: Mapping[str, Any],
        *,
        model: str = "model",
        recipe: Recipe | None = None,
        settings: Mapping[str, Any] | None = None,
        perplexity: Mapping[str, float] | None = None,
        divergence: Mapping[str, Divergence] | None = None,
        text: str = "held-out text",
        windows: int = 0,
        tokens: int = 0,
        recorder: Recorder | None = None,
        widths: WidthsReport | Budget | None = None,
    ) -> RunReport:
        """Make the report of a run from its simulation and the reports of its techniques.

        :param sim: Simulation as it is deployed, with ranges; it is left as it is.
        :param reports: Reports by the names of the techniques, in order, as
            :meth:`Recipe.apply <aimet_ext.Recipe.apply>` returns them.
        :param model: Name of the model.
        :param recipe: Recipe of the run.
        :param settings: Further settings to keep, plain JSON values.
        :param perplexity: Perplexities on held-out text of the states ``"float"``, ``"rounding"``
            (weights rounded to nearest) and ``"quantized"``, as far as they were measured.
        :param divergence: Results of :func:`aimet_ext.evaluate_divergence` by state, likewise.
        :param text: Description of that text.
        :param windows: Windows of it.
        :param tokens: Tokens of a window.
        :param recorder: Recorder of time, memory and warnings.
        :param widths: Result of :func:`aimet_ext.assign_widths` that the run follows.
        :raises TypeError: ``sim`` is no simulation, or a report is none of a technique.
        :raises ValueError: a state of another name.
        """
        from aimet_ext.reporting.budget import budget_of
        from aimet_ext.reporting.techniques import technique_notes, technique_results
        from aimet_ext.reporting.weights import weight_uses
        from aimet_ext.sim.protocol import adapt

        made, notes = adapt(sim).settings, technique_notes(reports)
        logged = [
            text
            for text in (recorder.warnings if recorder else ())
            if not any(note.startswith(text.removesuffix(", see the report")) for note in notes)
        ]
        return cls(
            model=model,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            machine=_machine(),
            versions=versions(),
            settings={**(settings or {}), **({"create_sim": made} if made else {})},
            recipe=_shown(recipe) if recipe else None,
            techniques=technique_results(reports),
            weights=weight_uses(sim),
            quality=_quality(perplexity or {}, divergence or {}, text, windows, tokens),
            phases=tuple(recorder.phases) if recorder else (),
            elapsed=recorder.elapsed if recorder else None,
            warnings=(*logged, *notes),
            infos=tuple(technique_notes(reports, "infos")),
            widths=widths if widths is None or isinstance(widths, Budget) else budget_of(widths),
        )

    @property
    def bits(self) -> float | None:
        """Average bits of a quantized weight, scales and offsets included; None without any."""
        count = sum(use.weights for use in self.weights)
        return sum(use.bits for use in self.weights) / count if count else None

    @property
    def seconds(self) -> float:
        """Time of all phases, and of the rest between them as far as it is known."""
        return sum(phase.seconds for phase in self.phases) + self.rest

    @property
    def rest(self) -> float:
        """Time between the phases."""
        parts = sum(phase.seconds for phase in self.phases)
        return 0.0 if self.elapsed is None else max(0.0, self.elapsed - parts)

    @property
    def memory_bytes(self) -> int | None:
        """Most bytes that the process held in any phase, None where that is not known."""
        return max(
            (p.memory_bytes for p in self.phases if p.memory_bytes is not None), default=None
        )

    def __str__(self) -> str:
        from aimet_ext.reporting.text import summary

        return summary(self)

    def compare(self, other: RunReport, names: Sequence[str] = ("", "")) -> RunComparison:
        """Return the differences of another run from this one.

        :param other: Report of the other run.
        :param names: Names of both to show, such as their folders.
        """
        from aimet_ext.reporting.comparison import RunComparison

        return RunComparison(self, other, names)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain JSON values; infinities are words."""
        return plain_of(self)

    def save(self, path: str | Path) -> None:
        """Write it to a JSON file, atomically, from which :meth:`read` reads the same."""
        replace_file(path, json.dumps(self.to_dict(), allow_nan=False).encode())

    def save_html(self, path: str | Path) -> None:
        """Write it as a page of one file, which needs no other and no network, atomically.

        :raises MissingExtraError: matplotlib or jinja2 is not installed.
        """
        from aimet_ext.reporting.page import run_page

        replace_file(path, run_page(self).encode())

    @classmethod
    def read(cls, path: str | Path) -> RunReport:
        """Read a report back.

        :param path: File, or folder of a run.
        :raises FileNotFoundError: there is none.
        :raises CorruptFileError: the file is no report of a run, or of another form.
        """
        place = Path(path)
        if place.is_dir():
            place = place / REPORT_JSON
            if not place.is_file():
                raise FileNotFoundError(
                    f"{place} is required and is absent; aimet-ext quantize writes it beside what "
                    "it exports"
                )
        return read_checked(place, cls)


def _shown(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain values, without the folders of the machine."""
    plain = recipe.to_dict()
    files = plain.get("calibration", {}).get("files")
    if files:
        plain["calibration"] = {**plain["calibration"], "files": [Path(f).name for f in files]}
    return plain


def _quality(
    perplexity: Mapping[str, float],
    divergence: Mapping[str, Any],
    text: str,
    windows: int,
    tokens: int,
) -> Quality | None:
    names = tuple(STATES)
    for parameter, given in (("perplexity", perplexity), ("divergence", divergence)):
        if unknown := [name for name in given if name not in names]:
            raise ValueError(
                f"{parameter}: the states {', '.join(names)} are known, got {', '.join(unknown)}"
            )
    states: Any = {
        name: StateQuality(
            perplexity=perplexity.get(name),
            **(asdict(divergence[name]) if name in divergence else {}),
        )
        for name in names
        if name in perplexity or name in divergence
    }
    return Quality(text=text, windows=windows, states=states, tokens=tokens) if states else None


def _machine() -> dict[str, str]:
    """Return the kind of the machine, without its name."""
    import torch

    found = {"system": platform.system(), "architecture": platform.machine()}
    found["threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return found
