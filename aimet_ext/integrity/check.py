"""Whether an export is whole and of one piece, told from its files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aimet_ext.errors import CorruptFileError
from aimet_ext.files.manifest import MANIFEST, hash_file, read_manifest
from aimet_ext.files.names import FINGERPRINTS
from aimet_ext.findings import Finding
from aimet_ext.integrity.encodings import check_encodings
from aimet_ext.integrity.files import AGAIN
from aimet_ext.integrity.fingerprints import read_fingerprints
from aimet_ext.integrity.scales import check_scales
from aimet_ext.integrity.state import ExportState
from aimet_ext.integrity.tensors import (
    check_external_data,
    check_models,
    check_ranges,
    check_weights,
)

__all__ = ["check_integrity"]


def check_integrity(path: str | Path) -> list[Finding]:
    """Everything in an export that contradicts something else in it, or was changed since.

    No simulation is built and nothing is run. What is compared, each tensor by name:

    =====================  ====================================================================
    ``manifest``           files against their hashes
    ``external data``      values beside an ONNX file: there, and all of them
    ``bias``, ``weight``   ONNX models against ``model.safetensors``, or against each other: the
                           same values, and read by the graph
    ``offset``             the sign of an offset in an encodings file or a quantizer
    ``swapped``            encodings, or scales, that are those of another tensor
    ``encodings``          both encodings files against ``quantizers.safetensors``
    ``stale``              weights that were changed after their ranges were set, and encodings of
                           another calibration
    ``scales``             ``scales.safetensors`` against the product of the ledger's multipliers
    ``ledger``             the ledger's multipliers against what was recorded
    ``changed``            anything else against ``fingerprints.json``
    ``file``, ``record``   files that are absent or cannot be read; ``fingerprints.json`` itself
    =====================  ====================================================================

    Files that contradict each other are found whether or not the manifest was written anew. Where
    ``fingerprints.json`` is as it was written, the finding says which of them was changed, and
    what was changed in all files alike is found too.

    :param path: folder that :func:`aimet_ext.export` wrote.
    :returns: findings, none if the export is sound.
    :raises FileNotFoundError: there is no export at ``path``.
    :raises CorruptFileError: the manifest cannot be read, or is not that of an export.

    >>> for finding in check_integrity("llama-w4"):
    ...     print(finding)
    """
    folder = Path(path)
    manifest, findings = _manifest(folder)
    record = _record(folder, manifest, findings)
    state = ExportState(folder, manifest, record)
    check_external_data(state)
    check_encodings(state)
    check_weights(state) if not state.is_onnx else check_models(state)
    check_ranges(state)
    check_scales(state)
    state.rest()
    return [*findings, *state.findings]


def _manifest(folder: Path) -> tuple[Mapping[str, Any], list[Finding]]:
    """The manifest as it is, and what is wrong with it or with the files it lists."""
    findings = []
    try:
        manifest: Mapping[str, Any] = read_manifest(folder, verify=False)
    except CorruptFileError as error:
        manifest = _damaged(folder, error)
        message = "was changed after it was written: its hash differs"
        findings.append(Finding("manifest", MANIFEST, message, AGAIN))
    if manifest.get("kind") != "export":
        raise CorruptFileError(
            f"{folder}: an export of aimet_ext is required, got {manifest.get('kind')!r}"
        )
    for name, listed in manifest["files"].items():
        path = folder / name
        problem = None
        if not path.is_file():
            problem = "is absent"
        elif path.stat().st_size != listed["bytes"]:
            problem = f"has {path.stat().st_size} bytes instead of {listed['bytes']}"
        elif hash_file(path) != listed["sha256"]:
            problem = "was changed after the manifest was written"
        if problem:
            findings.append(Finding("manifest", name, problem, AGAIN))
    return manifest, findings


def _damaged(folder: Path, error: CorruptFileError) -> Mapping[str, Any]:
    """A manifest with a hash that does not fit, if it can be read nevertheless."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        raise error from None
    if not isinstance(content, dict) or not {"kind", "prefix", "files"} <= content.keys():
        raise error
    return content


def _record(
    folder: Path, manifest: Mapping[str, Any], findings: list[Finding]
) -> Mapping[str, Mapping[str, str]] | None:
    """What was recorded when the export was written, if it can be trusted."""
    wanted = manifest.get("fingerprints")
    try:
        record = read_fingerprints(folder)
    except CorruptFileError as error:
        findings.append(Finding("record", FINGERPRINTS, str(error), AGAIN))
        return None
    if record is None:
        if wanted is not None:
            findings.append(Finding("record", FINGERPRINTS, "is required and absent", AGAIN))
        return None
    if hash_file(folder / FINGERPRINTS) != wanted:
        message = "is not the file that was written with the export"
        findings.append(Finding("record", FINGERPRINTS, message, AGAIN))
        return None
    return record
