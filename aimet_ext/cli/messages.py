"""Messages of a command while it works: on stderr, and whole in a log file."""

from __future__ import annotations

import contextlib
import io
import logging
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import aimet_ext
from aimet_ext import progress

_OURS = "aimet_ext"
_PACKAGE = str(Path(aimet_ext.__file__).parent)
# Their warnings are about how they are called, which no user of a command decides.
_OTHERS = r"aimet_(torch|onnx|common)\b|torch\b|transformers\b|onnx\w*\b"
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def messages(*, quiet: bool, verbose: bool, log_file: Path | None) -> Iterator[None]:
    """Open a context in which messages reach stderr and the log file, and stdout stays free.

    Other libraries are heard with their errors alone: what they say of themselves is about nothing
    that a user did.

    :param quiet: Show errors alone, and no progress.
    :param verbose: Show everything, what other libraries say too.
    :param log_file: File to which everything is added, whatever is shown.
    :raises OSError: The file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        screen = _Screen(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)
        screen.addFilter(lambda record: verbose or _is_ours(record) or record.levelno >= 40)
        handlers: list[logging.Handler] = [screen]
        if log_file is not None:
            file = logging.FileHandler(log_file, encoding="utf-8")
            stack.callback(file.close)
            file.setFormatter(logging.Formatter(_FORMAT))
            handlers.append(file)
        stack.enter_context(_handled_by(handlers))
        stack.enter_context(_level(logging.DEBUG if verbose or log_file else logging.INFO))
        stack.enter_context(_heard_warnings())
        prints = _Prints()
        stack.callback(prints.end)
        stack.enter_context(contextlib.redirect_stdout(prints))
        if quiet:
            stack.enter_context(progress.hidden())
        _log.debug("%s %s: %s", _OURS, aimet_ext.__version__, shlex.join(sys.argv[1:]))
        start = time.perf_counter()
        try:
            yield
        except (typer.Exit, typer.Abort):
            raise
        except BaseException as error:
            _log.debug("failed: %s", error, exc_info=True)
            raise
        _log.debug("done in %.1f s", time.perf_counter() - start)


class _Screen(logging.Handler):
    """Messages on stderr, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record: of this package the text alone, of others also who speaks."""
        try:
            text = self.format(record)
            if record.levelno >= logging.WARNING:
                text = f"{record.levelname.lower()}: {text}"
            progress.write(text if _is_ours(record) else f"{record.name}: {text}")
        except Exception:  # noqa: BLE001 - as every handler does: a message is not worth the run
            self.handleError(record)


class _Prints(io.TextIOBase):
    """Stream that turns what libraries print into messages of theirs, one a line."""

    _begun = ""

    def write(self, text: str) -> int:
        """Pass on each line that is whole: ``print`` writes a line in several parts."""
        lines = (self._begun + text).splitlines(keepends=True)
        whole = bool(lines) and lines[-1] != lines[-1].rstrip("\r\n")
        self._begun = "" if whole or not lines else lines.pop()
        for line in filter(str.strip, lines):
            logging.getLogger("stdout").warning(line.rstrip())
        return len(text)

    def end(self) -> None:
        """Pass on what has no end of a line."""
        if self._begun:
            self.write("\n")


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] == _OURS


@contextlib.contextmanager
def _handled_by(handlers: list[logging.Handler]) -> Iterator[None]:
    """Give the records of every logger to these handlers: libraries bring handlers of their own."""

    def call(logger: logging.Logger, record: logging.LogRecord) -> None:
        for handler in (*handlers, *_attached(logger)):
            if record.levelno >= handler.level:
                handler.handle(record)

    kind: Any = logging.Logger
    before = kind.callHandlers
    kind.callHandlers = call
    try:
        yield
    finally:
        kind.callHandlers = before


def _attached(logger: logging.Logger | None) -> Iterator[logging.Handler]:
    """Yield the handlers of loggers of this package, such as those of a recorder."""
    while logger is not None and logger.name.partition(".")[0] == _OURS:
        yield from logger.handlers
        logger = logger.parent


@contextlib.contextmanager
def _level(level: int) -> Iterator[None]:
    logger = logging.getLogger(_OURS)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _heard_warnings() -> Iterator[None]:
    """Turn warnings into messages."""

    def show(
        message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if filename.startswith(_PACKAGE):
            logging.getLogger(_OURS).warning("%s", message)
        else:
            place = (filename, lineno, category.__name__, message)
            logging.getLogger("py.warnings").warning("%s:%d: %s: %s", *place)

    with warnings.catch_warnings():  # puts showwarning back as well
        warnings.filterwarnings("default", module=_OTHERS)
        warnings.showwarning = show
        yield
