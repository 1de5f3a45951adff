"""Scales that are chosen leave room for an int32 bias; lint names what does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import aimet_ext
from aimet_ext import QSpec
from aimet_ext.sim.protocol import adapt

pytest.importorskip("aimet_torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # AIMET uses what torch and AIMET deprecated

TECHNIQUES: dict[str, dict[str, Any]] = {
    "seq_mse": {"num_candidates": 4},
    "gptq": {"scale_candidates": 2},
    "adaround": {"num_iterations": 5},
}


def model(share: float) -> nn.Module:
    """Two layers; one output row of each is small or zero, and its bias is not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight[1] *= share
            layer.bias[1] = 30.0
    return net.eval()


def overflows(sim: Any) -> list[str]:
    return [found.name for found in aimet_ext.lint(sim) if found.check == "bias"]


@pytest.mark.parametrize("share", [0.0, 1e-7, 1e-4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("chosen", TECHNIQUES)
def test_biases_fit_int32(chosen: str, symmetric: bool, share: float) -> None:
    batches = [torch.randn(32, 16) for _ in range(2)]
    weights = QSpec(bitwidth=8, symmetric=symmetric)
    sim = aimet_ext.create_sim(model(share), batches[0], weights=weights, lm_head=weights)
    apply = getattr(aimet_ext, f"apply_{chosen}")
    report = apply(sim, batches, progress=False, **TECHNIQUES[chosen])
    sim.compute_encodings(lambda m: [m(batch) for batch in batches])
    assert overflows(sim) == []
    for layer in report.layers:
        assert layer.loss_after <= layer.loss_nearest


@pytest.mark.techniques(where=lambda t: not t.from_data)
@pytest.mark.parametrize("share", [0.0, 1e-7, 1e-4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_biases_fit_int32_without_data(technique: Any, symmetric: bool, share: float) -> None:
    """By the ranges of the inputs, where the simulation is calibrated."""
    batch = torch.randn(32, 16)
    weights = QSpec(bitwidth=8, symmetric=symmetric)
    sim = aimet_ext.create_sim(model(share), batch, weights=weights, lm_head=weights)
    sim.compute_encodings(lambda m: m(batch))
    technique.function(sim, progress=False)
    assert overflows(sim) == []
    sim.compute_encodings(lambda m: m(batch))
    assert overflows(sim) == []


def test_float_activations_need_no_room() -> None:
    """Without an int32 bias, a row of small weights keeps its small scale."""
    batches = [torch.randn(32, 16) for _ in range(2)]
    sim = aimet_ext.create_sim(model(1e-5), batches[0], weights=QSpec(bitwidth=8), activations=None)
    aimet_ext.apply_gptq(sim, batches, progress=False)
    (quantizer, *_) = adapt(sim).weight_quantizers().values()
    assert float(quantizer.grid().scale[1]) < 1e-6


@pytest.mark.parametrize("chosen", ["omniquant", "autoround"])
@pytest.mark.parametrize("share", [0.0, 1e-7, 1e-5])
def test_biases_fit_int32_block_by_block(tiny_model: Any, share: float, chosen: str) -> None:
    batches = [torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))]
    network = tiny_model("qwen2", num_hidden_layers=1)
    projection = network.model.layers[0].self_attn.k_proj
    with torch.no_grad():
        projection.weight[3] *= share
        projection.bias[3] = 30.0
    sim = aimet_ext.create_sim(network, batches[0], weights=QSpec(bitwidth=8))
    getattr(aimet_ext, f"apply_{chosen}")(sim, batches, 2, progress=False)
    sim.compute_encodings(lambda m: [m(batch) for batch in batches])
    assert overflows(sim) == []


def test_lint_names_a_bias_that_overflows() -> None:
    batches = [torch.randn(32, 16)]
    sim = aimet_ext.create_sim(model(1.0), batches[0], weights=QSpec(bitwidth=8))
    sim.compute_encodings(lambda m: [m(batch) for batch in batches])
    assert overflows(sim) == []
    name, quantizer = next(iter(adapt(sim).weight_quantizers().items()))
    quantizer.set_scale(quantizer.grid().scale * 1e-7, None)
    (finding,) = (f for f in aimet_ext.lint(sim) if f.check == "bias")
    assert finding.name == name and "of 8 output channels" in finding.message
