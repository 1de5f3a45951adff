"""The check of an export, from its files alone: whole, unchanged and without contradictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from aimet_ext.errors import CorruptFileError, Finding
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.manifest import (
    FINGERPRINTS,
    LEDGER,
    MANIFEST,
    changed_files,
    hash_file,
    read_manifest,
)
from aimet_ext.files.reading import naming, parse_json, read_json
from aimet_ext.files.scales import AIMET_FILE, SCALES_FILE, aimet_tensors, cumulative_tensors
from aimet_ext.integrity.description import ExportContents, read_record
from aimet_ext.integrity.tensors import (
    check_encodings,
    check_external_data,
    check_models,
    check_numbers,
    check_ranges,
    check_weights,
)

_AGAIN = "export it again from the sim, or take the file from a copy that is sound"
_SHOWN = 20
_FIELDS = ("techniques", "pairs", "origin", "version", "schema")


def check_integrity(path: str | Path) -> list[Finding]:
    """Find everything in an export that contradicts the rest of it, or was changed since.

    No simulation is built and nothing is run. What is compared, each tensor by name:

    =====================  ====================================================================
    ``manifest``           files against their hashes
    ``external data``      values beside an ONNX file: there, and all of them
    ``bias``, ``weight``   ONNX models against ``model.safetensors``, or against each other: the
                           same values, and read by the graph
    ``offset``             the sign of an offset in an encodings file or a quantizer
    ``swapped``            encodings, or scales, that are those of another tensor
    ``encodings``          both encodings files against ``quantizers.safetensors``
    ``numbers``            scales and ranges that are not finite, or no range: 0, negative
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
    with naming(folder / MANIFEST):
        manifest, findings = _manifest(folder)
    record = _record(folder, manifest, findings)
    state = Examination(folder, manifest, record)
    of_weights = check_models if state.is_onnx else check_weights
    checks = (check_external_data, check_numbers, check_encodings, of_weights, check_ranges)
    for check in (*checks, check_scales, Examination.add_changes):
        try:
            with naming(folder):
                check(state)
        except CorruptFileError as error:
            state.add("file", folder.name, str(error))
    unread = [Finding("file", *problem, _AGAIN) for problem in state.contents.problems]
    return [*findings, *unread, *state.findings]


class Examination:
    """An export under examination: its contents, what was recorded of them, and the findings.

    :param folder: folder of the export.
    :param manifest: its manifest.
    :param record: hashes of what was in it when it was written, by name by file; None if that is
        not known.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        record: Mapping[str, Mapping[str, str]] | None,
    ) -> None:
        self.manifest, self.record = manifest, record
        self.contents = ExportContents(folder, manifest["prefix"])
        self.is_onnx = manifest.get("framework") == "onnx"
        self.doubted: set[str] = set()  # tensors of which some encoding is wrong
        self.findings: list[Finding] = []
        self._explained: set[tuple[str, str]] = set()

    def add(
        self, check: str, name: str, message: str, *items: tuple[str, str], remedy: str = _AGAIN
    ) -> None:
        """Note a finding.

        :param items: ``(file, name)`` of what was changed, which then needs no finding of its own.
        """
        self.findings.append(Finding(check, name, message, remedy))
        self._explained.update(items)

    @cached_property
    def _now(self) -> Mapping[str, Mapping[str, str]]:
        return dict(self.contents.hashes())

    def unchanged(self, file: str, name: str) -> bool | None:
        """Return True if something in a file is what it was, None if that is not known."""
        if self.record is None or file not in self.record:
            return None
        before, now = self.record[file].get(name), self._now.get(file, {}).get(name)
        return None if before is None and now is None else before == now

    def changed(self, file: str, name: str) -> bool:
        """Return True if something in a file is known to be other than it was."""
        return self.unchanged(file, name) is False

    def add_changes(self) -> None:
        """Note whatever was changed and is part of no finding yet."""
        for file in self.record or ():
            found = [item for item in self._changes(file) if (file, item[0]) not in self._explained]
            for name, change in found[:_SHOWN]:
                self.add("changed", name, f"{change} in {file} since the export was written")
            if len(found) > _SHOWN:
                more = f"{len(found) - _SHOWN} more things differ from when the export was written"
                self.add("changed", file, more)

    def _changes(self, file: str) -> Iterator[tuple[str, str]]:
        assert self.record is not None
        before, now = self.record[file], self._now.get(file, {})
        for name in dict.fromkeys([*before, *now]):
            if name not in now:
                yield name, "is gone"
            elif name not in before:
                yield name, "is new"
            elif before[name] != now[name]:
                yield name, "differs"


class _Readable(BaseModel):
    """Fields that the manifest of an export must have to be of use, even if its hash differs."""

    kind: Any
    prefix: str
    files: dict[str, dict[str, Any]]


def _manifest(folder: Path) -> tuple[Mapping[str, Any], list[Finding]]:
    """Return the manifest as it is, and what is wrong with it or with the files it lists."""
    findings = []
    try:
        manifest: Mapping[str, Any] = read_manifest(folder, verify=False)
    except CorruptFileError as error:
        try:
            manifest = read_json(folder / MANIFEST)
            _Readable.model_validate(manifest)
        except ValueError:
            raise error from None
        message = "was changed after it was written: its hash differs"
        findings.append(Finding("manifest", MANIFEST, message, _AGAIN))
    if manifest["kind"] != "export":
        raise CorruptFileError(
            f"{folder}: an export of aimet_ext is required, got {manifest['kind']!r}"
        )
    for name, fault in changed_files(folder, manifest["files"]):
        when = " after the manifest was written" if fault == "was changed" else ""
        findings.append(Finding("manifest", name, fault + when, _AGAIN))
    return manifest, findings


def _record(
    folder: Path, manifest: Mapping[str, Any], findings: list[Finding]
) -> Mapping[str, Mapping[str, str]] | None:
    """Return what was recorded when the export was written, if it can be trusted."""
    wanted = manifest.get("fingerprints")
    try:
        record = read_record(folder)
    except CorruptFileError as error:
        problem = str(error)
    else:
        if record is None and wanted is None:
            return None
        if record is not None and hash_file(folder / FINGERPRINTS) == wanted:
            return record
        absent = "is required and absent"
        problem = absent if record is None else "is not the file that was written with the export"
    findings.append(Finding("record", FINGERPRINTS, problem, _AGAIN))
    return None


def check_scales(state: Examination) -> None:
    """Check that each vector is the product of the ledger's multipliers for its module and axis."""
    ledger = _ledger(state)
    stored = state.contents.stored(SCALES_FILE)
    mine, places = stored.tensors, stored.json("products")
    if ledger is None:
        return
    _check_multipliers(state, ledger)
    try:
        named = {**mine, **places}
        expected, products = cumulative_tensors(ledger, lambda name: _original(name, named))
    except (ValueError, RuntimeError) as error:
        state.add("scales", LEDGER, f"its multipliers do not go together: {error}")
        return
    _compare(state, SCALES_FILE, mine, expected)
    if places != {name: [list(place) for place in found] for name, found in products.items()}:
        message = f"lists other products of matrices than {LEDGER}"
        state.add("scales", SCALES_FILE, message, (SCALES_FILE, "field products"))
    _check_fields(state, ledger)
    if state.contents.has(AIMET_FILE) and not products:
        theirs = state.contents.stored(AIMET_FILE).tensors
        _compare(state, AIMET_FILE, theirs, aimet_tensors(expected))


def _ledger(state: Examination) -> Ledger | None:
    stored = state.contents.stored(LEDGER)
    if not stored.fields:
        return None  # the file could not be read, which was said
    try:
        return Ledger.from_tensors(stored.tensors, stored.json("ledger"))
    except (KeyError, TypeError, ValueError) as error:
        state.add("ledger", LEDGER, f"is damaged: {type(error).__name__} {error}")
        return None


def _original(name: str, known: Mapping[str, Any]) -> str:
    """Return a module's name in the checkpoint: that in the sim, without the wrapper's prefix."""
    for start in range(name.count(".") + 1):
        short = name.split(".", start)[-1]
        if f"{short}.input" in known or f"{short}.output" in known:
            return short
    return name


def _check_multipliers(state: Examination, ledger: Ledger) -> None:
    """Check multipliers against the record, by the module that they were folded into."""
    entries = state.contents.stored(LEDGER).json("ledger")["entries"]
    for number, entry in enumerate(ledger.entries):
        for place, side in enumerate(entry.sides):
            _, _, *matrix = entries[number]["sides"][place]
            item = (LEDGER, matrix[0] if matrix else f"{number}.{place}")
            if state.changed(*item):
                message = f"its multiplier ({side.axis}) by {entry.technique} was changed"
                state.add("ledger", side.module, f"{message} in {LEDGER}", item)
    if state.changed(LEDGER, "field ledger"):
        message = "its list of what was done to the sim was changed"
        state.add("ledger", LEDGER, message, (LEDGER, "field ledger"))


def _compare(
    state: Examination, file: str, mine: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    for name in dict.fromkeys([*expected, *mine]):
        item = (file, name)
        if name not in mine:
            state.add("scales", name, f"is gone from {file}", item)
        elif name not in expected:
            state.add("scales", name, f"{file} has it, and {LEDGER} does not", item)
        elif not torch.equal(mine[name], expected[name]):
            twin = next(
                (n for n, v in expected.items() if n != name and torch.equal(v, mine[name])), None
            )
            if twin is not None:
                message = f"in {file} is that of {twin}"
                state.add("swapped", name, message, item)
            else:
                message = f"in {file} is not what {LEDGER} comes to: {_how(mine, expected, name)}"
                state.add("scales", name, message, item)


def _how(mine: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> str:
    one, two = mine[name], expected[name]
    if one.shape != two.shape:
        return f"{tuple(one.shape)} values, {tuple(two.shape)} are required"
    one, two = one.flatten(), two.flatten()
    wrong = (one != two).nonzero().flatten()
    first = int(wrong[0])
    return (
        f"{len(wrong)} of {len(one)} values differ, value {first} is {float(one[first]):.6g}, "
        f"{float(two[first]):.6g} is required"
    )


def _check_fields(state: Examination, ledger: Ledger) -> None:
    fields = state.contents.stored(SCALES_FILE).fields
    if not fields:
        return
    required = {"techniques": list(ledger.techniques), "origin": ledger.origin or ""}
    for name, value in required.items():
        text = fields.get(name)
        found = (
            text if name == "origin" else parse_json(text or "null", f"{SCALES_FILE}, field {name}")
        )
        if found != value:
            message = f"says {name} {found!r}, and {LEDGER} {value!r}"
            state.add("scales", SCALES_FILE, message, (SCALES_FILE, f"field {name}"))
    pairs = parse_json(
        fields.get("pairs", "[]"), f"{SCALES_FILE}, field pairs", list[dict[str, Any]]
    )
    kinds = [tuple(pair.get(key) for key in ("technique", "pair", "size")) for pair in pairs]
    if kinds != [(entry.technique, entry.pair, entry.size) for entry in ledger.entries]:
        message = f"lists other scale pairs than {LEDGER}"
        state.add("scales", SCALES_FILE, message, (SCALES_FILE, "field pairs"))
    for name in _FIELDS:
        item = (SCALES_FILE, f"field {name}")
        if state.changed(*item):
            state.add("scales", SCALES_FILE, f"its field {name!r} was changed", item)
