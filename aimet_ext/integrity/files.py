"""The files of an export, read even where they are damaged, and what is in them by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from aimet_ext.errors import CorruptFileError
from aimet_ext.files.encodings import entries, load_encodings
from aimet_ext.files.names import LEDGER, QUANTIZERS, WEIGHTS
from aimet_ext.files.scales import AIMET_FILE, SCALES_FILE
from aimet_ext.files.sealed import read_sealed
from aimet_ext.findings import Finding
from aimet_ext.integrity.onnx_file import OnnxGraph

__all__ = ["AGAIN", "ExportFiles", "Stored"]

AGAIN = "export it again from the sim, or take the file from a copy that is sound"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Stored:
    """Tensors and texts of a safetensors file."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)

    def json(self, name: str) -> Any:
        """A field that holds JSON; an empty object if there is none."""
        return json.loads(self.fields.get(name, "{}"))


class ExportFiles:
    """What an export holds. A file that cannot be read is a finding, and counts as empty.

    :param folder: of the export.
    :param prefix: name of its ONNX and encodings files.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix
        self.findings: list[Finding] = []

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return (self.folder / name).is_file()

    @cached_property
    def weights(self) -> Stored:
        """``model.safetensors``, of exports of PyTorch sims."""
        return self.safetensors(WEIGHTS)

    @cached_property
    def model(self) -> OnnxGraph | None:
        """The float model."""
        return self._graph(f"{self.prefix}.onnx", needed=True)

    @cached_property
    def qdq(self) -> OnnxGraph | None:
        """The QDQ model, if there is one."""
        return self._graph(f"{self.prefix}.qdq.onnx", needed=False)

    @cached_property
    def encodings(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Entries by tensor, by name of the encodings file: first 1.0.0, then 2.0.0."""
        names = (f"{self.prefix}.encodings", f"{self.prefix}.2.0.0.encodings")

        def read(path: Path) -> dict[str, dict[str, Any]]:
            try:
                return entries(load_encodings(path))
            except (KeyError, TypeError) as error:
                raise CorruptFileError(f"{path.name} lists no encodings ({error})") from error

        return {name: self._try(name, read, {}) for name in names}

    @cached_property
    def quantizers(self) -> Stored:
        """``quantizers.safetensors``."""
        return self._sealed(QUANTIZERS)

    @cached_property
    def scales(self) -> Stored:
        """``scales.safetensors``."""
        return self._sealed(SCALES_FILE)

    @cached_property
    def ledger(self) -> Stored:
        """``ledger.safetensors``."""
        return self._sealed(LEDGER)

    @cached_property
    def aimet_scales(self) -> Stored | None:
        """AIMET's own file of scales, if there is one."""
        return self.safetensors(AIMET_FILE) if self.has(AIMET_FILE) else None

    def safetensors(self, name: str) -> Stored:
        """Any safetensors file of the folder."""
        return self._try(name, _read_safetensors, Stored())

    def values(self, name: str) -> dict[str, Any]:
        """What an object in a JSON file holds."""

        def read(path: Path) -> dict[str, Any]:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise CorruptFileError(f"{path.name} holds no object")
            return content

        return self._try(name, read, {})

    def _sealed(self, name: str) -> Stored:
        """A file that carries its own hash; read where the hash does not fit, too."""
        stored = self.safetensors(name)
        if stored.fields:
            schema = stored.fields.get("schema", "")
            self._try(name, lambda path: read_sealed(path, schema), None)
        return stored

    def _graph(self, name: str, *, needed: bool) -> OnnxGraph | None:
        if not needed and not self.has(name):
            return None
        return self._try(name, OnnxGraph, None)

    def _try(self, name: str, read: Callable[[Path], _T], otherwise: _T) -> _T:
        try:
            return read(self.folder / name)
        except FileNotFoundError:
            self.findings.append(Finding("file", name, "is required and absent", AGAIN))
        except ValueError as error:  # of JSON, of UTF-8, or a CorruptFileError
            self.findings.append(Finding("file", name, f"is damaged: {error}", AGAIN))
        return otherwise


def _read_safetensors(path: Path) -> Stored:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return Stored(load_file(path), metadata)
    except (SafetensorError, ValueError) as error:
        raise CorruptFileError(f"{path.name} is no safetensors file: {error}") from error
