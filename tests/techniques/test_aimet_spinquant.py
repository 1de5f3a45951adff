"""Models that AIMET's own SpinQuant rotated are taken as any other, and proved as they are."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import aimet_ext
from aimet_ext import QSpec
from aimet_ext.sim.protocol import adapt

#: What follows a rotation, and whether it is proved on the rotated weights.
FOLLOWING: dict[str, dict[str, Any]] = {
    "omniquant": {"num_iterations": 2, "search_sweeps": 0},
    "awq": {"num_grid": 4},
    "rotation": {"mode": "random"},
    "gptq": {"scale_candidates": 0, "refine_sweeps": 0},
}


def change(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def torch_sim(tiny_model: Callable[..., Any]) -> Any:
    """A Llama with R1 and R2 of AIMET in its weights, and its float outputs before."""
    theirs = pytest.importorskip("aimet_torch.spinquant", reason="this AIMET has no SpinQuant")
    ids = torch.randint(3, 100, (4, 12), generator=torch.Generator().manual_seed(0))
    model = tiny_model("llama", num_hidden_layers=2, tie_word_embeddings=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(ids).logits
        theirs.apply_spinquant(model, enable_r1=True, enable_r2=True)
        assert change(model(ids).logits, expected) < 1e-5
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
    sim = aimet_ext.create_sim(model, ids, activations=None)
    return lambda: copy.deepcopy(sim), [ids], expected


@pytest.fixture(scope="module")
def onnx_sim() -> Any:
    """The same of an ONNX graph."""
    reason = "this AIMET has no SpinQuant for ONNX"
    theirs = pytest.importorskip("aimet_onnx.spinquant", reason=reason)
    topology = pytest.importorskip("aimet_onnx.llm_topology", reason=reason)
    from onnx_models import exported_llama, run_onnx
    from onnx_sims import build_sim

    exported = exported_llama(2, 4, 4)
    ids = torch.randint(3, 100, (4, 12), generator=torch.Generator().manual_seed(0))
    feed = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    expected = torch.from_numpy(run_onnx(exported.model, feed)[0])
    found = topology.analyze_llm_topology(exported.model, model_type="llama")
    found = dataclasses.replace(found, head_dim=16)  # which it reads off a cache's inputs
    theirs.apply_spinquant(exported.model, topology=found, enable_r1=True, enable_r2=True)
    assert change(torch.from_numpy(run_onnx(exported.model, feed)[0]), expected) < 1e-5
    return lambda: build_sim(exported.model, QSpec(bitwidth=4), None), [feed], expected


@pytest.mark.parametrize("following", FOLLOWING)
@pytest.mark.parametrize("framework", ["torch", "onnx"])
def test_what_follows_is_proved_on_the_rotated_weights(
    request: pytest.FixtureRequest, framework: str, following: str
) -> None:
    make, data, expected = request.getfixturevalue(f"{framework}_sim")
    sim = make()
    report = getattr(aimet_ext, f"apply_{following}")(
        sim, data, progress=False, **FOLLOWING[following]
    )
    adaptor = adapt(sim)
    if following != "gptq":
        (batch,) = adaptor.batches(data)
        with adaptor.disabled_quantizers(), adaptor.running(()) as run:
            assert change(run(batch), expected) < 1e-5
        assert not getattr(report, "refused_pairs", {}) and not getattr(report, "refused", {})
    # AIMET leaves no trace of its own: the ledger starts at the weights as they were given.
    assert sim.aimet_ext_ledger.techniques == (following,)
