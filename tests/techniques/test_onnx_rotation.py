"""Rotations of ONNX simulations: what PyTorch simulations get, in initializers."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor

import aimet_ext
from aimet_ext import QSpec, TransformRefused
from aimet_ext.sim.protocol import adapt

pytest.importorskip("aimet_onnx")
onnx_models = pytest.importorskip("onnx_models")
onnx_pairs = pytest.importorskip("onnx_pairs")

#: Exported graphs, each a family with fields of its config.
GRAPHS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "phi3": ("phi3", {}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    # Gains are ones and biases zeros, each stored once for all that read it; the head is tied.
    "merged": ("qwen2", {"untrained": True, "tie_word_embeddings": True}),
}


def graph_of(name: str) -> Any:
    if name == "genai":
        return onnx_models.genai_llama(num_hidden_layers=1)[0]
    family, changes = GRAPHS[name]
    layers = 2 if name == "merged" else 1
    return onnx_models.exported_llama(family=family, layers=layers, **changes).model


def sim_of(name: str, activations: QSpec | None = None) -> Any:
    from onnx_sims import build_sim

    model = graph_of(name)
    ids = torch.arange(16).reshape(2, 8)
    dummy = onnx_models.genai_inputs(model, ids) if name == "genai" else None
    return build_sim(model, QSpec(bitwidth=4), activations, dummy_input=dummy)


def feed_of(sim: Any) -> dict[str, Any]:
    return {name: value.numpy() for name, value in adapt(sim).probe_batch().items()}


def logits(sim: Any, feed: dict[str, Any]) -> Tensor:
    with adapt(sim).disabled_quantizers():
        return torch.from_numpy(sim.session.run(None, feed)[0])


def change(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def rotate(sim: Any, dataloader: Any = None, **settings: Any) -> Any:
    return aimet_ext.apply_rotation(sim, dataloader, progress=False, **settings)


@pytest.mark.parametrize("name", [*GRAPHS, "genai"])
def test_the_float_function_stays(name: str) -> None:
    """In onnxruntime, with the session that the simulation has afterwards."""
    sim = sim_of(name)
    feed = feed_of(sim)
    before = logits(sim, feed)
    report = rotate(sim)
    assert change(logits(sim, feed), before) < 1e-5 and report.deviation < 1e-5
    assert max(part.deviation for part in report.blocks) < 1e-12
    assert report.blocks[-1].name == "ends"
    assert set(report.rotations) == {"r1", "r2"} and not report.refused
    assert sim.aimet_ext_ledger.techniques == ("rotation",)


def test_the_weights_are_those_of_a_torch_simulation() -> None:
    pair = onnx_pairs.PAIRS["llama"]()
    sims = pair.sims(QSpec(bitwidth=4))
    names = pair.names(sims[1])
    for sim, data in zip(sims, pair.arguments(), strict=True):
        rotate(sim, data)
    for module, node in names.items():
        theirs = adapt(sims[0]).model.get_submodule(module).weight
        own = adapt(sims[1]).weight_quantizer(node)
        assert own is not None
        assert change(own.weight, theirs.detach()) < 1e-6, module
    kinds = [[entry.kind for entry in sim.aimet_ext_ledger.entries] for sim in sims]
    assert kinds[0] == kinds[1]


def test_stale_encodings_are_reset_and_named() -> None:
    sim = sim_of("llama", QSpec(bitwidth=16, symmetric=False))
    feed = feed_of(sim)
    sim.compute_encodings([feed])
    adaptor = adapt(sim)
    before = {n for n, q in adaptor.activation_quantizers().items() if q.is_initialized()}
    report = rotate(sim, [feed])
    reset = set(report.reset_encodings)
    assert reset & before and adaptor.graph.outputs[0] not in reset
    for name in before & reset:
        assert not sim.qc_quantize_op_dict[name].is_initialized()
    weights = adapt(sim).weight_quantizers()
    assert not any(q.frozen or q.initialized for n, q in weights.items() if "proj" in n)
    sim.compute_encodings([feed])
    assert all(sim.qc_quantize_op_dict[name].is_initialized() for name in before)


def test_a_norm_behind_layers_is_named() -> None:
    from onnx_sims import build_sim

    model = onnx_models.exported_llama(family="gemma3_text", layers=1).model
    sim = build_sim(model, QSpec(bitwidth=4), None)
    state, feed = onnx_pairs.state_of(sim), feed_of(sim)
    before = logits(sim, feed)
    with pytest.raises(TransformRefused, match=r"the norm behind .*normalises.*pass r1=False"):
        rotate(sim)
    assert onnx_pairs.state_of(sim) == state
    rotate(sim, r1=False)
    assert change(logits(sim, feed), before) < 1e-5


@pytest.mark.parametrize("name", ["gemma", "merged"])
def test_a_failure_undoes_all(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """The last thing that can fail; what was copied is one again."""
    from aimet_ext.techniques.rotating import run

    sim = sim_of(name, QSpec(bitwidth=16, symmetric=False))
    feed = feed_of(sim)
    sim.compute_encodings([feed])
    state, before = onnx_pairs.state_of(sim), logits(sim, feed)
    model = sim.model.model.SerializeToString(deterministic=True)

    def failing(*args: Any, **rest: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "write_scales", failing)
    with pytest.raises(KeyboardInterrupt):
        rotate(sim, output_path=tmp_path / "out")
    assert onnx_pairs.state_of(sim) == state
    assert torch.equal(logits(sim, feed), before)
    assert len(sim.model.model.SerializeToString(deterministic=True)) == len(model)


def test_gptq_follows() -> None:
    sim = sim_of("llama")
    feed = feed_of(sim)
    rotate(sim)
    aimet_ext.apply_gptq(sim, [feed], progress=False, scale_candidates=2, refine_sweeps=0)
    assert sim.aimet_ext_ledger.techniques == ("rotation", "gptq")


def test_inputs_that_nobody_can_guess_ask_for_data() -> None:
    pair = onnx_pairs.PAIRS["perceptron"]()
    with pytest.raises(ValueError, match="dataloader must be given for a graph with the inputs x"):
        adapt(pair.sims(QSpec(bitwidth=4))[1]).probe_batch()
