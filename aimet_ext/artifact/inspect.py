"""The summary of a folder that aimet_ext wrote, after its hashes were checked."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aimet_ext.artifact.export import read_quantizers
from aimet_ext.core.objective import sqnr_db
from aimet_ext.files.encodings import load_encodings
from aimet_ext.files.manifest import MANIFEST, QUANTIZERS, read_manifest
from aimet_ext.files.reading import naming, read_json
from aimet_ext.files.scales import SCALES_FILE, load_scales
from aimet_ext.files.tensors import of_parameter

_Quantizer = tuple[str, bool, bool, bool]  # kind, and: of a parameter? frozen? with a range?


def inspect_export(path: str | Path) -> dict[str, Any]:
    """Check a folder that ``export`` or a technique wrote against its hashes, and summarise it.

    :returns: JSON values: ``kind``, ``versions``, ``settings``, ``techniques``, ``checks``,
        ``scales`` (modules and pairs by kind), ``quantizers`` (how many of each width, frozen,
        without range), ``encodings`` (how many of each version), ``reports`` (quality that the
        techniques reported), ``quality`` (perplexities that ``quantize`` measured), ``files`` with
        their sizes and hashes, and ``unlisted`` files that came later.
    :raises FileNotFoundError: the folder was not written by aimet_ext.
    :raises CorruptFileError: a file was changed or is absent.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    with naming(folder):
        return _summary(folder, manifest)


def _summary(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    summary = {key: value for key, value in manifest.items() if key not in ("format", "sha256")}
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    summary["unlisted"] = sorted(found - manifest["files"].keys() - {MANIFEST})
    if SCALES_FILE in manifest["files"]:
        scales = load_scales(folder)
        summary["scales"] = {
            "modules": len(scales),
            "techniques": list(scales.techniques),
            "pairs": dict(Counter(pair["kind"] for pair in scales.pairs)),
        }
    if QUANTIZERS in manifest["files"]:
        if manifest.get("framework") == "onnx":
            from aimet_ext.artifact.onnx_export import read_onnx_quantizers

            quantizers = _onnx_quantizers(read_onnx_quantizers(folder)[1].quantizers)
        else:
            quantizers = _torch_quantizers(read_quantizers(folder)[1].quantizers)
        summary["quantizers"] = _count(list(quantizers))
    summary["encodings"] = {
        name: _count_encodings(folder / name)
        for name in manifest["files"]
        if name.endswith(".encodings")
    }
    reports = {Path(name).stem: name for name in manifest["files"] if name.startswith("reports/")}
    if quality := reports.pop("quality", None):
        summary["quality"] = read_json(folder / quality)
    found_reports = {name: _quality(read_json(folder / file)) for name, file in reports.items()}
    summary["reports"] = {name: value for name, value in found_reports.items() if value}
    return summary


def _quality(report: dict[str, Any]) -> dict[str, Any]:
    """Return median and lowest SQNR of the units of a technique's report; empty without any."""
    found = {}
    for unit in (*report.get("layers", ()), *report.get("blocks", ())):
        after, loss = unit.get("sqnr_db"), unit.get("noise", unit["loss_after"])
        if after is None and loss and unit.get("signal"):
            after = sqnr_db(unit["signal"], loss)
        if after is not None and math.isfinite(after):
            found[unit["name"]] = after
    if not found:
        return {}
    lowest = min(found, key=lambda name: found[name])
    layers = report.get("layers", ())
    of_weights = any("noise" in each for each in layers)
    units = "weights" if of_weights else "layers' outputs, with the errors that come in"
    return {
        "units": units if layers else "blocks' outputs",
        "median_sqnr_db": statistics.median(found.values()),
        "lowest_sqnr_db": found[lowest],
        "lowest": lowest,
    }


def _torch_quantizers(described: dict[str, dict[str, Any]]) -> Iterator[_Quantizer]:
    for name, value in described.items():
        if "same_as" in value:
            continue
        kind, state = "float", value["state"]
        if "qmax" in value:
            bits = (value["qmax"] - value["qmin"]).bit_length()
            kind = f"{'int' if value['qmin'] < 0 else 'uint'}{bits}"
        frozen = not any(state["overwrite"].values())
        yield kind, of_parameter(name), frozen, state["initialized"]


def _onnx_quantizers(described: dict[str, dict[str, Any]]) -> Iterator[_Quantizer]:
    for value in described.values():
        if "same_as" not in value and (state := value["state"])["enabled"]:
            is_uint = value["dtype"] != "float" and not value["symmetric"]
            kind = f"{'uint' if is_uint else value['dtype']}{value['bitwidth']}"
            yield kind, value["param"], state["frozen"], state["initialized"]


def _count(quantizers: list[_Quantizer]) -> dict[str, Any]:
    """Return how many quantizers have each kind, as ``{"int4": 14, "uint16": 30}``, and states."""
    kinds = Counter((parameter, kind) for kind, parameter, _, _ in quantizers)
    return {
        "parameters": {kind: n for (parameter, kind), n in sorted(kinds.items()) if parameter},
        "activations": {kind: n for (parameter, kind), n in sorted(kinds.items()) if not parameter},
        "frozen": sum(frozen for _, _, frozen, _ in quantizers),
        "without_range": sum(not initialized for *_, initialized in quantizers),
    }


def _count_encodings(path: Path) -> dict[str, Any]:
    document = load_encodings(path)
    lists = ("encodings", "param_encodings", "activation_encodings")
    return {
        "version": document["version"],
        **{key: len(document[key]) for key in lists if key in document},
    }
