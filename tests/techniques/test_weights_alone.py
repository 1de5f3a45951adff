"""Techniques that need no data: what they decide, and what their reports say."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pathlib
from typing import Any

import pytest
import torch
from layerwise_reference import LINEAR_GRIDS, as_simulated, grids, mlp, random, simulate, weights
from rounding_reference import nearest_by_loop
from torch import nn

import aimet_ext
from aimet_ext import PerTensor, QSpec
from aimet_ext.sim.protocol import adapt

pytest.importorskip("aimet_torch")
WITHOUT_DATA = pytest.mark.techniques(where=lambda t: not t.from_data)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", LINEAR_GRIDS)
def test_rtn_is_plain_rounding_on_the_ranges_of_compute_encodings(name: str, bits: int) -> None:
    granularity, symmetric = LINEAR_GRIDS[name]
    spec = QSpec(bitwidth=bits, symmetric=symmetric, granularity=granularity)
    x = random(2, 16)
    sim = simulate(mlp(16, 8, 4), x, spec)
    before = weights(sim)
    twin = copy.deepcopy(sim)
    twin.compute_encodings(lambda model: model(x))
    aimet_ext.apply_rtn(sim, progress=False)
    for layer, grid in grids(sim).items():
        calibrated = grids(twin)[layer]
        torch.testing.assert_close(grid.scale, calibrated.scale, rtol=3e-5, atol=0)
        assert torch.equal(grid.offset, calibrated.offset)
        shape = adapt(sim).weight_quantizer(layer).layout.shape
        cells = {"scale": grid.scale.view(shape), "offset": grid.offset.view(shape)}
        expected = nearest_by_loop(before[layer], dataclasses.replace(grid, **cells))
        torch.testing.assert_close(weights(sim)[layer], expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(as_simulated(sim, layer), weights(sim)[layer])
        assert adapt(sim).weight_quantizer(layer).frozen


@WITHOUT_DATA
def test_the_report_is_about_the_weights(technique: Any, sim: Any, tmp_path: pathlib.Path) -> None:
    before = weights(sim)
    report = technique.function(sim, progress=False)
    assert report.technique == technique.name and len(report.layers) == 14
    for layer in report.layers:
        weight = before[layer.name].double()
        error = weights(sim)[layer.name].double() - weight
        ratio = 10 * math.log10(float(weight.square().sum() / error.square().sum()))
        assert layer.sqnr_db == pytest.approx(ratio, abs=1e-4)
        assert layer.loss_after <= layer.loss_nearest
    text = str(report)
    assert text.startswith(f"{technique.name}: no data, objective: ") and text.count("\n") == 16
    assert f"{report.layers[0].sqnr_db:.1f} dB" in text.splitlines()[2]
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()


def test_rtn_has_no_objective(sim: Any) -> None:
    report = aimet_ext.apply_rtn(sim, progress=False)
    assert report.objective == "none"
    assert all(layer.noise == layer.noise_nearest == layer.loss_after for layer in report.layers)


@WITHOUT_DATA
def test_a_layer_that_no_data_would_reach_is_decided(technique: Any) -> None:
    """Nothing runs: the model's forward pass may even be broken."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.broken = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.broken
            return self.layer(x)

    sim = simulate(Broken().eval(), random(2, 8))
    sim.model.broken = True
    (layer,) = technique.function(sim, progress=False).layers
    assert layer.name == "layer"


@WITHOUT_DATA
def test_rows_that_share_a_range(technique: Any) -> None:
    """A convolution in groups with one range for all; rows of zeros; a zero tensor."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        net[0].weight[3] = 0
        net[2].weight.zero_()
    sim = simulate(net, random(1, 4, 5, 5), QSpec(bitwidth=3, granularity=PerTensor()))
    report = technique.function(sim, progress=False)
    assert [layer.rows for layer in report.layers] == [8, 4]
    assert bool((sim.model[0].weight[3] == 0).all()) and not bool(sim.model[2].weight.any())
    assert all(math.isfinite(layer.loss_after) for layer in report.layers)
