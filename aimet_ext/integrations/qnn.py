"""Compile ONNX models for Qualcomm's HTP with QNN, and run them in its simulation.

Any x86-64 Linux machine will do: onnxruntime-qnn brings the compiler and a simulation of the
processor. Compiling proves that HTP takes every node; it does **not** prove that the numbers are
right (some biases are dropped without an error), so run the result and compare.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aimet_ext.errors import require
from aimet_ext.files.folders import check_writable
from aimet_ext.files.scratch import scratch
from aimet_ext.integrations.qnn_targets import HtpTarget, find_target
from aimet_ext.onnx.session import open_session

if TYPE_CHECKING:
    import onnx

_UNSUPPORTED = re.compile(r"Unsupported nodes in QNN EP: (.*)")
_NODE = re.compile(r"\{ name: (.*?), type: (\w*) \}")
_NOT_VALID = re.compile(r"failed for node `(.*?)` of type `(\w+)`")
_FALLBACK = "fallback to CPU EP has been explicitly disabled"
# What a compiled model says of itself; its `arch=` is 68 for chips that QNN has no options of.
_SOC = re.compile(rb"soc_type=(\w+)")
_ARCH = re.compile(rb"min_arch=(\d+)")
_PROVIDER = "QNNExecutionProvider"
_LIBRARIES = {"linux": "libQnnHtp.so", "win32": "QnnHtp.dll"}
_OLDEST_PYTHON = (3, 11)
_lock = threading.RLock()


class HtpRejected(RuntimeError):
    """HTP does not take a model, or not all of it.

    :ivar target: what it was compiled for.
    :ivar nodes: name and operator of the nodes that HTP does not take, as far as QNN says so.
    :ivar reason: what QNN said.
    """

    def __init__(
        self, message: str, *, target: str, nodes: Sequence[tuple[str, str]], reason: str
    ) -> None:
        super().__init__(message)
        self.target = target
        self.nodes = tuple(nodes)
        self.reason = reason


class HtpSession:
    """A model compiled for HTP, which runs in simulation; made by :func:`compile_htp`.

    It holds the compiled model in memory until it is closed, or leaves its ``with`` block.

    :ivar target: what it was compiled for.
    :ivar seconds: how long compiling took.
    :ivar nodes: how many nodes of the ONNX graph HTP has, those of quantizers included.
    :ivar fallbacks: names of the nodes that run on the CPU instead.
    :ivar context: file of the compiled model for the device (``*.bin``), None if none was asked
        for.
    """

    def __init__(
        self,
        session: Any,
        target: HtpTarget,
        *,
        seconds: float,
        nodes: int,
        fallbacks: Sequence[tuple[str, str]] = (),
        context: Path | None = None,
    ) -> None:
        self._session = session
        self._inputs = {value.name: value for value in session.get_inputs()}
        self.target = target
        self.seconds = seconds
        self.nodes = nodes
        self.fallback_types = dict(fallbacks)
        self.fallbacks = tuple(name for name, _ in fallbacks)
        self.context = context
        self.inputs = tuple(self._inputs)
        self.outputs = tuple(value.name for value in session.get_outputs())

    def run(self, feed: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Return the outputs of one call, in the order of :attr:`outputs`.

        :param feed: an array of the graph's own shape for every input, by name.
        :raises ValueError: an input is missing, unknown, or of another shape.
        :raises RuntimeError: the session is closed.
        """
        if self._session is None:
            raise RuntimeError("HtpSession.run: the session is closed; compile the model again")
        if set(feed) != set(self._inputs):
            raise ValueError(
                f"HtpSession.run: inputs {sorted(self._inputs)} were required, got {sorted(feed)}"
            )
        for name, array in feed.items():
            shape = self._inputs[name].shape
            if list(array.shape) != list(shape):
                raise ValueError(
                    f"HtpSession.run: input {name!r}: shape {list(shape)} was required, which the "
                    f"model was compiled for, got {list(array.shape)}"
                )
        onnxruntime = require_qnn()
        options = onnxruntime.RunOptions()
        options.log_severity_level = 4
        found: list[np.ndarray[Any, Any]] = self._session.run(None, dict(feed), options)
        return found

    def close(self) -> None:
        """Release the compiled model; its files stay."""
        self._session = None

    def __enter__(self) -> HtpSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def compile_htp(
    model: str | Path | onnx.ModelProto,
    target: str | HtpTarget,
    *,
    context: str | Path | None = None,
    extra_outputs: Sequence[str] = (),
    allow_fallback: bool = False,
) -> HtpSession:
    """Compile a QDQ model for HTP, with a proof that every node of it runs there.

    >>> with compile_htp("model.onnx", "htp_v79", context="model_ctx.onnx") as session:
    ...     logits, *_ = session.run({"input_ids": ids})

    :param model: file of an ONNX model with quantize and dequantize nodes, or the model itself.
    :param target: an architecture (``"htp_v75"``) or a chip (``"sm8650"``).
    :param context: ``*.onnx`` file to write beside which ``*_qnn.bin`` holds the compiled model
        for the device. Both are put in place once they are complete.
    :param extra_outputs: tensors that :meth:`HtpSession.run` returns too, after the graph's own
        outputs; see :func:`aimet_ext.onnx.rewrite.compilable.with_outputs`.
    :param allow_fallback: let the CPU run what HTP does not take; :attr:`HtpSession.fallbacks`
        names it, and no context is written.
    :raises HtpRejected: HTP does not take the model, or not all of it; it names the nodes.
    :raises MissingExtraError: onnxruntime-qnn is not installed.
    :raises RuntimeError: QNN is not available for this Python or operating system.
    :raises ValueError: unknown target; tensors to return that are not there; a context file that
        is not ``*.onnx``; or ``context`` together with ``allow_fallback``.
    """
    chip = find_target(target)
    require_qnn()
    if context is not None and allow_fallback:
        raise ValueError(
            "compile_htp: a context is written only where HTP takes every node, so context and "
            "allow_fallback cannot be given together"
        )
    place = None
    if isinstance(model, str | Path):
        if not Path(model).is_file():
            raise FileNotFoundError(f"compile_htp: model {model} is not there")
        place = Path(model).resolve().parent
    if extra_outputs:
        from aimet_ext.onnx.rewrite.compilable import with_outputs

        model = with_outputs(model, extra_outputs)
    opened = partial(open_session, model, folder=place)
    if context is None:
        return _compile(opened, chip, allow_fallback=allow_fallback)
    wrapper = Path(context)
    if wrapper.suffix != ".onnx":
        raise ValueError(f"compile_htp: a context file *.onnx was required, got {wrapper}")
    check_writable(wrapper)
    wrapper.parent.mkdir(parents=True, exist_ok=True)
    with scratch(wrapper.parent, f".{wrapper.name}") as folder:
        aside = folder / wrapper.name
        session = _compile(opened, chip, aside=aside)
        session.context = _put_in_place(aside, wrapper, chip)
    return session


def load_context(path: str | Path, target: str | HtpTarget) -> HtpSession:
    """Open a compiled model that :func:`compile_htp` wrote; nothing is compiled anew.

    :param path: the ``*.onnx`` file beside which ``*_qnn.bin`` lies.
    :raises FileNotFoundError: one of the two files is not there.
    :raises ValueError: it was compiled for another architecture or chip.
    """
    wrapper, chip = Path(path), find_target(target)
    for file in (wrapper, _binary(wrapper)):
        if not file.is_file():
            raise FileNotFoundError(f"load_context: {file} was required and is not there")
    _check_chip(_binary(wrapper), chip)
    session = _compile(partial(open_session, wrapper), chip)
    session.context = _binary(wrapper)
    return session


def _compile(
    opened: Callable[..., Any],
    chip: HtpTarget,
    *,
    allow_fallback: bool = False,
    aside: Path | None = None,
) -> HtpSession:
    """Return a session with all nodes on HTP; an error otherwise, unless the CPU may help.

    :param opened: :func:`.open_session`, given the model.
    """
    require_qnn()
    device = _hexagon_device()
    entries = {
        "session.record_ep_graph_assignment_info": "1",
        "session.disable_cpu_ep_fallback": "0" if allow_fallback else "1",
    }
    if aside is not None:
        entries["ep.context_enable"] = "1"
        entries["ep.context_embed_mode"] = "0"
        entries["ep.context_file_path"] = str(aside)
    settings = {
        "backend_path": str(htp_library()),
        "htp_arch": str(chip.arch),
        "soc_model": str(chip.soc_model),
    }
    start = time.perf_counter()
    with _captured_output() as lines:
        try:
            session = opened(
                threads=0,
                entries=entries,
                extra="qnn",
                device=(device, settings),
                log_severity_level=2,  # warnings name the nodes; they are read, not shown
            )
            failure = None
        except Exception as error:  # noqa: BLE001 - onnxruntime's have no class of their own
            failure = str(error)
    if failure is not None:
        raise _rejection(failure, "".join(lines), opened, chip)
    seconds = time.perf_counter() - start
    nodes, fallbacks = _assignment(session)
    return HtpSession(session, chip, seconds=seconds, nodes=nodes, fallbacks=fallbacks)


def _assignment(session: Any) -> tuple[int, list[tuple[str, str]]]:
    """Return the number of nodes on HTP, and name and operator of those on the CPU."""
    on_htp, on_cpu = 0, []
    for part in session.get_provider_graph_assignment_info():
        nodes = part.get_nodes()
        if part.ep_name == _PROVIDER:
            on_htp += len(nodes)
        else:
            on_cpu += [(node.name, node.op_type) for node in nodes]
    return on_htp, on_cpu


def _rejection(failure: str, log: str, opened: Callable[..., Any], chip: HtpTarget) -> HtpRejected:
    """Build the error with the nodes of QNN's log, else those a second try leaves to the CPU."""
    reason = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", failure.strip())
    named = [node for line in _UNSUPPORTED.findall(log) for node in _NODE.findall(line)]
    if _FALLBACK in failure:
        reason = "nodes are left to the CPU"
        if not named:
            with _compile(opened, chip, allow_fallback=True) as session:
                named = [*session.fallback_types.items()]
    named = list(dict.fromkeys(named or _NOT_VALID.findall(log)))
    shown = ", ".join(f"{name} ({kind})" for name, kind in named[:8])
    if len(named) > 8:
        shown += f" and {len(named) - 8} more"
    return HtpRejected(
        f"HTP {chip.name} ({chip.soc}) does not take the model: {reason}"
        + (f"; nodes: {shown}" if named else ""),
        target=chip.name,
        nodes=named,
        reason=reason,
    )


def _binary(wrapper: Path) -> Path:
    return wrapper.with_name(f"{wrapper.stem}_qnn.bin")


def _put_in_place(aside: Path, wrapper: Path, chip: HtpTarget) -> Path:
    """Move both files of a context to where they belong, once they are what was asked for."""
    binary = _binary(aside)
    if not (aside.is_file() and binary.is_file()):
        raise RuntimeError(
            f"compile_htp: QNN was to write {aside.name} and {binary.name}, but wrote "
            f"{sorted(file.name for file in aside.parent.iterdir())}"
        )
    _check_chip(binary, chip)
    binary.replace(_binary(wrapper))
    aside.replace(wrapper)
    return _binary(wrapper)


def _check_chip(binary: Path, chip: HtpTarget) -> None:
    """Refuse a compiled model that says it is for another chip or architecture."""
    content = binary.read_bytes()
    says = [{match.decode() for match in pattern.findall(content)} for pattern in (_SOC, _ARCH)]
    if all(says) and says != [{chip.soc}, {str(chip.arch)}]:
        soc, arch = ("/".join(sorted(names)) for names in says)
        raise ValueError(
            f"{binary}: a model compiled for {chip.soc} (v{chip.arch}) was required, but it says "
            f"{soc} (v{arch}); compile it for {chip.name} again"
        )


def require_qnn() -> Any:
    """Return onnxruntime after a check that QNN can be used with it.

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
    """Return True if models can be compiled here: QNN is installed, and knows this system."""
    try:
        htp_library()
    except (ImportError, RuntimeError):
        return False
    return True


def htp_library() -> Path:
    """Return QNN's library of the HTP backend.

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


def _hexagon_device() -> Any:
    """Return the device that QNN's provider offers; the provider is registered on the first call.

    :raises RuntimeError: it offers none.
    """
    onnxruntime = require_qnn()
    with _lock:
        found = _devices(onnxruntime)
        if not found:
            library = require("onnxruntime_qnn", "qnn").get_library_path()
            with _captured_output():
                onnxruntime.register_execution_provider_library(_PROVIDER, library)
            found = _devices(onnxruntime)
    if not found:
        raise RuntimeError(
            f"{_PROVIDER} was registered from {library} and offers no device on this machine"
        )
    return found[0]


def _devices(onnxruntime: Any) -> list[Any]:
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == _PROVIDER]


@contextmanager
def _captured_output() -> Iterator[list[str]]:
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
