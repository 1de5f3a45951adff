"""SpinQuant: learnt rotations are rotations, and no worse than those they started from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import aimet_ext
from aimet_ext import QSpec
from aimet_ext.core.hadamard import nearest_orthogonal
from aimet_ext.sim.protocol import adapt

QUICK: dict[str, Any] = {"evaluations": 2, "progress": False}


@torch.no_grad()
def logits(sim: Any, batch: Tensor) -> Tensor:
    with adapt(sim).disabled_quantizers():
        return sim.model(batch)


def change(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def learn(sim: Any, data: Any, steps: int = 4, **settings: Any) -> Any:
    return aimet_ext.apply_spinquant(sim, data, steps, **{**QUICK, **settings})


@pytest.mark.parametrize("family", ["llama", "phi3", "starcoder2"])
def test_the_float_function_stays(make_sim: Any, ids: Any, family: str) -> None:
    sim = make_sim(family, activations=8)
    before = logits(sim, ids())
    report = learn(sim, [ids(2, 16, seed) for seed in (1, 2)], learning_rate=0.1)
    assert change(logits(sim, ids()), before) < 1e-5
    assert max(part.deviation for part in report.blocks) < 1e-12
    assert report.losses["learnt"] <= report.losses["start"]
    stacks = [s.factor for e in sim.aimet_ext_ledger.entries for s in e.sides if s.factor.dim() > 1]
    for stack in stacks:
        matrix = stack[0].double()
        assert torch.allclose(matrix @ matrix.T, torch.eye(len(matrix)).double(), atol=1e-12)
        assert change(nearest_orthogonal(matrix), matrix) < 1e-12


def test_learning_finds_better_rotations(make_sim: Any, ids: Any) -> None:
    """On the batches held out, at 3 bits; and plain rounding in the simulation gains as well."""
    data = [ids(4, 32, seed) for seed in range(4)]
    errors: dict[str, float] = {}
    for name, steps in (("start", 0), ("learnt", 40)):
        sim = make_sim(spec=QSpec(bitwidth=3))
        before = logits(sim, data[-1])
        if steps:
            report = learn(sim, data, steps, evaluations=6, learning_rate=0.01)
        else:
            aimet_ext.apply_rotation(sim, data, progress=False)
        sim.compute_encodings(lambda model: model(data[0]))
        with torch.no_grad():
            errors[name] = float((sim.model(data[-1]) - before).square().mean())
    assert report.losses["learnt"] < 0.97 * report.losses["start"]
    assert errors["learnt"] < errors["start"]
    assert report.rotations["r1"].endswith("learnt") and report.rotations["r2"].endswith("learnt")
    assert "start" in str(report)


def test_a_step_too_far_keeps_the_start(make_sim: Any, ids: Any) -> None:
    data = [ids(2, 16, seed) for seed in (1, 2)]
    sims = [make_sim(layers=1) for _ in range(2)]
    report = learn(sims[0], data, 1, learning_rate=3.0, momentum=0.0)
    aimet_ext.apply_rotation(sims[1], progress=False)
    if report.losses["learnt"] == report.losses["start"]:
        for one, other in zip(*(sim.model.parameters() for sim in sims), strict=True):
            assert torch.equal(one, other)


def test_the_seed_decides_and_data_are_used(make_sim: Any, ids: Any, result_of: Any) -> None:
    data = [ids(2, 16, seed) for seed in (1, 2)]
    results = []
    for seed in (0, 0, 1):
        sim = make_sim(layers=1, spec=QSpec(bitwidth=3))
        learn(sim, data, seed=seed)
        results.append(result_of(sim))
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("settings", [{"r1": False}, {"r2": False}])
def test_one_rotation_alone(make_sim: Any, ids: Any, settings: Any) -> None:
    sim = make_sim()
    before = logits(sim, ids())
    report = learn(sim, [ids()], **settings)
    assert change(logits(sim, ids()), before) < 1e-5
    assert set(report.rotations) == {"r1", "r2"} - set(settings)


def test_nothing_to_learn_from_is_refused(tiny_llama: Any, ids: Any, state_of: Any) -> None:
    sim = aimet_ext.create_sim(
        tiny_llama, ids(), weights=None, activations=None, lm_head=None, embedding=None
    )
    before = state_of(sim)
    with pytest.raises(ValueError, match=r"quantizes neither; use apply_rotation"):
        learn(sim, [ids()])
    assert state_of(sim) == before


def test_an_interrupt_while_learning_undoes_all(
    make_sim: Any, ids: Any, state_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aimet_ext.core.cayley import CayleySGD

    sim = make_sim(activations=16)
    sim.compute_encodings(lambda model: model(ids()))
    before = state_of(sim)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CayleySGD, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(sim, [ids()])
    assert state_of(sim) == before


@pytest.mark.parametrize("family", ["llama", "starcoder2"])
def test_it_goes_on_from_an_interrupt(
    make_sim: Any,
    ids: Any,
    state_of: Any,
    result_of: Any,
    monkeypatch: Any,
    tmp_path: Any,
    family: str,
) -> None:
    """Killed at any step it ends with the same bits, and reads a finished run back whole."""
    from aimet_ext.core.cayley import CayleySGD

    def fresh(activations: int = 8) -> Any:
        return make_sim(family, layers=1, spec=QSpec(bitwidth=3), activations=activations)

    data = [ids(2, 16, seed) for seed in (1, 2, 3)]
    settings: dict[str, Any] = {"evaluations": 3, "learning_rate": 0.02}
    whole, sim, again = fresh(), fresh(), fresh()
    report = learn(whole, data, 6, **settings)
    settings["checkpoint_dir"] = tmp_path
    before, step, left = state_of(sim), CayleySGD.step, iter(range(5))

    def interrupted(*args: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        step(*args)

    monkeypatch.setattr(CayleySGD, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(sim, data, 6, **settings)
    assert state_of(sim) == before
    monkeypatch.undo()
    for resumed, steps in ((sim, 4), (again, 6)):
        found = learn(resumed, data, 6, **settings)
        assert found.resumed == steps
        assert found.losses == report.losses and found.losses["learnt"] < found.losses["start"]
        assert result_of(resumed) == result_of(whole)
    for other, text in (
        ((fresh(), data, 5), "settings.num_iterations was 6 and is 5"),
        ((fresh(), data[:2], 6), "data was"),
        ((fresh(16), data, 6), r"activations\.\S+ was '0 to 255' and is '0 to 65535'"),
    ):
        with pytest.raises(ValueError, match=f"belongs to another run.*{text}"):
            learn(*other, **settings)


def test_after_a_rotation_it_may_learn_more_and_not_twice(make_sim: Any, ids: Any) -> None:
    sim = make_sim()
    aimet_ext.apply_rotation(sim, progress=False)
    learn(sim, [ids()])
    assert sim.aimet_ext_ledger.techniques == ("rotation", "spinquant")
    with pytest.raises(ValueError, match="spinquant was already applied to"):
        learn(sim, [ids()])


def test_onnx_learns_what_torch_learns() -> None:
    pytest.importorskip("aimet_onnx")
    pairs = pytest.importorskip("onnx_pairs")
    pair = pairs.PAIRS["llama"]()
    sims, reports = pair.sims(QSpec(bitwidth=4)), []
    for sim, data in zip(sims, pair.arguments(), strict=True):
        reports.append(learn(sim, data, 3, learning_rate=0.05))
    for name, loss in reports[0].losses.items():
        assert reports[1].losses[name] == pytest.approx(loss, rel=1e-3), name
