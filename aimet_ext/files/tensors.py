"""Safetensors files that notice when a byte of them was changed, and what a run keeps in them.

A sealed file carries the SHA-256 of its bytes, taken with the hash itself written as 64 zeros. A
file of a journal or checkpoint, written and read tensor by tensor, carries that of its content.
A run keeps what it changes in an undo journal, and each finished block in a checkpoint. Quantizers
of a torch simulation have names of their own among the tensors.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import Tensor

from aimet_ext.errors import CorruptFileError, some
from aimet_ext.files.folders import atomic_path, replace_file, writable_folder
from aimet_ext.files.manifest import versions
from aimet_ext.files.reading import check_regular, naming, read_json, read_safetensors
from aimet_ext.files.scratch import hold, release, remove_abandoned

_FORMAT = "aimet_ext.tensors/1"
_ZEROS = b"0" * 64
_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_RUN_FORMAT = "aimet_ext.checkpoints/1"
_PACKAGES = ("python", "aimet-ext", "aimet-torch", "torch", "transformers")
# A difference in one of these can change the last bits of a result, not its meaning.
_ENVIRONMENT = ("versions", "threads", "device", "machine")
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


def parameter_quantizer(parameter: str) -> str:
    """Return the name that a torch sim's quantizer of a parameter has in an export."""
    layer, _, key = parameter.rpartition(".")
    return f"{layer}.param_quantizers.{key}".lstrip(".")


def of_parameter(quantizer: str) -> bool:
    """Return True if a quantizer of a torch sim is a parameter's, by its name in an export."""
    return ".param_quantizers." in f".{quantizer}"


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
    content = _in_order(content)
    digest = hashlib.sha256(content).hexdigest().encode()
    replace_file(path, content.replace(b'"sha256":"' + _ZEROS, b'"sha256":"' + digest, 1))


def _in_order(content: bytes) -> bytes:
    """Return a safetensors file with a sorted header: safetensors writes metadata in any order."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def read_sealed(
    path: str | Path, schema: str | tuple[str, ...], fields: type[Fields]
) -> tuple[dict[str, Tensor], Fields]:
    """Read back what :func:`write_sealed` wrote: tensors, and the fields.

    :param schema: kind of the file and its version, or the versions that are read.
    :param fields: model of the fields, those that are not strings as ``pydantic.Json``.
    :raises FileNotFoundError: there is no such file.
    :raises CorruptFileError: the file is not safetensors, not of that schema, cut short, one of
        its bytes was changed, or its fields are not those of the model.
    """
    path = Path(path)
    schemas = (schema,) if isinstance(schema, str) else schema
    wanted = " or ".join(map(repr, schemas))
    content = check_regular(path).read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    seals = list(_SEAL.finditer(content[:header_end]))
    if len(seals) != 1:
        raise CorruptFileError(
            f"{path}: a file of schema {wanted} is required, but it carries no hash of aimet_ext;"
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
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise CorruptFileError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("schema") not in schemas:
        raise CorruptFileError(
            f"{path}: a file of schema {wanted} is required, got {metadata.get('schema')!r}"
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
        tensors, header = read_safetensors(path)
    except CorruptFileError as error:
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


# ---- undo and checkpoints ------------------------------------------------------------------------


class UndoJournal:
    """The originals of what a run changes, kept so that they can be put back.

    Invariant: an entry is complete or absent, and the first one saved under a key stays.

    :param directory: folder for the entries, created if need be; None keeps them in RAM.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self._entries: dict[str, tuple[dict[str, Tensor], str] | Path] = {}
        self._directory = None
        if directory is not None:
            self._directory = writable_folder(directory, "directory of the undo journal")

    def save(self, key: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Keep copies of ``tensors`` and ``meta`` under ``key``.

        :param meta: JSON values.
        :raises ValueError: there is an entry of that key, which holds the true original.
        """
        if key in self._entries:
            raise ValueError(
                f"the undo journal already holds the original of {key!r}; restore and clear it "
                "before another one is saved"
            )
        if self._directory is None:
            copies = {name: copy_to_cpu(tensor) for name, tensor in tensors.items()}
            self._entries[key] = (copies, json.dumps(dict(meta)))
        else:
            path = self._directory / f"undo_{quote(key, safe='')}.safetensors"
            write_tensors(path, tensors, meta)
            self._entries[key] = path

    def restore(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors, on the CPU, and metadata saved under ``key``.

        :raises KeyError: nothing was saved under that key.
        :raises CorruptFileError: the file of that entry was damaged.
        """
        entry = self._entries[key]
        if isinstance(entry, Path):
            return read_tensors(entry)
        tensors, meta = entry
        return {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(meta)

    def keys(self) -> tuple[str, ...]:
        """Return the keys in the order they were saved."""
        return tuple(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def clear(self) -> None:
        """Forget all entries and remove their files."""
        for entry in self._entries.values():
            if isinstance(entry, Path):
                entry.unlink(missing_ok=True)
        self._entries.clear()


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return what decides the last bits of a result: versions, threads, device and machine."""
    found = versions()
    packages = {name: found.get(name, "not installed") for name in _PACKAGES}
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "versions": packages,
        "threads": torch.get_num_threads(),
        "device": name,
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


class Checkpoints:
    """One file for each finished block of a run, from which the same run goes on.

    Invariant: a file is complete or absent, whenever the process was killed.

    :param directory: folder of this run, created if need be.
    :param fingerprint: JSON values that identify the run. ``versions``, ``threads``,
        ``device`` and ``machine`` (see :func:`environment`) may differ, with a warning; all else
        (settings, hashes of weights and data) must be as it was.
    :raises ValueError: the folder belongs to a run with another fingerprint.
    :raises CorruptFileError: its ``run.json`` is damaged, missing or not written by aimet_ext.
    """

    def __init__(self, directory: str | Path, fingerprint: Mapping[str, Any]) -> None:
        self.directory = writable_folder(directory, "checkpoint_dir")
        if not hold(self.directory):
            raise ValueError(
                f"checkpoint_dir {str(directory)!r} is in use by another process; wait for its end "
                "or pass another folder"
            )
        self._release = weakref.finalize(self, release, self.directory)
        for name in ("run.json", "block_*"):
            remove_abandoned(self.directory, f".{name}-*.scratch")
        run = json.loads(json.dumps(dict(fingerprint)))
        record = self.directory / "run.json"
        if record.exists():
            _compare(record, _read_record(record), run)
        elif self._indices():
            raise CorruptFileError(
                f"{record} is missing beside checkpoints that need it; pass an empty folder as "
                "checkpoint_dir"
            )
        else:
            with atomic_path(record) as temporary:
                text = json.dumps({"format": _RUN_FORMAT, "fingerprint": run}, indent=2)
                temporary.write_text(text, encoding="utf-8")
        self._run = _digest(run)

    def save(self, index: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Write the checkpoint of block ``index``; it replaces one of the same index.

        :param meta: JSON values.
        """
        write_tensors(self._file(index), tensors, {"run": self._run, "block": index, "meta": meta})

    def load(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors, on the CPU, and metadata of block ``index``.

        :raises FileNotFoundError: that block has no checkpoint.
        :raises CorruptFileError: the file is damaged or of another run.
        """
        path = self._file(index)
        tensors, meta = read_tensors(path)
        if (meta.get("run"), meta.get("block")) != (self._run, index):
            raise CorruptFileError(
                f"{path} is not the checkpoint of block {index} of this run; it was copied here "
                "or renamed. Delete it"
            )
        return tensors, meta["meta"]

    @contextmanager
    def resuming(self, index: int) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
        """Yield what :meth:`load` returns; an error of whatever kind in the context names the file.

        :raises CorruptFileError: anything was raised, or a number is not finite.
        """
        with naming(self._file(index)):
            tensors, meta = self.load(index)
            if bad := [name for name, t in tensors.items() if not bool(t.isfinite().all())]:
                raise ValueError(f"finite numbers are required, but {some(bad)} holds others")
            yield tensors, meta

    def close(self) -> None:
        """Let other processes use the folder."""
        self._release()

    def __contains__(self, index: object) -> bool:
        return index in self._indices()

    def _file(self, index: int) -> Path:
        return self.directory / f"block_{index:05d}.safetensors"

    def _indices(self) -> set[int]:
        paths = self.directory.glob("block_*.safetensors")
        names = (path.stem.removeprefix("block_") for path in paths)
        return {int(name) for name in names if name.isdecimal()}


class _Record(BaseModel):
    format: Literal["aimet_ext.checkpoints/1"]
    fingerprint: dict[str, Any]


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return _Record.model_validate(read_json(path)).fingerprint
    except ValueError as error:
        raise CorruptFileError(
            f"{path} is damaged ({error}); pass an empty folder as checkpoint_dir"
        ) from error


def _compare(path: Path, stored: dict[str, Any], now: dict[str, Any]) -> None:
    before, after = _leaves(stored), _leaves(now)
    changed = [
        (key, f"{key} was {before.get(key, 'absent')!r} and is {after.get(key, 'absent')!r}")
        for key in [*before, *(key for key in after if key not in before)]
        if before.get(key, "absent") != after.get(key, "absent")
    ]
    hard = [text for key, text in changed if key.split(".")[0] not in _ENVIRONMENT]
    if hard:
        raise ValueError(
            f"checkpoint_dir {str(path.parent)!r} belongs to another run: {'; '.join(hard)}. Pass "
            "the folder of this run, or an empty one to start anew"
        )
    if changed:
        warnings.warn(
            f"resuming from {str(path.parent)!r} in another environment, so the result may differ "
            f"in its last bits: {'; '.join(text for _, text in changed)}",
            stacklevel=3,
        )


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested dictionaries by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
        flat.update(inner or {f"{prefix}{key}": value})
    return flat


def _digest(run: dict[str, Any]) -> str:
    """Return the SHA-256 of the part of a fingerprint that must not change."""
    hard = {key: value for key, value in run.items() if key not in _ENVIRONMENT}
    return hashlib.sha256(json.dumps(hard, sort_keys=True).encode()).hexdigest()
