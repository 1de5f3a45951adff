"""AutoRound on ONNX simulations: blocks computed in PyTorch, integers in initializers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import aimet_ext
from aimet_ext.sim.protocol import adapt
from aimet_ext.techniques import autoround

pytest.importorskip("aimet_onnx")
pytest.importorskip("aimet_torch")
onnx_pairs = pytest.importorskip("onnx_pairs")

GRIDS, outputs, state_of = onnx_pairs.GRIDS, onnx_pairs.outputs, onnx_pairs.state_of
QUICK: dict[str, Any] = {"num_iterations": 12, "batch_size": 8, "progress": False}


@pytest.mark.parametrize("kind", GRIDS)
def test_both_adaptors_start_the_same_and_learn(kind: str) -> None:
    """AIMET's own operator leaves the weights alone, in the session too."""
    pair = onnx_pairs.PAIRS["llama"]()
    sims, data = pair.sims(GRIDS[kind]), pair.arguments()
    reports = [
        aimet_ext.apply_autoround(sim, batches, **QUICK)
        for sim, batches in zip(sims, data, strict=True)
    ]
    for one, two in zip(*(report.blocks for report in reports), strict=True):
        assert two.loss_nearest == pytest.approx(one.loss_nearest, rel=1e-3)
        assert two.loss_before == pytest.approx(one.loss_before, rel=1e-2)
        for block in (one, two):
            assert block.loss_after <= min(block.loss_before, block.loss_nearest)
    sim = sims[1]
    adaptor, found = adapt(sim), outputs(sim, pair.batches)
    decided = {quantizer.name for quantizer in adaptor.weight_quantizers().values()}
    blocks = [node for node in decided if "layers" in node]
    assert len(blocks) == 7
    for node in blocks:
        layer = adaptor.layers[node]
        weight, quantizer = adaptor.graph.array(layer.weight), sim.qc_quantize_op_dict[layer.weight]
        assert (quantizer.quantize_dequantize(weight) == weight).all()
        assert quantizer.is_encoding_frozen()
    with adaptor.disabled_quantizers(keep=decided - {*blocks}):
        for one, two in zip(outputs(sim, pair.batches), found, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_a_failure_leaves_no_trace_and_a_checkpoint_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    pair = onnx_pairs.PAIRS["llama"]()
    whole, sim = (pair.sims(GRIDS["channel"])[1] for _ in range(2))
    data, before = pair.arguments()[1], state_of(sim)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(autoround.torch.optim.Adam, "step", _interrupt)
        aimet_ext.apply_autoround(sim, data, **QUICK)
    assert state_of(sim) == before
    aimet_ext.apply_autoround(whole, data, checkpoint_dir=tmp_path, **QUICK)
    report = aimet_ext.apply_autoround(sim, data, checkpoint_dir=tmp_path, **QUICK)
    assert [block.resumed for block in report.blocks] == [True]
    states = [state_of(each) for each in (whole, sim)]
    assert [s.pop("ledger") is not None for s in states] == [True, True]
    assert states[0] == states[1] != before


def _interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt
