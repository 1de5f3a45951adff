"""Layer-wise techniques on models without blocks, and what their moments are taken of."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import pytest
import torch
from layerwise_reference import (
    IMAGES,
    LAYERS,
    as_simulated,
    check_moments,
    net_sim,
    random,
    seeded,
    simulate,
    weights,
)
from torch import nn

import aimet_ext
from aimet_ext import LPBQ, Blockwise, QSpec
from aimet_ext.sim.protocol import adapt

pytest.importorskip("aimet_torch")

LAYER_WISE = pytest.mark.techniques(where=lambda t: t.on_moments)
QUICK = {"adaround": {"samples": 64, "batch_size": 32}}
W4 = QSpec(bitwidth=4)
O_PROJ, EMBED = "model.model.layers.0.self_attn.o_proj", "model.model.embed_tokens"


def run(technique: Any, sim: Any, data: Any = IMAGES, **settings: Any) -> Any:
    return technique.apply(sim, data, **{**QUICK.get(technique.name, {}), **settings})


@LAYER_WISE
@pytest.mark.parametrize("grid_name", ["channel", "channel-asymmetric", "tensor"])
def test_a_net_of_convolutions(technique: Any, grid_name: str) -> None:
    """Every layer, grouped or not, is decided once and is not above plain rounding."""
    sim = net_sim(grid_name)
    before = weights(sim)
    report = run(technique, sim)
    assert tuple(layer.name for layer in report.layers) == LAYERS
    assert report.cost["walk"] == "graph"
    for layer in report.layers:
        assert layer.loss_after <= layer.loss_nearest + 1e-6 * abs(layer.loss_nearest)
        assert torch.equal(weights(sim)[layer.name], before[layer.name]) != technique.rounds
        if technique.rounds:
            assert torch.equal(as_simulated(sim, layer.name), weights(sim)[layer.name])
    assert sum(layer.loss_after for layer in report.layers) < sum(
        layer.loss_nearest for layer in report.layers
    )


@LAYER_WISE
def test_convolutions_in_blocks(technique: Any) -> None:
    """Blocks of input channels with the whole kernel, LPBQ and plain."""
    for spec in (QSpec(granularity=LPBQ(4)), QSpec(granularity=Blockwise(4), symmetric=False)):
        x = random(2, 8, 6, 6)
        net = seeded(lambda: nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)))
        sim = simulate(net, x, {"0": spec, "2": W4})
        report = run(technique, sim, [x])
        assert [layer.name for layer in report.layers] == ["0", "2"]
        assert all(layer.loss_after <= layer.loss_nearest for layer in report.layers)
        if technique.rounds:
            assert torch.equal(as_simulated(sim, "0"), weights(sim)["0"])


@LAYER_WISE
def test_a_batch_norm_that_was_not_folded(technique: Any, state_of: Any) -> None:
    x = random(2, 3, 6, 6)
    sim = simulate(
        seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())), x
    )
    before = state_of(sim)
    with pytest.raises(ValueError, match=r"after layer '0' must be folded.*fold_all_batch_norms"):
        technique.apply(sim, [x])
    assert state_of(sim) == before


@LAYER_WISE
def test_forms_of_data_for_a_net(technique: Any, tmp_path: pathlib.Path) -> None:
    """Tensors, tuples, keyword arguments, a forward_fn, caches on disk: one result."""

    def opaque(model: nn.Module, batch: Any) -> Any:
        return model(batch["image"])

    def outcome(data: Any, **settings: Any) -> dict[str, Any]:
        sim = net_sim()
        run(technique, sim, data, **settings)
        return {name: as_simulated(sim, name) for name in weights(sim)}

    expected = outcome(IMAGES)
    for data, settings in (
        ([(x,) for x in IMAGES], {}),
        ([{"x": x} for x in IMAGES], {}),
        (iter(IMAGES), {"cache_dir": tmp_path}),
        ([{"image": x} for x in IMAGES], {"forward_fn": opaque}),
    ):
        found = outcome(data, **settings)
        assert all(torch.equal(found[name], expected[name]) for name in expected), settings
    assert list(tmp_path.iterdir()) == []


@LAYER_WISE
def test_checkpoints_of_a_net(technique: Any, tmp_path: pathlib.Path, state_of: Any) -> None:
    first, second = net_sim(), net_sim()
    report = run(technique, first, checkpoint_dir=tmp_path)
    again = run(technique, second, checkpoint_dir=tmp_path)
    assert all(layer.resumed for layer in again.layers)
    assert technique.units(again) == technique.units(report)
    states = [state_of(sim) for sim in (first, second)]
    for state in states:
        state["ledger"] = state["ledger"][:2]
    assert states[0] == states[1]


# What the moments are taken of.


@LAYER_WISE
@pytest.mark.parametrize("symmetry", ["symqt", "symfp", "asym"])
@pytest.mark.parametrize("kind", ["llama", "net", "net-forward_fn"])
def test_moments_are_those_of_the_two_models(
    technique: Any,
    make_sim: Any,
    ids: Any,
    problems: dict[str, Any],
    kind: str,
    symmetry: str,
) -> None:
    """The float stream is the float model's although weights are rounded on the way."""
    data: Any = IMAGES if kind != "llama" else [ids(2, 16, 1), ids(1, 12, 2)]
    head = QSpec(bitwidth=4)
    sim = net_sim() if kind != "llama" else make_sim(lm_head=head, embedding=head)
    adaptor = adapt(sim)
    float_model = copy.deepcopy(sim)
    fn = (lambda model, batch: model(batch)) if kind == "net-forward_fn" else None
    strength = 0.75
    run(
        technique,
        sim,
        data,
        inp_symmetry=symmetry,
        asym_strength=strength,
        forward_fn=fn,
        **({"cache_dir": None} if kind == "llama" else {}),
    )
    assert len(problems) == (15 if kind == "llama" else len(LAYERS))
    assert adaptor.model is sim.model
    with adapt(float_model).disabled_quantizers():
        check_moments(float_model.model, sim, problems, data, symmetry, strength)


@LAYER_WISE
def test_excluded_layers_are_float_meanwhile(
    technique: Any, make_sim: Any, ids: Any, problems: dict[str, Any]
) -> None:
    data = [ids(2, 16, 1)]
    sim = make_sim()
    original = copy.deepcopy(sim)
    technique.apply(sim, data, inp_symmetry="symqt", modules_to_exclude=[O_PROJ, EMBED])
    sim.model.get_submodule(O_PROJ).param_quantizers["weight"] = None
    with adapt(original).disabled_quantizers():
        check_moments(original.model, sim, problems, data, "symqt", 1.0)


@LAYER_WISE
def test_layers_that_are_left_alone_are_on_their_grids_meanwhile(
    technique: Any, make_sim: Any, ids: Any, problems: dict[str, Any]
) -> None:
    """Too wide for the technique, quantized nevertheless: in the blocks, before and after them."""
    data = [ids(2, 16, 1)]
    wide = QSpec(bitwidth=5)
    sim = make_sim(overrides=None, embedding=wide)
    quantizer = adapt(sim).weight_quantizer(O_PROJ)
    aimet_ext.set_lpbq(sim, 16, bitwidth=5, layers=[O_PROJ])
    assert quantizer is not None
    original = copy.deepcopy(sim)
    report = technique.apply(sim, data, inp_symmetry="symqt", max_bitwidth=4)
    assert report.skipped == {O_PROJ: "5 bits, max_bitwidth is 4"}
    with adapt(original).disabled_quantizers():
        check_moments(original.model, sim, problems, data, "symqt", 1.0)
