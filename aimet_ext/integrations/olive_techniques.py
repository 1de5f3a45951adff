"""Techniques for Olive's ``AimetQuantization`` pass, one for each row of the registry.

``lpbq``, ``seqmse`` and ``adaround`` take the arguments of the techniques that Olive ships, with
the same defaults, and take their places; all others are new. All of them take the
settings of their parameter class as well, and an argument that is wrong is an error.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from olive.passes.onnx.aimet_quantization import SUPPORTED_TECHNIQUES
from pydantic import ValidationError

from aimet_ext.errors import faults_of, some
from aimet_ext.patterns import near
from aimet_ext.registry import TECHNIQUES, Step, Technique, check_order, load

logger = logging.getLogger(__name__)

# Parts of a decision that change LPBQ's scales, or the weights that these are for.
_CHOOSE = ("rotation", "smoothing", "scales", "ranges")

# Attribute of a simulation in which techniques leave their reports, (name, report) each.
_REPORTS = "aimet_ext_reports"


def check_techniques(techniques: Any) -> None:
    """Check the techniques of a pass: names, arguments, values of settings, and the order.

    :param techniques: Techniques as in a workflow: ``[{"name": "seqmse", "num_candidates": 20}]``.
    :raises ValueError: An unknown technique or argument, a value that is not allowed, or a
        technique that leaves a later one nothing to decide.
    """
    for technique in techniques:
        if not isinstance(technique, Mapping) or not isinstance(technique.get("name"), str):
            raise ValueError(  # noqa: TRY004 - one mistake in a file like others
                f'each technique must be an object with a "name", such as '
                f'{{"name": "seqmse"}}, got {technique!r}'
            )
        name = technique["name"].lower()
        if name not in SUPPORTED_TECHNIQUES:
            raise ValueError(
                f"{technique['name']!r} is no technique of AimetQuantization; these are "
                f"{', '.join(sorted(SUPPORTED_TECHNIQUES))}{near(name, SUPPORTED_TECHNIQUES)}"
            )
        arguments = {key: value for key, value in technique.items() if key != "name"}
        if not SUPPORTED_TECHNIQUES[name].validate_args(**arguments):
            # Of a technique that is not ours, which logs what is wrong.
            raise ValueError(f"technique {name!r} does not take {', '.join(arguments)}")
    # What excludes nodes may have layers of its own, which is seen when it is applied.
    whole = [step.name for step in steps_of(techniques) if not step.exclude]
    check_order(whole, {row.olive: row for row in TECHNIQUES.values() if row.olive is not None})
    _check_open(steps_of(with_defaults(techniques)))


def steps_of(techniques: Sequence[Mapping[str, Any]]) -> list[Step]:
    """Return those techniques of a pass that the registry has."""
    rows = {row.olive: row for row in TECHNIQUES.values() if row.olive is not None}
    return [
        Step(
            row=rows[each["name"].lower()],
            name=each["name"].lower(),
            settings=each,
            exclude=tuple(each.get("nodes_to_exclude") or ()),
        )
        for each in techniques
        if each["name"].lower() in rows
    ]


def _check_open(steps: Sequence[Step]) -> None:
    """Refuse steps that find all ranges frozen which they change, whatever the model.

    Steps that leave layers alone may have layers of their own, which is seen when they are applied.

    :raises ValueError: There is one, or a rotation that is to leave layers alone.
    """
    for step in steps:
        if step.row.decides == "rotation" and step.exclude:
            raise ValueError(
                f"technique {step.name!r} turns all layers at once and can leave none alone, got "
                f"{some(list(map(str, step.exclude)))}; leave that out"
            )
    for earlier, later in itertools.combinations((s for s in steps if not s.exclude), 2):
        rescales = later.row.decides in ("rotation", "smoothing", "scales")
        again = earlier.row.decides == "grids" and later.row.decides == "ranges"
        if earlier.freezes and (rescales or again):
            how = earlier.row.freezes_if
            instead = "leave one of them out" if how is None else f'give the first "{how}": false'
            raise ValueError(
                f"technique {later.name!r} cannot follow {earlier.name!r}, which freezes the "
                f"ranges that it would change; {instead}"
            )


def with_defaults(techniques: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return techniques as they are applied one after the other.

    Scales of LPBQ that a later technique chooses, or needs open, are not chosen and frozen before.
    """
    found = [dict(technique) for technique in techniques]
    choosing = {row.olive for row in TECHNIQUES.values() if row.decides in _CHOOSE} | {"hqq"}
    for place, technique in enumerate(found):
        later = {other["name"].lower() for other in found[place + 1 :]}
        if technique["name"].lower() == "lpbq" and later & choosing:
            technique.setdefault("search", False)
    return found


def keep_report(sim: Any, name: str, report: Any) -> None:
    """Leave a report at a simulation, for :func:`reports_of`."""
    logger.info("%s:\n%s", name, report)
    setattr(sim, _REPORTS, [*getattr(sim, _REPORTS, ()), (name, report)])


def named_reports(sim: Any) -> dict[str, Any]:
    """Return the reports of techniques by name, in order; each is applied once at most."""
    return dict(getattr(sim, _REPORTS, ()))


def reports_of(sim: Any) -> list[dict[str, Any]]:
    """Return the reports of techniques, in order: plain values, and a summary for people."""
    found = []
    for name, report in named_reports(sim).items():
        # The report of grids has no numbers, but may hold that of a search.
        numbers = report if hasattr(report, "to_dict") else getattr(report, "search", None)
        values = {} if numbers is None else numbers.to_dict()
        found.append({**values, "technique": name, "summary": str(report)})
    return found


class OliveTechnique:
    """A technique of the registry as Olive's pass uses one.

    Its arguments are data, nodes to exclude, and the settings of the technique's parameter class.
    """

    def __init__(self, row: Technique, name: str) -> None:
        self.row, self.name = row, name
        self.params = load(row.params)

    @property
    def arguments(self) -> list[str]:
        """Names of the arguments."""
        fields = [field.name for field in dataclasses.fields(self.params)]
        data = [] if self.row.data_free else ["data_config"]
        first = [*data, *([self.row.number] if self.row.number else []), "nodes_to_exclude"]
        return list(dict.fromkeys([*first, *fields, "preset"]))

    def _requires_data(self) -> bool:
        return not self.row.data_free

    @property
    def requires_reference(self) -> bool:
        """True if it is given the float model's outputs on its data."""
        return self.row.reference

    def validate_args(self, **arguments: Any) -> bool:
        """Check arguments without a simulation.

        :raises ValueError: One that is unknown or not allowed.
        """
        known = self.arguments
        unknown = [key for key in arguments if key not in known]
        if unknown:
            raise ValueError(
                f"technique {self.name!r} has no argument {', '.join(map(repr, unknown))}; it has "
                f"{', '.join(known)}{near(unknown, known)}"
            )
        fields = {*(field.name for field in dataclasses.fields(self.params)), "preset"}
        try:
            self.params(**_plain({k: v for k, v in arguments.items() if k in fields}))
        except ValidationError as error:
            wrong = "; ".join(faults_of(error))
            raise ValueError(f"technique {self.name!r}: {wrong}") from error
        return True

    def apply(self, sim: Any, *, data_config: Any = None, **arguments: Any) -> Any:
        """Call the public function, and leave its report at the simulation.

        :param data_config: Batches.
        :param arguments: Settings, and ``reference`` where it is required.
        """
        defaults = {} if "preset" in arguments else self.row.olive_defaults
        settings = {**defaults, **_plain(arguments)}
        report = load(self.row.function)(sim, data_config, progress=False, **settings)
        keep_report(sim, self.name, report)
        return sim


class LPBQTechnique(OliveTechnique):
    """LPBQ, with the arguments of the technique that Olive ships."""

    # on_indivisible: AIMET leaves a layer whose width block_size does not divide as it is; here it
    # is an error, or "per_channel". search: scales are chosen by the layers' output error, as does
    # SeqMSE, not by the largest weights as in AIMET; left to a later technique that does it.
    _DEFAULTS: ClassVar[dict[str, Any]] = {
        "op_types": ("Conv", "Gemm", "MatMul"),
        "bitwidth": 4,
        "decompressed_bw": 8,
        "block_size": 64,
        "nodes_to_exclude": (),
        "on_indivisible": "error",
        "search": True,
    }

    @property
    def arguments(self) -> list[str]:
        """Names of the arguments."""
        return ["data_config", *self._DEFAULTS]

    def apply(self, sim: Any, *, data_config: Any = None, **arguments: Any) -> Any:
        """Call :func:`aimet_ext.apply_lpbq`, and leave its report at the simulation.

        :param data_config: Batches.
        """
        given = {**self._DEFAULTS, **arguments}
        given["scale_bits"] = given.pop("decompressed_bw") - given["bitwidth"]
        for key in ("op_types", "nodes_to_exclude"):
            given[key] = tuple(given[key] or ())
        return super().apply(sim, data_config=data_config if given.pop("search") else None, **given)


def register(row: Technique) -> None:
    """Give Olive's pass a technique of the registry, in the place of one of that name."""
    if row.olive is not None:
        kind = LPBQTechnique if row.name == "lpbq" else OliveTechnique
        SUPPORTED_TECHNIQUES[row.olive] = kind(row, row.olive)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings from JSON, in which tuples are lists."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


for _row in TECHNIQUES.values():
    register(_row)
