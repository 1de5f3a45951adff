"""SeqMSE in mode "compatible" on ONNX against aimet_onnx's own."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch

import aimet_ext
from aimet_ext.sim.protocol import adapt
from aimet_ext.specs import LPBQ, Blockwise, QSpec

aimet_onnx = pytest.importorskip("aimet_onnx")
onnx_models = pytest.importorskip("onnx_models")

GRIDS = {
    "channel": QSpec(bitwidth=4),
    "channel-asymmetric": QSpec(bitwidth=4, symmetric=False),
    "blocks": QSpec(bitwidth=3, granularity=Blockwise(16)),
    "LPBQ": QSpec(bitwidth=4, granularity=LPBQ(16)),
}


def mlp() -> tuple[Any, list[Any]]:
    random = np.random.default_rng(1)
    mixed = random.standard_normal((2, 48, 16)) @ random.standard_normal((16, 16))
    return onnx_models.mlp_model((16, 32, 32, 8), bias="add"), [
        {"x": x} for x in mixed.astype(np.float32)
    ]


def llama() -> tuple[Any, list[Any]]:
    ids = np.random.default_rng(2).integers(3, 128, (2, 4, 16))
    return onnx_models.exported_llama(layers=1, mask=False).model, [{"input_ids": i} for i in ids]


@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")  # AIMET's folder
@pytest.mark.parametrize("model", [mlp, llama])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_same_ranges_as_aimet(model: Any, grid: str) -> None:
    """At least 99.9 % of the cells.

    AIMET leaves LPBQ's blocks on float scales, each its own, which its exporter then puts on
    integers; these are what ours were before AIMET put them on integers. Where quantizers have
    ranges already it starts from integer ones there.
    """
    from onnx_sims import build_sim

    graph, data = model()
    sims = [build_sim(graph, GRIDS[grid], None) for _ in range(2)]
    if grid == "LPBQ":
        for quantizer in adapt(sims[1]).weight_quantizers().values():
            quantizer.quantizer.reset_encoding_stats()
    report = aimet_ext.apply_seq_mse(sims[0], data, mode="compatible", progress=False)
    aimet_onnx.apply_seq_mse(sims[1], data, 20)
    gc.collect()
    ours, theirs = (adapt(sim).weight_quantizers() for sim in sims)
    assert ours.keys() == theirs.keys() == {layer.name for layer in report.layers}
    same = []
    for name, quantizer in ours.items():
        one, two = quantizer.free_grid(), theirs[name].grid()
        equal = torch.isclose(one.scale, two.scale, rtol=1e-5) & (one.offset == two.offset)
        same.append(equal.flatten())
        assert theirs[name].frozen
        if grid == "LPBQ" and one.shape[1] > 1:
            assert not torch.allclose(quantizer.grid().scale, two.scale, rtol=1e-5)
    assert torch.cat(same).double().mean() >= 0.999
    assert any(layer.loss_after < 0.98 * layer.loss_nearest for layer in report.layers)
