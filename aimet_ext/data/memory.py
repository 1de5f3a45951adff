"""How much memory there is, and tensors in files where it does not suffice."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from aimet_ext.files.folders import writable_folder

__all__ = ["available_bytes", "mapped_zeros"]

_PROC = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")  # that of the container, as a process in one sees it


def available_bytes(device: torch.device | str = "cpu") -> int | None:
    """Bytes that can still be allocated without driving out others; None where nobody knows.

    On the CPU that is what Linux says, or what is left of the container's limit if that is less.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = [amount for amount in (_machine_bytes(), _container_bytes()) if amount is not None]
    return min(known, default=None)


def _machine_bytes() -> int | None:
    try:
        lines = _PROC.read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _container_bytes() -> int | None:
    """What is left of the limit of the control group (version 2), None where there is none."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        details = (_CGROUP / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no control group, or "max"
        return None
    # Cached files count as used, though they go when memory is short.
    cached = sum(int(line.split()[1]) for line in details if line.startswith("inactive_file "))
    return max(0, limit - used + cached)


def mapped_zeros(
    shape: Sequence[int], dtype: torch.dtype, folder: str | Path | None = None
) -> Tensor:
    """Zeros in a memory-mapped file, which the system pages in and out as memory allows.

    The file has no name any more when this returns, and goes with the tensor or the process.

    :param folder: where the file is, the system's folder for temporary files if None.
    :raises ValueError: ``folder`` cannot be written.
    :raises OSError: it has no room.
    """
    place = writable_folder(tempfile.gettempdir() if folder is None else folder, "cache_dir")
    elements = math.prod(shape)
    size = elements * dtype.itemsize
    if size == 0:
        return torch.zeros(tuple(shape), dtype=dtype)
    handle, name = tempfile.mkstemp(prefix="mapped-", dir=place)
    try:
        _reserve(handle, size)
        flat = torch.from_file(name, shared=True, size=elements, dtype=dtype)  # [elements]
    except OSError as error:
        raise OSError(
            f"cache_dir must have room for {size / 2**20:,.1f} MiB, got {str(place)!r} "
            f"({error.strerror or error}); pass a folder on a larger disk"
        ) from error
    finally:
        os.close(handle)
        Path(name).unlink()
    return flat.view(*shape)


def _reserve(handle: int, size: int) -> None:
    """Make a file of zeros. A full disk shows here, not at some later write to the mapping."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)
