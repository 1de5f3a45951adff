"""Output folders and files: complete or absent, and nobody else's are touched."""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aimet_ext.errors import some
from aimet_ext.files.manifest import MANIFEST, is_ours
from aimet_ext.files.reading import read_json
from aimet_ext.files.scratch import (
    hold,
    moved_aside,
    release,
    remove_abandoned,
    remove_scratch,
    scratch,
    scratch_pattern,
)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_output(path: str | Path) -> Path:
    """Check, before any work is done, that a folder may be written at ``path``.

    Absent and empty folders are fine, and so is one that an earlier run wrote (its files are going
    to be replaced). Nothing is created or changed.

    :returns: the path, absolute.
    :raises ValueError: the path is empty.
    :raises FileExistsError: a file, or a folder with files that are not ours, is there.
    :raises PermissionError: nothing can be written there.
    """
    _refuse_empty(path, "output path")
    target = Path(path).expanduser().resolve()
    _refuse_foreign(target)
    check_writable(target / MANIFEST if _stays(target) else target)
    return target


def check_writable(path: str | Path) -> None:
    """Check that a file or folder can be made at ``path``, by making and removing one beside it.

    :raises PermissionError: nothing can be written there.
    """
    ancestor = Path(path).parent
    while not ancestor.exists() and ancestor != ancestor.parent:
        ancestor = ancestor.parent
    try:
        with scratch(ancestor, ".aimet_ext"):
            pass
    except OSError as error:
        raise PermissionError(
            f"output path {path}: a place that can be written is required, but {ancestor} cannot "
            f"be ({error.strerror or error}); choose another path"
        ) from error


def writable_folder(path: str | Path, parameter: str) -> Path:
    """Return a folder that exists and can be written, created if need be.

    :param parameter: name of the user's parameter, for the error.
    :raises ValueError: it cannot be created or written, or its path is empty.
    """
    _refuse_empty(path, parameter)
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


def _refuse_empty(path: str | Path, parameter: str) -> None:
    if not str(path).strip():
        raise ValueError(f'{parameter} must name a folder, got ""; the current folder is "."')


@contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Write a folder aside, then put it in the place of ``path`` in one step.

    If the block raises, or the process is killed, what was at ``path`` is untouched. The block must
    write a manifest last, by which the folder is known as ours. Of what was at ``path``, the files
    that its manifest lists are replaced and all others kept. A folder that must stay, such as the
    current one, gets the files one by one, the manifest first: until the last is there, the
    manifest tells that files are missing.

    >>> with replace_folder("out") as folder:
    ...     (folder / "notes.txt").write_text("…")
    ...     write_manifest(folder, "notes")

    :returns: a context manager that yields the folder to write to.
    :raises FileExistsError: see :func:`check_output`; or a file of another origin has the name of
        one to be written.
    :raises PermissionError: see :func:`check_output`.
    """
    target = check_output(path)
    stays = _stays(target)
    home = target if stays else target.parent
    home.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target, scratch_pattern(target))
    _recover(target)
    with scratch(home, f".{target.name}", 0o777) as folder:
        yield folder
        assert is_ours(folder), "a folder without a manifest was to be put in place"
        for file in filter(Path.is_file, folder.rglob("*")):
            _sync(file)  # the disk must hold all of it before the folder is put in place
        _refuse_foreign(target)
        kept = _files_of_others(target, folder)
        if clash := [name for name in kept if os.path.lexists(folder / name)]:
            raise FileExistsError(
                f"output folder {target}: {some(list(map(str, clash)))} would be replaced, which "
                "aimet_ext did not write; move it away or choose another path"
            )
        if stays:
            _replace_files(folder, target, kept)
            return
        for name in kept:
            _carry(target / name, folder / name)
        _put_in_place(folder, target)


def _stays(target: Path) -> bool:
    """Return True if a folder cannot be replaced: it is current, mounted, or in a closed one."""
    if not target.is_dir():
        return False
    try:
        here = Path.cwd()
    except FileNotFoundError:
        here = Path("/")
    return (
        here.is_relative_to(target)
        or os.path.ismount(target)
        or not os.access(target.parent, os.W_OK | os.X_OK)
    )


def _files_of_others(target: Path, scratch_folder: Path) -> list[Path]:
    """Return files and empty folders below ``target`` that its manifest does not list."""
    if not target.is_dir():
        return []
    files = read_json(target / MANIFEST).get("files") if is_ours(target) else {}
    listed = {MANIFEST, *(files if isinstance(files, dict) else ())}
    found = []
    for path in sorted(target.rglob("*")):
        if path == scratch_folder or scratch_folder in path.parents:
            continue
        is_folder = path.is_dir() and not path.is_symlink()
        if path.relative_to(target).as_posix() not in listed and not (
            is_folder and any(path.iterdir())
        ):
            found.append(path.relative_to(target))
    return found


def _carry(source: Path, place: Path) -> None:
    """Give a file, link or empty folder a second place, without a copy where that is possible."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir() and not source.is_symlink():
        place.mkdir()
        return
    try:
        os.link(source, place, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, place, follow_symlinks=False)


def _replace_files(folder: Path, target: Path, kept: list[Path]) -> None:
    """Move the files of ``folder`` into ``target``, and remove those that were listed before."""
    old = {path for path in target.rglob("*") if path.is_file() and folder not in path.parents}
    old -= {target / name for name in kept}
    new = [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(new, key=lambda path: path != folder / MANIFEST):
        place = target / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
        old.discard(place)
    for path in old:
        path.unlink()
    for path in sorted((path for path in target.rglob("*") if path.is_dir()), reverse=True):
        relative = path.relative_to(target)
        if path != folder and not any(path.iterdir()) and relative not in kept:
            path.rmdir()
    _sync(target)


def replace_file(path: str | Path, content: bytes) -> None:
    """Write a file so that ``path`` holds its old content or all of the new one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path to write to; the file written there becomes ``path`` when the block ends.

    After an exception nothing is left. A reader, or the next run after a kill or a power cut, sees
    the old file or the new one, never a part of one; the next run removes what a killed one left.
    """
    # A folder, because safetensors writes beside its target too: what a kill leaves lies in it.
    with scratch(path.parent, f".{path.name}") as folder:
        temporary = folder / path.name
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)


WORDS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
"""Numbers that JSON lacks, by the words that stand for them in reports, which are read back."""


def in_words(value: Any) -> Any:
    """Return JSON values, with words for infinities and NaN, and lists for tuples."""
    if isinstance(value, Mapping):
        return {key: in_words(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [in_words(inner) for inner in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return next(word for word, number in WORDS.items() if repr(number) == repr(value))


def json_text(content: Any) -> str:
    """Return a value as indented JSON, with null for infinities and NaN, which JSON lacks."""
    return json.dumps(_finite(content), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Any) -> None:
    """Write a value as an indented JSON file, see :func:`json_text`."""
    path.write_text(json_text(content) + "\n", encoding="utf-8")


def _refuse_foreign(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(
            f"output folder {target}: a folder is required, but a file of that name is there; "
            "choose another path"
        )
    own = set(target.glob(scratch_pattern(target)))
    if set(target.iterdir()) - own and not is_ours(target):
        raise FileExistsError(
            f"output folder {target}: an empty folder or one written by aimet_ext is required, but "
            "it holds other files, which are left as they are; choose another path or remove them"
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(folder: Path, target: Path) -> None:
    """Move ``folder`` to ``target``; what was there is afterwards at ``folder`` or removed."""
    if target.exists() and not _exchange(folder, target):
        # Without an exchange in one step there is a moment with no folder at all, but never half a
        # one. Killed then, the next run puts the old one back.
        backup = folder.with_name(f"{folder.name}.old")
        hold(target)
        target.rename(backup)
        try:
            folder.rename(target)
        except OSError:
            backup.rename(target)
            release(target)
            raise
        remove_scratch(backup)
    elif not target.exists():
        folder.rename(target)
    release(target)  # the new one: until here no other process may take it for abandoned


def _recover(target: Path) -> None:
    """Put back what a run that was killed between two renames moved away; else remove it."""
    for backup in moved_aside(target):
        if not hold(backup):
            continue  # its process is between them now
        if target.exists():
            remove_scratch(backup)
        else:
            backup.rename(target)
            release(target)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step of the file system; False where it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
