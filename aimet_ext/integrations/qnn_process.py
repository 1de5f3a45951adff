"""QNN's compiler and simulation in a process of their own, which may crash without harm.

The simulation of some compiled models ends by a segmentation fault. The process is asked by lines
of JSON; tensors travel in safetensors files.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from aimet_ext.files.scratch import make_scratch, remove_scratch
from aimet_ext.integrations.qnn import HtpRejected, compile_htp, load_context, require_qnn
from aimet_ext.integrations.qnn_targets import HtpTarget, find_target


class HtpCrashed(RuntimeError):
    """QNN ended its process instead of giving an answer."""


class HtpProcess:
    """A compiled model in a process of its own; else like :class:`~.qnn.HtpSession`.

    :param model: file of a QDQ model, or, with ``load``, of a context.
    :param target: an architecture (``"htp_v75"``) or a chip (``"sm8650"``).
    :param load: open a compiled model instead of compiling one.
    :param options: options of :func:`~aimet_ext.integrations.qnn.compile_htp`.
    :raises HtpRejected: HTP does not take the model, or not all of it.
    :raises HtpCrashed: QNN crashed.
    :raises MissingExtraError: onnxruntime-qnn is not installed.
    """

    def __init__(
        self,
        model: str | Path,
        target: str | HtpTarget,
        *,
        load: bool = False,
        context: str | Path | None = None,
        extra_outputs: Sequence[str] = (),
        allow_fallback: bool = False,
    ) -> None:
        require_qnn()
        self.target = find_target(target)
        self._folder = make_scratch(Path(tempfile.gettempdir()), "aimet_ext")
        self._calls = 0
        self._process: subprocess.Popen[str] | None = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        try:
            told = self._ask(
                "compile it",
                model=str(model),
                target=self.target.name,
                load=load,
                context=None if context is None else str(context),
                extra_outputs=list(extra_outputs),
                allow_fallback=allow_fallback,
            )
        except BaseException:
            self.close()
            raise
        self.seconds: float = told["seconds"]
        self.nodes: int = told["nodes"]
        self.fallback_types: dict[str, str] = told["fallback_types"]
        self.fallbacks = tuple(self.fallback_types)
        self.outputs: tuple[str, ...] = tuple(told["outputs"])
        self.context = None if told["context"] is None else Path(told["context"])

    def run(self, feed: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Return the outputs of one call, see :meth:`.qnn.HtpSession.run`.

        :raises HtpCrashed: QNN crashed; the process is gone.
        """
        self._running()
        self._calls += 1
        source, result = (
            self._folder / f"{kind}_{self._calls}.safetensors" for kind in ("in", "out")
        )
        save_file({name: np.ascontiguousarray(array) for name, array in feed.items()}, source)
        self._ask("run it", source=str(source), result=str(result))
        found = load_file(result)
        source.unlink()
        result.unlink()
        return [found[str(index)] for index in range(len(found))]

    def close(self) -> None:
        """End the process; closing twice does no harm."""
        if self._process is not None:
            process, self._process = self._process, None
            with process:
                process.kill()
            remove_scratch(self._folder)

    def __enter__(self) -> HtpProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise RuntimeError("the process of this model has ended; compile the model again")
        return self._process

    def _ask(self, action: str, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = process.wait()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.close()
            raise HtpCrashed(
                f"QNN's simulation of {self.target.name} was to {action} and crashed ({how})"
            )
        answer: dict[str, Any] = json.loads(line)
        if "rejected" in answer:
            told = answer["rejected"]
            raise HtpRejected(
                told["message"],
                target=told["target"],
                nodes=[(name, kind) for name, kind in told["nodes"]],
                reason=told["reason"],
            )
        if "error" in answer:
            kinds: dict[str, type[Exception]] = {
                kind.__name__: kind for kind in (FileNotFoundError, ValueError)
            }
            raise kinds.get(answer["kind"], RuntimeError)(answer["error"])
        return answer


def _answer(request: dict[str, Any], session: list[Any]) -> dict[str, Any]:
    """Answer one line of the parent process; the session is kept in the list."""
    if "source" in request:
        outputs = session[0].run(load_file(request["source"]))
        arrays = {str(index): np.ascontiguousarray(each) for index, each in enumerate(outputs)}
        save_file(arrays, request["result"])
        return {}
    if request["load"]:
        session.append(load_context(request["model"], request["target"]))
    else:
        names = ("context", "extra_outputs", "allow_fallback")
        options = {name: request[name] for name in names}
        session.append(compile_htp(request["model"], request["target"], **options))
    made = session[0]
    return {
        "seconds": made.seconds,
        "nodes": made.nodes,
        "fallback_types": made.fallback_types,
        "outputs": list(made.outputs),
        "context": None if made.context is None else str(made.context),
    }


def _serve() -> None:
    """Answer until nobody asks any more. QNN writes to the standard output, so ours moves away."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    session: list[Any] = []
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line), session)
        except HtpRejected as error:
            told = {"message": str(error), **vars(error)}
            answer = {"rejected": told}
        except (OSError, RuntimeError, ValueError) as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
