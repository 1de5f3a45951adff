"""Faults planted in an export are found and named; a sound export is left in peace."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import aimet_ext
from aimet_ext import LPBQ, QSpec
from aimet_ext.errors import CorruptFileError, Finding
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.manifest import relist_files
from aimet_ext.integrity.check import check_integrity
from aimet_ext.sim.protocol import adapt

pytest.importorskip("aimet_torch")
onnx = pytest.importorskip("onnx")

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
import faults  # noqa: E402

IDS = torch.arange(32).reshape(2, 16) * 3 % 128
SEEDS = range(4)


def ledger(modules: tuple[str, ...]) -> Ledger:
    """Two techniques, each with a scale of its own for every module."""
    made = Ledger("cd" * 32)
    draw = torch.Generator().manual_seed(0)
    for technique in ("smooth", "omniquant"):
        for module in modules:
            scale = torch.exp(torch.randn(64, generator=draw))
            made.record(technique, "block", module, "norm_qkv", [(module, "in", scale)], size=64)
    return made


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of AIMET and torch.onnx; what checks a folder must have none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def of_torch(
    tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """Biases, LPBQ, scales, and weights in a file beside the model."""
    layers = [f"model.model.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in "qkv"]
    folder = tmp_path_factory.mktemp("torch") / "out"
    with quiet():
        sim = aimet_ext.create_sim(tiny_model("qwen2"), IDS, weights=QSpec(granularity=LPBQ(32)))
        sim.compute_encodings(lambda module: module(IDS))
        adapt(sim).ledger = ledger(tuple(layers))
        aimet_ext.export(sim, folder, "m-1.5", IDS, aimet_keys=True, hf_checkpoint=True)
    path = folder / "m-1.5.onnx"
    onnx.save_model(
        onnx.load(path), str(path), save_as_external_data=True, location="m-1.5.onnx.data"
    )
    relist_files(folder)
    return folder


@pytest.fixture(scope="module")
def of_onnx(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The same for a simulation of an ONNX model, and a QDQ model."""
    aimet_onnx = pytest.importorskip("aimet_onnx")
    from onnx_models import mlp_model

    x = {"x": np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)}
    model = mlp_model((64, 96, 64, 64), bias="add")
    folder = tmp_path_factory.mktemp("onnx") / "out"
    with quiet():
        sim = aimet_onnx.QuantizationSimModel(model, param_type="int4", activation_type="int16")
        sim.compute_encodings([x])
        adapt(sim).ledger = ledger(("fc0", "fc2"))
        aimet_ext.export(sim, folder, "m-1.5", x, external_data=True)
    return folder


@pytest.fixture
def sound(request: pytest.FixtureRequest, framework: str) -> pathlib.Path:
    """An export as it was written."""
    folder: pathlib.Path = request.getfixturevalue(f"of_{framework}")
    return folder


both = pytest.mark.parametrize("framework", ["torch", "onnx"])


def named(findings: list[Finding], expected: set[str]) -> list[Finding]:
    """Findings, not those of the manifest, with one of the names in them."""
    return [
        finding
        for finding in findings
        if finding.check not in ("manifest", "record")
        and any(name in f"{finding.name} {finding.message}" for name in expected)
    ]


@both
def test_a_sound_export_has_no_findings(sound: pathlib.Path) -> None:
    assert check_integrity(sound) == []


@both
def test_neither_has_one_without_fingerprints(tmp_path: pathlib.Path, sound: pathlib.Path) -> None:
    shutil.copytree(sound, tmp_path / "out")
    faults.cover_up(tmp_path / "out", record=True)
    assert check_integrity(tmp_path / "out") == []


@both
@pytest.mark.parametrize("number", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("file", ["quantizers", "scales", "ledger"])
def test_numbers_that_make_no_grid_are_refused_and_named(
    tmp_path: pathlib.Path, sound: pathlib.Path, file: str, number: float
) -> None:
    """In a file that is sealed anew: every reader names it and the tensor."""
    shutil.copytree(sound, tmp_path / "out")
    path = tmp_path / "out" / f"{file}.safetensors"
    tensors, schema, fields = faults.read_sealed(path)
    name = next(n for n in tensors if file != "quantizers" or n.endswith(".max") or "range." in n)
    if name.endswith(".max"):  # a range of width 0, or turned over
        low = float(tensors[name.replace(".max", ".min")].flatten()[0])
        number = low + number if number <= 0 else number
    tensors[name].flatten()[0] = number
    faults.write_sealed(path, schema, tensors, fields)
    faults.cover_up(tmp_path / "out")
    tensor = name.removeprefix("range.").removesuffix(".max")
    said = r"_proj \(in\)|fc0 \(in\)" if file == "ledger" else re.escape(tensor)
    with pytest.raises(CorruptFileError, match=rf"{file}\.safetensors: .*({said})"):
        if file == "scales":
            aimet_ext.load_scales(tmp_path / "out")
        elif file == "ledger":
            Ledger.load(tmp_path / "out")
        else:
            aimet_ext.load(tmp_path / "out")
    found = [f for f in check_integrity(tmp_path / "out") if f.check == "numbers"]
    assert found and all(tensor in finding.name for finding in found)


@both
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", faults.FAULTS)
def test_a_planted_fault_is_named(
    tmp_path: pathlib.Path, sound: pathlib.Path, framework: str, kind: str, seed: int
) -> None:
    """Though the manifest, and a sealed file's hash, were written anew."""
    expected = faults.plant(kind, sound, tmp_path / "out", seed)
    faults.cover_up(tmp_path / "out")
    findings = check_integrity(tmp_path / "out")
    assert {finding.check for finding in findings} & {"manifest"} == set()
    assert named(findings, expected), [str(finding) for finding in findings]


@both
@pytest.mark.parametrize("kind", ["dropped bias", "truncated external data"])
def test_files_contradict_each_other(
    tmp_path: pathlib.Path, sound: pathlib.Path, framework: str, kind: str
) -> None:
    """With nothing recorded of single tensors."""
    for seed in range(6):
        folder = tmp_path / str(seed)
        expected = faults.plant(kind, sound, folder, seed)
        faults.cover_up(folder, record=True)
        assert named(check_integrity(folder), expected), seed


def test_what_a_finding_says(tmp_path: pathlib.Path, of_torch: pathlib.Path) -> None:
    """The tensor, the file, what was required and what came."""
    folder = tmp_path / "out"
    shutil.copytree(of_torch, folder)
    path = folder / "m-1.5.encodings"
    document = json.loads(path.read_text())
    one, two = document["activation_encodings"][1:3]
    one["offset"] = [-offset for offset in one["offset"]]
    two["scale"] = [2 * scale for scale in two["scale"]]
    path.write_text(json.dumps(document))
    found = {f.name: f for f in check_integrity(folder)}
    assert found["m-1.5.encodings"].check == "manifest"
    wrong = found[one["name"]]
    assert wrong.check == "offset" and "sign" in wrong.message
    assert "m-1.5.encodings" in wrong.message and "export it again" in wrong.remedy
    assert found[two["name"]].check == "encodings"
    assert f"{two['scale'][0]:.6g}" in found[two["name"]].message
    assert set(found) == {"m-1.5.encodings", one["name"], two["name"]}


def test_swapped_encodings_name_both(tmp_path: pathlib.Path, of_torch: pathlib.Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(of_torch, folder)
    path = folder / "m-1.5.2.0.0.encodings"
    document = json.loads(path.read_text())
    same = [e for e in document["encodings"] if "q_proj.weight" in e["name"]]
    names = [entry["name"] for entry in same]
    for entry, name in zip(same, reversed(names), strict=True):
        entry["name"] = name
    path.write_text(json.dumps(document))
    relist_files(folder)
    findings = check_integrity(folder)
    assert [(f.check, f.name) for f in findings] == [("swapped", name) for name in names]
    assert names[1] in findings[0].message and names[0] in findings[1].message


def test_weights_trained_on_are_stale(tmp_path: pathlib.Path, of_torch: pathlib.Path) -> None:
    """By a hundredth, in both files alike: no range can show it, what was recorded does."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "out"
    shutil.copytree(of_torch, folder)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = onnx.load(folder / "m-1.5.onnx")
    place = json.loads((folder / "manifest.json").read_text())["onnx_constants"][name]
    proto = next(proto for proto in model.graph.initializer if proto.name == place)
    proto.CopyFrom(onnx.numpy_helper.from_array(tensors[name].T.numpy().copy(), place))
    onnx.save(model, folder / "m-1.5.onnx")
    relist_files(folder)
    (finding,) = check_integrity(folder)
    assert (finding.check, finding.name) == ("stale", name)
    assert "set the range again" in finding.remedy


def test_weights_of_another_size_are_stale_without_record(
    tmp_path: pathlib.Path, of_onnx: pathlib.Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(of_onnx, folder)
    path = folder / "m-1.5.onnx"
    model = onnx.load(path)
    proto = next(proto for proto in model.graph.initializer if proto.name == "fc1.weight")
    values = onnx.numpy_helper.to_array(proto)
    proto.CopyFrom(onnx.numpy_helper.from_array(values * 10, proto.name))
    onnx.save(model, path)
    faults.cover_up(folder, record=True)
    findings = {f.check: f for f in check_integrity(folder)}
    assert findings["stale"].name == "fc1.weight"
    assert "outside its range" in findings["stale"].message


def test_the_record_itself_is_watched(tmp_path: pathlib.Path, of_onnx: pathlib.Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(of_onnx, folder)
    path = folder / "fingerprints.json"
    path.write_text(path.read_text().replace('"fc0.bias": "', '"fc0.bias": "0', 1))
    relist_files(folder)
    assert [(f.check, f.name) for f in check_integrity(folder)] == [("record", path.name)]
    path.unlink()
    relist_files(folder)
    assert [(f.check, f.name) for f in check_integrity(folder)] == [("record", path.name)]


@pytest.mark.parametrize("name", ["quantizers.safetensors", "m-1.5.encodings", "m-1.5.onnx"])
@pytest.mark.parametrize("how", ["cut", "absent"])
def test_unreadable_files_are_findings(
    tmp_path: pathlib.Path, of_onnx: pathlib.Path, name: str, how: str
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(of_onnx, folder)
    path = folder / name
    path.write_bytes(path.read_bytes()[:-200])
    if how == "absent":
        path.unlink()
    relist_files(folder)
    assert ("file", name) in {(f.check, f.name) for f in check_integrity(folder)}


def test_no_export_is_an_error(tmp_path: pathlib.Path, of_onnx: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        check_integrity(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(CorruptFileError):
        check_integrity(tmp_path)


def test_a_finding_as_text_and_json() -> None:
    finding = Finding("bias", "fc0.bias", "was dropped", "export it again")
    assert str(finding) == "bias: fc0.bias: was dropped; export it again"
    assert finding.to_json()["name"] == "fc0.bias"
