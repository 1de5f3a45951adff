"""Safetensors files that notice when a byte of them was changed, and hashes of tensors.

A sealed file carries the SHA-256 of its bytes, taken with the hash itself written as 64 zeros. A
file of a journal or checkpoint, written and read tensor by tensor, carries that of its content.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from aimet_ext.errors import CorruptFileError
from aimet_ext.files.folders import atomic_path, replace_file

__all__ = [
    "copy_to_cpu",
    "hash_tensors",
    "read_sealed",
    "read_tensors",
    "write_sealed",
    "write_tensors",
]

_FORMAT = "aimet_ext.tensors/1"
_ZEROS = b"0" * 64
_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')
Fields = TypeVar("Fields", bound=BaseModel)


def hash_tensors(items: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values, in the order given.

    :param items: pairs of name and tensor, taken one at a time.
    :returns: 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in items:
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(len(head.encode()).to_bytes(8, "little") + head.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)  # [elements]
        digest.update(flat.view(torch.uint8).numpy().data)  # [bytes]
    return digest.hexdigest()


def copy_to_cpu(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU that shares no memory with ``tensor``."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def write_sealed(
    path: str | Path, schema: str, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> None:
    """Write tensors and JSON values as safetensors, whole or not at all.

    :param schema: kind of the file and its version, for example ``"aimet_ext.scales/1"``.
    :param fields: JSON values; strings are stored as they are, the rest as JSON text.
    """
    texts = {
        k: value if isinstance(value, str) else json.dumps(value) for k, value in fields.items()
    }
    metadata = {**texts, "schema": schema, "sha256": _ZEROS.decode()}
    # safetensors refuses tensors that share memory, so each is copied.
    content = save({name: copy_to_cpu(tensor) for name, tensor in tensors.items()}, metadata)
    digest = hashlib.sha256(content).hexdigest().encode()
    replace_file(path, content.replace(b'"sha256":"' + _ZEROS, b'"sha256":"' + digest, 1))


def read_sealed(
    path: str | Path, schema: str, fields: type[Fields]
) -> tuple[dict[str, Tensor], Fields]:
    """Read back what :func:`write_sealed` wrote: tensors, and the fields.

    :param fields: model of the fields, those that are not strings as ``pydantic.Json``.
    :raises FileNotFoundError: there is no such file.
    :raises CorruptFileError: the file is not safetensors, not of that schema, cut short, one of
        its bytes was changed, or its fields are not those of the model.
    """
    path = Path(path)
    content = path.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    seals = list(_SEAL.finditer(content[:header_end]))
    if len(seals) != 1:
        raise CorruptFileError(
            f"{path}: a file of schema {schema!r} is required, but it carries no hash of aimet_ext;"
            " it is damaged or was written by another program"
        )
    start, stop = seals[0].span(1)
    blank = content[:start] + _ZEROS + content[stop:]
    if hashlib.sha256(blank).hexdigest().encode() != seals[0][1]:
        raise CorruptFileError(
            f"{path} is not as it was written (its hash differs); write it again from its source"
        )
    try:
        tensors = load(content)
        metadata = json.loads(content[8:header_end])["__metadata__"]
    except (SafetensorError, ValueError, KeyError) as error:
        raise CorruptFileError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("schema") != schema:
        raise CorruptFileError(
            f"{path}: a file of schema {schema!r} is required, got {metadata.get('schema')!r}"
        )
    try:
        return tensors, fields.model_validate(metadata)
    except ValidationError as error:
        raise CorruptFileError(f"{path} does not hold what it must: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write one safetensors file atomically, with a hash of its content.

    :param tensors: any dtypes and devices; tensors that share memory are written twice.
    :param meta: JSON values.
    :raises TypeError: ``meta`` holds something JSON has no word for.
    """
    copies = {name: copy_to_cpu(tensor) for name, tensor in tensors.items()}
    header = {"format": _FORMAT, "meta": json.dumps(dict(meta))}
    header["sha256"] = _content_hash(copies, header["meta"])
    with atomic_path(path) as temporary:
        save_file(copies, temporary, metadata=header)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote.

    :returns: tensors on the CPU, and the metadata.
    :raises FileNotFoundError: there is no such file.
    :raises CorruptFileError: the file is damaged or was not written by :func:`write_tensors`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CorruptFileError(
            f"{path} is damaged ({error}); delete it and run the step that writes it again"
        ) from error
    if header.get("format") != _FORMAT:
        raise CorruptFileError(
            f"{path} must be a file of format {_FORMAT!r}, got {header.get('format')!r}; "
            "point to a folder that holds files of this library only"
        )
    if header.get("sha256") != _content_hash(tensors, header.get("meta", "")):
        raise CorruptFileError(
            f"{path} was changed after it was written (its content has another hash); "
            "delete it and run the step that writes it again"
        )
    return tensors, json.loads(header["meta"])


def _content_hash(tensors: Mapping[str, Tensor], meta: str) -> str:
    return hash_tensors([(meta, torch.empty(0)), *sorted(tensors.items(), key=lambda kv: kv[0])])
