"""Afterwards it is still AIMET's simulation, and its ledger says what happened to the weights."""

from __future__ import annotations

import copy
import importlib
import json
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aimet_ext
from aimet_ext import CorruptFileError, QSpec, load_scales
from aimet_ext.files.tensors import hash_tensors
from aimet_ext.models.huggingface import original_name
from aimet_ext.sim.protocol import adapt


@pytest.fixture(scope="session")
def _done() -> dict[Any, Any]:
    return {}


@pytest.fixture
def full(
    technique: Any, grid: QSpec, make_sim: Any, ids: Callable[..., Tensor], _done: dict[Any, Any]
) -> Any:
    """A whole sim (embedding, head, activations) after a technique and calibration."""
    key = technique.name, grid
    if key not in _done:
        sim = make_sim(
            "qwen2",
            grid,
            activations=16,
            lm_head=QSpec(bitwidth=8),
            embedding=QSpec(bitwidth=8),
        )
        technique.apply(sim, [ids(2, 16, 1), ids(2, 16, 2)])
        sim.compute_encodings(lambda model: model(ids(2, 16, 1)))
        _done[key] = sim
    return copy.deepcopy(_done[key])


@torch.no_grad()
def logits(sim: Any) -> Tensor:
    return sim.model(torch.arange(32).reshape(2, 16) + 5)


def grids(sim: Any, inside: str = ".layers.") -> dict[str, tuple[Tensor, Tensor]]:
    found = adapt(sim).weight_quantizers()
    return {
        name: (quantizer.grid().scale, quantizer.grid().offset)
        for name, quantizer in found.items()
        if inside in name and quantizer.weight.dim() > 1
    }


def same_grids(one: Any, other: Any) -> bool:
    assert list(one) == list(other) and len(one) == 14
    return all(
        torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True)
    )


def test_quantizers_are_aimets_and_frozen(technique: Any, full: Any) -> None:
    for name, module in full.model.named_modules():
        if "quantizers." in name:
            assert type(module).__module__.partition(".")[0] == "aimet_torch", name
    frozen = {n for n, q in adapt(full).weight_quantizers().items() if q.frozen}
    decided = {*grids(full), *(grids(full, "lm_head") if technique.head else ())}
    assert frozen == (decided if technique.freezes else set())


def test_calibration_leaves_what_was_decided(full: Any, ids: Callable[..., Tensor]) -> None:
    before = grids(full)
    full.compute_encodings(lambda model: model(ids(2, 16, 9)))
    assert same_grids(grids(full), before)
    activations = adapt(full).activation_quantizers().values()
    assert all(quantizer.is_initialized() for quantizer in activations)


def test_deep_copy(technique: Any, full: Any) -> None:
    twin = copy.deepcopy(full)
    assert torch.equal(logits(twin), logits(full))
    assert same_grids(grids(twin), grids(full))
    frozen = {adapt(twin).weight_quantizer(name).frozen for name in grids(twin)}
    assert frozen == {technique.freezes}
    count = len(full.aimet_ext_ledger.runs)
    twin.aimet_ext_ledger.log_run("something", ["a.layer"])
    assert len(full.aimet_ext_ledger.runs) == count


def test_a_step_of_quantization_aware_training(full: Any) -> None:
    """Gradients reach weights and ranges; the loss on the batch falls.

    Rounded weights lie on their grids to the last bit, so that a range has none before they move.
    """
    batch = torch.arange(32).reshape(2, 16) + 5
    full.model.train()
    optimizer = torch.optim.SGD(full.model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        output = full.model(batch)[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(output, batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        layer = full.model.get_submodule("model.model.layers.0.mlp.up_proj")
        assert layer.weight.grad.abs().max() > 0
        optimizer.step()
        losses.append(loss.item())
    assert layer.param_quantizers["weight"].max.grad.abs().max() > 0
    assert losses[1] < losses[0]


def test_encodings_saved_and_loaded(full: Any, tmp_path: pathlib.Path) -> None:
    """By AIMET's own functions, into a sim whose ranges were set to something else."""
    expected, before = logits(full), grids(full)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        full.save_encodings_to_json(str(tmp_path), "all")
    (file,) = tmp_path.glob("all*.json")
    twin = copy.deepcopy(full)
    for quantizer in adapt(twin).weight_quantizers().values():
        quantizer.freeze(False)
        quantizer.set_scale(torch.full(quantizer.shape, 0.01))
    assert not torch.equal(logits(twin), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin.load_encodings(str(file), allow_overwrite=True)
    for name, (scale, offset) in grids(twin).items():
        torch.testing.assert_close(scale, before[name][0], rtol=1e-6, atol=0)
        assert torch.equal(offset, before[name][1]), name
    torch.testing.assert_close(logits(twin), expected, rtol=0, atol=1e-4)


@pytest.mark.techniques(
    where=lambda t: t.name in ("omniquant", "gptq"), grids=("per-channel", "asymmetric")
)
def test_export_of_aimet(full: Any, tmp_path: pathlib.Path) -> None:
    """Plain ``sim.onnx.export`` writes the ranges that were decided."""
    pytest.importorskip("onnx")
    sample = torch.arange(32).reshape(2, 16) + 5
    before = grids(full)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        full.onnx.export(sample, str(tmp_path / "plain.onnx"), encoding_version="1.0.0")
    assert (tmp_path / "plain.onnx").is_file()
    (file,) = tmp_path.glob("*.encodings")
    written = [e["scale"] for e in json.loads(file.read_text())["param_encodings"]]
    for name, (scale, _) in before.items():
        wanted = scale.flatten()
        assert any(
            len(found) == len(wanted) and torch.equal(torch.tensor(found), wanted)
            for found in written
        ), name
    assert same_grids(grids(full), before)


def test_export_of_ours(full: Any, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("onnx")
    sample = torch.arange(32).reshape(2, 16) + 5
    expected = logits(full)
    aimet_ext.export(full, tmp_path / "out", "tiny", sample)
    assert torch.equal(logits(aimet_ext.load(tmp_path / "out")), expected)


@pytest.mark.techniques(where=lambda t: t.freezes)
def test_seqmse_of_aimet_afterwards(full: Any, ids: Callable[..., Tensor]) -> None:
    """It works on what is left, the output layer, and leaves frozen ranges alone."""
    seq_mse = importlib.import_module("aimet_torch.seq_mse")
    before, head = grids(full), grids(full, "lm_head")
    blocks = [m for n, m in full.model.named_modules() if n in before]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seq_mse.apply_seq_mse(
            full,
            [ids(2, 16, 1)],
            num_candidates=4,
            forward_fn=lambda m, b: m(b),
            modules_to_exclude=blocks,
        )
    assert same_grids(grids(full), before)
    assert list(grids(full, "lm_head")) == list(head) != []


def test_seqmse_of_aimet_before(technique: Any, make_sim: Any, ids: Callable[..., Tensor]) -> None:
    """Ranges that AIMET froze outside of the blocks stay as they are."""
    seq_mse = importlib.import_module("aimet_torch.seq_mse")
    sim = make_sim(lm_head=QSpec(bitwidth=4))
    blocks = [sim.model.get_submodule(name) for name in grids(sim)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seq_mse.apply_seq_mse(
            sim,
            [ids(2, 16, 1)],
            num_candidates=4,
            forward_fn=lambda m, b: m(b),
            modules_to_exclude=blocks,
        )
    (head,) = grids(sim, "lm_head").values()
    technique.apply(sim, [ids(2, 16, 1)])
    (after,) = grids(sim, "lm_head").values()
    assert torch.equal(head[0], after[0])


@pytest.mark.techniques(where=lambda t: t.folds)
def test_stale_encodings_are_renewed_and_named(
    technique: Any, make_sim: Any, ids: Callable[..., Tensor]
) -> None:
    """Named: those whose tensor a transform changed. Kept: all others, to the bit."""
    data = [ids(2, 16, 1), ids(2, 16, 2)]
    sim = make_sim("qwen2", activations=16)
    sim.compute_encodings(lambda model: [model(batch) for batch in data])
    adaptor = adapt(sim)

    def run() -> None:
        with adaptor.disabled_quantizers(activations=False):
            for batch in data:
                sim.model(batch)

    every = {
        n: q
        for n, q in sim.model.named_modules()
        if hasattr(q, "is_initialized") and not n.endswith("_proj.param_quantizers.weight")
    }
    initialized = {name for name, q in every.items() if q.is_initialized()}
    ranges = {n: [p.detach().clone() for p in q.parameters()] for n, q in every.items()}
    before = adaptor.tensor_ranges("", run)
    report = technique.apply(sim, data)
    after = adaptor.tensor_ranges("", run)
    reset = [name for block in report.blocks for name in block.reset_encodings]
    assert len(set(reset)) == len(reset)
    assert all(every_now(sim)[name].is_initialized() for name in initialized)
    points = {point.place: point for point in adaptor.points().values()}
    for name in reset:  # for the tensors as they are now
        point, (low, high) = points[name], after[name]
        step = (point.high - point.low) / (point.qmax - point.qmin)
        assert not point.frozen, name
        assert point.low <= low + step, name
        assert high - step <= point.high, name
        assert point.symmetric or point.high <= max(high, 0) + 2 * step, name
    for end in ("input_layernorm.output_quantizers.0", "input_layernorm.param_quantizers.weight"):
        assert any(name.endswith(end) for name in reset), end
    assert not any(
        "rotary" in name or name.endswith("q_proj.output_quantizers.0") for name in reset
    )
    for name in initialized - set(reset):
        now = list(every_now(sim)[name].parameters())
        assert all(torch.equal(a, b) for a, b in zip(ranges[name], now, strict=True)), name
        if ".layers." in name and name in before:
            widest = max(map(abs, before[name]))
            for old, new in zip(before[name], after[name], strict=True):
                assert abs(old - new) <= 3e-3 * widest, name
    decided = grids(sim)
    sim.compute_encodings(lambda model: [model(batch) for batch in data])
    assert all(every_now(sim)[name].is_initialized() for name in initialized)
    assert same_grids(grids(sim), decided)


def every_now(sim: Any) -> dict[str, Any]:
    return dict(sim.model.named_modules())


@pytest.mark.techniques(where=lambda t: t.folds)
def test_output_folder(
    technique: Any,
    make_sim: Any,
    tiny_model: Any,
    ids: Callable[..., Tensor],
    tmp_path: pathlib.Path,
) -> None:
    """The scales of the file make the deployed weights from those of the original checkpoint."""
    sim = make_sim("qwen2")
    output = tmp_path / "deep" / "out"
    origin = hash_of(make_sim("qwen2"))
    report = technique.apply(sim, [ids(2, 16, 1)], output_path=output)
    assert json.loads((output / "report.json").read_text()) == report.to_dict()
    assert str(report).count("\n") >= len(report.blocks)
    scales = load_scales(output)
    assert scales.techniques == (technique.name,)
    assert scales.origin == origin
    assert {pair["source"].rpartition(".")[2] for pair in scales.pairs} >= {"v_proj"}
    original = dict(tiny_model("qwen2", max_position_embeddings=64).named_modules())
    assert "model.layers.1.self_attn.v_proj" in scales
    for name, factors in scales.items():
        weight = original[name].weight.detach()
        if factors.output is not None:
            weight = weight * factors.output.view(-1, *[1] * (weight.dim() - 1))
        if factors.input is not None:
            weight = weight * factors.input
        deployed = sim.model.get_submodule(f"model.{name}").weight.detach()
        torch.testing.assert_close(deployed, weight, rtol=1e-6, atol=1e-9)

    file = output / "scales.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"scales\.safetensors"):
        load_scales(output)


def hash_of(sim: Any) -> str:
    state = adapt(sim).float_state()
    return hash_tensors((original_name(n, sim.model), state[n]) for n in sorted(state))


@pytest.mark.techniques(where=lambda t: t.folds)
def test_keys_of_aimet_on_request(
    technique: Any, sim: Any, ids: Callable[..., Tensor], tmp_path: pathlib.Path
) -> None:
    safetensors = importlib.import_module("safetensors.torch")
    technique.apply(sim, [ids(2, 16, 1)], output_path=tmp_path, aimet_keys=True)
    file = tmp_path / "aimet_omniquant_metadata.safetensor"
    keys = safetensors.load_file(file)
    name = "model.layers.0.self_attn.v_proj"
    scales = load_scales(tmp_path)
    torch.testing.assert_close(1 / keys[f"{name}.prev"].flatten(), scales[name].output)
    torch.testing.assert_close(keys[f"{name}.foll"].flatten(), scales[name].input)


@pytest.mark.techniques(where=lambda t: t.folds)
def test_a_folder_of_ours_is_replaced_whole(
    technique: Any, make_sim: Any, ids: Callable[..., Tensor], tmp_path: pathlib.Path
) -> None:
    technique.apply(make_sim(), [ids(2, 16, 1)], output_path=tmp_path / "out", aimet_keys=True)
    technique.apply(make_sim(), [ids(2, 16, 1)], output_path=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(["clips.safetensors"] if technique.freezes else []),
        "manifest.json",
        "report.json",
        "scales.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.techniques(where=lambda t: not t.folds)
def test_output_folder_of_a_technique_without_scales(
    technique: Any, make_sim: Any, ids: Callable[..., Tensor], tmp_path: pathlib.Path
) -> None:
    output = tmp_path / "deep" / "out"
    for seed in (1, 2):
        report = technique.apply(make_sim(layers=1), [ids(2, 16, seed)], output_path=output)
    assert sorted(path.name for path in output.iterdir()) == ["manifest.json", "report.json"]
    written = json.loads((output / "report.json").read_text())
    assert written == getattr(report, "search", report).to_dict()
    assert json.loads((output / "manifest.json").read_text())["techniques"] == [technique.name]
    assert str(report).count("\n") >= len(technique.entries(report))
