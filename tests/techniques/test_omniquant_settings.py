"""What OmniQuant's settings do, and that it helps."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import aimet_ext
from aimet_ext import OmniQuantParams, PerTensor, QSpec
from aimet_ext.sim.protocol import adapt
from aimet_ext.techniques import omniquant

pytest.importorskip("aimet_torch")

QUICK: dict[str, Any] = {"num_iterations": 3, "search_sweeps": 1, "progress": False}


@pytest.fixture
def data(ids: Callable[..., Tensor]) -> list[Tensor]:
    return [ids(4, 16, 1), ids(3, 24, 2)]


@pytest.mark.parametrize(
    "settings",
    [
        {"quantize_activations": True},
        {"aug_loss": 1.0},
        {"autocast": True},
        {"batch_size": 1},
        {"batch_size": 99},
        {"let": False},
        {"lwc": False},
        {"init": "ones"},
        {"init": "search"},
        {"init": "awq"},
        {"init": "awq", "let": False},
        {"search_sweeps": 0},
        {"search_sweeps": 0, "init": "search"},
        {"search_sweeps": 0, "lwc": False, "init": "ones"},
        {"float_target": False},
        {"lr_schedule": "linear"},
        {"lr_schedule": "constant", "evaluations": 99},
        {"pairs": ("v_o",)},
        {"pairs": ()},
        {"smooth_alpha": 1.0},
        {"device": "cpu"},
    ],
    ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items()),
)
def test_settings_work(make_sim: Any, data: list[Tensor], settings: dict[str, Any]) -> None:
    """Never worse than plain rounding or than the start; what is switched off stays off."""
    sim = make_sim(activations=8, layers=1)
    before = {name: p.detach().clone() for name, p in sim.model.named_parameters()}
    grids = {n: q.grid().scale for n, q in adapt(sim).weight_quantizers().items()}
    report = aimet_ext.apply_omniquant(sim, data, **{**QUICK, **settings})
    (block,) = report.blocks
    assert math.isfinite(block.loss_after)
    assert block.loss_after <= block.loss_nearest
    assert block.loss_after <= block.loss_before * (1 + 1e-5)
    for name, value in settings.items():
        if name != "device":
            expected = list(value) if isinstance(value, tuple) else value
            assert report.settings[name] == expected
    if settings == {"let": False} or settings.get("pairs") == ():
        assert sim.aimet_ext_ledger.entries == []
        for name, parameter in sim.model.named_parameters():
            assert "quantizers" in name or torch.equal(parameter, before[name]), name
    if settings.get("pairs") == ("v_o",):
        assert {entry.kind for entry in sim.aimet_ext_ledger.entries} <= {"v_o"}
    if settings.get("lwc") is False:  # ranges hold every weight
        for name, quantizer in adapt(sim).weight_quantizers(grids).items():
            weight = quantizer.weight.detach()
            if weight.dim() > 1 and quantizer.frozen:
                scale = quantizer.grid().scale
                assert bool((weight.abs().amax(1, keepdim=True) <= 8.05 * scale).all()), name


def test_activations_are_trained_on_the_ranges_that_are_deployed(
    make_sim: Any, data: list[Tensor], block_outputs: Any
) -> None:
    sim = make_sim(activations=6, layers=1)
    adaptor = adapt(sim)
    inside = [p for p in adaptor.points().values() if ".layers.0." in p.name and p.kind != "weight"]
    chosen = next(point for point in inside if point.name.endswith("gate_proj"))
    adaptor.write_range(chosen, -3.0, 3.0)
    with adaptor.disabled_quantizers():
        targets = block_outputs(sim.model, 0, data)
    (block,) = aimet_ext.apply_omniquant(sim, data, **QUICK, quantize_activations=True).blocks
    points = {point.name: point for point in adaptor.points().values()}
    assert all(points[p.name].frozen and points[p.name].low is not None for p in inside)
    assert points[chosen.name].high == pytest.approx(3.0, rel=0.05)
    # The report's loss is that of the simulation, whose other quantizers are off here.
    weights = [name for name in points if ".layers.0." in name and "norm" not in name]
    with adaptor.running([*weights, *(p.name for p in inside)]):
        outputs = block_outputs(sim.model, 0, data)
    errors = [(a - b).square() for a, b in zip(outputs, targets, strict=True)]
    loss = sum(float(e.sum()) for e in errors) / sum(e.numel() for e in errors)
    assert block.loss_after == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_run_with_activations_goes_on_to_the_bit(
    make_sim: Any,
    data: list[Tensor],
    state_of: Any,
    result_of: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    calibrated: bool,
) -> None:
    def fresh(bits: int = 6) -> Any:
        sim = make_sim(activations=bits)
        if calibrated:
            sim.compute_encodings(lambda model: model(data[0]))
        points = adapt(sim).points().values()
        chosen = next(p for p in points if p.name.endswith("layers.0.mlp.gate_proj"))
        adapt(sim).write_range(chosen, -3.0, frozen)
        return sim

    def run(sim: Any, **settings: Any) -> Any:
        return aimet_ext.apply_omniquant(sim, data, quantize_activations=True, **QUICK, **settings)

    frozen = 3.0
    whole, sim, again = fresh(), fresh(), fresh()
    report = run(whole)
    before, train, blocks = state_of(sim), omniquant.train_block, iter(range(1))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(blocks, None) is None:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(omniquant, "train_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(sim, checkpoint_dir=tmp_path)
    assert state_of(sim) == before
    monkeypatch.undo()
    for resumed, count in ((sim, 1), (again, 2)):
        found = run(resumed, checkpoint_dir=tmp_path)
        assert [block.resumed for block in found.blocks] == [True] * count + [False] * (2 - count)
        for one, other in zip(found.blocks, report.blocks, strict=True):
            assert (one.loss_after, one.loss_nearest) == (other.loss_after, other.loss_nearest)
            assert one.reset_encodings == other.reset_encodings
        assert result_of(resumed) == result_of(whole)
        states = [state_of(each) for each in (resumed, whole)]
        assert [state.pop("ledger")[:2] for state in states] == [
            (len(whole.aimet_ext_ledger.entries), 1)
        ] * 2
        assert states[0] == states[1]
    if not calibrated:
        return
    with pytest.raises(ValueError, match=r"another run.*activations\.\S+integers was '0 to 63'"):
        run(fresh(8), checkpoint_dir=tmp_path)
    frozen = 4.0
    with pytest.raises(
        ValueError, match=r"another run.*gate_proj\S+range was '-\S+ to 2\.\S+' and"
    ):
        run(fresh(), checkpoint_dir=tmp_path)


def test_one_params_object_or_its_fields(make_sim: Any, data: list[Tensor], result_of: Any) -> None:
    params = OmniQuantParams(num_iterations=3, search_sweeps=1, let_lr=1e-2)
    one, other = make_sim(layers=1), make_sim(layers=1)
    aimet_ext.apply_omniquant(one, data, params=params, progress=False)
    report = aimet_ext.apply_omniquant(
        other,
        data,
        3,
        params=dataclasses.replace(params, let_lr=5e-3),
        let_lr=1e-2,
        progress=False,
    )
    assert result_of(one) == result_of(other)
    assert report.settings == params.to_dict()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"lwc": False, "let": False}, "lwc or let must be true"),
        ({"lwc_lr": -1.0}, "lwc_lr"),
        ({"let_lr": math.nan}, "let_lr"),
        ({"init": "random"}, "init: .*path of a folder or file that exists"),
        ({"let_start": "ones", "init": "awq"}, "let_start and init are one setting, given twice"),
        ({"pairs": ("q_v",)}, "pairs"),
        ({"batch_size": 0}, "batch_size"),
        ({"smooth_alpha": 1.5}, "smooth_alpha"),
    ],
    ids=str,
)
def test_settings_that_are_refused(
    sim: Any, data: list[Tensor], state_of: Any, settings: dict[str, Any], text: str
) -> None:
    before = state_of(sim)
    with pytest.raises(ValueError, match=text):
        aimet_ext.apply_omniquant(sim, data, **settings)
    assert state_of(sim) == before


@pytest.mark.parametrize("rate", [1e2, 1e6])
@pytest.mark.parametrize("search_sweeps", [0, 1])
def test_divergence_is_rolled_back(
    make_sim: Any, data: list[Tensor], rate: float, search_sweeps: int
) -> None:
    sim = make_sim("qwen2")
    report = aimet_ext.apply_omniquant(
        sim,
        data,
        8,
        let_lr=rate,
        lwc_lr=rate,
        search_sweeps=search_sweeps,
        evaluations=8,
        lr_schedule="constant",
        progress=False,
    )
    for block in report.blocks:
        assert block.loss_after <= block.loss_nearest
        assert block.loss_after <= block.loss_before * (1 + 1e-5)
    assert all(bool(p.isfinite().all()) for p in sim.model.parameters())


def test_nan_in_a_step_is_rolled_back(
    make_sim: Any, data: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third step of each block leaves NaN behind; training goes on from the best state."""
    steps = []
    step = torch.optim.Adam.step

    def poisoned(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(step(optimizer, *args, **kwargs))
        if len(steps) == 3:
            with torch.no_grad():
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.fill_(math.nan)
        return steps[-1]

    monkeypatch.setattr(torch.optim.Adam, "step", poisoned)
    sim = make_sim(layers=1)
    report = aimet_ext.apply_omniquant(sim, data, 8, search_sweeps=0, evaluations=8, progress=False)
    assert len(steps) > 4
    assert report.blocks[0].loss_after <= report.blocks[0].loss_before
    assert all(bool(p.isfinite().all()) for p in sim.model.parameters())


def test_training_lowers_the_loss(make_sim: Any, data: list[Tensor]) -> None:
    """The gradient alone, from scales of 1, ends clearly below where it began."""
    sim = make_sim(layers=1, spec=QSpec(bitwidth=3, granularity=PerTensor()))
    report = aimet_ext.apply_omniquant(
        sim, data, 30, search_sweeps=0, init="ones", let_lr=0.03, progress=False
    )
    (block,) = report.blocks
    assert block.kept == "training"
    assert block.loss_after < 0.95 * block.loss_before


def test_the_seed_decides_the_order_of_batches(
    make_sim: Any, ids: Callable[..., Tensor], result_of: Any
) -> None:
    data = [ids(2, 16, seed) for seed in range(4)]
    results = []
    for seed in (0, 0, 1):
        sim = make_sim(layers=1)
        aimet_ext.apply_omniquant(
            sim, data, 6, search_sweeps=0, batch_size=1, seed=seed, let_lr=0.05, progress=False
        )
        results.append(result_of(sim))
    assert results[0] == results[1]


def test_excluded_layers_are_left_alone(make_sim: Any, data: list[Tensor]) -> None:
    sim = make_sim()
    excluded = "model.model.layers.1.self_attn.v_proj"
    quantizer = adapt(sim).weight_quantizer(excluded)
    weight, scale = quantizer.weight.detach().clone(), quantizer.grid().scale
    report = aimet_ext.apply_omniquant(sim, data, modules_to_exclude=[excluded], **QUICK)
    assert torch.equal(quantizer.weight, weight)
    assert torch.equal(quantizer.grid().scale, scale) and not quantizer.frozen
    assert set(report.refused_pairs) == {"norm_qkv", "v_o"}
    assert all("v_proj" in reason for reason in report.refused_pairs.values())


def test_a_block_without_a_layer_to_quantize_is_passed(make_sim: Any, data: list[Tensor]) -> None:
    sim = make_sim()
    first = [n for n in adapt(sim).weight_quantizers() if n.startswith("model.model.layers.0.")]
    weight = adapt(sim).weight_quantizer(first[0]).weight.detach().clone()
    report = aimet_ext.apply_omniquant(sim, data, modules_to_exclude=first, **QUICK)
    assert [block.name for block in report.blocks] == [f"model.model.layers.{i}" for i in (0, 1)]
    assert report.blocks[0].loss_after == report.blocks[0].loss_nearest
    assert torch.equal(adapt(sim).weight_quantizer(first[0]).weight, weight)


def test_progress_is_shown_on_request(
    sim: Any, data: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    aimet_ext.apply_omniquant(sim, data, **{**QUICK, "progress": True})
    shown = capsys.readouterr().err
    assert "OmniQuant, block 2 of 2" in shown and "6/6" in shown


@pytest.mark.slow
def test_perplexity_of_a_trained_model_recovers() -> None:
    """On text it was not calibrated on, far closer to float than plain rounding is."""
    transformers = pytest.importorskip("transformers")
    folder = aimet_ext.examples.model_dir()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def batches(split: str, count: int) -> list[Tensor]:
        documents = aimet_ext.examples.documents(split)
        return aimet_ext.calibration_batches(tokenizer, documents, 128, count, batch_size=4)

    calibration, evaluation = batches("calibration", 2), batches("evaluation", 4)
    figures = {"float": aimet_ext.evaluate_perplexity(model, evaluation)}
    for name in ("nearest", "omniquant"):
        sim = aimet_ext.create_sim(
            model,
            calibration[0],
            weights=QSpec(bitwidth=3),
            lm_head=None,
            embedding=None,
            activations=None,
        )
        if name == "omniquant":
            aimet_ext.apply_omniquant(sim, calibration, 4, search_sweeps=1, progress=False)
        figures[name] = aimet_ext.evaluate_perplexity(sim, evaluation)
    lost = math.log(figures["nearest"] / figures["float"])
    left = math.log(figures["omniquant"] / figures["float"])
    assert left < 0.7 * lost, figures


def test_ranges_of_norm_gains_do_not_blur_the_judgement(make_sim: Any, data: list[Tensor]) -> None:
    """Gains have moved out of the ranges their quantizers had: losses must not see those."""
    losses = []
    for activations in (None, 16):
        report = aimet_ext.apply_omniquant(make_sim(activations=activations), data, **QUICK)
        losses.append([loss for b in report.blocks for loss in (b.loss_nearest, b.loss_after)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
