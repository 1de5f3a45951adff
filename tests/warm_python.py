"""New processes for scripts, forked from one that has the frameworks imported already."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

__all__ = ["WarmPython"]

SECONDS = 540


class WarmPython:
    """A Python process that has imported torch, transformers and AIMET, and has read the examples.

    Importing them takes longer than most scripts run; each script gets a process of its own still.
    """

    def __init__(self, package: pathlib.Path) -> None:
        # As `python script` does it: the script's folder comes first, then the package under test.
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**inherited, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(package)},
        )

    def run(
        self, script: pathlib.Path, *arguments: str, folder: pathlib.Path
    ) -> subprocess.CompletedProcess[str]:
        """Run ``python script arguments`` in a folder."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.TemporaryDirectory() as place:
            files = [pathlib.Path(place, name) for name in ("stdout", "stderr")]
            command = [str(script), *arguments]
            asked = {"command": command, "folder": str(folder), "files": [*map(str, files)]}
            self._process.stdin.write(f"{json.dumps(asked)}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            assert answer, "the warm process has ended"
            texts = [file.read_text("utf-8") for file in files]
        return subprocess.CompletedProcess(command, int(answer), *texts)

    def close(self) -> None:
        self._process.communicate()


def serve() -> list[str]:
    """Answer each line on stdin by the exit code of a child; return the command in the child."""
    import signal

    # Not onnxruntime, which starts a thread: a fork would not have it, and fail when it ends.
    import aimet_torch  # noqa: F401
    import onnx  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from aimet_ext import examples

    examples.documents("calibration")  # which reads the standard library's sources
    assert "onnxruntime" not in sys.modules
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        if (child := os.fork()) == 0:
            signal.alarm(SECONDS)
            os.chdir(asked["folder"])
            for number, file in enumerate([os.devnull, *asked["files"]]):
                os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
            return asked["command"]
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()
    sys.exit()


if __name__ == "__main__":
    import runpy

    sys.argv = serve()
    sys.path[0] = str(pathlib.Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
