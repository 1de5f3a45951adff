"""Each fault of a torch simulation is named with its remedy, and sound simulations have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from aimet_ext.grids.create import create_sim
from aimet_ext.integrations.qnn_targets import LIMITS, find_target, target_names
from aimet_ext.linting.lint import lint
from aimet_ext.sim.protocol import adapt
from aimet_ext.specs import LPBQ, Blockwise, PerChannel, PerTensor, QSpec

pytest.importorskip("aimet_torch")

LPBQ32 = QSpec(bitwidth=4, granularity=LPBQ(32))


def named(sim: Any, target: str = "htp_v79") -> dict[str, str]:
    """Name and check of each finding, one that says what to do."""
    findings = lint(sim, target)
    assert all(found.message and found.remedy for found in findings)
    assert len({(found.check, found.name) for found in findings}) == len(findings)
    return {found.name: found.check for found in findings}


# --------------------------------------------------------------------------------------- limits


def test_there_are_limits_of_every_target() -> None:
    assert {find_target(name).arch for name in target_names()} == LIMITS.keys()


@pytest.mark.parametrize("width", [48, 64, 96, 192, 240, 768, 11008])
def test_blocks_that_are_recommended_are_taken(width: int) -> None:
    for limits in LIMITS.values():
        for conv in (False, True):
            blocks = limits.blocks(width, conv=conv)
            assert all(limits.takes_block(block, width, conv=conv) for block in blocks)


# ----------------------------------------------------------------------------------------- torch


class Net(nn.Module):
    """An embedding, linear layers and what has a fixed range."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 48)
        self.first = nn.Linear(48, 64)
        self.relu = nn.ReLU()
        self.second = nn.Linear(64, 32)
        self.sigmoid = nn.Sigmoid()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.sigmoid(self.second(self.relu(self.first(self.table(ids)))))


IDS = torch.arange(32).reshape(2, 16) % 16


def net_sim(calibrated: bool = True, **settings: Any) -> Any:
    torch.manual_seed(0)
    table = QSpec(bitwidth=8, granularity=PerTensor())
    settings = {"weights": QSpec(bitwidth=8), "embedding": table, **settings}
    overrides = {"table": settings.pop("embedding"), **settings.pop("overrides", {})}
    sim = create_sim(Net().eval(), (IDS,), overrides=overrides, **settings)
    if calibrated and settings.get("activations", 16) is not None:
        sim.compute_encodings(lambda model: model(IDS))
    return sim


def test_a_sound_simulation_has_no_findings() -> None:
    sim = net_sim(weights=QSpec(bitwidth=4), overrides={"second": LPBQ32})
    assert [name for name in target_names() if lint(sim, name)] == []


def test_a_sound_language_model_has_no_findings(tiny_llama: Any) -> None:
    ids = torch.arange(32).reshape(2, 16)
    sim = create_sim(tiny_llama, ids, weights=LPBQ32)
    sim.compute_encodings(lambda model: model(ids))
    assert lint(sim) == []


def test_a_mask_that_leaves_no_grid_for_scores_is_found(tiny_llama: Any) -> None:
    from aimet_ext.models.huggingface import prepare_model

    ids = torch.arange(32).reshape(2, 16)
    sim = create_sim(prepare_model(tiny_llama), ids)
    sim.compute_encodings(lambda model: model(ids))
    (found,) = lint(sim)
    assert found.check == "mask"
    assert "mask_value=-100.0" in found.remedy


def narrow_sim(tiny_llama: Any) -> Any:
    ids = torch.arange(32).reshape(2, 16)
    sim = create_sim(tiny_llama, ids, weights=QSpec(bitwidth=4), activations=8)
    sim.compute_encodings(lambda model: model(ids))
    return sim


def test_gains_of_norms_are_narrow_beside_narrow_activations(tiny_llama: Any) -> None:
    """HTP takes a norm from 8 bits to 8 with an unsigned gain of 8 bits alone."""
    sim = narrow_sim(tiny_llama)
    assert named(sim) == {"the attention mask": "scores"}
    gain = sim.model.get_submodule("model.model.norm").param_quantizers["weight"]
    assert (gain.bitwidth, gain.symmetric) == (8, False)
    for changes in ({"bitwidth": 16}, {"bitwidth": 8, "symmetric": True, "signed": True}):
        for name, value in changes.items():
            setattr(gain, name, value)
        assert named(sim)["model.model.norm.weight"] == "norm"
        (found,) = [found for found in lint(sim) if found.check == "norm"]
        assert "unsigned integers" in found.remedy


def test_scores_of_wide_steps_are_found(tiny_llama: Any) -> None:
    """A grid of 8 bits that holds a mask of -100 has a step of 0.39."""
    (found,) = lint(narrow_sim(tiny_llama))
    assert "22%" in found.message
    assert "16 bits" in found.remedy


SPECS: dict[str, tuple[QSpec | None, str, str]] = {
    "3 bits": (QSpec(bitwidth=3), "weight width", "4 or 8 bits"),
    "asymmetric": (QSpec(bitwidth=8, symmetric=False), "symmetry", "symmetric=True"),
    "blockwise": (QSpec(granularity=Blockwise(32)), "blockwise", "set_lpbq"),
    "scale bits": (QSpec(granularity=LPBQ(32, scale_bits=3)), "LPBQ bits", "scale_bits=4"),
    "8-bit LPBQ": (QSpec(bitwidth=8, granularity=LPBQ(32)), "LPBQ bits", "4 bits"),
    "small blocks": (QSpec(granularity=LPBQ(8)), "LPBQ block", "16, 32 or 64"),
    "float": (None, "float layer", "quantize"),
}


@pytest.mark.parametrize("case", SPECS)
def test_a_grid_that_is_not_for_the_chip_is_found(case: str) -> None:
    spec, check, remedy = SPECS[case]
    (found,) = lint(net_sim(overrides={"second": spec}))
    assert (found.check, found.name) == (check, "second")
    assert remedy in found.remedy


def test_a_block_size_is_judged_with_the_input_width() -> None:
    """16 divides 48, but 32 does not; v68 takes both."""
    sim = net_sim(weights=QSpec(granularity=LPBQ(16)))
    (found,) = lint(sim)
    assert (found.check, found.name) == ("LPBQ block", "first")
    assert "input width of 48" in found.message
    assert "per_channel" in found.remedy
    assert lint(sim, "htp_v68") == []


@pytest.mark.parametrize(("target", "found"), [("htp_v69", True), ("htp_v73", False)])
def test_weights_of_16_bits_are_for_later_chips(target: str, found: bool) -> None:
    sim = net_sim(overrides={"second": QSpec(bitwidth=16)})
    assert named(sim, target) == ({"second": "weight width"} if found else {})


def test_a_table_with_a_scale_for_each_row_is_found() -> None:
    sim = net_sim(embedding=QSpec(bitwidth=8, granularity=PerChannel()))
    assert named(sim) == {"table": "lookup table"}


def test_rows_of_a_table_that_is_the_output_layer_too_are_right(tiny_model: Any) -> None:
    ids = torch.arange(32).reshape(2, 16)
    sim = create_sim(tiny_model(tie_word_embeddings=True), ids)
    sim.compute_encodings(lambda model: model(ids))
    assert lint(sim) == []


def test_float_activations_are_found_once() -> None:
    sim = net_sim(activations=None)
    assert named(sim) == {"the simulation": "float activation"}


def test_ranges_that_are_not_there_are_found() -> None:
    sim = net_sim(calibrated=False)
    assert named(sim) == {"the simulation": "range"}
    sim.compute_encodings(lambda model: model(IDS))
    adapt(sim).reset_encodings(["first.param_quantizers.weight", "relu.output_quantizers.0"])
    assert named(sim) == {
        "first.param_quantizers.weight": "range",
        "relu.output_quantizers.0": "range",
    }


def set_bits(sim: Any, layer: str, bits: int, place: str = "output_quantizers") -> None:
    quantizer = getattr(sim.model.get_submodule(layer), place)[0]
    quantizer.bitwidth = bits


def test_a_layer_that_changes_the_width_is_found() -> None:
    sim = net_sim()
    set_bits(sim, "relu", 8)
    assert named(sim) == {"second": "width change"}


def test_a_width_that_no_chip_has_is_found() -> None:
    sim = net_sim()
    set_bits(sim, "sigmoid", 12)
    assert named(sim) == {"sigmoid.output_quantizers.0": "activation width"}


def test_a_layer_without_output_quantizer_is_found_unless_a_relu_follows() -> None:
    sim = net_sim()
    assert sim.model.first.output_quantizers[0] is None
    sim.model.second.output_quantizers[0] = None
    assert named(sim) == {"second": "float activation"}


def test_a_range_that_is_not_the_operators_is_found() -> None:
    sim = net_sim()
    quantizer = sim.model.sigmoid.output_quantizers[0]
    quantizer.set_range(torch.tensor(0.0), torch.tensor(0.9))
    (found,) = lint(sim)
    assert (found.check, found.name) == ("fixed range", "sigmoid.output_quantizers.0")
    assert "0 to 1" in found.message


def test_nothing_is_changed() -> None:
    sim = net_sim()
    before, described = adapt(sim).snapshot("")
    lint(sim)
    after, description = adapt(sim).snapshot("")
    assert description == described
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_unknown_targets_and_simulations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"htp_v79.*got 'htp_v99'"):
        lint(net_sim(), "htp_v99")
    with pytest.raises(TypeError, match="QuantizationSimModel"):
        lint(Net())
