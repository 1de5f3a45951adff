"""Prefill and decode graphs: one set of encodings, and the numbers of the graph without a cache."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import aimet_ext
from aimet_ext import LPBQ, QSpec
from aimet_ext.artifact.kv import export as cache_export
from aimet_ext.artifact.kv.export import export_with_cache
from aimet_ext.artifact.kv.run import load_cache_graphs
from aimet_ext.core.objective import sqnr_db
from aimet_ext.files.encodings import entries, load_encodings
from aimet_ext.files.manifest import read_manifest
from aimet_ext.models.kv_cache import run_with_cache

pytest.importorskip("aimet_torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

IDS = torch.arange(64).reshape(2, 32) * 7 % 125 + 3


def calibrated(model: Any, **settings: Any) -> Any:
    prepared = aimet_ext.prepare_model(model, mask_value=-100)
    sim = aimet_ext.create_sim(prepared, IDS[:1], weights=QSpec(granularity=LPBQ(32)), **settings)
    sim.compute_encodings(lambda module: module(IDS))
    return sim


def decibels(found: Tensor, expected: Tensor) -> float:
    error = float((found - expected).double().square().sum())
    return sqnr_db(float(expected.double().square().sum()), error)


@torch.no_grad()
def logits(sim: Any, ids: Tensor) -> Tensor:
    return sim.model(ids)


@pytest.fixture(scope="module")
def sim(tiny_model: Callable[..., Any]) -> Any:
    return calibrated(tiny_model("llama"))


@pytest.fixture(scope="module")
def folder(sim: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Float and quantized graphs; made once, because that takes seconds."""
    pytest.importorskip("aimet_onnx")
    path = tmp_path_factory.mktemp("cache") / "out"
    before = logits(sim, IDS)
    export_with_cache(sim, path, prefill_length=12, context_length=40, dataloader=[IDS])
    assert torch.equal(logits(sim, IDS), before)  # the sim is what it was
    return path


def test_what_a_folder_holds(folder: pathlib.Path) -> None:
    manifest = read_manifest(folder)
    assert sorted(manifest["files"]) == [
        *(f"decode{end}" for end in (".2.0.0.encodings", ".encodings", ".onnx", ".qdq.onnx")),
        *(f"prefill{end}" for end in (".2.0.0.encodings", ".encodings", ".onnx", ".qdq.onnx")),
        "weights.data",
    ]
    assert manifest["graphs"] == {"prefill": 12, "decode": 1}
    assert manifest["checks"]["onnxruntime_relative_deviation"] < 1e-5
    assert manifest["checks"]["quantized_sqnr_db"] > 60
    assert manifest["checks"]["hand_off_sqnr_db"] > 50


def test_both_graphs_have_the_encodings_of_the_export(
    sim: Any, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Weights by name, activations too, but for tensors that a cache stands between."""
    aimet_ext.export(sim, tmp_path / "plain", "m", IDS[:1])
    plain = entries(load_encodings(tmp_path / "plain" / "m.encodings"))
    both = [entries(load_encodings(folder / f"{name}.encodings")) for name in ("prefill", "decode")]
    for found in both:
        same = found.keys() & plain.keys()
        assert all(found[name] == plain[name] for name in same)
        assert {name for name in found if name not in plain} == {
            "present_value_0",
            "present_value_1",
        }
        weights = {name for name in plain if plain[name]["enc_type"] != "PER_TENSOR"}
        assert len(weights) == 15 and weights <= found.keys()


@pytest.mark.parametrize("prompt", [32, 20, 0])
def test_float_graphs_are_the_float_model(
    tiny_model: Callable[..., Any], folder: pathlib.Path, prompt: int
) -> None:
    found = load_cache_graphs(folder).logits(IDS[:1], prompt)
    with torch.no_grad():
        expected = tiny_model("llama")(IDS[:1]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompt", [32, 20, 0])
def test_quantized_graphs_are_the_sim(sim: Any, folder: pathlib.Path, prompt: int) -> None:
    """Far closer to the sim than the sim is to the float model."""
    found = load_cache_graphs(folder, qdq=True).logits(IDS[:1], prompt)
    assert decibels(found, logits(sim, IDS[:1])) > 55
    floats = load_cache_graphs(folder).logits(IDS[:1])
    assert decibels(logits(sim, IDS[:1]), floats) < 35


def test_a_cache_has_the_grid_of_what_is_put_into_it(folder: pathlib.Path) -> None:
    for name in ("prefill", "decode"):
        grids = quantizers(folder / f"{name}.qdq.onnx")
        for layer in (0, 1):
            for part in ("key", "value"):
                assert grids[f"past_{part}_{layer}"] == grids[f"present_{part}_{layer}"]
        assert grids["attention_mask"][0] == pytest.approx(100 / 65535, rel=1e-3)
    prefill, decode = (quantizers(folder / f"{name}.qdq.onnx") for name in ("prefill", "decode"))
    assert prefill["past_key_1"] == decode["past_key_1"] != prefill["past_key_0"]


def on_htp(folder: pathlib.Path, prompt: int) -> Tensor:
    """Logits of the first text, every node of both graphs on HTP."""
    pytest.importorskip("onnxruntime_qnn", reason="HTP's compiler is not installed")
    from aimet_ext.integrations.qnn import compile_htp

    graphs = load_cache_graphs(folder)
    calls = {}
    for name, length in read_manifest(folder)["graphs"].items():
        session = compile_htp(folder / f"{name}.qdq.onnx", "htp_v75")
        assert session.fallbacks == ()

        def call(feed: Any, session: Any = session) -> dict[str, Tensor]:
            arrays = session.run({name: value.numpy() for name, value in feed.items()})
            return dict(zip(session.outputs, map(torch.from_numpy, arrays), strict=True))

        calls[length] = call
    return run_with_cache(calls, graphs.cache(), IDS[:1], prompt)


def quantizers(path: pathlib.Path) -> dict[str, tuple[float, int, int]]:
    """Scale, zero point and type of each graph input and output."""
    model = onnx.load(str(path))
    from aimet_ext.onnx.index import stored_values

    known = {n: onnx.numpy_helper.to_array(p) for n, p in stored_values(model.graph).items()}
    names = {value.name for value in (*model.graph.input, *model.graph.output)}
    found = {}
    for node in model.graph.node:
        place = node.input[0] if node.op_type == "QuantizeLinear" else node.output[0]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and place in names:
            zero = known[node.input[2]]
            found[place] = (float(known[node.input[1]]), int(zero), zero.dtype.itemsize)
    return found


@pytest.mark.slow
def test_eight_bits_for_the_cache(sim: Any, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("aimet_onnx")
    out = tmp_path / "out"
    export_with_cache(
        sim, out, prefill_length=12, context_length=40, dataloader=[IDS], kv_bitwidth=8
    )
    graphs = load_cache_graphs(out, qdq=True)
    for name in ("prefill", "decode"):
        grids = quantizers(out / f"{name}.qdq.onnx")
        assert {grids[each][2] for each in graphs.shape.past_names(1)} == {1}
        assert {grids[each][2] for each in graphs.shape.output_names()[1:]} == {1}
        assert grids["logits"][2] == 2
    cache = graphs.cache()
    found = run_with_cache(graphs.calls, cache, IDS[:1], 20)
    assert decibels(found, logits(sim, IDS[:1])) > 40
    key = cache.feed(IDS[:1, :1], 1)["past_key_0"]
    assert 100 < len(key.unique()) <= 256
    assert decibels(on_htp(out, 20), logits(sim, IDS[:1])) > 35


def test_weights_are_stored_once(folder: pathlib.Path) -> None:
    """Float weights of two graphs, integers of two graphs: half of what they would take apart."""
    apart = 0
    for path in folder.glob("*.onnx"):
        for proto in onnx.load(str(path)).graph.initializer:
            apart += len(proto.raw_data)
    assert (folder / "weights.data").stat().st_size < 0.6 * apart
    assert all(path.stat().st_size < 200_000 for path in folder.glob("*.onnx"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "attention", "changes"),
    [("qwen2", "sdpa", {"tie_word_embeddings": True}), ("qwen3", "eager", {})],
)
def test_from_an_export_of_another_family(
    tmp_path: pathlib.Path,
    tiny_model: Callable[..., Any],
    family: str,
    attention: str,
    changes: dict[str, Any],
) -> None:
    pytest.importorskip("aimet_onnx")
    model = tiny_model(family, **changes)
    model.set_attn_implementation(attention)
    sim = calibrated(model)
    aimet_ext.export(sim, tmp_path / "plain", "m", IDS[:1])
    manifest = export_with_cache(
        tmp_path / "plain",
        tmp_path / "out",
        prefill_length=8,
        context_length=32,
        dataloader=[IDS],
    )
    assert manifest["checks"]["quantized_sqnr_db"] > 55
    found = load_cache_graphs(tmp_path / "out", qdq=True).logits(IDS[:1], 16)
    assert decibels(found, logits(sim, IDS[:1])) > 50
    assert decibels(on_htp(tmp_path / "out", 16), logits(sim, IDS[:1])) > 35


@pytest.mark.slow
def test_a_prompt_may_be_the_whole_context(sim: Any, tmp_path: pathlib.Path) -> None:
    """Then the graph for prompts takes no cache."""
    pytest.importorskip("aimet_onnx")
    out = tmp_path / "out"
    export_with_cache(
        sim, out, prefill_length=16, context_length=16, dataloader=[IDS], kv_bitwidth=8
    )
    inputs = {value.name for value in onnx.load(str(out / "prefill.qdq.onnx")).graph.input}
    assert inputs == {"input_ids", "attention_mask", "position_ids"}
    graphs = load_cache_graphs(out, qdq=True)
    for prompt in (16, 0):
        found = graphs.logits(IDS[:1, :16], prompt)
        assert decibels(found, logits(sim, IDS[:1, :16])) > 40


def test_both_graphs_run_on_htp(sim: Any, folder: pathlib.Path) -> None:
    found = on_htp(folder, 20)
    expected = logits(sim, IDS[:1])
    assert decibels(found, expected) > 40
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_an_export_that_fails(
    tmp_path: pathlib.Path,
    sim: Any,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    before = sim.model
    monkeypatch.setattr(cache_export, "share_weights", fail)
    with pytest.raises(error):
        export_with_cache(sim, tmp_path / "out", prefill_length=4, context_length=8)
    assert sim.model is before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefill_length": 1}, r"prefill_length must be in 2 \.\.\. 16 .*got 1"),
        ({"prefill_length": 17}, r"prefill_length must be in 2 \.\.\. 16 .*got 17"),
        ({"kv_bitwidth": 8}, "need a dataloader"),
        ({"kv_bitwidth": 4, "dataloader": [IDS]}, "kv_bitwidth must be 8, 16 or None, got 4"),
        ({"dataloader": []}, "at least one batch"),
    ],
)
def test_arguments_that_do_not_fit(
    tmp_path: pathlib.Path, sim: Any, arguments: dict[str, Any], message: str
) -> None:
    given = {"prefill_length": 4, "context_length": 16, **arguments}
    with pytest.raises(ValueError, match=message):
        export_with_cache(sim, tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


def test_onnx_sims_are_refused(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("aimet_onnx")
    from onnx_sims import build_sim

    value = onnx.helper.make_tensor_value_info
    weight = onnx.numpy_helper.from_array(torch.ones(2, 2).numpy(), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="m")],
        "g",
        [value("x", onnx.TensorProto.FLOAT, [1, 2])],
        [value("y", onnx.TensorProto.FLOAT, [1, 2])],
        [weight],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    sim = build_sim(model, QSpec(bitwidth=8), None, providers=["CPUExecutionProvider"])
    with pytest.raises(TypeError, match="traced from torch sims, got an ONNX sim"):
        export_with_cache(sim, tmp_path / "out", prefill_length=2, context_length=4)


def test_a_folder_of_another_kind_or_without_integers(
    tmp_path: pathlib.Path, folder: pathlib.Path
) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["kind"] == "cache"
    with pytest.raises(FileNotFoundError, match="manifest"):
        load_cache_graphs(tmp_path)
    copied = shutil.copytree(folder, tmp_path / "copy")
    (copied / "decode.encodings").write_bytes(b"{}")
    with pytest.raises(aimet_ext.CorruptFileError, match=r"decode\.encodings"):
        load_cache_graphs(copied)
