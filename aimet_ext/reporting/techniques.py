"""The reports of techniques, of whatever kind, as parts of the report of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import singledispatch
from typing import Any

from aimet_ext.reporting.parts import TechniqueResult, UnitResult
from aimet_ext.techniques.dwq import DWQReport
from aimet_ext.techniques.layer_report import LayerwiseReport, WeightsReport
from aimet_ext.techniques.range_report import ActivationRangesReport
from aimet_ext.techniques.report import BlockwiseReport, Report, RotationReport


def technique_results(reports: Mapping[str, Any]) -> tuple[TechniqueResult, ...]:
    """Return the outcome of each technique.

    :param reports: Reports by the names of the techniques, in order, or their outcomes themselves.
    :raises TypeError: something that is no report of a technique.
    """
    found = []
    for name, given in reports.items():
        if isinstance(given, TechniqueResult):
            found.append(given)
            continue
        report = _report(name, given)
        if report is not None:
            common = {"name": name, "settings": report.to_dict()["settings"]}
            found.append(TechniqueResult(**common, seconds=report.seconds, **_result(report)))
    return tuple(found)


def technique_notes(reports: Mapping[str, Any], kind: str = "notes") -> list[str]:
    """Return what the reports note of what was left alone, refused or in short supply.

    :param kind: ``"infos"`` for what is as it must be.
    """
    named = (
        (name, _report(name, given))
        for name, given in reports.items()
        if not isinstance(given, TechniqueResult)
    )
    return [f"{name}: {note}" for name, report in named if report for note in getattr(report, kind)]


def _report(name: str, given: Any) -> Report | None:
    """Return the report that was given, or of the search of one on grids; None without data."""
    if not isinstance(given, Report) and hasattr(given, "specs"):
        given = given.search
        if given is None:
            return None
    if not isinstance(given, Report):
        raise TypeError(
            f"reports: the report that a technique returned is required for {name!r}, got "
            f"{type(given).__name__}"
        )
    return given


@singledispatch
def _result(report: Report) -> dict[str, Any]:
    """Return the fields of a result that follow from the kind of the report."""
    return {}


@_result.register
def _(report: LayerwiseReport) -> dict[str, Any]:
    units = (
        UnitResult(
            name=layer.name,
            rounding=_share(layer.loss_nearest, layer.signal),
            result=_share(layer.loss_after, layer.signal),
            upstream=_share(layer.loss_upstream, layer.signal),
            sqnr_db=layer.sqnr_db,
            grid=f"{layer.bitwidth} bits, {layer.spec}",
            seconds=layer.seconds,
        )
        for layer in report.layers
    )
    return {"measure": "error of the layer's output, as a share of its signal", **_units(units)}


@_result.register
def _(report: WeightsReport) -> dict[str, Any]:
    own = report.objective != "none"
    units = (
        UnitResult(
            name=layer.name,
            rounding=layer.loss_nearest if own else _share(layer.noise_nearest, layer.signal),
            result=layer.loss_after if own else _share(layer.noise, layer.signal),
            sqnr_db=layer.sqnr_db,
            grid=f"{layer.bitwidth} bits, {layer.spec}",
            seconds=layer.seconds,
        )
        for layer in report.layers
    )
    of_weights = "error of the weights, as a share of their signal"
    return {"measure": report.objective if own else of_weights, **_units(units)}


@_result.register
def _(report: BlockwiseReport) -> dict[str, Any]:
    units = (
        UnitResult(
            name=block.name,
            rounding=block.loss_nearest,
            result=block.loss_after,
            sqnr_db=block.sqnr_db,
            grid=f"kept: {block.kept}",
            seconds=block.seconds,
        )
        for block in report.blocks
    )
    return {"measure": "mean squared error of the block's output", **_units(units, "block")}


@_result.register
def _(report: RotationReport) -> dict[str, Any]:
    numbers = {"deviation of the float outputs": report.deviation}
    numbers |= {f"KL to the float model, {name}": loss for name, loss in report.losses.items()}
    numbers |= {f"KL by keys of 8 bits, {name}": loss for name, loss in report.key_losses.items()}
    return {"numbers": numbers, "unit": "block"}


@_result.register
def _(report: ActivationRangesReport) -> dict[str, Any]:
    units = (
        UnitResult(
            name=entry.name,
            rounding=entry.kl_before if entry.block is None else entry.loss_before,
            result=entry.kl_after if entry.block is None else entry.loss_after,
            grid=f"{entry.bitwidth} bits, {entry.after[0]:.4g} … {entry.after[1]:.4g}",
            seconds=entry.seconds,
        )
        for entry in report.ranges
    )
    numbers = {"KL, before": report.kl_before, "KL, after": report.kl_after}
    measure = "divergence of the outputs, or error of the block's output, with this range"
    return {"measure": measure, "numbers": numbers, **_units(units, "range")}


@_result.register
def _(report: DWQReport) -> dict[str, Any]:
    return {
        "numbers": {
            "KL held out, before": report.before.kl,
            "KL held out, after": report.after.kl,
            "mean change of the scales": report.scales_moved,
            "mean change of the gains": report.gains_moved,
        }
    }


def _units(units: Iterable[UnitResult], unit: str = "layer") -> dict[str, Any]:
    return {"units": tuple(units), "unit": unit}


def _share(loss: float, signal: float) -> float:
    """Return a loss as a share of the signal, or itself where there is none."""
    return loss / signal if signal > 0 else loss
