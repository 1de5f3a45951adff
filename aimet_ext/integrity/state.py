"""What all checks of an export share: its files, what was recorded of them, what was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from aimet_ext.files.names import WEIGHTS
from aimet_ext.findings import Finding
from aimet_ext.integrity.files import AGAIN, ExportFiles
from aimet_ext.integrity.fingerprints import fingerprints_of

__all__ = ["ExportState"]

_SHOWN = 20


class ExportState:
    """An export under examination.

    :param folder: of the export.
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
        self.folder, self.manifest, self.record = folder, manifest, record
        self.files = ExportFiles(folder, manifest["prefix"])
        self.doubted: set[str] = set()  # tensors of which some encoding is wrong
        self._findings: list[Finding] = []
        self._explained: set[tuple[str, str]] = set()

    @property
    def is_onnx(self) -> bool:
        """Whether it is the export of an ONNX sim."""
        return self.manifest.get("framework") == "onnx"

    @property
    def weights_file(self) -> str:
        """The file of the weights that quantizers were set for."""
        return f"{self.files.prefix}.onnx" if self.is_onnx else WEIGHTS

    @property
    def findings(self) -> list[Finding]:
        """All findings, those of unreadable files first."""
        return [*self.files.findings, *self._findings]

    def add(
        self, check: str, name: str, message: str, remedy: str = AGAIN, *items: tuple[str, str]
    ) -> None:
        """Note a finding.

        :param items: ``(file, name)`` of what was changed, which then needs no finding of its own.
        """
        self._findings.append(Finding(check, name, message, remedy))
        self._explained.update(items)

    def explain(self, *items: tuple[str, str]) -> None:
        """Note that what was changed is part of a finding."""
        self._explained.update(items)

    @cached_property
    def _now(self) -> Mapping[str, Mapping[str, str]]:
        return dict(fingerprints_of(self.files))

    def unchanged(self, file: str, name: str) -> bool | None:
        """Whether something in a file is what it was, None if that is not known."""
        if self.record is None or file not in self.record:
            return None
        before, now = self.record[file].get(name), self._now.get(file, {}).get(name)
        return None if before is None and now is None else before == now

    def rest(self) -> None:
        """Note whatever was changed and is part of no finding yet."""
        if self.record is None:
            return
        for file in self.record:
            found = [item for item in self._changes(file) if (file, item[0]) not in self._explained]
            for name, change in found[:_SHOWN]:
                self.add("changed", name, f"{change} in {file} since the export was written")
            if len(found) > _SHOWN:
                more = f"{len(found) - _SHOWN} more things differ from when the export was written"
                self.add("changed", file, more)

    def _changes(self, file: str) -> Iterator[tuple[str, str]]:
        assert self.record is not None
        before, now = self.record.get(file, {}), self._now.get(file, {})
        for name in dict.fromkeys([*before, *now]):
            if name not in now:
                yield name, "is gone"
            elif name not in before:
                yield name, "is new"
            elif before[name] != now[name]:
                yield name, "differs"
