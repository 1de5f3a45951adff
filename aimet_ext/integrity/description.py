"""Description of an export: its files, how each is read, and a hash of every single thing in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from aimet_ext.errors import CorruptFileError
from aimet_ext.files.encodings import entries, load_encodings
from aimet_ext.files.folders import replace_file
from aimet_ext.files.manifest import (
    CONFIG,
    FINGERPRINTS,
    LEDGER,
    QUANTIZERS,
    SETTINGS,
    WEIGHTS,
    hash_file,
)
from aimet_ext.files.reading import TensorFile, naming, parse_json, read_json
from aimet_ext.files.scales import AIMET_FILE, SCALES_FILE
from aimet_ext.files.tensors import parameter_quantizer, read_sealed
from aimet_ext.integrity.stored import (
    GridIndex,
    StoredGraph,
    as_in_graph,
    encoded_cells,
    hash_values,
    torch_cells,
)

_SCHEMA = "aimet_ext.fingerprints/1"
_T = TypeVar("_T")
Hashes = dict[str, str]


@dataclass(frozen=True)
class Stored:
    """Tensors and texts of a safetensors file."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)

    def json(self, name: str) -> Any:
        """Return the value of a field that holds JSON; an empty object if there is none."""
        return parse_json(self.fields.get(name, "{}"), f"field {name}")


@dataclass(frozen=True)
class Part:
    """One file of an export.

    :param name: its name, with ``{}`` in the place of the export's prefix.
    :param read: reader; raises a ValueError if the file is damaged.
    :param empty: content that stands for a file that cannot be read.
    :param hashes: hashes of a content, by the name of the thing, by what follows the file's name.
    :param optional: True if an export may lack the file.
    :param sealed: True if the file carries its own hash.
    """

    name: str
    read: Callable[[Path], Any]
    empty: Callable[[], Any]
    hashes: Mapping[str, Callable[[Any], Hashes]]
    optional: bool = False
    sealed: bool = False


class ExportContents:
    """All that an export holds; a file that cannot be read is a problem, and counts as empty.

    :param folder: folder of the export.
    :param prefix: name of its ONNX and encodings files.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix
        self.problems: list[tuple[str, str]] = []  # the file and what is wrong with it
        self._known: dict[str, Any] = {}

    @property
    def model(self) -> StoredGraph | None:
        """The float model."""
        graph: StoredGraph | None = self._content(_PARTS["{}.onnx"])
        return graph

    @property
    def qdq(self) -> StoredGraph | None:
        """The QDQ model, if there is one."""
        part = _PARTS["{}.qdq.onnx"]
        graph: StoredGraph | None = self._content(part) if self._has(part) else None
        return graph

    @cached_property
    def encodings(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Entries by tensor, by name of the encodings file: first 1.0.0, then 2.0.0."""
        parts = [_PARTS["{}.encodings"], _PARTS["{}.2.0.0.encodings"]]
        return {part.name.format(self.prefix): self._content(part) for part in parts}

    @property
    def encodings_2(self) -> dict[str, dict[str, Any]]:
        """Entries of the encodings file 2.0.0, by tensor."""
        return self.encodings[f"{self.prefix}.2.0.0.encodings"]

    def stored(self, name: str) -> Stored:
        """Return the content of a safetensors file, by its name."""
        stored: Stored = self._content(_PARTS[name])
        return stored

    def has(self, name: str) -> bool:
        """Return True if there is a file of that name."""
        return (self.folder / name).is_file()

    def hashes(self) -> Iterator[tuple[str, Hashes]]:
        """Yield ``(file, hash by name)`` of all that the export holds now, file by file."""
        for part in _PARTS.values():
            content = self._content(part) if self._has(part) or not part.optional else None
            if content is not None:
                for suffix, hashes in part.hashes.items():
                    yield part.name.format(self.prefix) + suffix, hashes(content)

    def _has(self, part: Part) -> bool:
        return self.has(part.name.format(self.prefix))

    def _content(self, part: Part) -> Any:
        name = part.name.format(self.prefix)
        if name not in self._known:
            self._known[name] = content = self._try(name, part.read, part.empty())
            if part.sealed and content.fields:  # its content counts, even if its hash differs
                schema = content.fields.get("schema", "")
                self._try(name, lambda path: read_sealed(path, schema, _AnyFields), None)
        return self._known[name]

    def _try(self, name: str, read: Callable[[Path], _T], otherwise: _T) -> _T:
        try:
            with naming(self.folder / name):
                return read(self.folder / name)
        except FileNotFoundError:
            self.problems.append((name, "is required and absent"))
        except (CorruptFileError, OSError) as error:
            self.problems.append((name, f"is damaged: {error}"))
        return otherwise


def write_fingerprints(folder: Path, prefix: str, parameters: Mapping[str, str]) -> dict[str, Any]:
    """Write the hashes of all that an export holds, to be called before its manifest is written.

    :param parameters: encoded tensor by the parameter's name in a PyTorch sim.
    :returns: fields for the manifest: the file's own SHA-256 (``"fingerprints"``); the tensor of
        the float model by the parameter of ``model.safetensors`` (``"onnx_constants"``); and the
        quantizer of a PyTorch sim by the encoded tensor (``"quantizer_of"``).
    :raises RuntimeError: a file that was just written cannot be read.
    """
    contents = ExportContents(folder, prefix)
    record = {"schema": _SCHEMA, "items": dict(contents.hashes())}
    names: dict[str, dict[str, str]] = {"onnx_constants": {}, "quantizer_of": {}}
    if contents.has(WEIGHTS) and contents.model is not None:
        names["onnx_constants"] = _constants(contents.model, contents.stored(WEIGHTS))
        names["quantizer_of"] = _owners(contents, parameters)
    if contents.problems:
        raise RuntimeError(f"files just written cannot be read: {': '.join(contents.problems[0])}")
    text = json.dumps(record, indent=1, ensure_ascii=False)
    replace_file(folder / FINGERPRINTS, f"{text}\n".encode())
    return {"fingerprints": hash_file(folder / FINGERPRINTS), **names}


def read_record(folder: Path) -> Mapping[str, Hashes] | None:
    """Read the hashes that :func:`write_fingerprints` wrote, None if there is no such file.

    :returns: hash by name by file; nodes of an ONNX file are under ``"{file} nodes"``.
    :raises CorruptFileError: it is damaged.
    """
    path = folder / FINGERPRINTS
    if not path.is_file():
        return None
    record: _Record = read_json(path, _Record)
    return record.items


def _constants(graph: StoredGraph, weights: Stored) -> dict[str, str]:
    """Return where each tensor of ``model.safetensors`` lies in the float model, perhaps turned."""
    named: dict[str | None, list[str]] = {}
    for name in [*graph.constants, *graph.index.producer]:
        if name in graph.read:
            named.setdefault(graph.hash(name), []).append(name)
    found = {}
    for name, tensor in weights.tensors.items():
        values = as_in_graph(tensor)
        turned = [values, values.T] if values.ndim == 2 else [values]
        places = [place for one in turned for place in named.get(hash_values(one), [])]
        if places:
            found[name] = min(places, key=lambda place: name not in place)
    return found


def _owners(contents: ExportContents, parameters: Mapping[str, str]) -> dict[str, str]:
    """Return the quantizer of each encoding: by the parameter, else by its grid, then by name."""
    owners = {tensor: parameter_quantizer(name) for name, tensor in parameters.items()}
    stored = contents.stored(QUANTIZERS)
    index = GridIndex(torch_cells(stored.tensors, stored.json("quantizers")))
    for tensor, entry in contents.encodings_2.items():
        if tensor in owners:
            continue
        grid = encoded_cells(entry, entry, contents.model.shape(tensor) if contents.model else None)
        owner = None if grid is None else index.find(grid, tensor.strip("/").replace("/", "."))
        if owner is not None:
            owners[tensor] = owner
    return owners


def _read_safetensors(path: Path) -> Stored:
    file = TensorFile(path)
    return Stored(file, file.metadata)


def _read_encodings(path: Path) -> dict[str, dict[str, Any]]:
    return entries(load_encodings(path))


class _AnyFields(BaseModel):
    """Fields of a sealed file, whatever they are."""


class _Record(BaseModel):
    kind: Literal["aimet_ext.fingerprints/1"] = Field(alias="schema")
    items: dict[str, Hashes]


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _of_constants(graph: StoredGraph) -> Hashes:
    hashes = {name: graph.hash(name) for name in graph.constants}
    return {name: value for name, value in hashes.items() if value is not None}


def _of_values(values: Mapping[str, Any]) -> Hashes:
    return {name: _hash_json(value) for name, value in values.items()}


def _of_tensors(stored: Stored) -> Hashes:
    return {name: _hash_tensor(tensor) for name, tensor in stored.tensors.items()}


def _hash_tensor(tensor: Tensor) -> str:
    digest = hashlib.sha256(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _of_fields(stored: Stored) -> Hashes:
    fields = {f"field {name}": text for name, text in stored.fields.items() if name != "sha256"}
    return {**_of_tensors(stored), **_of_values(fields)}


def _of_quantizers(stored: Stored) -> Hashes:
    return {**_of_tensors(stored), **_of_values(stored.json("quantizers"))}


def _model(name: str, *, optional: bool = False) -> Part:
    hashes = {"": _of_constants, " nodes": lambda graph: dict(graph.nodes())}
    return Part(name, StoredGraph, lambda: None, hashes, optional)


def _safetensors(
    name: str, hashes: Callable[[Stored], Hashes], *, optional: bool = False, sealed: bool = False
) -> Part:
    return Part(name, _read_safetensors, Stored, {"": hashes}, optional, sealed)


_ALL = (
    _model("{}.onnx"),
    _model("{}.qdq.onnx", optional=True),
    Part("{}.encodings", _read_encodings, dict, {"": _of_values}),
    Part("{}.2.0.0.encodings", _read_encodings, dict, {"": _of_values}),
    _safetensors(WEIGHTS, _of_tensors, optional=True),
    _safetensors(QUANTIZERS, _of_quantizers, sealed=True),
    _safetensors(SCALES_FILE, _of_fields, sealed=True),
    _safetensors(LEDGER, _of_fields, sealed=True),
    _safetensors(AIMET_FILE, _of_tensors, optional=True),
    Part(CONFIG, read_json, dict, {"": _of_values}, optional=True),
    Part(SETTINGS, read_json, dict, {"": _of_values}, optional=True),
    _safetensors(f"checkpoint/{WEIGHTS}", _of_tensors, optional=True),
)
_PARTS = {part.name: part for part in _ALL}
