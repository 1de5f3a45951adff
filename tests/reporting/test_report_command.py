"""The reports of runs on the command line: left by quantize, shown, and compared."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import aimet_ext
from aimet_ext import CorruptFileError, RunReport, cli, examples
from aimet_ext.cli import jobs
from aimet_ext.files.manifest import read_manifest

pytest.importorskip("aimet_torch")


def run(*arguments: str | pathlib.Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(examples.documents("calibration")), "utf-8")
    return path


@pytest.fixture(scope="module")
def tiny(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("tiny") / "a <b> & c"
    tiny_model("llama", vocab_size=1024).save_pretrained(folder)
    for file in examples.model_dir().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def quantized(model: pathlib.Path, text: pathlib.Path, output: pathlib.Path, *more: Any) -> Result:
    windows = ("--seq-length", "16", "--num-batches", "2", "--batch-size", "2")
    options = ("--activations", "none", "--no-check-export", *windows)
    return run("quantize", model, "--calibration", text, "--output", output, *options, *more)


@pytest.fixture(scope="module")
def folder(
    tiny: pathlib.Path, text: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """Return what quantize wrote for widths that were assigned."""
    place = tmp_path_factory.mktemp("run")
    assigned = run(
        *("assign-widths", tiny, "--calibration", text, "--budget", "5", "--seq-length", "16"),
        *("--num-batches", "1", "--output", place / "mine.yaml"),
    )
    assert assigned.exit_code == 0, assigned.stderr
    done = quantized(
        tiny, text, place / "out", "--recipe", place / "mine.yaml", "--technique", "rtn"
    )
    assert done.exit_code == 0, done.stderr
    return place / "out"


def test_quantize_leaves_a_report(folder: pathlib.Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert {"report.json", "report.html"} <= set(manifest["files"])
    found = RunReport.read(folder)
    assert found.model == "a <b> & c" and [each.name for each in found.techniques] == ["rtn"]
    quality = json.loads((folder / "reports/quality.json").read_text("utf-8"))
    assert {k: v.perplexity for k, v in found.quality.states.items()} == {
        name: quality[name] for name in ("float", "rounding", "quantized")
    }
    assert found.recipe is not None and found.recipe["calibration"]["files"] == ["text.txt"]
    assert found.quality.states["quantized"].kl == quality["divergence"]["quantized"]["kl"]
    phases = [phase.name for phase in found.phases]
    assert phases[0] == "load the model" and "rtn" in phases and phases[-1] == "export"
    page = (folder / "report.html").read_text("utf-8")
    assert "a &lt;b&gt; &amp; c" in page and "<b> & c" not in page
    assert found.widths is not None and len(found.widths.curve) > 1
    assert "bits a weight, with scales" in page and "int8" in page


def test_a_recipe_with_other_grids_has_no_curve(
    folder: pathlib.Path, tiny: pathlib.Path, text: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    from aimet_ext.reporting.budget import read_beside

    beside = folder.parent / "mine.yaml"
    recipe = aimet_ext.read_recipe(beside)
    assert read_beside(beside, recipe) is not None
    other = dataclasses.replace(recipe, weights="int3", overrides={})
    assert read_beside(beside, other) is None
    assert read_beside(tmp_path / "mine.yaml", recipe) is None
    (tmp_path / "mine.widths.json").write_text("{}", "utf-8")
    with pytest.raises(CorruptFileError, match=r"mine\.widths\.json"):
        read_beside(tmp_path / "mine.yaml", recipe)


def test_the_command_shows_one_run_and_two(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shown = run("report", folder)
    assert shown.exit_code == 0, shown.stderr
    assert "rtn" in shown.stdout and "as deployed" in shown.stdout
    plain = json.loads(run("report", folder, "--json").stdout)
    assert plain == RunReport.read(folder).to_dict()
    both = run("report", folder, folder / "report.json", "-o", tmp_path / "both.html")
    assert both.exit_code == 0 and "measures" in both.stdout
    assert both.stdout.startswith("A: out, ") and "\nB: report.json, " in both.stdout
    assert "other windows" not in both.stdout
    assert "Two runs" in (tmp_path / "both.html").read_text("utf-8")
    compared = json.loads(run("report", folder, folder, "--json").stdout)
    assert compared["settings"] == {} and compared["measures"]
    again = run("report", folder, "-o", tmp_path / "again.html")
    assert again.exit_code == 0
    assert (tmp_path / "again.html").read_bytes() == (folder / "report.html").read_bytes()


def test_a_failing_report_keeps_the_export(
    tiny: pathlib.Path, text: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("of nothing")

    monkeypatch.setattr(RunReport, "of", fail)
    done = quantized(tiny, text, tmp_path / "out", "--technique", "nearest")
    assert done.exit_code == 0, done.stderr
    assert "report.json is not written: ZeroDivisionError: of nothing" in done.stderr
    read_manifest(tmp_path / "out")  # every file is as it was written
    assert not list((tmp_path / "out").glob("report.*"))


@pytest.mark.parametrize("command", ["analyze", "assign-widths"])
def test_a_plot_is_asked_for_before_the_work(
    folder: pathlib.Path,
    tiny: pathlib.Path,
    text: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(jobs, command.replace("-", "_"), lambda *_, **__: pytest.fail("worked"))
    arguments = {
        "analyze": (folder, "--text", text),
        "assign-widths": (
            *(tiny, "--calibration", text, "--budget", "5"),
            *("--output", tmp_path / "mine.yaml"),
        ),
    }
    done = run(command, *arguments[command], "--plot", tmp_path / "plot.svg")
    assert done.exit_code == 5 and 'pip install "aimet-ext[report]"' in done.stderr


def test_wrong_usage_of_the_command(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert run("report", folder, folder, folder).exit_code == 2
    assert run("report", folder, "-o", tmp_path / "page.pdf").exit_code == 2
    assert run("report", tmp_path / "absent").exit_code == 2
    assert run("report", tmp_path).exit_code == 4
    (tmp_path / "report.json").write_text("{}", "utf-8")
    damaged = run("report", tmp_path)
    assert damaged.exit_code == 4 and "report.json" in damaged.stderr


@pytest.mark.parametrize("absent", ["jinja2", "matplotlib"])
def test_without_the_extra_the_json_is_written_and_the_extra_named(
    tiny: pathlib.Path,
    text: pathlib.Path,
    folder: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    absent: str,
) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    page = run("report", folder, "-o", tmp_path / "page.html")
    assert page.exit_code == 5 and 'pip install "aimet-ext[report]"' in page.stderr
    if absent == "matplotlib":
        return
    done = quantized(tiny, text, tmp_path / "out", "--technique", "nearest")
    assert done.exit_code == 0, done.stderr
    assert "report.html is not written: jinja2 is needed" in done.stderr
    assert 'pip install "aimet-ext[report]"' in done.stderr
    assert RunReport.read(tmp_path / "out").techniques == ()
    assert not (tmp_path / "out/report.html").exists()
