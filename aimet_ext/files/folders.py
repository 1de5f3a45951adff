"""Output folders that are complete or absent: checked first, written aside, then swapped in."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aimet_ext.files.manifest import is_ours

__all__ = ["check_output", "check_writable", "replace_file", "replace_folder"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_output(path: str | Path) -> Path:
    """Check, before any work is done, that a folder may be written at ``path``.

    Absent and empty folders are fine, and so is one that an earlier run of ours wrote (it is going
    to be replaced). Nothing is created or changed.

    :returns: the path, absolute.
    :raises FileExistsError: a file, or a folder with files that are not ours, is there.
    :raises PermissionError: nothing can be written there.
    """
    target = Path(path).expanduser().resolve()
    _refuse_foreign(target)
    check_writable(target)
    return target


def check_writable(path: str | Path) -> None:
    """Check that a file or folder can be made at ``path``, by making and removing one beside it.

    :raises PermissionError: nothing can be written there.
    """
    ancestor = Path(path).parent
    while not ancestor.exists() and ancestor != ancestor.parent:
        ancestor = ancestor.parent
    try:
        with tempfile.TemporaryDirectory(dir=ancestor, prefix=".aimet_ext."):
            pass
    except OSError as error:
        raise PermissionError(
            f"output path {path}: a place that can be written is required, but {ancestor} cannot "
            f"be ({error.strerror or error}); choose another path"
        ) from error


@contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Write a folder aside, then put it in the place of ``path`` in one step.

    If the block raises, or the process is killed, what was at ``path`` is untouched. The block must
    write a manifest last, by which the folder is known as ours.

    >>> with replace_folder("out") as folder:
    ...     (folder / "notes.txt").write_text("…")
    ...     write_manifest(folder, "notes")

    :returns: a context manager that yields the folder to write to.
    :raises FileExistsError: see :func:`check_output`.
    :raises PermissionError: see :func:`check_output`.
    """
    target = check_output(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    folder.mkdir()
    try:
        yield folder
        assert is_ours(folder), "a folder without a manifest was to be put in place"
        _sync(folder)
        _refuse_foreign(target)
        _put_in_place(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_file(path: str | Path, content: bytes) -> None:
    """Write a file so that ``path`` holds its old content or all of the new one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def _refuse_foreign(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(
            f"output folder {target}: a folder is required, but a file of that name is there; "
            "choose another path"
        )
    if any(target.iterdir()) and not is_ours(target):
        raise FileExistsError(
            f"output folder {target}: an empty folder or one written by aimet_ext is required, but "
            "it holds other files, which are left as they are; choose another path or remove them"
        )


def _sync(folder: Path) -> None:
    """Have the disk hold every file of a folder before the folder is put in place."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _put_in_place(folder: Path, target: Path) -> None:
    """Move ``folder`` to ``target``; what was there is afterwards at ``folder`` or removed."""
    if not target.exists():
        folder.rename(target)
        return
    if _exchange(folder, target):
        return
    # Without an exchange in one step there is a moment with no folder at all, but never half a one.
    backup = folder.with_suffix(".old")
    target.rename(backup)
    try:
        folder.rename(target)
    except OSError:
        backup.rename(target)
        raise
    shutil.rmtree(backup, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step of the file system; False where it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
