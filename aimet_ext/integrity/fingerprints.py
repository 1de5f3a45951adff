"""A hash of every single thing in an export, so that what was changed afterwards can be named."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aimet_ext.errors import CorruptFileError
from aimet_ext.files.folders import replace_file
from aimet_ext.files.manifest import hash_file
from aimet_ext.files.names import (
    CONFIG,
    FINGERPRINTS,
    LEDGER,
    QUANTIZERS,
    SETTINGS,
    WEIGHTS,
)
from aimet_ext.files.scales import AIMET_FILE, SCALES_FILE
from aimet_ext.integrity.files import ExportFiles, Stored
from aimet_ext.integrity.grids import Cells, encoded_cells, torch_cells
from aimet_ext.integrity.onnx_file import OnnxGraph

__all__ = [
    "NODES",
    "fingerprints_of",
    "read_fingerprints",
    "write_fingerprints",
]

NODES = " nodes"  # follows the name of an ONNX file where its nodes are meant, not its constants
_SCHEMA = "aimet_ext.fingerprints/1"


def write_fingerprints(folder: Path, prefix: str, parameters: Mapping[str, str]) -> dict[str, Any]:
    """Write the hashes of all that an export holds, to be called before its manifest is written.

    :param parameters: of a PyTorch sim, the encoded tensor by the parameter's name in the sim.
    :returns: fields for the manifest: the file's own SHA-256 (``"fingerprints"``); the tensor of
        the float model by the parameter of ``model.safetensors`` (``"onnx_constants"``); and the
        quantizer of a PyTorch sim by the encoded tensor (``"quantizer_of"``).
    :raises RuntimeError: a file that was just written cannot be read.
    """
    files = ExportFiles(folder, prefix)
    content = {"schema": _SCHEMA, "items": dict(fingerprints_of(files))}
    names = {"onnx_constants": _constants(files), "quantizer_of": _owners(files, parameters)}
    if files.findings:
        raise RuntimeError(f"files just written cannot be read: {files.findings[0]}")
    text = json.dumps(content, indent=1, ensure_ascii=False)
    replace_file(folder / FINGERPRINTS, f"{text}\n".encode())
    return {"fingerprints": hash_file(folder / FINGERPRINTS), **names}


def read_fingerprints(folder: Path) -> Mapping[str, Mapping[str, str]] | None:
    """The hashes that :func:`write_fingerprints` wrote, None if there is no such file.

    :returns: hash by name by file; nodes of an ONNX file are under ``"{file} nodes"``.
    :raises CorruptFileError: it is damaged.
    """
    path = folder / FINGERPRINTS
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != _SCHEMA:
            raise CorruptFileError(f"{path.name}: schema {_SCHEMA!r} is required")
        return dict(content["items"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path.name} is damaged: {error}") from error


def fingerprints_of(files: ExportFiles) -> Iterator[tuple[str, dict[str, str]]]:
    """``(file, hash by name)`` of all that an export holds now, file by file."""
    for graph in (files.model, files.qdq):
        if graph is not None:
            yield graph.path.name, dict(_of_constants(graph))
            yield graph.path.name + NODES, dict(graph.nodes())
    for name, found in files.encodings.items():
        yield name, {tensor: _json(entry) for tensor, entry in found.items()}
    if files.has(WEIGHTS):
        yield WEIGHTS, _of_tensors(files.weights)
    described = files.quantizers.json("quantizers")
    yield (
        QUANTIZERS,
        {
            **_of_tensors(files.quantizers),
            **{name: _json(entry) for name, entry in described.items()},
        },
    )
    yield SCALES_FILE, {**_of_tensors(files.scales), **_of_fields(files.scales)}
    yield LEDGER, {**_of_tensors(files.ledger), **_of_fields(files.ledger)}
    if files.aimet_scales is not None:
        yield AIMET_FILE, _of_tensors(files.aimet_scales)
    for name in (CONFIG, SETTINGS):
        if files.has(name):
            yield name, {key: _json(value) for key, value in files.values(name).items()}
    checkpoint = f"checkpoint/{WEIGHTS}"
    if files.has(checkpoint):
        yield checkpoint, _of_tensors(files.safetensors(checkpoint))


def _of_constants(graph: OnnxGraph) -> Iterator[tuple[str, str]]:
    for name in graph.constants:
        value = graph.value(name)
        if value is not None:
            yield name, _hash(str(value.dtype), value.shape, np.ascontiguousarray(value))


def _of_tensors(stored: Stored) -> dict[str, str]:
    return {name: _of_tensor(tensor) for name, tensor in stored.tensors.items()}


def _of_tensor(tensor: Tensor) -> str:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return _hash(str(tensor.dtype), tuple(tensor.shape), flat.numpy())


def _of_fields(stored: Stored) -> dict[str, str]:
    kept = {name: text for name, text in stored.fields.items() if name != "sha256"}
    return {f"field {name}": _json(text) for name, text in kept.items()}


def _hash(kind: str, shape: tuple[int, ...], values: Any) -> str:
    digest = hashlib.sha256(json.dumps([kind, list(shape)]).encode())
    digest.update(values.tobytes() if values.dtype.kind == "V" else values.view(np.uint8).data)
    return digest.hexdigest()


def _json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _constants(files: ExportFiles) -> dict[str, str]:
    """Where each tensor of ``model.safetensors`` lies in the float model, as it is or turned."""
    if not files.has(WEIGHTS) or files.model is None:
        return {}
    graph = files.model
    named: dict[str, list[str]] = {}
    for name in [*graph.constants, *graph.producers]:
        value = graph.value(name)
        if value is not None and name in graph.read:
            named.setdefault(_hash("", value.shape, np.ascontiguousarray(value)), []).append(name)
    found = {}
    for name, tensor in files.weights.tensors.items():
        turned = [tensor, tensor.T] if tensor.dim() == 2 else [tensor]
        arrays = [np.ascontiguousarray(value.numpy()) for value in turned]
        places = [p for array in arrays for p in named.get(_hash("", array.shape, array), [])]
        places.sort(key=lambda place: name not in place)
        if places:
            found[name] = places[0]
    return found


def _owners(files: ExportFiles, parameters: Mapping[str, str]) -> dict[str, str]:
    """The quantizer that each encoding is of: by the parameter, else by its grid, then by name."""
    if not files.has(WEIGHTS):
        return {}
    cells = torch_cells(files.quantizers.tensors, files.quantizers.json("quantizers"))
    owners: dict[str, str] = {}
    for parameter, tensor in parameters.items():
        layer, _, key = parameter.rpartition(".")
        owners[tensor] = f"{layer}.param_quantizers.{key}".lstrip(".")
    newer = files.encodings[f"{files.prefix}.2.0.0.encodings"]
    for tensor, entry in newer.items():
        if tensor in owners:
            continue
        grid = encoded_cells(entry, entry, files.model.shape(tensor) if files.model else None)
        owner = None if grid is None else _owner(tensor, grid, cells)
        if owner is not None:
            owners[tensor] = owner
    return owners


def _owner(tensor: str, grid: Cells, cells: Mapping[str, Cells]) -> str | None:
    plain = tensor.strip("/").replace("/", ".")
    same = [name for name, candidate in cells.items() if candidate.same(grid)]
    return max(same, key=lambda name: _common(name, plain), default=None)


def _common(one: str, two: str) -> int:
    """How many characters two names start with in common."""
    pairs = zip(one, two, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
