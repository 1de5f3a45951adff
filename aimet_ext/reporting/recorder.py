"""Time, memory and warnings of the parts of a run, while it goes on."""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from aimet_ext.reporting.parts import Phase

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_INTERVAL = 0.02  # seconds between two looks at the memory
_MOST = 200  # warnings that are kept


class Recorder:
    """Record time, memory and warnings of the parts of a run, for :class:`aimet_ext.RunReport`.

    Memory is that of the process, looked at fifty times a second; of a part with the most memory
    so far it is the operating system's own record.

    >>> recorder = aimet_ext.Recorder()
    >>> with recorder.phase("GPTQ"):
    ...     report = aimet_ext.apply_gptq(sim, batches)
    """

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self.warnings: list[str] = []
        self._open = 0
        self.elapsed: float | None = None
        self._started = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Open a context whose time and memory count as a part of this name.

        :param name: Name of the part; parts of one name are several entries.
        """
        started, before, watch = time.perf_counter(), _record(), _Watch()
        try:
            with self._listening(), watch:
                yield
        finally:
            after = _record()
            held = watch.most if after is None or after == before else max(after, watch.most or 0)
            self.phases.append(
                Phase(
                    name=name,
                    seconds=time.perf_counter() - started,
                    memory_bytes=held,
                    gpu_memory_bytes=watch.most_on_gpu,
                )
            )

    def stop(self) -> None:
        """Keep the time since the recorder was made, of which some is between the parts."""
        self.elapsed = time.perf_counter() - self._started

    def note(self, text: str) -> None:
        """Keep a warning, each text once."""
        if text not in self.warnings and len(self.warnings) < _MOST:
            self.warnings.append(text)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Open a context in which what aimet_ext warns of is kept, and shown as ever."""
        if self._open:  # inside another part, which listens
            yield
            return
        handler, shown = _Handler(self), warnings.showwarning

        def show(message: Any, category: Any, filename: str, *rest: Any, **more: Any) -> None:
            if "aimet_ext" in Path(filename).parts:
                self.note(str(message))
            shown(message, category, filename, *rest, **more)

        logger = logging.getLogger("aimet_ext")
        logger.addHandler(handler)
        warnings.showwarning = show
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            logger.removeHandler(handler)
            if warnings.showwarning is show:
                warnings.showwarning = shown


class _Handler(logging.Handler):
    """Handler that keeps warnings in a recorder."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(logging.WARNING)
        self._recorder = recorder

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text of a record."""
        self._recorder.note(record.getMessage())


class _Watch:
    """A thread that looks at the memory, and the most that it saw."""

    def __init__(self) -> None:
        self.most: int | None = None
        self.most_on_gpu: int | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Watch:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._done.wait(_INTERVAL):
            self._look()

    def _look(self) -> None:
        now = _resident()
        if now is not None:
            self.most = max(now, self.most or 0)
        if torch.cuda.is_available():
            self.most_on_gpu = max(torch.cuda.memory_allocated(), self.most_on_gpu or 0)


def _record() -> int | None:
    """Return the most bytes that the process ever held, as the operating system counted."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _resident() -> int | None:
    """Return the bytes that the process holds now, None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:
        return None
    assert resource is not None
    return pages * resource.getpagesize()
