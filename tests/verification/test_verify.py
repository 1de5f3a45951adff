"""An export is verified down to what computes it, and faults on the way there are named."""

from __future__ import annotations

import copy
import json
import pathlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import aimet_ext
from aimet_ext import LPBQ, QSpec, cli
from aimet_ext.data.feeds import graph_feeds
from aimet_ext.errors import CorruptFileError, Finding
from aimet_ext.files.manifest import read_manifest, write_manifest
from aimet_ext.integrations.qnn import HtpRejected, is_available
from aimet_ext.integrations.qnn_process import HtpCrashed
from aimet_ext.integrations.qnn_targets import find_target
from aimet_ext.onnx.values import read_input_specs
from aimet_ext.verification import steps as verify_steps
from aimet_ext.verification.layers import compared_layers
from aimet_ext.verification.report import Thresholds, VerifyReport
from aimet_ext.verification.steps import Verification
from aimet_ext.verification.verify import REPORT, target_of, verify

pytest.importorskip("aimet_torch")
pytest.importorskip("aimet_onnx")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "UserWarning", "FutureWarning")
]

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [torch.randint(0, 128, (1, 16), generator=GENERATOR) for _ in range(4)]
Q0 = "model.model.layers.0.self_attn.q_proj"
LOOSE = Thresholds()


def exported(model: Any, path: pathlib.Path) -> pathlib.Path:
    """Export a sim of a model with LPBQ weights and 16-bit activations."""
    prepared = aimet_ext.prepare_model(model, mask_value=-100.0)
    sim = aimet_ext.create_sim(prepared, BATCHES[0], weights=QSpec(granularity=LPBQ(32)))
    sim.compute_encodings(lambda module: [module(batch) for batch in BATCHES])
    aimet_ext.export(sim, path, "m", BATCHES[0])
    return path


@pytest.fixture(scope="module")
def folder(
    tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """Export of a model with biases."""
    return exported(tiny_model("qwen2"), tmp_path_factory.mktemp("verify") / "out")


@pytest.fixture
def without_qnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_steps, "is_available", lambda: False)


@pytest.fixture(scope="module")
def prepared(
    folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Verification]:
    """Return a function that gives a verification with all done but compiling and running."""
    feeds = graph_feeds(BATCHES, read_input_specs(folder / "m.onnx"))
    run = Verification(
        folder,
        tmp_path_factory.mktemp("work"),
        find_target("htp_v75"),
        feeds,
        count=2,
        real=True,
        reference=None,
        thresholds=LOOSE,
        kv_bitwidth=None,
    )
    for step in (run.rebuild, run.same_numbers, run.write):
        step()
    assert run.findings == []

    def again(thresholds: Thresholds = LOOSE) -> Verification:
        other = copy.copy(run)
        other.findings, other.hints, other.layers = [], [], []
        other.thresholds = thresholds
        return other

    return again


def finish(run: Verification) -> Verification:
    for step in (run.compile, run.outputs, run.compare_layers):
        step()
    return run


@pytest.fixture(scope="module")
def sound(folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The report on a sound export where QNN is not installed, and the folder that it wrote."""
    output = tmp_path_factory.mktemp("verified") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_steps, "is_available", lambda: False)
        return verify(folder, BATCHES, output=output, thresholds=LOOSE), output


# ----------------------------------------------------------------------------- what a report says


def test_a_sound_export_passes_and_the_report_says_where_it_ran(sound: Any) -> None:
    report, _ = sound
    assert report.passed, str(report)
    assert report.backend == "onnxruntime CPU"
    assert "passed on the CPU; nothing was run for htp_v79" in str(report)  # as it was exported
    assert [step.status for step in report.steps] == ["passed"] * 8
    assert report.first_divergence is None
    assert report.measures.device_sim_db > report.measures.sim_float_db + 15
    assert report.measures.device_onnx_db > 40


def test_the_target_is_that_of_the_export(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert target_of(folder).name == "htp_v79"
    settings = read_manifest(folder)["settings"]
    for config, name in (("htp_v73", "htp_v73"), ({"defaults": {}}, "htp_v79")):
        (other := tmp_path / name).mkdir()
        write_manifest(other, "export", settings={**settings, "config_file": config})
        assert target_of(other).name == name
    assert target_of(tmp_path / "absent").name == "htp_v79"


def test_every_linear_layer_is_compared_under_its_modules_name(sound: Any) -> None:
    report, _ = sound
    names = {layer.name for layer in report.layers}
    linear = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    assert {f"model.model.layers.{i}.{name}" for i in (0, 1) for name in linear} <= names
    assert "model.lm_head" in names
    assert sum(layer.op_type == "Softmax" for layer in report.layers) == 2
    assert min(layer.sqnr_db for layer in report.layers) > 40


def test_perplexity_is_that_of_the_sim(sound: Any, folder: pathlib.Path) -> None:
    report, _ = sound
    expected = aimet_ext.evaluate_perplexity(aimet_ext.load(folder), BATCHES)
    assert report.measures.perplexity_sim == pytest.approx(expected, rel=1e-5)
    assert report.measures.perplexity_device == pytest.approx(expected, rel=5e-3)


def test_the_folder_holds_model_encodings_and_report(sound: Any) -> None:
    report, output = sound
    manifest = read_manifest(output)
    assert manifest["kind"] == "verified"
    assert manifest["passed"] is True
    assert {"m.qdq.onnx", "m.encodings", REPORT} <= set(manifest["files"])
    assert json.loads((output / REPORT).read_text("utf-8")) == report.to_json()
    encoded = json.loads((output / "m.encodings").read_text("utf-8"))
    names = {entry["name"] for entry in encoded["activation_encodings"]}
    assert set(report.added) & names, "ranges that only the target needs belong to the file"


def test_made_up_inputs_give_no_perplexity(folder: pathlib.Path, without_qnn: None) -> None:
    report = verify(folder, windows=2, thresholds=LOOSE)
    assert report.measures.perplexity_device is None
    assert "made-up" in report.data
    assert report.measures.device_sim_db is not None


def test_the_float_model_may_be_given(
    prepared: Callable[..., Verification], tiny_model: Callable[..., Any]
) -> None:
    run = prepared()
    given = verify_steps.float_outputs(run.sim, tiny_model("qwen2"), run.windows)
    own = verify_steps.float_outputs(run.sim, None, run.windows)
    for one, two in zip(given, own, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * np.abs(two).max())
    with pytest.raises(TypeError, match=r"reference must be a torch module.*got str"):
        verify_steps.float_outputs(run.sim, "llama", run.windows)


# ----------------------------------------------------------------------------- faults on the way


def doctored(path: pathlib.Path, change: Callable[[Any], None]) -> pathlib.Path:
    """A copy of a model that computes something else, as a faulty compiler would."""
    model = onnx.load(str(path))
    change(model)
    other = path.with_name("doctored.onnx")
    onnx.save(model, str(other))
    return other


def run_on(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    """Have the CPU, in the place of a device, run a changed model."""

    class Faulty(verify_steps.CpuSession):
        def __init__(self, model: pathlib.Path, extra_outputs: Any = ()) -> None:
            super().__init__(doctored(model, change), extra_outputs)

    monkeypatch.setattr(verify_steps, "CpuSession", Faulty)


def without_bias(layer: str) -> Callable[[Any], None]:
    """Have the values of a layer's bias be zero, or the integer that stands for it."""

    def change(model: Any) -> None:
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        (name,) = [n for n in stored if f"{layer}.bias" in n and n.endswith(("_q", ".bias"))]
        value = onnx.numpy_helper.to_array(stored[name])
        zero = stored.get(f"{name.removesuffix('_q')}_zero_point")
        fill = 0 if zero is None else onnx.numpy_helper.to_array(zero)
        assert np.any(value != fill)
        value = np.broadcast_to(fill, value.shape).astype(value.dtype)
        stored[name].CopyFrom(onnx.numpy_helper.from_array(value, name))

    return change


@pytest.mark.parametrize("layer", ["layers.0.self_attn.k_proj", "layers.1.self_attn.v_proj"])
def test_a_dropped_bias_is_named(
    prepared: Callable[..., Verification],
    without_qnn: None,
    monkeypatch: pytest.MonkeyPatch,
    layer: str,
) -> None:
    run_on(monkeypatch, without_bias(layer))
    run = finish(prepared())
    assert run.first_divergence == f"model.model.{layer}"
    assert run.cause is not None
    assert "is dropped" in run.cause
    (finding,) = [each for each in run.findings if each.check == "layer"]
    assert "keep MatMul and Add apart" in finding.remedy


def test_a_known_cause_counts_before_a_larger_loss_without_one(
    prepared: Callable[..., Verification], without_qnn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on(monkeypatch, without_bias("layers.0.self_attn.k_proj"))
    monkeypatch.setattr(verify_steps, "culprit", lambda *_: 0)
    run = finish(prepared())
    assert run.first_divergence == "model.model.layers.0.self_attn.k_proj" != run.layers[0].name
    assert run.cause is not None and "is dropped" in run.cause


def test_a_wrong_weight_is_found_and_no_cause_made_up(
    prepared: Callable[..., Verification], without_qnn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(model: Any) -> None:
        node = next(n for n in model.graph.node if n.name.endswith("layers.1/mlp/up_proj/MatMul"))
        node.input[1] = next(
            n.input[1] for n in model.graph.node if n.name.endswith("layers.1/mlp/gate_proj/MatMul")
        )

    run_on(monkeypatch, change)
    run = finish(prepared())
    assert run.first_divergence == "model.model.layers.1.mlp.up_proj"
    assert run.cause is None
    assert {finding.check for finding in run.findings} >= {"output", "layer"}
    assert "the cause is not known" in str(run.findings[-1])
    layer = next(each for each in run.findings if each.check == "layer")
    wrong = [c for c in run.layers if not LOOSE.near_enough(c.sqnr_db, c.error_steps)]
    said = rf"{len(wrong)} of {len(run.layers)} are not: the first is {wrong[0].name} with "
    assert said + f"{wrong[0].sqnr_db:.1f} dB" in layer.message
    assert "must have 25.0 dB of signal to noise or more" in layer.message
    assert wrong[0].sqnr_db < LOOSE.layer_db and wrong[0].error_steps >= 1


def test_a_changed_file_stops_before_anything_runs(
    folder: pathlib.Path, tmp_path: pathlib.Path, without_qnn: None
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "m.onnx").write_bytes((broken / "m.onnx").read_bytes()[:-100])
    report = verify(broken, BATCHES, output=tmp_path / "out")
    assert not report.passed
    assert report.findings
    assert report.steps[0].status == "failed"
    assert {step.status for step in report.steps[1:]} == {"not run"}
    assert json.loads((tmp_path / "out" / REPORT).read_text("utf-8")) == report.to_json()


def test_what_htp_refuses_is_named(
    prepared: Callable[..., Verification], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model still runs on the CPU, so that the numbers tell the model from the target."""
    node = "/model/model/layers.0/self_attn/q_proj/MatMul"

    def refuse(*_: Any, **__: Any) -> None:
        raise HtpRejected("no", target="htp_v75", nodes=[(node, "MatMul")], reason="no such kernel")

    monkeypatch.setattr(verify_steps, "is_available", lambda: True)
    monkeypatch.setattr(verify_steps, "HtpProcess", refuse)
    run = finish(prepared())
    assert run.backend == "onnxruntime CPU"
    (finding,) = run.findings
    assert (finding.check, finding.name) == ("assignment", Q0)
    assert finding.remedy
    assert run.measures.device_sim_db is not None


def test_a_crash_of_the_compiler_is_a_finding(
    prepared: Callable[..., Verification], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise HtpCrashed("QNN was to compile it and crashed (SIGSEGV)")

    monkeypatch.setattr(verify_steps, "is_available", lambda: True)
    monkeypatch.setattr(verify_steps, "HtpProcess", crash)
    run = finish(prepared())
    assert [finding.check for finding in run.findings] == ["crash"]
    assert "SIGSEGV" in str(run.findings[0])
    assert run.layers, "the layers are compared on the CPU"


def test_thresholds_decide(prepared: Callable[..., Verification], without_qnn: None) -> None:
    strict = Thresholds(margin_db=300, enough_db=300, layer_db=0, top1=0, perplexity=1)
    assert [finding.check for finding in finish(prepared(strict)).findings] == ["output"]
    assert finish(prepared()).findings == []


# ----------------------------------------------------------------------------- what is refused


def test_wrong_arguments(folder: pathlib.Path, tmp_path: pathlib.Path, sound: Any) -> None:
    with pytest.raises(ValueError, match="htp_v75"):
        verify(folder, BATCHES, target="htp_v99")
    with pytest.raises(ValueError, match="windows must be"):
        verify(folder, BATCHES, windows=0)
    with pytest.raises(FileNotFoundError):
        verify(tmp_path, BATCHES)
    with pytest.raises(CorruptFileError, match="was written by verify; give the folder"):
        verify(sound[1], BATCHES)
    with pytest.raises(ValueError, match=r"\[1, 16\], got \[1, 8\]"):
        verify(folder, [torch.zeros(1, 8, dtype=torch.long)])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        verify(folder, BATCHES, output=tmp_path)


def test_a_threshold_must_be_a_number() -> None:
    with pytest.raises(ValueError, match="margin_db"):
        Thresholds(margin_db=float("nan"))
    with pytest.raises(ValueError, match="top1"):
        Thresholds(top1=99)


# ----------------------------------------------------------------------------- the command


def run_command(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["verify", *arguments])


def test_the_command_ends_with_the_verdict(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: VerifyReport = VerifyReport(folder="out", target="htp_v79", backend="HTP simulation")
    asked: dict[str, Any] = {}

    def fake(path: Any, dataloader: Any, **options: Any) -> VerifyReport:
        asked.update(options, path=path, dataloader=dataloader)
        return shown

    monkeypatch.setattr("aimet_ext.verification.verify.verify", fake)
    done = run_command(str(folder), "--target", "htp_v79", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["passed"] is True
    assert (asked["target"], asked["dataloader"]) == ("htp_v79", None)
    failed = verify_report_with_a_fault(shown)
    monkeypatch.setattr("aimet_ext.verification.verify.verify", lambda *_, **__: failed)
    done = run_command(str(folder))
    assert done.exit_code == 1
    assert "FAILED: 1 fault" in done.stdout


def verify_report_with_a_fault(report: VerifyReport) -> VerifyReport:
    return replace(report, findings=(Finding("a", "b", "c", "d"),))


def test_the_command_takes_text(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_tokenizer = tmp_path / "export"
    shutil.copytree(folder, with_tokenizer)
    for file in aimet_ext.examples.model_dir().glob("tokenizer*"):
        shutil.copy(file, with_tokenizer)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a small red house. " * 40, "utf-8")
    asked: list[Any] = []

    def fake(path: Any, dataloader: Any, **_: Any) -> VerifyReport:
        asked.extend(dataloader)
        return VerifyReport(folder=str(path), target="htp_v75")

    monkeypatch.setattr("aimet_ext.verification.verify.verify", fake)
    done = run_command(
        str(with_tokenizer), "--text", str(text), "--windows", "2", "--calibration-windows", "3"
    )
    assert done.exit_code == 0, done.output
    assert [tuple(batch.shape) for batch in asked] == [(1, 16)] * 3


# ----------------------------------------------------------------------------- on HTP itself


@pytest.mark.skipif(not is_available(), reason="onnxruntime-qnn is not installed")
@pytest.mark.slow
def test_a_model_with_biases_runs_on_htp(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Every node is assigned, the context binary is there, and the numbers are the sim's."""
    report = verify(folder, BATCHES, target="htp_v79", output=tmp_path / "out", thresholds=LOOSE)
    assert report.passed, str(report)
    assert report.backend == "HTP simulation"
    assert report.fallbacks == ()
    assert report.measures.device_sim_db > report.measures.sim_float_db + 15
    assert (tmp_path / "out" / "m.htp_v79_qnn.bin").stat().st_size > 10_000


@pytest.mark.skipif(not is_available(), reason="onnxruntime-qnn is not installed")
@pytest.mark.slow
def test_a_bias_that_htp_drops_is_named(prepared: Callable[..., Verification]) -> None:
    """HTP takes LPBQ weights with a float bias, fused, and leaves the bias out without a word."""
    run = prepared()
    run.qdq = doctored(run.qdq, lambda model: fuse(model, "layers.0/self_attn/q_proj"))
    run.facts = compared_layers(onnx.load(str(run.qdq)), {f"{Q0}.weight_0": Q0})
    finish(run)
    assert run.backend == "HTP simulation", "accepted"
    assert run.first_divergence == Q0, "and wrong"
    assert run.cause is not None
    assert "bias (float32) is dropped" in run.cause


def fuse(model: Any, layer: str) -> None:
    """Leave nothing between a layer's MatMul and Add, and its bias float, as some exports do."""
    made = {name: node for node in model.graph.node for name in node.output}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    add = next(node for node in model.graph.node if node.name.endswith(f"{layer}/Add"))
    for index, name in enumerate(add.input):
        integers, scale, zero = made[name].input
        if integers in stored:
            value, step, middle = (
                onnx.numpy_helper.to_array(stored[each]).astype(np.float64)
                for each in (integers, scale, zero)
            )
            floats = ((value - middle) * step).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(floats, "float_bias"))
            add.input[index] = "float_bias"
            unread = [made[name]]
        else:
            add.input[index] = made[integers].input[0]
            unread = [made[name], made[integers]]
        for node in unread:
            model.graph.node.remove(node)
