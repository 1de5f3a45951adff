"""SeqMSE in mode "compatible" against AIMET's own, from end to end, on a trained model."""

from __future__ import annotations

import copy

import pytest
import torch

import aimet_ext
from aimet_ext import LPBQ, QSpec
from aimet_ext.sim.protocol import adapt

CALIBRATION, SCORING = 2, 8  # windows; AIMET runs the model anew for every layer
GRIDS = {
    "per_channel": QSpec(bitwidth=4),
    "asymmetric": QSpec(bitwidth=4, symmetric=False),
    "lpbq": QSpec(bitwidth=4, granularity=LPBQ(4)),  # 172 columns of its MLP are 4 · 43
}


@pytest.fixture(scope="module")
def stories(assets):
    """A trained Llama, and windows to calibrate and to score."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("aimet_torch")
    folder = assets / "stories260K-hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def windows(name, count):
        path = assets / "tinystories" / name
        return aimet_ext.calibration_batches(tokenizer, path, 256, count)

    return model.eval(), windows("calib.jsonl", CALIBRATION), windows("eval.jsonl", SCORING)


def ranges(sim):
    """The grid of every quantized weight, LPBQ's blocks with their own float scales."""
    return {name: q.free_grid() for name, q in adapt(sim).weight_quantizers().items()}


@pytest.mark.parametrize("grid", list(GRIDS))
def test_the_same_rows_and_perplexity_as_aimet(stories, grid):
    """At least 99.9 % of the cells, and 0.2 % in perplexity."""
    from aimet_torch.seq_mse import apply_seq_mse

    model, calibration, scoring = stories
    sim = aimet_ext.create_sim(
        copy.deepcopy(model),
        calibration[0],
        weights=GRIDS[grid],
        activations=None,
        lm_head=None,
        embedding=None,
    )
    theirs = copy.deepcopy(sim)
    apply_seq_mse(theirs, calibration, 20)
    report = aimet_ext.apply_seq_mse(
        sim, calibration, num_candidates=20, mode="compatible", progress=False
    )
    found, expected = ranges(sim), ranges(theirs)
    assert found.keys() == expected.keys()
    assert len(report.layers) == len(found)
    same = [
        torch.isclose(grid.scale, expected[name].scale, rtol=1e-5)
        & (grid.offset == expected[name].offset)
        for name, grid in found.items()
    ]
    assert torch.cat([cells.flatten() for cells in same]).double().mean() >= 0.999
    gains = [layer.loss_after < 0.98 * layer.loss_nearest for layer in report.layers]
    assert sum(gains) > len(gains) / 2  # there was something to choose
    with torch.no_grad():
        mine, aimets = (aimet_ext.evaluate_perplexity(s, scoring) for s in (sim, theirs))
    assert mine == pytest.approx(aimets, rel=2e-3)
