"""OmniQuant from AWQ's scales and clipping: in one call, from its files, and from LLMC's."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import aimet_ext
from aimet_ext import QSpec
from aimet_ext.files.starts import load_starts

pytest.importorskip("aimet_torch")

QUICK: dict[str, Any] = {"num_iterations": 2, "search_sweeps": 0, "progress": False}
SPECS = [
    QSpec(bitwidth=3),
    QSpec(bitwidth=3, symmetric=False, granularity=aimet_ext.Blockwise(16)),
    QSpec(bitwidth=4, granularity=aimet_ext.LPBQ(16)),
]


@pytest.fixture
def data(ids: Callable[..., Tensor]) -> list[Tensor]:
    return [ids(4, 16, 1), ids(3, 24, 2)]


def awq(sim: Any, data: Any, **settings: Any) -> Any:
    return aimet_ext.apply_awq(sim, data, 10, progress=False, **settings)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec.granularity).__name__)
def test_files_of_awq_give_back_its_state(
    make_sim: Any, data: list[Tensor], tmp_path: pathlib.Path, spec: QSpec
) -> None:
    """The first block starts with the loss that AWQ deployed; training never ends above it."""
    before = awq(make_sim(spec=spec), data, output_path=tmp_path / "awq").blocks[0]
    assert before.kept == "awq"
    report = aimet_ext.apply_omniquant(make_sim(spec=spec), data, init=tmp_path / "awq", **QUICK)
    first = report.blocks[0]
    assert first.loss_before == pytest.approx(before.loss_after, rel=1e-3)
    assert first.loss_after <= first.loss_before * (1 + 1e-5)
    assert report.settings["init"] == str(tmp_path / "awq")


def test_one_call_starts_there_too(make_sim: Any, data: list[Tensor]) -> None:
    """Of the same candidates, on the inputs of the quantized model: those of block 0 are float."""
    sims = [make_sim(spec=QSpec(bitwidth=3), layers=1) for _ in range(2)]
    found = aimet_ext.apply_awq(sims[0], data, progress=False).blocks[0]
    started = aimet_ext.apply_omniquant(sims[1], data, init="awq", let=False, **QUICK).blocks[0]
    assert started.loss_after <= started.loss_before * (1 + 1e-5)
    assert started.loss_before == pytest.approx(found.loss_after, rel=0.2)
    entries = [sim.aimet_ext_ledger.entries for sim in sims]
    for one, other in zip(*entries, strict=True):  # the scales are kept, clipping is learnt
        if one.kind == "norm_qkv":  # the first stage sees the same inputs
            for a, b in zip(one.sides, other.sides, strict=True):
                torch.testing.assert_close(a.factor, b.factor, rtol=1e-3, atol=0)


def test_weights_alone_as_llmc_does_it(
    make_sim: Any, data: list[Tensor], tmp_path: pathlib.Path
) -> None:
    """AWQ transforms, then clipping is learnt: on the same sim, or with scales of a folder."""
    same, other = make_sim(), make_sim()
    awq(same, data, clip=False, output_path=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json", "report.json", "scales.safetensors",
    ]  # fmt: skip
    folded = {n: p.detach().clone() for n, p in same.model.named_parameters() if "quant" not in n}
    report = aimet_ext.apply_omniquant(same, data, let=False, **QUICK)
    assert all(torch.equal(same.model.get_parameter(n), p) for n, p in folded.items())
    assert same.aimet_ext_ledger.techniques == ("awq", "omniquant")
    again = aimet_ext.apply_omniquant(other, data, let=False, init=tmp_path, **QUICK)
    scales, kept = aimet_ext.load_scales(tmp_path), other.aimet_ext_ledger.cumulative()
    for name, axes in kept.items():
        for axis, scale in axes.items():
            wanted = getattr(scales[name.removeprefix("model.")], axis)
            torch.testing.assert_close(scale, wanted, rtol=1e-4, atol=0)
    for one, two in zip(report.blocks, again.blocks, strict=True):
        assert one.loss_after <= one.loss_nearest and two.loss_after <= two.loss_nearest
    assert again.blocks[0].loss_after == pytest.approx(report.blocks[0].loss_after, rel=0.1)


def test_files_of_llmc_are_a_start(
    make_sim: Any, data: list[Tensor], tmp_path: pathlib.Path
) -> None:
    """Those of AWQ in its layout, which lacks clips of queries and keys: these are searched."""
    before = awq(make_sim(), data, output_path=tmp_path / "awq").blocks[0]
    starts = load_starts(tmp_path / "awq")
    clips: dict[int, dict[str, Any]] = {}
    for name, (_, high) in starts.shares.items():
        block, layer = name.removeprefix("model.layers.").split(".", 1)
        if not layer.endswith(("q_proj", "k_proj")):
            place = clips.setdefault(int(block), {})
            place[f"{layer}.weight_quantizer.upbound_factor"] = torch.logit(high.clamp(max=1))
            place[f"{layer}.weight_quantizer.lowbound_factor"] = None
    torch.save(dict(starts.columns), tmp_path / "scales.pth")
    torch.save(clips, tmp_path / "clips.pth")
    report = aimet_ext.apply_omniquant(make_sim(), data, init=tmp_path, **QUICK)
    assert report.blocks[0].loss_before == pytest.approx(before.loss_after, rel=0.1)
    assert all(block.loss_after <= block.loss_nearest for block in report.blocks)


def test_starts_that_do_not_fit_are_refused(
    make_sim: Any, data: list[Tensor], state_of: Any, tmp_path: pathlib.Path
) -> None:
    awq(make_sim(layers=1), data, output_path=tmp_path)
    rescaled, other = make_sim(layers=1), make_sim("qwen2", layers=1)
    aimet_ext.apply_smoothquant(rescaled, data, progress=False)
    blockwise = make_sim(layers=1, spec=QSpec(granularity=aimet_ext.Blockwise(16)))
    for sim, text in (
        (rescaled, "for the original weights, but smoothquant rescaled these"),
        (other, "a model of other weights"),
        (blockwise, r"q_proj has \d+ cells, a share for each is required"),
    ):
        before = state_of(sim)
        with pytest.raises(ValueError, match=text):
            aimet_ext.apply_omniquant(sim, data, init=tmp_path, **QUICK)
        assert state_of(sim) == before


def test_a_run_does_not_go_on_from_other_files(
    make_sim: Any, data: list[Tensor], state_of: Any, tmp_path: pathlib.Path
) -> None:
    """The same values read from a file that was written again are the same files."""
    start, kept = tmp_path / "start", tmp_path / "kept"

    def written(steps: int) -> None:
        aimet_ext.apply_awq(make_sim(layers=1), data, steps, output_path=start, progress=False)

    def run() -> Any:
        return aimet_ext.apply_omniquant(sim, data, init=start, checkpoint_dir=kept, **QUICK)

    written(10)
    sim = make_sim(layers=1)
    run()
    written(10)
    sim = make_sim(layers=1)
    assert run().blocks[0].resumed
    written(3)
    sim = make_sim(layers=1)
    before = state_of(sim)
    with pytest.raises(
        ValueError, match=r"another run: settings\.contents of init was '\w+' and is"
    ):
        run()
    assert state_of(sim) == before
