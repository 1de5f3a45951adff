"""R3 from a simulation's ledger to the files: keys are kept turned, and the function stays."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import aimet_ext
from aimet_ext.artifact.hand_off import hand_off
from aimet_ext.artifact.kv.run import load_cache_graphs
from aimet_ext.core.objective import outputs_sqnr
from aimet_ext.errors import TransformRefused
from aimet_ext.files.manifest import read_manifest
from aimet_ext.models.huggingface import prepare_model

pytest.importorskip("aimet_torch")
pytest.importorskip("aimet_onnx")
pytest.importorskip("onnxruntime")

from aimet_ext.onnx.reading import read_model
from aimet_ext.onnx.rewrite.rotate import is_rotated
from aimet_ext.sim.protocol import adapt

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
IDS = torch.arange(32).reshape(1, 32) * 7 % 125 + 3


def _float_sim(tiny_model: Callable[..., Any]) -> Any:
    """A model with two channels of each key much larger than the others."""
    model = tiny_model("llama", num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    half = attention.head_dim // 2
    with torch.no_grad():
        for layer, factor in ((attention.k_proj, 20.0), (attention.q_proj, 1 / 20)):
            layer.weight.mul_(8.0)  # scores far apart
            layer.weight[0 :: 2 * half].mul_(factor)  # each head's first channel
            layer.weight[half :: 2 * half].mul_(factor)  # and the one that it is turned with
    prepared = prepare_model(model, mask_value=-100.0)
    return aimet_ext.create_sim(prepared, IDS, weights=aimet_ext.QSpec(bitwidth=8))


def _rotated(sim: Any, **settings: Any) -> Any:
    """A simulation with R2 and R3, and its ranges."""
    aimet_ext.apply_rotation(sim, [IDS], r1=False, progress=False, **settings)
    sim.compute_encodings(lambda module: module(IDS))
    return sim


@pytest.fixture(scope="module")
def sim(tiny_model: Callable[..., Any]) -> Any:
    return _rotated(_float_sim(tiny_model), r3=True)


@pytest.fixture(scope="module")
def folder(sim: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("rotated") / "out"
    aimet_ext.export(sim, path, "net", IDS)
    return path


def test_the_graph_turns_queries_and_keys_and_computes_the_same(
    sim: Any, folder: pathlib.Path
) -> None:
    """In the session to 1e-5; what was loaded is exported with R3 again."""
    assert is_rotated(read_model(folder / "net.onnx"))
    assert read_manifest(folder)["checks"]["onnxruntime_relative_deviation"] < 1e-5
    loaded = aimet_ext.load(folder)
    assert adapt(loaded).ledger.rotates_keys
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS), sim.model(IDS))


@pytest.fixture(scope="module")
def plain(sim: Any, folder: pathlib.Path) -> pathlib.Path:
    """The export without R3."""
    other = copy.deepcopy(sim)
    other.aimet_ext_ledger.runs.clear()
    aimet_ext.export(other, folder.parent / "plain", "net", IDS)
    return folder.parent / "plain"


def test_large_channels_of_keys_fit_in_8_bits(
    sim: Any, folder: pathlib.Path, plain: pathlib.Path
) -> None:
    """The loss of 8 bits is that of keys without large channels."""
    with torch.no_grad():
        expected = sim.model(IDS).as_subclass(torch.Tensor)
    sqnr = {}
    for place in (folder, plain):
        found = hand_off(place, [IDS], sim=sim, kv_bitwidth=8)
        output = torch.from_numpy(found.sim.session.run(None, dict(found.sample))[0])
        sqnr[place.name] = outputs_sqnr([output], [expected])
        assert (found.kept[0].endswith("_r3_kept")) == (place is folder)
    assert sqnr["out"] > sqnr["plain"] + 6


def test_a_cache_holds_turned_keys(sim: Any, folder: pathlib.Path) -> None:
    out = folder.parent / "cache"
    manifest = aimet_ext.export_with_cache(
        sim, out, prefill_length=8, context_length=32, dataloader=[IDS], kv_bitwidth=8
    )
    assert manifest["checks"]["onnxruntime_relative_deviation"] < 1e-5
    graphs = load_cache_graphs(out)
    outputs = graphs.calls[8](graphs.cache().feed(IDS[:, :8], 8))
    largest = outputs["present_key_0"].abs().amax((0, 1, 2))  # [width]
    assert float(largest.max() / largest.mean()) < 3


def _eight_bits(place: pathlib.Path, sim: Any) -> float:
    """dB of the output with keys and values of 8 bits."""
    found = hand_off(place, [IDS], sim=sim, kv_bitwidth=8)
    assert found.kept[0].endswith("_r3_kept")
    output = torch.from_numpy(found.sim.session.run(None, dict(found.sample))[0])
    with torch.no_grad():
        expected = sim.model(IDS).as_subclass(torch.Tensor)
    return outputs_sqnr([output], [expected])


@pytest.fixture(scope="module")
def fitted(tiny_model: Callable[..., Any]) -> Any:
    """The model with maps of keys that are fitted to it."""
    return _rotated(_float_sim(tiny_model), r3="fitted", r3_steps=100)


def test_fitted_maps_compute_the_same_and_cost_less(
    sim: Any, folder: pathlib.Path, fitted: Any
) -> None:
    """What was loaded has the maps; the loss of 8 bits is less than with a Hadamard matrix."""
    out = folder.parent / "fitted"
    aimet_ext.export(fitted, out, "net", IDS)
    assert read_manifest(out)["checks"]["onnxruntime_relative_deviation"] < 1e-5
    maps = [adapt(each).ledger.key_maps for each in (fitted, aimet_ext.load(out))]
    assert len(maps[0]) == 1 and maps[0][0].matrix.abs().max() > 0
    assert torch.equal(maps[0][0].matrix, maps[1][0].matrix)
    assert torch.equal(maps[0][0].shift, maps[1][0].shift)
    assert _eight_bits(out, fitted) > _eight_bits(folder, sim) + 3


def test_a_cache_holds_mapped_keys(fitted: Any, folder: pathlib.Path) -> None:
    """``k M + b`` of every head fills one range."""
    out = folder.parent / "fitted cache"
    manifest = aimet_ext.export_with_cache(
        fitted, out, prefill_length=8, context_length=32, dataloader=[IDS], kv_bitwidth=8
    )
    assert manifest["checks"]["onnxruntime_relative_deviation"] < 1e-5
    plain = aimet_ext.export_with_cache(
        fitted, out, prefill_length=8, context_length=32, dataloader=[IDS]
    )
    assert plain["checks"]["quantized_sqnr_db"] > 40  # checked: the same numbers as without a cache
    outputs = load_cache_graphs(out)
    keys = outputs.calls[8](outputs.cache().feed(IDS[:, :8], 8))["present_key_0"]
    assert float(keys.abs().max()) < 1.2


def test_maps_are_fitted_to_an_onnx_simulation(
    fitted: Any, plain: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Its keys are those of the torch simulation; what is built for the device maps them."""
    graph = read_model(plain / "net.onnx")
    sample = {"input_ids": IDS.numpy()}
    from aimet_ext.sim.onnx.build import build_target

    sim = build_target(graph, "htp_v79", sample=sample)
    report = aimet_ext.apply_rotation(
        sim, [sample], r1=False, r3="fitted", r3_steps=100, progress=False
    )
    own, other = adapt(sim).ledger.key_maps[0], adapt(fitted).ledger.key_maps[0]
    torch.testing.assert_close(own.matrix, other.matrix, rtol=0.02, atol=0.002)
    losses = report.key_losses
    assert losses["plain"] > losses["hadamard"] > losses["fitted"] > 0
    sim.compute_encodings([sample])
    aimet_ext.export(sim, tmp_path / "out", "net", sample)
    found = hand_off(tmp_path / "out", [sample], sim=sim, kv_bitwidth=8)
    assert found.kept[0].endswith("_r3_kept")
    assert found.same_numbers > 60


def test_what_maps_cannot_be_fitted_to_is_refused(tiny_model: Callable[..., Any]) -> None:
    """No data; scores that are bounded before the softmax, which sees shifts then."""
    sim = _float_sim(tiny_model)
    with pytest.raises(ValueError, match=r'r3="fitted": batches are required'):
        aimet_ext.apply_rotation(sim, r1=False, r3="fitted", progress=False)
    bounding = tiny_model("gemma2", num_hidden_layers=1, attn_logit_softcapping=0.5)
    bounding.set_attn_implementation("eager")
    with torch.no_grad():
        for layer in ("q_proj", "k_proj"):  # scores that reach their bounds
            getattr(bounding.model.layers[0].self_attn, layer).weight.mul_(16.0)
    other = aimet_ext.create_sim(prepare_model(bounding, mask_value=-100.0), IDS)
    with pytest.raises(TransformRefused, match=r'r3="fitted": .*shifted alike.*pass r3=True'):
        aimet_ext.apply_rotation(other, [IDS], r1=False, r3="fitted", progress=False)
    assert adapt(sim).ledger is None and adapt(other).ledger is None


def test_an_onnx_simulation_gets_it_for_the_device(
    tmp_path: pathlib.Path, plain: pathlib.Path
) -> None:
    """Its own graph stays as it is; what is built for the device turns queries and keys."""
    graph = read_model(plain / "net.onnx")
    sample = {"input_ids": IDS.numpy()}
    from aimet_ext.sim.onnx.build import build_target

    sim = build_target(graph, "htp_v79", sample=sample)
    aimet_ext.apply_rotation(sim, [sample], r1=False, r3=True, progress=False)
    sim.compute_encodings([sample])
    aimet_ext.export(sim, tmp_path / "out", "net", sample)
    assert not is_rotated(read_model(tmp_path / "out" / "net.onnx"))
    found = hand_off(tmp_path / "out", [sample], sim=sim, kv_bitwidth=8)
    assert found.kept[0].endswith("_r3_kept")
    assert found.same_numbers > 60


def test_a_model_without_a_rotary_embedding_is_refused(tiny_model: Callable[..., Any]) -> None:
    sim = aimet_ext.create_sim(tiny_model("gpt2"), IDS)
    with pytest.raises(ValueError, match=r"r3: a model with a rotary embedding"):
        aimet_ext.apply_rotation(sim, r3=True, progress=False)
    assert adapt(sim).ledger is None
