"""The undo journal of a run and its per-block checkpoints, from which it is resumed."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import torch
from pydantic import BaseModel
from torch import Tensor

from aimet_ext.errors import CorruptFileError
from aimet_ext.files.folders import atomic_path, read_json, versions, writable_folder
from aimet_ext.files.tensors import copy_to_cpu, hash_tensors, read_tensors, write_tensors

__all__ = ["Checkpoints", "UndoJournal", "environment", "hash_tensors"]

_FORMAT = "aimet_ext.checkpoints/1"
_PACKAGES = ("python", "aimet-ext", "aimet-torch", "torch", "transformers")
# A difference in one of these can change the last bits of a result, not its meaning.
_ENVIRONMENT = ("versions", "threads", "device", "machine")


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
            _remove_leftovers(self._directory, "undo_*")

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
        _remove_leftovers(self.directory, "block_*")
        _remove_leftovers(self.directory, "run.json.*")
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
                text = json.dumps({"format": _FORMAT, "fingerprint": run}, indent=2)
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

    def __contains__(self, index: object) -> bool:
        return index in self._indices()

    def clear(self) -> None:
        """Remove the checkpoints and the record of the run."""
        for index in self._indices():
            self._file(index).unlink(missing_ok=True)
        (self.directory / "run.json").unlink(missing_ok=True)

    def _file(self, index: int) -> Path:
        return self.directory / f"block_{index:05d}.safetensors"

    def _indices(self) -> set[int]:
        paths = self.directory.glob("block_*.safetensors")
        names = (path.stem.removeprefix("block_") for path in paths)
        return {int(name) for name in names if name.isdecimal()}


def _remove_leftovers(directory: Path, pattern: str) -> None:
    """Remove what a killed run left behind, see :func:`atomic_path`."""
    for folder in directory.glob(f".{pattern}.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


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
