"""What a folder of ours holds, after its hashes were checked."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from aimet_ext.files.encodings import load_encodings
from aimet_ext.files.manifest import read_manifest
from aimet_ext.files.names import ONNX_SCHEMA, QUANTIZERS, QUANTIZERS_SCHEMA
from aimet_ext.files.scales import SCALES_FILE, load_scales
from aimet_ext.files.sealed import read_sealed

__all__ = ["inspect_export"]


def inspect_export(path: str | Path) -> dict[str, Any]:
    """Check a folder that ``export`` or a technique wrote against its hashes, and summarise it.

    :returns: JSON values: ``kind``, ``versions``, ``settings``, ``techniques``, ``checks``,
        ``scales`` (modules and pairs by kind), ``quantizers`` (how many of each width, frozen,
        without range), ``encodings`` (how many of each version), ``files`` with their sizes and
        hashes, and ``unlisted`` files that came later.
    :raises FileNotFoundError: it is no folder of ours.
    :raises CorruptFileError: a file was changed or is absent.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    summary = {key: value for key, value in manifest.items() if key not in ("format", "sha256")}
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    summary["unlisted"] = sorted(found - manifest["files"].keys() - {"manifest.json"})
    if SCALES_FILE in manifest["files"]:
        scales = load_scales(folder)
        summary["scales"] = {
            "modules": len(scales),
            "techniques": list(scales.techniques),
            "pairs": dict(Counter(pair["kind"] for pair in scales.pairs)),
        }
    if QUANTIZERS in manifest["files"]:
        of_onnx = manifest.get("framework") == "onnx"
        schema = ONNX_SCHEMA if of_onnx else QUANTIZERS_SCHEMA
        described = json.loads(read_sealed(folder / QUANTIZERS, schema)[1]["quantizers"])
        summary["quantizers"] = _count_onnx(described) if of_onnx else _count(described)
    summary["encodings"] = {
        name: _count_encodings(folder / name)
        for name in manifest["files"]
        if name.endswith(".encodings")
    }
    return summary


def _count(described: dict[str, dict[str, Any]]) -> dict[str, Any]:
    own = {name: value for name, value in described.items() if "same_as" not in value}
    weights = {name: value for name, value in own.items() if ".param_quantizers." in name}
    return {
        "parameters": _by_width(weights),
        "activations": _by_width({n: v for n, v in own.items() if n not in weights}),
        "frozen": sum(not any(v["state"]["overwrite"].values()) for v in own.values()),
        "without_range": sum(not v["state"]["initialized"] for v in own.values()),
    }


def _count_onnx(described: dict[str, dict[str, Any]]) -> dict[str, Any]:
    used = [v for v in described.values() if "same_as" not in v and v["state"]["enabled"]]
    return {
        "parameters": _by_type([v for v in used if v["param"]]),
        "activations": _by_type([v for v in used if not v["param"]]),
        "frozen": sum(v["state"]["frozen"] for v in used),
        "without_range": sum(not v["state"]["initialized"] for v in used),
    }


def _by_type(described: list[dict[str, Any]]) -> dict[str, int]:
    """The same as :func:`_by_width` of an ONNX sim's quantizers."""
    types: Counter[str] = Counter()
    for value in described:
        kind = value["dtype"] if value["dtype"] == "float" or value["symmetric"] else "uint"
        types[f"{kind}{value['bitwidth']}"] += 1
    return dict(sorted(types.items()))


def _by_width(described: dict[str, dict[str, Any]]) -> dict[str, int]:
    """How many quantizers have each width, as ``{"int4": 14, "uint16": 30}``."""
    widths: Counter[str] = Counter()
    for value in described.values():
        if "qmax" in value:
            bits = (value["qmax"] - value["qmin"]).bit_length()
            widths[f"{'int' if value['qmin'] < 0 else 'uint'}{bits}"] += 1
        else:
            widths["float"] += 1
    return dict(sorted(widths.items()))


def _count_encodings(path: Path) -> dict[str, Any]:
    document = load_encodings(path)
    lists = ("encodings", "param_encodings", "activation_encodings")
    return {
        "version": document["version"],
        **{key: len(document[key]) for key in lists if key in document},
    }
