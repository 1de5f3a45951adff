"""Manifests: the files of a folder with their hashes, by which it is known as ours and as whole."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ValidationError

from aimet_ext import __version__
from aimet_ext.errors import CorruptFileError
from aimet_ext.files.reading import read_json
from aimet_ext.files.scratch import moved_aside

MANIFEST = "manifest.json"
# Files of an export that have one name whatever its prefix.
CONFIG = "config.json"
FINGERPRINTS = "fingerprints.json"
LEDGER = "ledger.safetensors"
QUANTIZERS = "quantizers.safetensors"
SETTINGS = "quantsim.json"
WEIGHTS = "model.safetensors"

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


def _inside(name: str) -> str:
    """Refuse the name of a file that is not below the folder of its manifest."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name:
        raise ValueError(f"a file below the folder is required, got {name!r}")
    return name


class _File(BaseModel, strict=True):
    bytes: int
    sha256: str


class _Manifest(BaseModel, strict=True):
    """Fields of every manifest; others follow from the kind."""

    format: Literal["aimet_ext.manifest/1"]
    kind: str
    files: dict[Annotated[str, AfterValidator(_inside)], _File]
    prefix: Annotated[str, AfterValidator(_inside)] | None = None
    sha256: str


def write_manifest(folder: str | Path, kind: str, **fields: Any) -> dict[str, Any]:
    """Write ``manifest.json``: every file below ``folder`` with its SHA-256, versions, and fields.

    :param folder: complete but for its manifest.
    :param kind: kind of the folder, for example ``"export"``.
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
        left = "".join(f"; a killed run moved it to {path}" for path in moved_aside(folder)[-1:])
        raise FileNotFoundError(
            f"{folder}: a folder written by aimet_ext, with a {MANIFEST}, is required{left}"
        )
    content = read_json(path, Any)
    try:
        _Manifest.model_validate(content)
    except ValidationError as error:
        raise CorruptFileError(
            f'{path}: a manifest of format "{_FORMAT}" is required ({error})'
        ) from error
    if content["sha256"] != _digest(content):
        raise CorruptFileError(f"{path} was changed after it was written: its hash differs")
    if verify:
        faults = [f"{name} {fault}" for name, fault in changed_files(folder, content["files"])]
        if faults:
            raise CorruptFileError(
                f"{folder} is not as it was written: {'; '.join(faults)}. Export it again"
            )
    return dict(content)


def read_export(folder: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """Read the manifest of an export, see :func:`read_manifest`.

    :raises FileNotFoundError: there is no manifest.
    :raises CorruptFileError: see :func:`read_manifest`; or the folder holds something else.
    """
    manifest = read_manifest(folder, verify=verify)
    check_kind(folder, manifest["kind"])
    return manifest


def check_kind(folder: str | Path, kind: str) -> None:
    """Refuse a folder of another kind than an export.

    :raises CorruptFileError: it is of another kind.
    """
    if kind == "verified":
        raise CorruptFileError(
            f"{folder} was written by verify; give the folder that quantize wrote"
        )
    if kind != "export":
        raise CorruptFileError(f"{folder}: an export is required, got {kind!r}")


def is_ours(folder: str | Path) -> bool:
    """Return True if a folder holds a manifest of aimet_ext, even if other files are damaged."""
    try:
        content = read_json(Path(folder) / MANIFEST)
    except (OSError, CorruptFileError):
        return False
    return bool(content.get("format") == _FORMAT)


def is_export(folder: str | Path) -> bool:
    """Return True if a folder holds an export, or one that lost its manifest.

    Its weights were rescaled for its quantizers, so it is never to be taken for a model of its own.
    """
    rest = (Path(folder) / name for name in (QUANTIZERS, SETTINGS))
    return is_ours(folder) or any(file.is_file() for file in rest)


def hash_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return versions of Python and of the installed packages that decide what is written."""
    found = {"aimet-ext": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def changed_files(
    folder: Path, files: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, str]]:
    """Yield ``(name, difference)`` of each file that is not as a manifest lists it."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            yield name, "is absent"
        elif not path.resolve().is_relative_to(folder.resolve()):
            yield name, "is a link to another place"
        elif (size := path.stat().st_size) != expected["bytes"]:
            yield name, f"has {size} bytes instead of {expected['bytes']}"
        elif hash_file(path) != expected["sha256"]:
            yield name, "was changed"


def _digest(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
