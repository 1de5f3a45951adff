"""The command line: what it teaches, what it refuses, what it ends with."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import aimet_ext
from aimet_ext import RunReport, cli, examples
from aimet_ext.cli import demo
from aimet_ext.errors import CorruptFileError, MissingExtraError, TransformRefused
from aimet_ext.files.manifest import relist_files

COMMANDS = (
    "quantize",
    "evaluate",
    "inspect",
    "demo",
    "olive-config",
    "verify",
    "assign-widths",
    "report",
)


def run(*arguments: str | pathlib.Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def then(*techniques: str) -> list[str]:
    """Return the options that apply techniques in this order."""
    return [word for technique in techniques for word in ("--technique", technique)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": document}) for document in examples.documents("calibration")]
    path.write_text("\n".join(lines), "utf-8")
    return path


@pytest.fixture(scope="module")
def tiny(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Folder of a small random model, with the tokenizer of the packaged one."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", vocab_size=1024).save_pretrained(folder)
    for file in examples.model_dir().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


# ------------------------------------------------------------------------------------------- help


def test_help_names_every_command_and_exit_code() -> None:
    shown = run("--help")
    assert shown.exit_code == 0
    for command in COMMANDS:
        assert command in shown.stdout
    for code in sorted({0, 2, *cli.EXIT_CODES.values()}):
        assert f"\n    {code:<4} " in shown.stdout, code


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_how_it_is_used(command: str) -> None:
    shown = run(command, "--help")
    assert shown.exit_code == 0
    assert f"aimet-ext {command}" in shown.stdout  # an example


def test_version() -> None:
    shown = run("--version").stdout.splitlines()
    assert shown[0] == f"aimet-ext {aimet_ext.__version__}"
    assert {line.split()[0] for line in shown} >= {"aimet-ext", "python", "torch", "safetensors"}


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "aimet_ext", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=pathlib.Path(aimet_ext.__file__).parent.parent,
    )
    assert done.stdout.startswith(f"aimet-ext {aimet_ext.__version__}\n")


# ------------------------------------------------------------------------------------ wrong usage


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "4"], 'a width such as "int4"'),
        (["--weights", "int1"], "bitwidth"),
        (
            ["--weights", "int9"],
            "--weights': width: weights of 2 to 8 bits, or of 16, are required",
        ),
        (
            ["--weights", "int44"],
            "--weights': width: weights of 2 to 8 bits, or of 16, are required",
        ),
        (["--activations", "int9"], "--activations': width: activations of 2 to 8 bits, or of 16,"),
        (["--lm-head", "int17"], "--lm-head': width: weights of 2 to 8 bits, or of 16, are"),
        (["--override", "*.q_proj=int12"], "--override: width: weights of 2 to 8 bits"),
        (["--block-size", "32", "--lpbq", "32"], "not both"),
        (["--lpbq", "32", "--weights", "uint4"], "LPBQ needs symmetric=True"),
        (["--num-iterations", "0"], "--num-iterations"),
        (["--technique", "magic"], "magic"),
        (["--technique", "omniqant"], "did you mean 'omniquant'?"),
        (["--set", "gtpq.beams=2"], "did you mean 'gptq'?"),
        ([*then("gptq"), "--set", "gptq.beems=2"], "did you mean 'beams'?"),
        ([*then("gptq"), "--num-iterations", "5"], "add --technique omniquant"),
        (["--num-iterations", "5", "--set", "omniquant.num_iterations=6"], "given twice"),
        (["--set", "gptq.beams=2"], "add --technique gptq"),
        ([*then("gptq"), "--set", "beams=2"], "such as gptq.beams=4"),
        ([*then("gptq"), "--set", "gptq.beams"], "such as gptq.beams=4"),
        ([*then("gptq"), "--set", "gtpq.beams=2"], "omniquant, seq_mse, gptq, adaround"),
        ([*then("gptq"), "--set", "gptq.beems=2"], "no setting 'beems'"),
        ([*then("gptq"), "--set", "gptq.beams=0"], "gptq: beams"),
        ([*then("gptq"), "--set", "gptq.beams=two"], "gptq: beams"),
        (["--set", "omniquant.pairs=[]", "--set", "omniquant.pairs=[]"], "given twice"),
        (then("gptq", "gptq"), "'gptq' cannot follow 'gptq'"),
        (then("gptq", "adaround"), "'adaround' cannot follow 'gptq'"),
        (then("seq_mse", "omniquant"), "'omniquant' cannot follow 'seq_mse'"),
        (then("smoothquant", "awq"), "'awq' cannot follow 'smoothquant'"),
        (then("awq", "omniquant"), "add --set awq.clip=false"),
        (then("omniquant", "nearest"), "give it alone"),
        ([*then("gptq"), "--weights", "int16"], "gptq decides weights of at most 8 bits"),
        ([*then("seq_mse"), "--set", "seq_mse.max_bitwidth=3"], "at most 3 bits (max_bitwidth)"),
    ],
)
def test_wrong_usage_ends_with_2(
    options: list[str], message: str, text: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    arguments = ["--calibration", text, "--output", tmp_path / "out", *options]
    done = run("quantize", examples.model_dir(), *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_an_absent_file_ends_with_2(tmp_path: pathlib.Path) -> None:
    done = run("evaluate", examples.model_dir(), "--text", tmp_path / "absent.txt")
    assert done.exit_code == 2
    assert "absent.txt" in done.stderr


# ----------------------------------------------------------------------------- errors to exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("the forward pass failed"), 1),
        (ValueError("too little text"), 3),
        (TransformRefused("the pair v_o does not hold"), 3),
        (CorruptFileError("scales were changed"), 4),
        (FileExistsError("other files are there"), 4),
        (PermissionError("cannot be written"), 4),
        (MissingExtraError('pip install "aimet-ext[torch]"'), 5),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_one_message_and_a_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    from aimet_ext.artifact import inspect

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(inspect, "inspect_export", fail)
    done = run("inspect", tmp_path)
    assert done.exit_code == code
    assert done.stderr == f"aimet-ext: {error if str(error) else 'interrupted'}\n"
    assert done.stdout == ""

    done = run("--debug", "inspect", tmp_path)
    assert done.exit_code == code
    assert "Traceback" in done.stderr


def test_a_mistake_of_ours_is_not_dressed_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    from aimet_ext.artifact import inspect

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(inspect, "inspect_export", fail)
    assert isinstance(run("inspect", tmp_path).exception, KeyError)


def test_a_folder_without_a_model_ends_with_3(text: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = run("evaluate", tmp_path, "--text", text)
    assert done.exit_code == 3
    assert "config.json" in done.stderr


def test_a_foreign_output_folder_ends_with_4_and_is_left_alone(
    text: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    done = run("quantize", examples.model_dir(), "--calibration", text, "--output", tmp_path)
    assert done.exit_code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_too_little_text_ends_with_3(tmp_path: pathlib.Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Too short.")
    done = run(
        "quantize", examples.model_dir(), "--calibration", text, "--output", tmp_path / "out"
    )
    assert done.exit_code == 3
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------ the real job


@pytest.fixture(scope="module")
def exported(text: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    output = tmp_path_factory.mktemp("quantized") / "out"
    done = run(
        *("quantize", examples.model_dir(), "--calibration", text, "--output", output),
        *("--weights", "int4", "--block-size", "64", "--activations", "none"),
        *("--num-iterations", "2", "--seq-length", "32", "--num-batches", "2"),
        *("--batch-size", "2"),
    )
    assert done.exit_code == 0, done.stderr
    for path in output.iterdir():
        assert path.name in done.stdout
    return output


def test_what_quantize_wrote_can_be_inspected(exported: pathlib.Path) -> None:
    done = run("inspect", exported, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"model.onnx"} <= set(found["files"])
    shown = run("inspect", exported).stdout
    assert "model.onnx" in shown and max(map(len, shown.splitlines())) <= 120
    head = "\n".join(shown.splitlines()[:20])
    for word in ("omniquant", "int4, Blockwise (block_size=64)", "int8, per_channel", "dB"):
        assert word in head, word


def test_a_model_can_be_inspected_before_anything_is_done(
    tiny: pathlib.Path, exported: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Its numbers are those of the model itself; a lost manifest does not make an export one."""
    done = run("inspect", tiny, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    model = aimet_ext.cli.jobs.load_model(tiny)[0]
    assert found["family"] == "llama" and found["blocks"] == len(model.model.layers)
    (entry,) = found["dtypes"].values()
    assert entry["numbers"] == sum(p.numel() for p in model.parameters())
    assert entry["bytes"] == 4 * entry["numbers"]
    block = model.model.layers[0]
    shapes = {name: list(block.get_submodule(name).weight.shape) for name in found["layers"]}
    assert shapes == found["layers"] and len(shapes) == 7
    report = aimet_ext.apply_smoothquant(
        aimet_ext.create_sim(model, torch.arange(3, 35)[None]), [torch.arange(3, 35)[None]]
    )
    assert found["taken"] and found["pairs"]["norm_qkv"] == len(report.blocks)
    shown = run("inspect", tiny).stdout
    assert "takes it" in shown and shown.splitlines()[-1].startswith("  aimet-ext quantize ")
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "manifest.json").unlink()
    done = run("inspect", copy)
    assert done.exit_code == 4 and "manifest.json" in done.stderr


def test_other_libraries_are_silent_and_steps_are_shown(
    exported: pathlib.Path, text: pathlib.Path
) -> None:
    """Nothing of AIMET's log, transformers' reports and bars, or warnings of either."""
    options = ("--text", str(text), "--seq-length", "16", "--num-windows", "1")
    done = subprocess.run(
        [sys.executable, "-m", "aimet_ext", "evaluate", str(exported), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "load:" in done.stderr and "simulation" in done.stderr
    for noise in ("INFO", "[transformers]", "Warning", "Loading weights"):
        assert noise not in done.stdout + done.stderr


def test_quantize_ends_with_a_verdict(exported: pathlib.Path) -> None:
    found = json.loads(run("inspect", exported, "--json").stdout)["quality"]
    for name in ("rounding", "quantized"):
        assert found[name] != found["float"] == pytest.approx(found[name], rel=0.2)
    assert found["windows"] >= 1 and found["text"] == "text that was not calibrated on"
    assert all(found["divergence"][name]["kl"] > 0 for name in ("rounding", "quantized"))
    shown = run("inspect", exported).stdout
    assert "divergence" in shown and "%" in shown.partition("divergence")[2]


def test_evaluate_scores_what_quantize_scored(
    exported: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    quality = json.loads((exported / "reports" / "quality.json").read_text("utf-8"))
    with_reference = ("evaluate", exported, "--reference", examples.model_dir())
    found = json.loads(run(*with_reference, "--json").stdout)
    assert (found["windows"], found["seq_length"]) == (quality["windows"], 32) == (16, 32)
    assert found["perplexity"] == pytest.approx(quality["quantized"], rel=1e-5)
    assert found["reference_perplexity"] == pytest.approx(quality["float"], rel=1e-5)
    divergence = quality["divergence"]["quantized"]
    for name in ("kl", "kl_high", "flips", "rows"):
        assert found[name] == pytest.approx(divergence[name], rel=1e-3), name
    shown = run(*with_reference).stdout
    for words in ("float model", "as deployed", "mean KL", f"{quality['quantized']:.4g}"):
        assert words in shown, words
    copy = shutil.copytree(exported, tmp_path / "copy")
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text("utf-8").replace("text.jsonl", "gone.jsonl"), "utf-8")
    relist_files(copy)
    done = run("evaluate", copy)
    assert done.exit_code == 3 and "gone.jsonl is absent" in " ".join(done.stderr.split())
    done = run("evaluate", examples.model_dir())
    assert done.exit_code == 3 and "give --text FILE" in " ".join(done.stderr.split())


def test_what_quantize_wrote_can_be_evaluated(exported: pathlib.Path, text: pathlib.Path) -> None:
    options = ("--text", text, "--seq-length", "64", "--num-windows", "4", "--json")
    quantized = run("evaluate", exported, *options)
    plain = run("evaluate", examples.model_dir(), *options)
    assert quantized.exit_code == plain.exit_code == 0, quantized.stderr + plain.stderr
    quantized, plain = json.loads(quantized.stdout), json.loads(plain.stdout)
    assert quantized["quantized"] and not plain["quantized"]
    assert quantized["windows"] == plain["windows"] == 4
    assert plain["perplexity"] < quantized["perplexity"] < 2 * plain["perplexity"]


def test_the_report_is_in_the_manifest(exported: pathlib.Path) -> None:
    found = json.loads(run("inspect", exported, "--json").stdout)
    assert "reports/omniquant.json" in found["files"] and found["unlisted"] == []
    assert found["kind"] == "export" and found["checks"]


@pytest.mark.parametrize(
    ("techniques", "settings", "expected"),
    [
        (
            ("seq_mse", "adaround"),
            ("seq_mse.num_candidates=3", "seq_mse.mode=compatible", "adaround.num_iterations=2"),
            {
                "seq_mse": {"num_candidates": 3, "mode": "compatible"},
                "adaround": {"num_iterations": 2, "seed": 7},
            },
        ),
        (
            ("omniquant", "gptq"),
            ('omniquant.pairs=["v_o"]', "omniquant.num_iterations=1", "gptq.damping=0.5"),
            {
                "omniquant": {"pairs": ["v_o"], "num_iterations": 1, "seed": 7},
                "gptq": {"damping": 0.5},
            },
        ),
        (
            ("smoothquant", "gptq"),
            ("smoothquant.alpha=search", "gptq.damping=0.5"),
            {"smoothquant": {"alpha": "search"}, "gptq": {"damping": 0.5}},
        ),
        (
            ("rotation", "rtn"),  # a rotation has no checkpoint
            ("rotation.mode=random",),
            {"rtn": {"max_bitwidth": 8}},
        ),
    ],
)
def test_techniques_follow_one_another_with_their_settings(
    techniques: tuple[str, ...],
    settings: tuple[str, ...],
    expected: dict[str, dict[str, Any]],
    tiny: pathlib.Path,
    text: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    output, kept = tmp_path / "out", tmp_path / "kept"
    arguments = [
        *("quantize", tiny, "--calibration", text, "--output", output, "--checkpoint-dir", kept),
        *("--activations", "none", "--seq-length", "32", "--num-batches", "2"),
        *("--batch-size", "2", "--seed", "7", *then(*techniques)),
        *(word for setting in settings for word in ("--set", setting)),
    ]
    done = run(*arguments)
    assert done.exit_code == 0, done.stderr

    ledger = json.loads((output / "manifest.json").read_text("utf-8"))["techniques"]
    assert [entry["technique"] for entry in ledger] == list(techniques)
    for name, values in expected.items():
        report = json.loads((output / "reports" / f"{name}.json").read_text("utf-8"))
        assert report["settings"].items() >= values.items()
        assert any((kept / name).iterdir())
    shown = done.stdout
    summaries = [f"{name}: " for name in techniques]
    assert [line[: line.find(" ") + 1] for line in shown.splitlines()][:1] == summaries[:1]
    assert all(re.search(f"^{each}", shown, re.MULTILINE) for each in summaries)
    # By SQNR, or by what is lost in a layer itself and with what comes in.
    rows = re.findall(r"^ +(?:-?[\d.]+ dB|[\d.]+ % +[\d.]+ %)  \S+$", shown, re.MULTILINE)
    assert 0 < len(rows) <= 3 * len(techniques)  # the worst, of seven a block
    assert f"reports/{techniques[-1]}.json" in shown

    again = run(*arguments)  # nothing is computed twice
    assert again.exit_code == 0, again.stderr
    report = json.loads((output / "reports" / f"{techniques[-1]}.json").read_text("utf-8"))
    assert all(layer["resumed"] for layer in report["layers"])


def test_scales_are_polished_against_the_float_model(
    tiny: pathlib.Path, text: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    output, cut = tmp_path / "out", ("--seq-length", "32")
    done = run(
        *("quantize", tiny, "--calibration", text, "--output", output, *then("rtn", "dwq")),
        *("--activations", "none", *cut, "--num-batches", "2", "--batch-size", "2"),
        *("--weights", "int3", "--set", "dwq.num_iterations=4", "--set", "dwq.evaluations=2"),
    )
    assert done.exit_code == 0, done.stderr
    report = json.loads((output / "reports" / "dwq.json").read_text("utf-8"))
    assert report["kept"] == "learnt" and report["after"]["kl"] < report["before"]["kl"]
    assert "KL to the float model" in done.stdout
    options = ("--text", text, *cut, "--num-windows", "2", "--reference", tiny, "--json")
    done = run("evaluate", output, *options)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kl"] > 0 and found["rows"] == 64 and 0 <= found["flips"] <= 1


def test_plain_rounding_has_no_report(
    tiny: pathlib.Path, text: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    output = tmp_path / "out"
    done = run(
        *("quantize", tiny, "--calibration", text, "--output", output, *then("nearest")),
        *("--activations", "none", "--seq-length", "32", "--num-batches", "1"),
    )
    assert done.exit_code == 0, done.stderr
    assert "in all" not in done.stdout and done.stdout.startswith("config.json")
    assert runs(next_of(done)) is None
    assert [file.name for file in (output / "reports").iterdir()] == ["quality.json"]
    assert json.loads(run("inspect", output, "--json").stdout)["techniques"] == []


def next_of(done: Result) -> list[str]:
    """Return the arguments of the command that quantize ends with."""
    before, line = done.stdout.splitlines()[-2:]
    program, *arguments = shlex.split(line)
    assert before.endswith("Next:") and program == "aimet-ext"
    return arguments


def runs(arguments: list[str]) -> str | None:
    """Run a command, and return its complaint."""
    done = run(*arguments)
    return None if done.exit_code == 0 else done.stdout + done.stderr


def test_verify_compares_on_windows_that_no_technique_saw(
    exported: pathlib.Path,
    text: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the calibration text those behind it come first, of other text the first ones."""
    (other := tmp_path / "other.jsonl").write_text(text.read_text("utf-8"), "utf-8")
    given = []

    def note(_: Any, dataloader: Any, **rest: Any) -> Any:
        given.append(dataloader)
        return types.SimpleNamespace(passed=True, to_dict=dict)

    monkeypatch.setattr("aimet_ext.verification.verify.verify", note)
    for file in (text, other):
        assert run("verify", exported, "--text", file).exit_code == 0
    seen = 4  # windows: two batches of two
    of_calibration, of_other = given
    assert len(of_calibration) == len(of_other) == 16
    for one, two in zip(of_calibration[:4], of_other[seen:], strict=False):
        assert torch.equal(one, two)


def test_three_commands_score_the_same_windows_of_unequal_files(
    tiny: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that calibration used up gives none, the other one all."""
    words = " ".join(examples.documents("calibration")).split()
    (short := tmp_path / "short.txt").write_text(" ".join(words[:120]), "utf-8")
    (long := tmp_path / "long.txt").write_text(" ".join(words[120:2000]), "utf-8")
    read = aimet_ext.cli.jobs.load_tokenizer(tiny)
    cut = [torch.cat(aimet_ext.calibration_batches(read, f, 32, None)) for f in (short, long)]
    used = len(cut[0])  # windows of either
    out, scored = tmp_path / "out", []
    done = run(
        *("quantize", tiny, "--calibration", short, "--calibration", long, "--output", out),
        *(*then("nearest"), "--activations", "none", "--no-check-export", "--seq-length", "32"),
        *("--batch-size", "1", "--num-batches", str(2 * used)),
    )
    assert done.exit_code == 0, done.stderr
    quality = json.loads((out / "reports" / "quality.json").read_text("utf-8"))
    assert quality["text"] == "text that was not calibrated on"

    def note(_: Any, batches: Any, **rest: Any) -> Any:
        scored.append(torch.cat(list(batches)[: rest.get("windows")]))
        return types.SimpleNamespace(passed=True, to_dict=dict)

    found = json.loads(run("evaluate", out, "--json").stdout)
    assert found["perplexity"] == pytest.approx(quality["quantized"], rel=1e-5)
    assert found["windows"] == quality["windows"] == 16
    monkeypatch.setattr("aimet_ext.verification.verify.verify", note)
    assert run("verify", out, "--windows", "16").exit_code == 0
    monkeypatch.setattr(aimet_ext, "evaluate_perplexity", lambda *a: note(*a) and 1.0)
    for options in ((), ("--seq-length", "48", "--num-windows", "4")):
        assert run("evaluate", out, *options).exit_code == 0
    behind = cut[1][used:]
    assert torch.equal(scored[0], behind[:16]) and torch.equal(scored[1], behind[:16])
    start = -(-32 * used // 48) * 48  # from where on no longer window holds calibrated tokens
    assert torch.equal(scored[2].flatten(), cut[1].flatten()[start:][: 4 * 48])


def test_quantize_ends_with_a_command_that_verifies(
    tiny: pathlib.Path, text: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    pytest.importorskip("onnxruntime")
    (spaced := tmp_path / "my text.jsonl").write_text(text.read_text("utf-8"), "utf-8")
    log = tmp_path / "log.txt"
    done = run(
        *("quantize", tiny, "--calibration", spaced, "--output", tmp_path / "out", *then("rtn")),
        *("--seq-length", "16", "--num-batches", "2", "--no-check-export", "-q"),
        *("--log-file", log),
    )
    assert done.exit_code == 0 and done.stderr == ""
    layers = [unit.name for unit in RunReport.read(tmp_path / "out").techniques[0].units]
    assert sum(name in done.stdout for name in layers) == 3 < len(layers)
    assert all(name in log.read_text("utf-8") for name in layers)
    arguments = next_of(done)
    assert arguments[0] == "verify" and arguments[2:4] == ["--target", "htp_v79"]
    assert arguments[-2:] == ["--reference", str(tiny)]
    said = runs(arguments)
    assert said is None or "FAULT" in said, said  # of random weights


def test_layers_are_excluded_by_pattern_and_the_recipe_says_so(
    tiny: pathlib.Path, text: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    arguments = [
        *("quantize", tiny, "--calibration", text, "--output", tmp_path / "out", *then("rtn")),
        *("--activations", "none", "--seq-length", "32", "--num-batches", "1"),
        *("--no-check-export", "--exclude"),
    ]
    done = run(*arguments, "*.down_prj")
    assert (
        done.exit_code == 3 and "did you mean 'model" in done.stderr and "down_proj" in done.stderr
    )
    done = run(*arguments, "*.down_proj", "--exclude", "*.layers.0", "--json")
    assert done.exit_code == 0, done.stderr
    layers = [layer["name"] for layer in json.loads(done.stdout)["reports"]["rtn"]["layers"]]
    assert layers and not any("down_proj" in name or ".layers.0." in name for name in layers)
    assert aimet_ext.read_recipe(tmp_path / "out" / "recipe.yaml").exclude == [
        *("*.down_proj", "*.layers.0")
    ]


def test_texts_are_mixed_and_the_recipe_names_them(
    tiny: pathlib.Path, text: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    stories = tmp_path / "stories.csv"
    stories.write_text(f"story\n{'once upon a time ' * 200}\n")
    cut = ("--seq-length", "32", "--num-batches", "1", "--batch-size", "4", "--activations", "none")
    fast = (*cut, "--no-check-export", *then("nearest"))
    with_field = ("--calibration", stories, "--text-field", "story")
    done = run(
        "quantize", tiny, *with_field, "--calibration", text, "--output", tmp_path / "one", *fast
    )
    assert done.exit_code == 4 and "'story' is required, got 'text'" in done.stderr
    stories.write_text(stories.read_text().replace("story", "text", 1))
    first = ("--calibration", stories, "--calibration", text, "--output", tmp_path / "one")
    done = run("quantize", tiny, *first, *fast)
    assert done.exit_code == 0, done.stderr
    assert f"2 of {stories}, 2 of {text}" in done.stderr
    written = tmp_path / "one" / "recipe.yaml"
    assert aimet_ext.read_recipe(written).calibration.files == [str(stories), str(text)]
    again = ("--recipe", written, "--output", tmp_path / "two", "--no-check-export", "--json")
    done = run("quantize", tiny, *again)
    assert done.exit_code == 0, done.stderr
    assert f"2 of {stories}, 2 of {text}" in done.stderr
    stories.unlink()
    done = run("quantize", tiny, *again)
    assert done.exit_code == 2 and "stories.csv is absent" in " ".join(done.stderr.split())


def test_text_to_calibrate_on_is_required(tmp_path: pathlib.Path) -> None:
    done = run("quantize", examples.model_dir(), "--output", tmp_path / "out")
    assert done.exit_code == 2 and "--calibration" in done.stderr


def test_a_changed_file_ends_with_4(exported: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"!")
    done = run("inspect", copy)
    assert done.exit_code == 4
    assert "model.onnx" in done.stderr


@pytest.mark.parametrize("damage", ["absent", "another format"])
def test_an_export_is_never_taken_for_a_float_model(
    damage: str, exported: pathlib.Path, text: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Its folder loads in transformers too, with weights that were rescaled for its quantizers."""
    copy = shutil.copytree(exported, tmp_path / "copy")
    manifest = copy / "manifest.json"
    if damage == "absent":
        manifest.unlink()
    else:
        manifest.write_text(
            manifest.read_text("utf-8").replace("manifest/1", "manifesu/1"), "utf-8"
        )
    done = run("evaluate", copy, "--text", text, "--seq-length", "16", "--num-windows", "1")
    assert done.exit_code == 4
    assert "manifest.json" in done.stderr


def test_the_demo_compares_and_exports(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 3 bits alone, on little text, with few steps."""
    output = tmp_path / "out"
    monkeypatch.setattr(demo, "BITWIDTHS", (3,))
    monkeypatch.setattr(demo, "WINDOWS", {"calibration": 4, "evaluation": 8})
    monkeypatch.setitem(demo.SETTINGS, "gptq", {"scale_candidates": 2, "refine_sweeps": 1})
    monkeypatch.setitem(demo.SETTINGS, "adaround", {"start": "weight", "num_iterations": 20})
    monkeypatch.setitem(demo.SETTINGS, "omniquant", {"search_sweeps": 0, "evaluations": 1})
    done = run("demo", "--output", output, "--num-iterations", "1")
    assert done.exit_code == 0, done.stderr
    labels = ("float", "rounding", "SeqMSE", "GPTQ", "AdaRound", "OmniQuant")
    rows = dict(re.findall(rf"^({'|'.join(labels)})\s+([\d.]+ .*)$", done.stdout, re.MULTILINE))
    assert tuple(rows) == labels
    found = {name: float(row.split()[0]) for name, row in rows.items()}
    assert found["float"] == min(found.values())
    assert found["rounding"] == max(found.values())
    best = min(labels[2:], key=found.__getitem__)
    lost = found["rounding"] - found["float"]
    share = (found["rounding"] - found[best]) / lost
    (said,) = re.findall(
        r"^At 3 bits plain rounding adds ([\d.]+) .*; (\w+) gains (\d+)%", done.stdout, re.M
    )
    assert said[1] == best
    assert (float(said[0]), float(said[2])) == pytest.approx((lost, 100 * share), rel=0.02)
    for name in (path.name for path in output.iterdir()):
        assert name in done.stdout
    for name in re.findall(r"\w+\.\w+", "\n".join(name for name, _ in demo.WHERE)):
        assert (output / name).is_file(), name
    report = RunReport.read(output)
    states = {name: state.perplexity for name, state in report.quality.states.items()}
    assert states["float"] == pytest.approx(found["float"], rel=1e-3)
    assert states["quantized"] == pytest.approx(found["OmniQuant"], rel=1e-3)
    assert [each.name for each in report.techniques] == ["omniquant"]
    assert json.loads(run("inspect", output, "--json").stdout)["unlisted"] == []
