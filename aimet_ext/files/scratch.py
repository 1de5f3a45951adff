"""Folders that a process holds while it lives, and the removal of those that killed ones left."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is held, and leftovers stay
    fcntl = None  # type: ignore[assignment]

# What this process holds, by device and inode: a descriptor, and how often it was asked for.
_held: dict[tuple[int, int], tuple[int, int]] = {}


def hold(folder: Path) -> bool:
    """Hold a folder until :func:`release` or the end of the process, however it ends.

    :returns: False if another process holds it.
    """
    return _lock(folder) is not False


def release(folder: Path) -> None:
    """Undo one :func:`hold`; a folder that is not held, or is gone, is passed over."""
    try:
        key = _key(folder.stat())
    except FileNotFoundError:
        return
    descriptor, count = _held.pop(key, (-1, 0))
    if count > 1:
        _held[key] = descriptor, count - 1
    elif count:
        os.close(descriptor)


def make_scratch(home: Path, name: str, mode: int = 0o700) -> Path:
    """Make a held folder for data that no later process needs.

    Those of the same name that killed processes left in ``home`` are removed.

    :param home: Folder that exists.
    :param name: First part of the folder's name.
    :param mode: Permissions, from which the process's mask is taken.
    """
    remove_abandoned(home, f"{glob.escape(name)}-*.scratch")
    while True:
        folder = home / f"{name}-{secrets.token_hex(6)}.scratch"
        folder.mkdir(mode)
        try:
            if hold(folder) and folder.is_dir():
                return folder
        except FileNotFoundError:
            pass  # another process took it for abandoned, before it was held


def remove_scratch(folder: Path) -> None:
    """Remove a folder that this process holds."""
    release(folder)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def scratch(home: Path, name: str, mode: int = 0o700) -> Iterator[Path]:
    """Yield a folder as of :func:`make_scratch`, which is removed at the end."""
    folder = make_scratch(home, name, mode)
    try:
        yield folder
    finally:
        remove_scratch(folder)


@contextmanager
def temporary() -> Iterator[Path]:
    """Yield a folder of :func:`scratch` in the system's folder for temporary files."""
    with scratch(Path(tempfile.gettempdir()), "aimet_ext") as folder:
        yield folder


def scratch_pattern(target: Path) -> str:
    """Return the pattern of the folders that runs write to, before they are put at ``target``."""
    return f".{glob.escape(target.name)}-*.scratch"


def moved_aside(target: Path) -> list[Path]:
    """Return what killed runs moved away from ``target`` to put another folder there."""
    return sorted(target.parent.glob(f"{scratch_pattern(target)}.old"))


def remove_abandoned(home: Path, pattern: str) -> None:
    """Remove the folders that match a pattern and that no process holds."""
    for folder in home.glob(pattern):
        try:
            if _key(folder.stat()) not in _held and _lock(folder):
                remove_scratch(folder)
        except OSError:
            continue  # gone meanwhile, or of another user


def _lock(folder: Path) -> bool | None:
    """Return True if this process holds a folder now, None where the system has no locks."""
    if fcntl is None:
        return None
    key = _key(folder.stat())
    if key in _held:
        descriptor, count = _held[key]
        _held[key] = descriptor, count + 1
        return True
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        return False if isinstance(error, BlockingIOError) else None
    _held[key] = descriptor, 1
    return True


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
