"""Notebooks run as they stand, offline, and become pages and files for Jupyter."""

from __future__ import annotations

import importlib
import pathlib
import re
from types import ModuleType

import pytest
from warm_python import WarmPython

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.py"))


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("myst_parser")
    monkeypatch.syspath_prepend(ROOT / "docs/extensions")
    return importlib.import_module("notebooks")


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(
    notebook: pathlib.Path, warm_python: WarmPython, tmp_path: pathlib.Path
) -> None:
    pytest.importorskip("aimet_onnx")
    done = warm_python.run(notebook, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    figures = dict(re.findall(r"^(float|quantized)\s+([\d.]+)$", done.stdout, re.MULTILINE))
    assert float(figures["float"]) < float(figures["quantized"]) < 1.1 * float(figures["float"])
    assert (tmp_path / "exported/model.onnx").is_file()
    assert (tmp_path / "snapdragon/verify.json").is_file()
    absent = 'pip install "aimet-ext[qnn]"' in done.stdout
    assert ("on HTP simulation" in done.stdout) != absent
    assert importlib.util.find_spec("onnxruntime_qnn") is None or not absent


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_its_code_and_its_words(
    extension: ModuleType, notebook: pathlib.Path
) -> None:
    text = notebook.read_text("utf-8")
    cells = extension.read(text).cells
    assert [cell.cell_type for cell in cells[:2]] == ["markdown", "code"]
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    compile(code, notebook.name, "exec")
    page = extension.markdown(extension.read(text))
    assert page.startswith("# ")
    assert page.count("```python\n") == sum(cell.cell_type == "code" for cell in cells)
    assert "aimet_ext.export(" in page
