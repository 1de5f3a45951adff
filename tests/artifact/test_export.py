"""An export holds what the sim computes, and is there whole or not at all."""

from __future__ import annotations

import copy
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import aimet_ext
from aimet_ext import LPBQ, Blockwise, QSpec
from aimet_ext.artifact import torch_export as onnx_file
from aimet_ext.core.affine import fake_quantize
from aimet_ext.errors import MissingExtraError
from aimet_ext.files import encodings
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.manifest import read_manifest
from aimet_ext.sim.protocol import adapt

pytest.importorskip("aimet_torch")
onnx = pytest.importorskip("onnx")

IDS = torch.arange(32).reshape(2, 16) * 3 % 128
Q0 = "model.layers.0.self_attn.q_proj"


def calibrated(model: nn.Module, **settings: Any) -> Any:
    sim = aimet_ext.create_sim(model, IDS, **settings)
    sim.compute_encodings(lambda module: module(IDS))
    return sim


@torch.no_grad()
def logits(sim: Any, ids: Tensor = IDS) -> Tensor:
    return sim.model(ids)


@pytest.fixture(scope="module")
def sim(tiny_model: Callable[..., Any]) -> Any:
    """Weights and activations quantized; tests must leave it as it is."""
    return calibrated(tiny_model("llama"), weights=QSpec(granularity=LPBQ(32)))


@pytest.fixture(scope="module")
def folder(sim: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("export") / "out"
    aimet_ext.export(sim, path, "tiny-1.5", IDS, hf_checkpoint=True, aimet_keys=True)
    return path


def test_what_a_folder_holds(folder: pathlib.Path) -> None:
    manifest = read_manifest(folder)
    assert sorted(manifest["files"]) == [
        "aimet_omniquant_metadata.safetensor",
        "checkpoint/config.json",
        "checkpoint/model.safetensors",
        "config.json",
        "fingerprints.json",
        "ledger.safetensors",
        "model.safetensors",
        "quantizers.safetensors",
        "quantsim.json",
        "scales.safetensors",
        "tiny-1.5.2.0.0.encodings",
        "tiny-1.5.encodings",
        "tiny-1.5.onnx",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert manifest["versions"]["aimet-torch"] and len(manifest["origin"]) == 64
    checks = manifest["checks"]
    assert checks["quantized_parameters_equal"] == 21
    assert checks["weights_not_found_in_onnx"] == []


def test_onnx_holds_the_float_weights(sim: Any, folder: pathlib.Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert torch.equal(weights[f"{Q0}.weight"], sim.model.get_submodule(f"model.{Q0}").weight)
    stored = {
        proto.name: torch.from_numpy(onnx.numpy_helper.to_array(proto).copy())
        for proto in onnx.load(folder / "tiny-1.5.onnx").graph.initializer
    }
    names = read_manifest(folder)["onnx_names"]
    for name, weight in weights.items():
        found = stored[names[f"model.{name}"]]
        assert torch.equal(found, weight) or torch.equal(found.T, weight)


def test_both_encodings_list_the_same_tensors(folder: pathlib.Path) -> None:
    older = json.loads((folder / "tiny-1.5.encodings").read_text())
    newer = json.loads((folder / "tiny-1.5.2.0.0.encodings").read_text())
    assert (older["version"], newer["version"]) == ("1.0.0", "2.0.0")
    names = {e["name"] for e in older["param_encodings"] + older["activation_encodings"]}
    assert names == {e["name"] for e in newer["encodings"]}
    kinds = [e["enc_type"] for e in older["param_encodings"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "LPBQ": 14,
        "PER_CHANNEL": 1,
        "PER_TENSOR": 6,
    }


def test_onnx_computes_the_float_model(sim: Any, folder: pathlib.Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(
        str(folder / "tiny-1.5.onnx"), providers=["CPUExecutionProvider"]
    )
    (output,) = session.run(None, {"input_ids": IDS.numpy()})
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    with torch.no_grad():
        expected = model.eval()(IDS).logits
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits(sim), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "settings"),
    [
        ("llama", {}, {"weights": QSpec(bitwidth=2, granularity=Blockwise(16))}),
        ("qwen2", {}, {"weights": QSpec(bitwidth=3, symmetric=False)}),
        ("llama", {"tie_word_embeddings": True}, {}),
        ("llama", {}, {"lm_head": None, "embedding": None}),
    ],
    ids=["int2-blockwise", "uint3-biases", "tied", "blocks-only"],
)
def test_a_checkpoint_computes_the_weights_only_sim(
    tmp_path: pathlib.Path,
    tiny_model: Callable[..., Any],
    family: str,
    changes: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    transformers = pytest.importorskip("transformers")
    sim = calibrated(tiny_model(family, **changes), activations=None, **settings)
    manifest = aimet_ext.export(sim, tmp_path / "out", "m", IDS, hf_checkpoint=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "checkpoint", local_files_only=True
    )
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS).logits, logits(sim), rtol=1e-5, atol=1e-5)
    quantizer = adapt(sim).weight_quantizer(f"model.{Q0}")
    expected = fake_quantize(quantizer.weight.detach(), quantizer.grid())
    assert torch.equal(model.get_submodule(Q0).weight.detach(), expected)
    assert bool(manifest["model"]["tied"]) == bool(changes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_sim_stays_as_it_was(tmp_path: pathlib.Path, tiny_model: Callable[..., Any]) -> None:
    sim = calibrated(tiny_model("llama"), activations=8)
    sim.model.train()
    sim.model.get_submodule(f"model.{Q0}").eval()
    before = logits(sim)
    flags = [module.training for module in sim.model.modules()]
    attributes = set(vars(sim))
    aimet_ext.export(sim, tmp_path / "out", "m", IDS)
    assert torch.equal(logits(sim), before)
    assert [module.training for module in sim.model.modules()] == flags
    assert set(vars(sim)) == attributes
    # AIMET's own exporter rounds the weights that it writes, as ever.
    sim.onnx.export((IDS,), str(tmp_path / "aimet.onnx"), dynamo=False, opset_version=17)
    stored = onnx.load(tmp_path / "aimet.onnx").graph.initializer
    weight = next(onnx.numpy_helper.to_array(proto) for proto in stored if "q_proj" in proto.name)
    assert len(set(weight[:, 0].tolist())) <= 16


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("granularity", [Blockwise(16), LPBQ(16)], ids=["blockwise", "lpbq"])
def test_aimet_onnx_loads_both_encodings(
    tmp_path: pathlib.Path, tiny_model: Callable[..., Any], granularity: Any
) -> None:
    """Embedding and output layer as by default; square weights, where a wrong order would fit."""
    aimet_onnx = pytest.importorskip("aimet_onnx")
    from aimet_onnx.quantsim import load_encodings_to_sim

    model = tiny_model("llama", num_hidden_layers=1, num_key_value_heads=4)
    weights = QSpec(granularity=granularity)
    sim = calibrated(model, activations=None, weights=weights)
    aimet_ext.export(sim, tmp_path / "out", "m", IDS)
    quantizers = adapt(sim).weight_quantizers()
    names = read_manifest(tmp_path / "out")["onnx_names"]
    for name in ("m.encodings", "m.2.0.0.encodings"):
        graph = onnx.load(tmp_path / "out" / "m.onnx")
        other = aimet_onnx.QuantizationSimModel(graph)
        load_encodings_to_sim(other, str(tmp_path / "out" / name), strict=False)
        for layer, quantizer in quantizers.items():
            if ".layers." not in layer:
                continue
            read = other.qc_quantize_op_dict[names[f"{layer}.weight"]].get_encodings()
            expected = quantizer.grid().scale.T.flatten()  # [blocks * out]
            assert torch.equal(torch.tensor([e.delta for e in read]).float(), expected), layer
        (output,) = other.session.run(None, {"input_ids": IDS.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), logits(sim), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_aimet_onnx_loads_no_rows_of_an_embedding(
    tmp_path: pathlib.Path, tiny_model: Callable[..., Any]
) -> None:
    """Why the default has one scale for an embedding: if this fails, rows may be the default."""
    aimet_onnx = pytest.importorskip("aimet_onnx")
    from aimet_onnx.quantsim import load_encodings_to_sim

    sim = calibrated(tiny_model("llama", num_hidden_layers=1), embedding=QSpec(bitwidth=8))
    aimet_ext.export(sim, tmp_path / "out", "m", IDS)
    other = aimet_onnx.QuantizationSimModel(onnx.load(tmp_path / "out" / "m.onnx"))
    with pytest.raises(RuntimeError, match="cannot set channel/block quantization"):
        load_encodings_to_sim(other, str(tmp_path / "out" / "m.encodings"), strict=False)


def test_masks_and_free_axes(tmp_path: pathlib.Path, sim: Any) -> None:
    runtime = pytest.importorskip("onnxruntime")
    axes = {0: "batch", 1: "length"}
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    names = ("input_ids", "attention_mask", "logits")
    aimet_ext.export(sim, tmp_path / "out", "m", batch, dynamic_axes=dict.fromkeys(names, axes))
    session = runtime.InferenceSession(
        str(tmp_path / "out" / "m.onnx"), providers=["CPUExecutionProvider"]
    )
    ids, mask = IDS[:1, :9], torch.ones(1, 9, dtype=torch.long)
    mask[0, :3] = 0
    (output,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad(), adapt(sim).disabled_quantizers():
        expected = sim.model(ids, mask)
    torch.testing.assert_close(
        torch.from_numpy(output)[:, 3:], expected[:, 3:], rtol=1e-4, atol=1e-5
    )


def test_scales_have_original_names(tmp_path: pathlib.Path, sim: Any) -> None:
    sim = copy.deepcopy(sim)
    ledger = Ledger("cd" * 32)
    sides = [(f"model.{Q0}", "in", torch.full((64,), 2.0))]
    ledger.record("omniquant", "model.model.layers.0", "n->q", "norm_qkv", sides, size=64)
    ledger.log_run("omniquant", [f"model.{Q0}"], settings={"seed": 3})
    adapt(sim).ledger = ledger
    manifest = aimet_ext.export(sim, tmp_path / "out", "m", IDS)
    scales = aimet_ext.load_scales(tmp_path / "out")
    assert list(scales) == [Q0] and scales.origin == manifest["origin"] == "cd" * 32
    assert scales.pairs[0]["block"] == "model.layers.0"
    assert manifest["techniques"][0]["settings"] == {"seed": 3}


def test_the_tokenizer_is_copied_or_given(
    tmp_path: pathlib.Path, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "train.py").write_text("not to be copied")
    tiny_llama.config._name_or_path = str(source)
    sim = calibrated(tiny_llama, activations=None)
    manifest = aimet_ext.export(sim, tmp_path / "out", "m", IDS)
    assert manifest["model"]["tokenizer"] == "copied"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "train.py").exists()

    class Tokenizer:
        def save_pretrained(self, folder: pathlib.Path) -> None:
            (folder / "vocab.json").write_text("[]")

    manifest = aimet_ext.export(sim, tmp_path / "out", "m", IDS, tokenizer=Tokenizer())
    assert manifest["model"]["tokenizer"] == "argument"
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_without_onnxruntime_the_manifest_says_so(
    tmp_path: pathlib.Path, sim: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: Any) -> None:
        raise MissingExtraError("onnxruntime")

    monkeypatch.setattr("aimet_ext.artifact.torch_export.run_onnx", missing)
    manifest = aimet_ext.export(sim, tmp_path / "out", "m", IDS)
    assert manifest["checks"]["onnxruntime"] == "not installed"


def wrong_sign(document: Any, params: Any, **rest: Any) -> Any:
    """Encodings 1.0.0 as if offsets had the other sign."""
    older = right(document, params, **rest)
    for entry in older["param_encodings"]:
        entry["offset"] = [-offset for offset in entry["offset"]]
    return older


right = onnx_file.to_version_1


@pytest.mark.parametrize("fault", ["offset", "order", "output", "absent"])
def test_a_wrong_file_is_noticed_and_the_old_folder_stays(
    tmp_path: pathlib.Path,
    sim: Any,
    folder: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    """Plant errors in what is written; each is found when it is read back."""
    shutil.copytree(folder, tmp_path / "out")
    before = read_manifest(tmp_path / "out")
    if fault == "offset":
        monkeypatch.setattr(onnx_file, "to_version_1", wrong_sign)
    elif fault == "order":
        monkeypatch.setattr(encodings, "_flatten", lambda values, layout: values.flatten())
    elif fault == "output":
        monkeypatch.setattr(
            "aimet_ext.artifact.torch_export.run_onnx", lambda *_: logits(sim) * 1.001
        )
    else:
        monkeypatch.setattr(onnx_file.OnnxFile, "hash", lambda self, name: None)
    with pytest.raises(RuntimeError, match=r"m\.onnx"):
        aimet_ext.export(sim, tmp_path / "out", "m", IDS)
    assert read_manifest(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bad_arguments_are_refused_before_any_work(
    tmp_path: pathlib.Path, tiny_llama: Any, sim: Any
) -> None:
    out = tmp_path / "out"
    bare = aimet_ext.create_sim(tiny_llama, IDS)
    with pytest.raises(ValueError, match=r"run sim\.compute_encodings first"):
        aimet_ext.export(bare, out, "m", IDS)
    for prefix in ("", "a/b", ".."):
        with pytest.raises(ValueError, match="filename_prefix"):
            aimet_ext.export(sim, out, prefix, IDS)
    for dummy in (None, "text", (IDS, IDS, IDS), {"ids": IDS}):
        with pytest.raises(TypeError):
            aimet_ext.export(sim, out, "m", dummy)
    with pytest.raises(TypeError, match="QuantizationSimModel"):
        aimet_ext.export(tiny_llama, out, "m", IDS)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds other files"):
        aimet_ext.export(sim, out, "m", IDS)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
