"""The folder of an ONNX sim holds what the sim computes, for every reader, or is not there."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import aimet_ext
from aimet_ext.artifact.inspect import inspect_export
from aimet_ext.artifact.onnx_export import read_onnx_quantizers
from aimet_ext.errors import CorruptFileError
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.manifest import read_manifest
from aimet_ext.sim.onnx.files import name_nodes
from aimet_ext.sim.onnx.state import deviation, differences
from aimet_ext.sim.protocol import adapt

onnx = pytest.importorskip("onnx")
aimet_onnx = pytest.importorskip("aimet_onnx")

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from onnx_models import (  # noqa: E402
    conv_model,
    exported_llama,
    genai_inputs,
    genai_llama,
    mlp_model,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
X = {"x": np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)}
IDS = {
    "input_ids": np.arange(32).reshape(2, 16) * 3 % 128,
    "attention_mask": np.ones((2, 16), np.int64),
}


def granularity(kind: str) -> Any:
    from aimet_onnx.defs import LPBQ, Blockwise, PerChannel, PerTensor

    return {
        "tensor": PerTensor(),
        "channel": PerChannel(),
        "block": Blockwise(16),
        "lpbq": LPBQ(16, scale_bits=4),
    }[kind]


def set_weights(sim: Any, bits: int, kind: str, *, symmetric: bool = True) -> None:
    """One grid for all 2-D weights that have a quantizer."""
    from aimet_onnx.common.defs import qtype
    from aimet_onnx.defs import QSpec

    for name in sim.param_names:
        quantizer = sim.qc_quantize_op_dict[name]
        layout = quantizer.tensor_quantizer_params
        if quantizer.enabled and layout is not None and len(layout.tensor_shape) == 2:
            quantizer.set_bitwidth(bits)
            quantizer.set_qspec(QSpec(qtype.int(bits), granularity(kind), symmetric))


def simulated(model: Any = None, feed: Any = X, grid: Any = None, **options: Any) -> Any:
    """A sim with ranges in all quantizers."""
    model = mlp_model((64, 96, 32), bias="add") if model is None else model
    settings = {"param_type": "int4", "activation_type": "int16", **options}
    sim = aimet_onnx.QuantizationSimModel(model, **settings)
    if grid is not None:
        set_weights(sim, *grid)
    sim.compute_encodings([feed])
    return sim


def outputs(sim: Any, feed: Any = X) -> Any:
    return sim.session.run(None, feed)[0]


def weights_only(sim: Any) -> Any:
    for name in sim.activation_names:
        sim.qc_quantize_op_dict[name].enabled = False
    return sim


def run(path: pathlib.Path) -> Any:
    runtime = pytest.importorskip("onnxruntime")
    return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, X)[0]


def quantized(sim: Any, name: str) -> Any:
    """A weight as the sim computes with it."""
    graph = sim.model.model.graph
    proto = next(proto for proto in graph.initializer if proto.name == name)
    return sim.qc_quantize_op_dict[name].quantize_dequantize(onnx.numpy_helper.to_array(proto))


@pytest.fixture(scope="module")
def sim() -> Any:
    """Tests must leave it as it is."""
    return simulated(grid=(4, "lpbq"))


@pytest.fixture(scope="module")
def folder(sim: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("export") / "out"
    aimet_ext.export(sim, path, "net-1.5", X, aimet_keys=True)
    return path


def test_what_a_folder_holds(folder: pathlib.Path) -> None:
    manifest = read_manifest(folder)
    assert sorted(manifest["files"]) == [
        "aimet_omniquant_metadata.safetensor",
        "fingerprints.json",
        "ledger.safetensors",
        "net-1.5.2.0.0.encodings",
        "net-1.5.encodings",
        "net-1.5.onnx",
        "net-1.5.qdq.onnx",
        "quantizers.safetensors",
        "quantsim.json",
        "scales.safetensors",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert manifest["framework"] == "onnx" and len(manifest["origin"]) == 64
    assert manifest["containers"] == {} and manifest["bias"] == "float"
    checks = manifest["checks"]
    assert checks["constants_equal"] == 4
    assert checks["net-1.5.encodings_relative_deviation"] == 0
    assert checks["net-1.5.2.0.0.encodings_relative_deviation"] == 0
    assert checks["onnxruntime_relative_deviation"] < 0.1 * checks["quantization_error"]


def test_the_float_model_holds_the_float_weights(sim: Any, folder: pathlib.Path) -> None:
    model = onnx.load(folder / "net-1.5.onnx")
    onnx.checker.check_model(model)
    assert {node.op_type for node in model.graph.node} == {"MatMul", "Add", "Relu"}
    mine = {proto.name: proto for proto in sim.model.model.graph.initializer}
    assert len(model.graph.initializer) == 4
    for proto in model.graph.initializer:
        value = onnx.numpy_helper.to_array(proto)
        assert np.array_equal(value, onnx.numpy_helper.to_array(mine[proto.name]))


GRIDS = [
    (4, "tensor", True),
    (4, "channel", False),
    (4, "block", True),
    (4, "block", False),
    (4, "lpbq", True),
    (8, "channel", True),
    (8, "block", False),
    (3, "channel", True),
    (3, "channel", False),
    (3, "lpbq", True),
    (2, "block", True),
    (2, "tensor", False),
    (6, "block", True),
]


@pytest.mark.parametrize(("bits", "kind", "symmetric"), GRIDS)
def test_every_grid_is_read_back_exactly(
    tmp_path: pathlib.Path, bits: int, kind: str, symmetric: bool
) -> None:
    """By AIMET's own readers with their defaults, and by ``load``."""
    from aimet_onnx.quantsim import load_encodings_to_sim

    sim = aimet_onnx.QuantizationSimModel(mlp_model((64, 96, 32)), activation_type="int16")
    set_weights(sim, bits, kind, symmetric=symmetric)
    sim.compute_encodings([X])
    manifest = aimet_ext.export(sim, tmp_path / "out", "m", X)
    width = 4 if bits < 4 else 8 if bits > 4 else 4
    held = [bits, width] if bits in (2, 3, 6) else None
    assert manifest["containers"] == ({"fc0.weight": held, "fc1.weight": held} if held else {})
    for name in ("m.encodings", "m.2.0.0.encodings"):
        other = aimet_onnx.QuantizationSimModel(onnx.load(tmp_path / "out" / "m.onnx"))
        load_encodings_to_sim(other, str(tmp_path / "out" / name), strict=False)
        assert np.array_equal(quantized(other, "fc1.weight"), quantized(sim, "fc1.weight"))
        assert np.array_equal(outputs(other), outputs(sim))
    qdq = onnx.load(tmp_path / "out" / "m.qdq.onnx")
    types = {p.data_type for p in qdq.graph.initializer if len(p.dims) == 2}
    names = {onnx.TensorProto.DataType.Name(kind) for kind in types} - {"FLOAT"}
    assert names >= {f"{'' if symmetric else 'U'}INT{width}"}
    if not held:
        onnx.save(sim.to_onnx_qdq(prequantize_constants=True), tmp_path / "aimet.onnx")
        theirs = run(tmp_path / "aimet.onnx")
        np.testing.assert_allclose(run(tmp_path / "out" / "m.qdq.onnx"), theirs, rtol=0, atol=1e-6)
    back = aimet_onnx.QuantizationSimModel.from_onnx_qdq(qdq, strict=True)
    np.testing.assert_allclose(outputs(back), outputs(sim), rtol=1e-3, atol=1e-3)

    loaded = aimet_ext.load(tmp_path / "out")
    assert np.array_equal(outputs(loaded), outputs(sim))
    assert loaded.qc_quantize_op_dict["fc0.weight"].bitwidth == bits


def test_three_bits_travel_as_integers_of_four(tmp_path: pathlib.Path) -> None:
    """Codes -4 … 3 in the QDQ model, the file's weights on the grid, the sim's in float again."""
    sim = simulated(grid=(3, "channel"))
    weight = {p.name: onnx.numpy_helper.to_array(p) for p in sim.model.model.graph.initializer}
    aimet_ext.export(sim, tmp_path / "out", "m", X)
    graph = onnx.load(tmp_path / "out" / "m.qdq.onnx").graph
    codes = [p for p in graph.initializer if p.data_type == onnx.TensorProto.INT4]
    codes = [onnx.numpy_helper.to_array(p).astype(int) for p in codes if len(p.dims) == 2]
    assert len(codes) == 2
    assert {int(code.min()) for code in codes} == {-4}
    assert {int(code.max()) for code in codes} <= {3, 4 - 1}
    for proto in onnx.load(tmp_path / "out" / "m.onnx").graph.initializer:
        if proto.name == "fc0.weight":
            assert np.array_equal(onnx.numpy_helper.to_array(proto), quantized(sim, "fc0.weight"))
    entry = json.loads((tmp_path / "out" / "m.encodings").read_text())["param_encodings"][0]
    assert entry["bw"] == 4
    loaded = aimet_ext.load(tmp_path / "out")
    for proto in loaded.model.model.graph.initializer:
        assert np.array_equal(onnx.numpy_helper.to_array(proto), weight[proto.name])


@pytest.mark.parametrize("config", [None, "htp_v81"])
@pytest.mark.parametrize("bias", ["float", "int32"])
@pytest.mark.parametrize("build", ["qwen2", "conv"])
def test_real_graphs(tmp_path: pathlib.Path, config: Any, bias: Any, build: str) -> None:
    """Fused supergroups, tied quantizers, constants in nodes, an opset that QDQ has to raise."""
    if build == "conv":
        model = conv_model()
        feed = {"x": np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    else:
        model, feed = exported_llama(layers=1, bias=True).model, IDS
    sim = simulated(model, feed, config_file=config)
    before, session = outputs(sim, feed), set(vars(sim))
    aimet_ext.export(sim, tmp_path / "out", "m", feed, bias=bias)
    assert np.array_equal(outputs(sim, feed), before) and set(vars(sim)) == session
    encoded = json.loads((tmp_path / "out" / "m.2.0.0.encodings").read_text())["encodings"]
    assert any(e["output_dtype"] == "int32" for e in encoded) == (bias == "int32")
    assert np.array_equal(outputs(aimet_ext.load(tmp_path / "out"), feed), before)


def test_graphs_of_onnxruntimes_own_operators(tmp_path: pathlib.Path) -> None:
    """AIMET needs a batch to tell their types, which the folder keeps."""
    model, _ = genai_llama()
    feed = genai_inputs(model, IDS["input_ids"])
    sim = simulated(model, feed, grid=(4, "lpbq"), dummy_input=feed)
    aimet_ext.export(sim, tmp_path / "out", "m", feed)
    loaded = aimet_ext.load(tmp_path / "out")
    for one, two in zip(sim.session.run(None, feed), loaded.session.run(None, feed), strict=True):
        assert np.array_equal(one, two)


def test_weights_alone(tmp_path: pathlib.Path) -> None:
    sim = weights_only(simulated())
    manifest = aimet_ext.export(sim, tmp_path / "out", "m", X)
    assert manifest["checks"]["onnxruntime_relative_deviation"] < 1e-5
    document = json.loads((tmp_path / "out" / "m.encodings").read_text())
    assert document["activation_encodings"] == []
    assert np.array_equal(outputs(aimet_ext.load(tmp_path / "out")), outputs(sim))
    with pytest.raises(ValueError, match=r"input quantized .*fc0\.bias, fc1\.bias"):
        aimet_ext.export(sim, tmp_path / "out", "m", X, bias="int32")
    assert read_manifest(tmp_path / "out") == manifest


def test_float16_activations_are_cast_again(tmp_path: pathlib.Path) -> None:
    """Encodings 2.0.0 and QDQ have no word for them, and the manifest lists them."""
    sim = simulated(activation_type="float16")
    manifest = aimet_ext.export(sim, tmp_path / "out", "m", X)
    assert "x" in manifest["checks"]["float16_casts_only_in_1.0.0"]
    assert np.array_equal(outputs(aimet_ext.load(tmp_path / "out")), outputs(sim))


def test_float32_quantizers_are_refused_before_anything_is_written(tmp_path: pathlib.Path) -> None:
    """AIMET's operator rounds them to float16, and its exporter does not know them."""
    sim = simulated(activation_type="float32")
    with pytest.raises(ValueError, match="of float32, which AIMET rounds to float16; set them"):
        aimet_ext.export(sim, tmp_path / "out", "m", X)
    for quantizer in sim.qc_quantize_op_dict.values():
        quantizer.enabled = quantizer.enabled and quantizer.bitwidth < 32
    aimet_ext.export(sim, tmp_path / "out", "m", X)
    assert np.array_equal(outputs(aimet_ext.load(tmp_path / "out")), outputs(sim))


def test_a_half_precision_model_has_no_qdq_model(tmp_path: pathlib.Path) -> None:
    """AIMET writes none: its scales are float32."""
    model, half = mlp_model((64, 96, 32), bias="add"), {"x": X["x"].astype(np.float16)}
    for proto in model.graph.initializer:
        narrow = onnx.numpy_helper.to_array(proto).astype(np.float16)
        proto.CopyFrom(onnx.numpy_helper.from_array(narrow, proto.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    sim = simulated(model, half)
    with pytest.raises(ValueError, match=r"fc0\.bias \(float16\).*qdq=False"):
        aimet_ext.export(sim, tmp_path / "out", "m", half, qdq=True)
    manifest = aimet_ext.export(sim, tmp_path / "out", "m", half)
    assert "fc0.bias (float16)" in manifest["checks"]["qdq_left_out"]
    assert "m.qdq.onnx" not in manifest["files"]
    assert np.array_equal(outputs(aimet_ext.load(tmp_path / "out"), half), outputs(sim, half))


@pytest.mark.parametrize("form", ["tensor", "tuple", "labelled", "pair"])
def test_forms_of_a_batch(tmp_path: pathlib.Path, sim: Any, form: str) -> None:
    x = torch.from_numpy(X["x"])
    batch = {"tensor": x, "tuple": (x,), "labelled": {**X, "labels": x}, "pair": (X, 0)}[form]
    manifest = aimet_ext.export(sim, tmp_path / "out", "m", batch, qdq=False)
    assert "m.encodings" in manifest["files"]


def test_lpbq_of_other_bits_is_blocks_in_2_0_0(tmp_path: pathlib.Path) -> None:
    """1.0.0 says integer scales of any width, 2.0.0 and QDQ those of the weight's only."""
    from aimet_onnx.common.defs import qtype
    from aimet_onnx.defs import LPBQ, QSpec

    sim = aimet_onnx.QuantizationSimModel(mlp_model((64, 96, 32)), activation_type="int16")
    sim.qc_quantize_op_dict["fc0.weight"].set_qspec(
        QSpec(qtype.int(4), LPBQ(16, scale_bits=3), symmetric=True)
    )
    sim.compute_encodings([X])
    manifest = aimet_ext.export(sim, tmp_path / "out", "m", X)
    assert manifest["checks"]["lpbq_as_blocks_in_2.0.0"] == ["fc0.weight"]
    older = json.loads((tmp_path / "out" / "m.encodings").read_text())["param_encodings"]
    newer = json.loads((tmp_path / "out" / "m.2.0.0.encodings").read_text())["encodings"]
    assert {e["name"]: e["enc_type"] for e in older}["fc0.weight"] == "LPBQ"
    assert "y_scale" in next(e for e in newer if e["name"] == "fc0.weight")
    assert np.array_equal(outputs(aimet_ext.load(tmp_path / "out")), outputs(sim))


@pytest.mark.parametrize("external", [True, None])
def test_weights_beside_the_models(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, external: bool | None
) -> None:
    """On request, or because they are too many for one file."""
    monkeypatch.setattr("aimet_ext.sim.onnx.files.EXTERNAL_LIMIT", 1000)
    sim = simulated(mlp_model((64, 192, 32)))
    aimet_ext.export(sim, tmp_path / "out", "m", X, external_data=external)
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "elsewhere").iterdir()}
    assert sizes["m.onnx.data"] >= 4 * 64 * 192 and sizes["m.onnx"] < 4000
    assert sizes["m.qdq.onnx.data"] >= 64 * 192 // 2
    assert np.array_equal(outputs(aimet_ext.load(tmp_path / "elsewhere")), outputs(sim))


def test_replaced_values_are_not_read_from_the_file(
    sim: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protobuf would keep their room; the others are read."""
    from aimet_ext.onnx.index import stored_values
    from aimet_ext.sim.onnx import files as onnx_files

    aimet_ext.export(sim, tmp_path / "out", "m", X, qdq=False, external_data=True)
    path = tmp_path / "out" / "m.onnx"
    before = stored_values(onnx.load(path).graph)
    read: list[str] = []
    load = onnx.external_data_helper.load_external_data_for_tensor

    def watched(tensor: Any, *args: Any) -> None:
        read.append(tensor.name)
        load(tensor, *args)

    monkeypatch.setattr(onnx.external_data_helper, "load_external_data_for_tensor", watched)
    new = np.ones((64, 96), np.float32)
    found = stored_values(onnx_files.load_with(path, [("fc0.weight", new)]).graph)
    assert "fc0.weight" not in read and "fc1.weight" in read
    assert np.array_equal(onnx.numpy_helper.to_array(found["fc0.weight"]), new)
    assert onnx_files.same_value(found["fc1.weight"], before["fc1.weight"])


def test_state_settings_and_ledger_come_back(tmp_path: pathlib.Path) -> None:
    """Quantizers put out of use, frozen, tied and folded, and what was done to the sim."""
    sim = simulated(grid=(4, "block"))
    quantizers = sim.qc_quantize_op_dict
    quantizers["fc0.weight"].freeze_encodings()
    quantizers["y"].enabled = False
    quantizers["x"].set_bitwidth(12)
    sim.set_quantizers({"relu0_out": quantizers["x"]})
    sim.compute_encodings([X])
    ledger = Ledger("cd" * 32)
    sides = [("fc0", "out", torch.full((96,), 2.0)), ("fc1", "in", torch.full((96,), 0.5))]
    ledger.record("omniquant", "blocks.0", "fc0->fc1", "up_down", sides, size=96)
    ledger.log_run("omniquant", ["fc0"], settings={"seed": 3})
    adapt(sim).ledger, adapt(sim).settings = ledger, {"weights": None}
    manifest = aimet_ext.export(sim, tmp_path / "out", "m", X, qdq=False)
    assert "m.qdq.onnx" not in manifest["files"] and manifest["origin"] == "cd" * 32
    assert list(aimet_ext.load_scales(tmp_path / "out")) == ["fc0", "fc1"]

    loaded = aimet_ext.load(tmp_path / "out")
    assert np.array_equal(outputs(loaded), outputs(sim))
    found = loaded.qc_quantize_op_dict
    assert found["fc0.weight"].is_encoding_frozen() and not found["y"].enabled
    assert found["relu0_out"] is found["x"] and found["x"].bitwidth == 12
    assert adapt(loaded).settings == {"weights": None}
    with pytest.raises(ValueError, match="already applied"):
        adapt(loaded).ledger.check_can_apply("omniquant", ["fc0"])
    sim.fold_param_quantizers()
    aimet_ext.export(sim, tmp_path / "out", "m", X, qdq=False)
    assert np.array_equal(outputs(aimet_ext.load(tmp_path / "out")), outputs(sim))


def test_a_sim_of_the_same_model_is_loaded_into(tmp_path: pathlib.Path) -> None:
    sim, other = simulated(), simulated(mlp_model((64, 96, 32), bias="add", seed=1))
    aimet_ext.export(sim, tmp_path / "out", "m", X)
    assert not np.array_equal(outputs(sim), outputs(other))
    assert aimet_ext.load(tmp_path / "out", sim=other) is other
    assert np.array_equal(outputs(sim), outputs(other))
    narrow = simulated(mlp_model((64, 48, 32), bias="add"))
    before = outputs(narrow)
    with pytest.raises(ValueError, match=r"fc0\.weight has shape \(64, 48\) instead of \(64, 96\)"):
        aimet_ext.load(tmp_path / "out", sim=narrow)
    assert np.array_equal(outputs(narrow), before)


_OUTLIVES = """
import gc, sys
import numpy as np
import aimet_ext
feed = {"x": np.load(sys.argv[2])}
sim = aimet_ext.load(sys.argv[1])
expected = sim.session.run(None, feed)
decided = aimet_ext.load(sys.argv[1])
aimet_ext.apply_gptq(decided, [feed], progress=False)
sessions = [sim.session, decided.session]
del sim, decided
gc.collect()
others = [np.full(size, size) for size in range(1, 5000)]  # in the memory that is free now
found = [session.run(None, feed) for session in sessions for _ in range(20)]
assert all(np.array_equal(one, two) for one, two in zip(expected, found[0]))
"""


def test_a_session_outlives_its_simulation(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Its operators point at memory of the quantizers; without them the process would end."""
    np.save(tmp_path / "x.npy", X["x"])
    done = subprocess.run(
        [sys.executable, "-c", _OUTLIVES, str(folder), str(tmp_path / "x.npy")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("fault", ["scale", "weight", "lost", "range", "output"])
def test_a_wrong_file_is_noticed_and_the_old_folder_stays(
    tmp_path: pathlib.Path, sim: Any, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Plant errors in what is written; each is found when it is read back."""
    from aimet_ext.sim.onnx import files as onnx_files

    aimet_ext.export(sim, tmp_path / "out", "m", X)
    before, write, save = (
        read_manifest(tmp_path / "out"),
        onnx_files.write_encodings,
        onnx_files.save_float_model,
    )

    def spoilt(sim: Any, path: pathlib.Path, version: str, *args: Any, **options: Any) -> None:
        write(sim, path, version, *args, **options)
        document = json.loads(path.read_text())
        if version == "1.0.0":
            params, others = document["param_encodings"], document["activation_encodings"]
            if fault == "scale":
                params[0]["scale"][3] *= 1.001
            elif fault == "range":
                others[0]["scale"][0] *= 1.001
            elif fault == "lost":
                del params[1]
        path.write_text(json.dumps(document))

    def changed(sim: Any, path: pathlib.Path, *args: Any, **options: Any) -> None:
        save(sim, path, *args, **options)
        if fault == "weight":
            model = onnx.load(path)
            value = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
            value.flat[5] += 1e-6
            model.graph.initializer[0].raw_data = value.tobytes()
            onnx.save(model, path)

    monkeypatch.setattr(onnx_files, "write_encodings", spoilt)
    monkeypatch.setattr(onnx_files, "save_float_model", changed)
    if fault == "output":
        right = np.concatenate([outputs(sim), outputs(sim)])[:4] * 1.2
        monkeypatch.setattr("aimet_ext.artifact.onnx_export.run_file", lambda *_: [right])
    with pytest.raises(RuntimeError, match=r"^m\.(qdq\.onnx|onnx|encodings)"):
        aimet_ext.export(sim, tmp_path / "out", "m", X, qdq=True)
    assert read_manifest(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_qdq_model_that_deviates_is_left_out_and_said(
    tmp_path: pathlib.Path,
    sim: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wrong = outputs(sim) * 1.2
    monkeypatch.setattr("aimet_ext.artifact.onnx_export.run_file", lambda *_: [wrong])
    manifest = aimet_ext.export(sim, tmp_path / "out", "m", X)
    assert (
        "m.qdq.onnx" not in manifest["files"] and "deviates" in manifest["checks"]["qdq_left_out"]
    )
    assert "no QDQ model was written" in caplog.text


@pytest.mark.parametrize("place", ["deviation", "files.name_nodes", "differences"])
def test_a_fault_of_this_package_is_no_reason_to_leave_it_out(
    tmp_path: pathlib.Path, sim: Any, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Nor is a full disk; only what AIMET and onnxruntime refuse or compute otherwise is."""
    module = "sim.onnx" if "." in place else "artifact.onnx_export"
    count = [0]
    real = {"deviation": deviation, "differences": differences, "files.name_nodes": name_nodes}

    def broken(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        if place == "files.name_nodes" or count[0] > 3:  # behind both encodings files
            raise KeyError("a fault of ours")
        return real[place](*arguments, **options)

    monkeypatch.setattr(f"aimet_ext.{module}.{place}", broken)
    with pytest.raises(KeyError, match="a fault of ours"):
        aimet_ext.export(sim, tmp_path / "out", "m", X)
    assert not (tmp_path / "out").exists()


def test_what_aimet_cannot_convert_is_left_out(
    tmp_path: pathlib.Path, sim: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise NotImplementedError("an operator that AIMET does not convert")

    monkeypatch.setattr("aimet_ext.sim.onnx.files.encodings_to_onnx_qdq", refused)
    manifest = aimet_ext.export(sim, tmp_path / "out", "m", X)
    assert "NotImplementedError" in manifest["checks"]["qdq_left_out"]
    with pytest.raises(RuntimeError, match="AIMET's exporter failed with NotImplementedError"):
        aimet_ext.export(sim, tmp_path / "other", "m", X, qdq=True)


def test_a_qdq_model_counts_that_onnxruntime_computes_right(
    tmp_path: pathlib.Path, sim: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*_: Any, **__: Any) -> None:
        raise KeyError("an operator that AIMET does not read")

    monkeypatch.setattr("aimet_ext.artifact.onnx_export.read_qdq", unread)
    manifest = aimet_ext.export(sim, tmp_path / "out", "m", X, qdq=True)
    assert "m.qdq.onnx" in manifest["files"]
    assert "KeyError" in manifest["checks"]["qdq_not_read_by_aimet"]


def test_weights_that_old_files_list_as_inputs(tmp_path: pathlib.Path) -> None:
    model = mlp_model((64, 96, 32), bias="add")
    for proto in model.graph.initializer:
        shape = list(proto.dims)
        info = onnx.helper.make_tensor_value_info(proto.name, proto.data_type, shape)
        model.graph.input.append(info)
    sim = simulated(model)
    aimet_ext.export(sim, tmp_path / "out", "m", X, qdq=True)
    assert np.array_equal(outputs(aimet_ext.load(tmp_path / "out")), outputs(sim))


def test_a_bias_of_two_layers_cannot_be_an_integer(tmp_path: pathlib.Path) -> None:
    model = mlp_model((32, 32, 32), bias="add")
    names = sorted(p.name for p in model.graph.initializer if p.name.endswith("bias"))
    for node in model.graph.node:
        node.input[:] = [names[0] if name == names[1] else name for name in node.input]
    del model.graph.initializer[[p.name for p in model.graph.initializer].index(names[1])]
    feed = {"x": X["x"][..., :32]}
    with pytest.raises(ValueError, match=rf'bias="int32".*{names[0]} is that of fc0, fc1'):
        aimet_ext.export(simulated(model, feed), tmp_path / "out", "m", feed, bias="int32")


def test_what_cannot_be_written_is_named(tmp_path: pathlib.Path, sim: Any) -> None:
    out = tmp_path / "out"
    bare = aimet_onnx.QuantizationSimModel(mlp_model((64, 96, 32)))
    with pytest.raises(ValueError, match=r"fc0\.weight.* run sim\.compute_encodings first"):
        aimet_ext.export(bare, out, "m", X)
    odd = simulated()
    odd.qc_quantize_op_dict["x"].set_bitwidth(12)
    odd.compute_encodings([X])
    with pytest.raises(ValueError, match=r"x \(12 bits, and it is no constant\).*qdq=False"):
        aimet_ext.export(odd, out, "m", X, qdq=True)
    conv = conv_model()
    feed = {"x": np.zeros((1, 3, 8, 8), np.float32)}
    blocks = aimet_onnx.QuantizationSimModel(conv)
    name = next(n for n in blocks.param_names if _kernel(blocks, n))
    from aimet_onnx.common.defs import qtype
    from aimet_onnx.defs import Blockwise, QSpec

    spec = QSpec(qtype.int(4), Blockwise(1), symmetric=True)
    blocks.qc_quantize_op_dict[name].set_qspec(spec)
    blocks.compute_encodings([feed])
    with pytest.raises(ValueError, match=rf"{name} \(blocks of a 4-D weight\)"):
        aimet_ext.export(blocks, out, "m", feed, qdq=True)
    for options in (
        {"hf_checkpoint": True},
        {"opset_version": 21},
        {"dynamic_axes": {"x": {0: "batch"}}},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            aimet_ext.export(sim, out, "m", X, **options)
    for dummy in (None, {"z": X["x"]}, {"x": X["x"][:, :5]}):
        with pytest.raises((TypeError, ValueError)):
            aimet_ext.export(sim, out, "m", dummy)
    assert list(tmp_path.iterdir()) == []


def _kernel(sim: Any, name: str) -> bool:
    layout = sim.qc_quantize_op_dict[name].tensor_quantizer_params
    return layout is not None and len(layout.tensor_shape) == 4 and layout.tensor_shape[2] > 1


def test_every_file_is_checked(tmp_path: pathlib.Path, folder: pathlib.Path) -> None:
    """One flipped bit, anywhere, in any file."""
    for number, path in enumerate(sorted(folder.iterdir())):
        copied = tmp_path / str(number)
        shutil.copytree(folder, copied)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        (copied / path.name).write_bytes(content)
        with pytest.raises(CorruptFileError, match=path.name):
            aimet_ext.load(copied)


def test_inspecting_sums_up_an_export(folder: pathlib.Path) -> None:
    found = inspect_export(folder)
    assert found["quantizers"]["parameters"] == {"int4": 2}
    assert found["quantizers"]["activations"] == {"uint16": 3}
    assert found["quantizers"]["without_range"] == 0
    assert found["encodings"]["net-1.5.encodings"]["param_encodings"] == 2
    assert found["encodings"]["net-1.5.2.0.0.encodings"]["version"] == "2.0.0"
    assert found["unlisted"] == []


@pytest.mark.parametrize("bits", [3, 4])
def test_rounded_weights_need_no_second_copy(tmp_path: pathlib.Path, bits: int) -> None:
    """What a technique decided is what is written; ranges stay frozen, the ledger is kept."""
    sim = simulated(grid=(bits, "block"))
    report = aimet_ext.apply_gptq(sim, [X])
    assert len(report.layers) == 2
    sim.compute_encodings([X])
    manifest = aimet_ext.export(sim, tmp_path / "out", "m", X, bias="int32")
    assert [run["technique"] for run in manifest["techniques"]] == ["gptq"]
    tensors, _ = read_onnx_quantizers(tmp_path / "out")
    assert not any(name.startswith("float.") for name in tensors)
    loaded = aimet_ext.load(tmp_path / "out")
    assert np.array_equal(outputs(loaded), outputs(sim))
    assert loaded.qc_quantize_op_dict["fc0.weight"].is_encoding_frozen()
    with pytest.raises(ValueError, match="already applied"):
        aimet_ext.apply_gptq(loaded, [X])
