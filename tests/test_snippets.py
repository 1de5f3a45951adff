"""Snippets and the README's example are complete programs: they run as they stand, offline."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from warm_python import WarmPython

from aimet_ext import examples

ROOT = pathlib.Path(__file__).resolve().parent.parent
SNIPPETS = sorted((ROOT / "snippets").rglob("*.py"))
SHELL = sorted((ROOT / "snippets").rglob("*.sh"))
MARKER = re.compile(r"^# (End of )?\[([\w-]+)\]$", re.MULTILINE)


@pytest.mark.parametrize(
    "script", [*SNIPPETS, *SHELL], ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_markers_pair_up(script: pathlib.Path) -> None:
    marks = [(bool(end), name) for end, name in MARKER.findall(script.read_text("utf-8"))]
    names = [name for end, name in marks if not end]
    assert len(names) == len(set(names))
    assert marks == [(end, name) for name in names for end in (False, True)]


@pytest.mark.slow
@pytest.mark.parametrize("script", SNIPPETS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_snippet_runs(
    script: pathlib.Path, warm_python: WarmPython, tmp_path: pathlib.Path
) -> None:
    done = warm_python.run(script, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    printed = done.stdout
    figures = dict(re.findall(r"^(float|quantized)\s+([\d.]+)$", printed, re.MULTILINE))
    assert float(figures["float"]) < float(figures["quantized"]) < 1.1 * float(figures["float"])
    exports = "aimet_ext.export(" in script.read_text("utf-8")
    assert (tmp_path / "exported/model.onnx").is_file() == exports
    assert any((tmp_path / "scales").rglob("*.safetensors")) == (script.stem == "apply_omniquant")


@pytest.mark.slow
@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.stem)
def test_a_shell_snippet_runs(script: pathlib.Path, tmp_path: pathlib.Path) -> None:
    programs = [str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
    done = subprocess.run(
        ["/bin/sh", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": os.pathsep.join(programs)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "out/model.onnx").is_file()
    score = json.loads((tmp_path / "score.json").read_text("utf-8"))
    assert score["quantized"] and score["windows"] == 16 and 0 < score["kl"] < 0.1


def test_the_example_of_the_readme(warm_python: WarmPython, tmp_path: pathlib.Path) -> None:
    """Word for word, except that fewer steps and windows are taken."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    code, changes = re.subn(r"(num_batches|num_iterations)=\d+", r"\1=2", code)
    assert changes == 2
    shutil.copytree(examples.model_dir(), tmp_path / "my_model")
    (tmp_path / "text.txt").write_text("\n".join(examples.documents("calibration")), "utf-8")
    (tmp_path / "example.py").write_text(code, "utf-8")
    done = warm_python.run(tmp_path / "example.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "quantized/model.onnx").is_file()
