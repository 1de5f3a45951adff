"""Tensors on disk: safetensors files that are written whole or not at all, and content hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aimet_ext.errors import CorruptFileError

__all__ = [
    "atomic_path",
    "copy_to_cpu",
    "hash_tensors",
    "read_tensors",
    "writable_folder",
    "write_tensors",
]

_FORMAT = "aimet_ext.tensors/1"


def hash_tensors(items: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, dtypes, shapes and values, in the order given.

    :param items: pairs of name and tensor, taken one at a time.
    :return: 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in items:
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(len(head.encode()).to_bytes(8, "little") + head.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)  # [elements]
        digest.update(flat.view(torch.uint8).numpy().data)  # [bytes]
    return digest.hexdigest()


def copy_to_cpu(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares no memory with ``tensor``."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def writable_folder(path: str | Path, parameter: str) -> Path:
    """A folder that exists and can be written, created if need be.

    :param parameter: name of the user's parameter, for the error.
    :raises ValueError: it cannot be created or written.
    """
    folder = Path(path)
    problem = "permission denied"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError as error:
        problem = str(error)
    raise ValueError(
        f"{parameter} must be a folder that can be written, got {str(path)!r} ({problem}); "
        "pass another folder"
    )


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A path to write to; what was written there becomes ``path`` when the block ends.

    After an exception nothing is left. A reader, or the next run after a kill, sees the old file
    or the new one, never a part of one.

    :param durable: wait until the bytes are on the disk, so that this holds for a power cut too.
    """
    # A folder, because safetensors writes beside its target too: what a kill leaves lies in it.
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    folder.mkdir(exist_ok=True)
    try:
        temporary = folder / path.name
        yield temporary
        if durable:
            _sync(temporary)
        temporary.replace(path)
        if durable:
            _sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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

    :return: tensors on the CPU, and the metadata.
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
