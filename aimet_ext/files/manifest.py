"""The manifest of an output folder: its files with their hashes, versions and settings."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from aimet_ext import __version__
from aimet_ext.errors import CorruptFileError

__all__ = [
    "MANIFEST",
    "hash_file",
    "is_ours",
    "read_manifest",
    "relist_files",
    "versions",
    "write_manifest",
]

MANIFEST = "manifest.json"
_FORMAT = "aimet_ext.manifest/1"
_PACKAGES = (
    "aimet-torch",
    "aimet-onnx",
    "torch",
    "transformers",
    "safetensors",
    "onnx",
    "onnxruntime",
)


def write_manifest(folder: str | Path, kind: str, **fields: Any) -> dict[str, Any]:
    """Write ``manifest.json``: every file below ``folder`` with its SHA-256, versions, and fields.

    :param folder: complete but for its manifest.
    :param kind: what the folder holds, for example ``"export"``.
    :param fields: JSON values that are added as they are.
    :returns: what was written.
    """
    folder = Path(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    content: dict[str, Any] = {
        "format": _FORMAT,
        "kind": kind,
        "versions": versions(),
        **fields,
        "files": {
            file.relative_to(folder).as_posix(): {
                "bytes": file.stat().st_size,
                "sha256": hash_file(file),
            }
            for file in files
            if file.name != MANIFEST or file.parent != folder
        },
    }
    content["sha256"] = _digest(content)
    text = json.dumps(content, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return content


def relist_files(folder: str | Path) -> dict[str, Any]:
    """Write a folder's manifest again, with all files as they are now and the fields it had.

    :returns: what was written.
    :raises FileNotFoundError: there is no manifest.
    :raises CorruptFileError: the manifest is damaged or not ours.
    """
    content = read_manifest(folder, verify=False)
    for derived in ("format", "versions", "files", "sha256"):
        del content[derived]
    return write_manifest(folder, **content)


def read_manifest(folder: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """Read a manifest and, if ``verify``, compare every file it lists with its hash.

    :raises FileNotFoundError: there is no manifest.
    :raises CorruptFileError: the manifest is damaged or not ours, or a file of its list is absent
        or was changed; all such files are named.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: a folder written by aimet_ext, with a {MANIFEST}, is required"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CorruptFileError(f'{path}: a manifest of format "{_FORMAT}" is required')
    if content.get("sha256") != _digest(content):
        raise CorruptFileError(f"{path} was changed after it was written: its hash differs")
    if verify:
        _verify_files(folder, content["files"])
    return content


def is_ours(folder: str | Path) -> bool:
    """Whether a folder holds a manifest of ours, whatever the state of its other files."""
    try:
        content = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == _FORMAT


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what is written; absent ones left out."""
    found = {"python": platform.python_version(), "aimet-ext": __version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _verify_files(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    faults = []
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is absent")
        elif path.stat().st_size != expected["bytes"]:
            size = path.stat().st_size
            faults.append(f"{name} has {size} bytes instead of {expected['bytes']}")
        elif hash_file(path) != expected["sha256"]:
            faults.append(f"{name} was changed")
    if faults:
        raise CorruptFileError(
            f"{folder} is not as it was written: {'; '.join(faults)}. Export it again"
        )


def _digest(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
