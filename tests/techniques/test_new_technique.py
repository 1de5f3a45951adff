"""A technique is one file and one row: everything else that a user meets follows from the row."""

from __future__ import annotations

import json
import pathlib
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor
from warm_python import WarmPython

import aimet_ext
from aimet_ext import registry

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
PACKAGE = pathlib.Path(aimet_ext.__file__).parent.parent  # installed or checkout, as tested here
PATH = [str(PACKAGE), str(ROOT / "tests"), str(ROOT / "tests" / "reference")]


Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def program(warm_python: WarmPython, tmp_path: pathlib.Path) -> Program:
    """Return a function that runs Python with the row of the trial technique in the registry."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "program.py"
        first = f"import sys; sys.path[:0] = {PATH!r}; import trial_row"
        script.write_text("\n".join([first, *words]), "utf-8")
        return warm_python.run(script, folder=ROOT)

    return run


@pytest.fixture
def row() -> Iterator[registry.Technique]:
    """The trial's row, in the registry for one test."""
    from trial_row import ROW

    registry.TECHNIQUES[ROW.name] = ROW
    yield ROW
    del registry.TECHNIQUES[ROW.name]
    for name in ("apply_trial", "TrialParams"):
        vars(aimet_ext).pop(name, None)


@pytest.mark.slow
def test_the_contract_holds_for_it(program: Program) -> None:
    """Signature, all forms of data, errors, undo, checkpoints, ledger: the contract's own tests."""
    files = ("test_contract_calls", "test_contract_undo", "test_layerwise_report")
    paths = [str(HERE / f"{name}.py") for name in files]
    arguments = ["-q", "-k", "trial", "-p", "no:cacheprovider", "-p", "pytest_timeout", *paths]
    # Plugins that are imported already, with the frameworks, could not be loaded once more.
    alone = "import os, pytest; os.environ['PYTEST_DISABLE_PLUGIN_AUTOLOAD'] = '1'"
    done = program(alone, f"sys.exit(pytest.main({arguments!r}))")
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


def test_its_public_names(row: registry.Technique) -> None:
    function, params = aimet_ext.apply_trial, aimet_ext.TrialParams
    assert function is registry.load(row.function) and params is registry.load(row.params)
    for line in (
        "Round to nearest on shrunk ranges",
        ":param checkpoint_dir: Folder",
        "TrialParams",
    ):
        assert line in function.__doc__


def test_it_decides_the_same_on_torch_and_onnx(row: registry.Technique) -> None:
    pytest.importorskip("aimet_onnx")
    pairs = pytest.importorskip("onnx_pairs")
    pair = pairs.PAIRS["perceptron"]()
    sims, data = pair.sims(pairs.GRIDS["channel"]), pair.arguments()
    names = pair.names(sims[1])
    reports = [
        aimet_ext.apply_trial(sim, batches, progress=False)
        for sim, batches in zip(sims, data, strict=True)
    ]
    for one, other in zip(*(report.layers for report in reports), strict=True):
        assert names[one.name] == other.name
        assert other.loss_after == pytest.approx(one.loss_after, rel=1e-3)
        assert other.loss_after <= other.loss_nearest
    for sim in sims:
        assert sim.aimet_ext_ledger.techniques == ("trial",)
        assert sim.aimet_ext_ledger.runs[0].rounds
        with pytest.raises(ValueError, match="trial was already applied to"):
            aimet_ext.apply_trial(sim, data[sims.index(sim)], progress=False)


def test_it_follows_what_decides_less(
    row: registry.Technique, make_sim: Any, batches: list[Tensor]
) -> None:
    sim = make_sim(layers=1)
    aimet_ext.apply_seq_mse(sim, batches, 4, sweeps=2, progress=False)
    aimet_ext.apply_trial(sim, batches, progress=False)
    assert sim.aimet_ext_ledger.techniques == ("seq_mse", "trial")
    with pytest.raises(ValueError, match="gptq needs float weights, but trial already rounded"):
        aimet_ext.apply_gptq(sim, batches, progress=False)


def test_the_command_line_has_it(program: Program, tmp_path: pathlib.Path) -> None:
    assert "trial" in program("from aimet_ext.cli import app", "app(['quantize', '--help'])").stdout
    text, output = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("\n\n".join(aimet_ext.examples.documents("calibration")[:40]), "utf-8")
    words = [
        *("quantize", str(aimet_ext.examples.model_dir()), "--calibration", str(text)),
        *("--output", str(output), "--technique", "seq_mse", "--technique", "trial"),
        *("--set", "trial.shrink=0.8", "--set", "seq_mse.num_candidates=2"),
        *("--activations", "none", "--seq-length", "32", "--num-batches", "1"),
    ]
    done = program("from aimet_ext.cli import app", f"app({words!r})")
    assert done.returncode == 0, done.stderr
    report = json.loads((output / "reports" / "trial.json").read_text("utf-8"))
    assert report["settings"]["shrink"] == 0.8 and "trial:" in done.stdout
    wrong = [*words, "--technique", "gptq"]
    done = program("from aimet_ext.cli import app", f"app({wrong!r})")
    assert done.returncode == 2
    assert "or trial" in " ".join(done.stderr.replace("│", "").split())


def test_olive_has_it(row: registry.Technique) -> None:
    for module in ("olive", "aimet_onnx"):
        pytest.importorskip(module)
    pairs = pytest.importorskip("onnx_pairs")
    from olive.passes.onnx.aimet_quantization import SUPPORTED_TECHNIQUES

    from aimet_ext.integrations import olive_techniques

    olive_techniques.register(row)
    try:
        olive_techniques.check_techniques([{"name": "trial", "shrink": 0.8}])
        with pytest.raises(ValueError, match="'trial' has no argument 'shrnk'; it has data_config"):
            olive_techniques.check_techniques([{"name": "trial", "shrnk": 0.8}])
        pair = pairs.PAIRS["perceptron"]()
        sim = pair.sims(pairs.GRIDS["channel"])[1]
        sim = SUPPORTED_TECHNIQUES["trial"].apply(sim, data_config=pair.arguments()[1], shrink=0.8)
    finally:
        del SUPPORTED_TECHNIQUES["trial"]
    (report,) = olive_techniques.reports_of(sim)
    assert report["technique"] == "trial" and report["settings"]["shrink"] == 0.8
