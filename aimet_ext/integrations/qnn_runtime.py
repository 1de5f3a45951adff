"""onnxruntime with QNN's execution provider: found, registered once, and kept quiet."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from aimet_ext.errors import require

__all__ = [
    "PROVIDER",
    "captured_output",
    "hexagon_device",
    "htp_library",
    "is_available",
    "require_qnn",
]

PROVIDER = "QNNExecutionProvider"
_LIBRARIES = {"linux": "libQnnHtp.so", "win32": "QnnHtp.dll"}
_OLDEST_PYTHON = (3, 11)
_lock = threading.RLock()


def require_qnn() -> Any:
    """onnxruntime, once it is sure that QNN can be used with it.

    :raises MissingExtraError: onnxruntime-qnn or onnxruntime is not installed.
    :raises RuntimeError: there is no QNN for this version of Python.
    """
    if sys.version_info < _OLDEST_PYTHON:
        raise RuntimeError(
            f"onnxruntime-qnn requires Python {'.'.join(map(str, _OLDEST_PYTHON))} or newer, this "
            f"is {sys.version_info.major}.{sys.version_info.minor}; run it with a newer Python"
        )
    require("onnxruntime_qnn", "qnn")
    return require("onnxruntime", "qnn")


def is_available() -> bool:
    """Whether models can be compiled here: QNN is installed, and knows this system."""
    try:
        htp_library()
    except (ImportError, RuntimeError):
        return False
    return True


def htp_library() -> Path:
    """QNN's library of the HTP backend.

    :raises RuntimeError: the installed onnxruntime-qnn has none, as on macOS.
    """
    require_qnn()
    folder = Path(require("onnxruntime_qnn", "qnn").get_library_path()).parent
    name = _LIBRARIES.get(sys.platform)
    found = sorted(folder.rglob(name)) if name else []
    if not found:
        raise RuntimeError(
            f"QNN's HTP backend is required and onnxruntime-qnn has none for {sys.platform} in "
            f"{folder}; x86-64 Linux has it"
        )
    return found[0]


def hexagon_device() -> Any:
    """The device that QNN's provider offers; the provider is registered on the first call.

    :raises RuntimeError: it offers none.
    """
    onnxruntime = require_qnn()
    with _lock:
        found = _devices(onnxruntime)
        if not found:
            library = require("onnxruntime_qnn", "qnn").get_library_path()
            with captured_output():
                onnxruntime.register_execution_provider_library(PROVIDER, library)
            found = _devices(onnxruntime)
    if not found:
        raise RuntimeError(
            f"{PROVIDER} was registered from {library} and offers no device on this machine"
        )
    return found[0]


def _devices(onnxruntime: Any) -> list[Any]:
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]


@contextmanager
def captured_output() -> Iterator[list[str]]:
    """Take what native code writes to standard output and error while the block runs.

    QNN writes to both, past Python's streams. What other threads write meanwhile is taken too.

    :returns: a context manager that yields a list, which has the text once the block is left.
    """
    text: list[str] = []
    with _lock, tempfile.TemporaryFile() as file:
        _flush()
        saved = {number: os.dup(number) for number in (1, 2)}
        try:
            for number in saved:
                os.dup2(file.fileno(), number)
            yield text
        finally:
            _flush()
            for number, copy in saved.items():
                os.dup2(copy, number)
                os.close(copy)
            file.seek(0)
            text.append(file.read().decode("utf-8", "replace"))


def _flush() -> None:
    """Write what Python and C hold back of both streams to where they point now."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(ValueError):  # closed
                stream.flush()
    if sys.platform != "win32":
        ctypes.CDLL(None).fflush(None)
