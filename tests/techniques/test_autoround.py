"""AutoRound: its training step by step, its start, the grids it deploys on, both frameworks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import autoround_reference
import pytest
import torch
from layerwise_reference import as_simulated, grids, same, weights
from torch import Tensor

import aimet_ext
from aimet_ext import LPBQ, AutoRoundParams, Blockwise, PerTensor, QSpec, examples
from aimet_ext.techniques import autoround

pytest.importorskip("aimet_torch")

WEIGHTS_ONLY: dict[str, Any] = {"activations": None, "lm_head": None, "embedding": None}
QUICK: dict[str, Any] = {"num_iterations": 4, "progress": False}
SPECS = {
    "2 bits": QSpec(bitwidth=2),
    "3 bits, asymmetric blocks": QSpec(bitwidth=3, symmetric=False, granularity=Blockwise(16)),
    "4 bits, LPBQ": QSpec(bitwidth=4, granularity=LPBQ(16)),
    "8 bits, one range": QSpec(bitwidth=8, granularity=PerTensor()),
}


@pytest.mark.parametrize("name", ["3 bits, asymmetric blocks", "4 bits, LPBQ"])
def test_training_follows_the_reference(
    name: str, make_sim: Any, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of every step is that of gradients and updates written out in float64."""
    params = AutoRoundParams(
        num_iterations=6, batch_size=3, learning_rate=0.05, scale_lr=0.02, trim=0.01, autocast=False
    )
    train, found, expected = autoround.train_block, [], []

    def both(block: Any, start: Any, score: float, _: Any, **rest: Any) -> Any:
        steps = autoround._steps(block, params.batch_size, rest["seed"])
        expected.append(autoround_reference.losses_of(block, start, params, steps))
        found.append([])
        return train(block, start, score, params, **{**rest, "on_step": found[-1].append})

    monkeypatch.setattr(autoround, "train_block", both)
    aimet_ext.apply_autoround(
        make_sim(spec=SPECS[name], layers=1), batches, trim=params.trim, **QUICK
    )
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=0)
    assert len({*found[0]}) == params.num_iterations


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Each block with the state that training starts from, as it is to be deployed."""
    kept: list[tuple[Any, Any]] = []
    train = autoround.train_block

    def note(block: Any, start: Any, *args: Any, **rest: Any) -> Any:
        learners = autoround._learners(block, start, args[1])
        for layer, learner in learners.items():
            assert torch.equal(learner.codes(), start.codes[layer].to(learner.weight))
        kept.append((block, block.state_params(start)))
        return train(block, start, *args, **rest)

    monkeypatch.setattr(autoround, "train_block", note)
    return kept


@pytest.mark.parametrize("name", ["2 bits", "4 bits, LPBQ"])
def test_it_starts_at_gptq(name: str, make_sim: Any, batches: list[Tensor], starts: Any) -> None:
    """On the same inputs: integers and scales of GPTQ, but rows it gives back to rounding."""
    one, other = (make_sim(spec=SPECS[name], layers=1) for _ in range(2))
    plain = make_sim(spec=SPECS[name], layers=1)
    aimet_ext.apply_rtn(plain, progress=False)
    aimet_ext.apply_autoround(one, batches, **QUICK)
    aimet_ext.apply_gptq(other, batches, progress=False)
    ((block, start),) = starts
    compared = 0
    for layer in block.stages[0]:
        theirs, rounded = (weights(s)[f"{block.name}.{layer}"] for s in (other, plain))
        kept = (theirs != rounded).any(1)
        assert torch.equal(start[f"{layer}.weight"][kept], theirs[kept])
        compared += int(kept.sum())
    assert compared > 40


@pytest.mark.parametrize("name", SPECS)
def test_what_was_learnt_is_deployed(name: str, make_sim: Any, batches: list[Tensor]) -> None:
    """On the grid to the last bit, and no block is worse than GPTQ's rounding."""
    sim = make_sim(spec=SPECS[name], layers=1)
    before = weights(sim)
    report = aimet_ext.apply_autoround(sim, batches, 20, batch_size=6, progress=False)
    for block in report.blocks:
        assert block.loss_after <= min(block.loss_before, block.loss_nearest)
    assert name.startswith("8") or "training" in {block.kept for block in report.blocks}
    after, decided = weights(sim), grids(sim)
    sim.compute_encodings(lambda model: [model(batch) for batch in batches])
    for layer, weight in weights(sim).items():
        if ".layers." in layer:
            assert torch.equal(as_simulated(sim, layer), weight) and same(
                grids(sim)[layer], decided[layer]
            )
            assert torch.equal(weight, after[layer]) and not torch.equal(weight, before[layer])


def test_two_bits_gain_much() -> None:
    """Beside GPTQ, whose errors are minimised layer by layer, on text that was not seen as well."""
    transformers = pytest.importorskip("transformers")
    folder = examples.model_dir()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    data, (unseen,) = (
        aimet_ext.calibration_batches(tokenizer, examples.documents(split), 64, 1, count)
        for split, count in (("calibration", 16), ("evaluation", 8))
    )
    sims = [
        aimet_ext.create_sim(
            copy.deepcopy(model), unseen, weights=QSpec(bitwidth=2), **WEIGHTS_ONLY
        )
        for _ in range(2)
    ]
    (block,) = aimet_ext.apply_autoround(sims[0], data, 24, progress=False).blocks
    aimet_ext.apply_gptq(sims[1], data, progress=False)
    assert block.loss_after < 0.95 * block.loss_before < 0.5 * block.loss_nearest
    with torch.no_grad():
        reference = model(unseen).logits
        errors = [float((sim.model(unseen) - reference).square().mean()) for sim in sims]
    assert errors[0] < errors[1]


def test_sequences_of_several_batches_make_a_step(
    make_sim: Any, ids: Callable[..., Tensor]
) -> None:
    """Batches of the dataloader may be as small as may be."""
    whole, single = make_sim(layers=1), make_sim(layers=1)
    data = ids(3, 16, 1)
    settings = {**QUICK, "batch_size": 3, "trim": 0.0, "autocast": False}
    first = aimet_ext.apply_autoround(whole, [data], **settings)
    second = aimet_ext.apply_autoround(single, list(data.split(1)), **settings)
    (one,), (two,) = first.blocks, second.blocks
    assert two.loss_after == pytest.approx(one.loss_after, rel=1e-3)
    assert two.loss_before == pytest.approx(one.loss_before, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_of_half_precision(dtype: torch.dtype, make_sim: Any, batches: list[Tensor]) -> None:
    """Trained in float32, judged and deployed in their own type."""
    sim = make_sim(dtype=dtype, layers=1)
    settings = {"batch_size": 6, "progress": False}
    (block,) = aimet_ext.apply_autoround(sim, batches, 20, **settings).blocks
    assert block.kept == "training" and block.loss_after < block.loss_before
    for layer, weight in weights(sim).items():
        if ".layers." in layer:
            assert weight.dtype == dtype and torch.equal(as_simulated(sim, layer), weight)


def test_ranges_of_omniquant_are_rounded_on(make_sim: Any, batches: list[Tensor]) -> None:
    sim = make_sim(layers=1)
    aimet_ext.apply_omniquant(sim, batches, 2, search_sweeps=1, progress=False)
    decided = {name: grid for name, grid in grids(sim).items() if ".layers." in name}
    (block,) = aimet_ext.apply_autoround(sim, batches, **QUICK).blocks
    assert block.loss_after <= block.loss_before < block.loss_nearest
    assert all(same(grids(sim)[name], grid) for name, grid in decided.items())
    assert sim.aimet_ext_ledger.techniques == ("omniquant", "autoround")
