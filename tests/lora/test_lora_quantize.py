"""Adapters get encodings of their own, and the base keeps its."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor

from aimet_ext import LPBQ, PerTensor, QSpec, lora
from aimet_ext.lora.sim import lora_state

peft = pytest.importorskip("peft")
pytest.importorskip("aimet_torch")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

Q0 = "model.model.layers.0.self_attn.q_proj"
O0 = "model.model.layers.0.self_attn.o_proj"


@pytest.fixture(scope="module")
def sim(lora_peft: Any, lora_base: pathlib.Path) -> Any:
    return lora.create_sim(lora_peft, lora_base)


@torch.no_grad()
def logits(sim: Any, ids: Tensor) -> Tensor:
    return sim.model(ids)


def test_adapters_are_on_grids_of_their_own(sim: Any, lora_ids: Tensor) -> None:
    base, active = lora.base_hash(sim), lora_state(sim).active
    report = lora.quantize(sim, None, [lora_ids])
    assert lora.base_hash(sim) == base
    assert lora_state(sim).active == active
    assert [adapter.name for adapter in report.adapters] == ["one", "two"]
    ranges = []
    for adapter in report.adapters:
        lora.switch(sim, adapter.name)
        slot = sim.model.get_submodule(Q0)
        for part, bits in ((slot.lora_A, 8), (slot.lora_B, 8)):
            quantizer = part.param_quantizers["weight"]
            grid = part.weight / quantizer.get_scale()
            steps = torch.unique((quantizer(part.weight) / quantizer.get_scale()).round())
            assert len(steps) <= 2**bits < len(torch.unique(grid)) + 2**bits
            assert part.output_quantizers[0].bitwidth == 16
        quantizers = list(lora_state(sim).adapters[adapter.name][Q0].quantizers.values())
        assert all(q.is_initialized() and not q.is_overwrite_allowed() for q in quantizers)
        ranges.append([float(q.get_scale().flatten()[0]) for q in quantizers])
        assert adapter.logits_sqnr_db > 30
        assert min(adapter.change_sqnr_db.values()) > 35
    assert all(one != other for one, other in zip(*ranges, strict=True))
    assert report.adapters[1].ranks["model.layers.0.self_attn.o_proj"] == 2
    assert "model.layers.0.mlp.down_proj" not in report.adapters[1].ranks
    assert "two" in str(report)


def test_fewer_bits_lose_more(sim: Any, lora_ids: Tensor) -> None:
    found = [
        lora.quantize(sim, "one", [lora_ids], weights=QSpec(bitwidth=bits)).adapters[0]
        for bits in (4, 8, 16)
    ]
    values = [adapter.logits_sqnr_db for adapter in found]
    assert values[0] < values[1] < values[2]


def test_an_adapter_without_a_layer_leaves_it_to_the_base(sim: Any, lora_ids: Tensor) -> None:
    """The sum with nothing lies on the grid of the base layer's output."""
    lora.quantize(sim, ["one"], [lora_ids])
    slot = sim.model.get_submodule(O0)
    output = slot.base_layer.output_quantizers[0]
    mine = lora_state(sim).adapters["one"][O0].quantizers["sum"]
    assert torch.equal(mine.get_scale(), output.get_scale())
    lora.quantize(sim, ["two"], [lora_ids])
    mine = lora_state(sim).adapters["two"][O0].quantizers["sum"]
    assert not torch.equal(mine.get_scale(), output.get_scale())


def test_sums_may_keep_the_ranges_of_the_base(sim: Any, lora_ids: Tensor) -> None:
    lora.quantize(sim, ["two"], [lora_ids], sums="base")
    for slot, content in lora_state(sim).adapters["two"].items():
        output = sim.model.get_submodule(slot).base_layer.output_quantizers[0]
        assert torch.equal(content.quantizers["sum"].get_scale(), output.get_scale())


def test_a_further_adapter_is_folded_and_quantized(
    sim: Any, lora_model: Any, lora_ids: Tensor
) -> None:
    """Its rank may be larger than any before."""
    config = peft.LoraConfig(r=6, target_modules=["o_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = peft.get_peft_model(copy.deepcopy(lora_model), config)
    before = logits(sim, lora_ids)
    report = lora.quantize(sim, {"more": model}, [lora_ids])
    assert torch.equal(logits(sim, lora_ids), before)
    assert report.adapters[0].ranks["model.layers.0.self_attn.o_proj"] == 6
    lora.switch(sim, "more")
    assert sim.model.get_submodule(O0).lora_A.weight.shape == (6, 64)
    assert not torch.equal(logits(sim, lora_ids), before)
    lora.switch(sim, "one")


def test_adapters_may_share_their_encodings(sim: Any, lora_ids: Tensor) -> None:
    """Each range holds what every adapter needs, so no adapter alone does worse than a few dB."""
    spec = QSpec(bitwidth=8, granularity=PerTensor())
    alone = lora.quantize(sim, ["one", "two"], [lora_ids], weights=spec)
    together = lora.quantize(sim, ["one", "two"], [lora_ids], weights=spec, shared=True)
    adapters = lora_state(sim).adapters
    for slot in lora_state(sim).slots:
        for key, quantizer in adapters["one"][slot].quantizers.items():
            other = adapters["two"][slot].quantizers[key]
            assert other is not quantizer
            assert torch.equal(other.get_scale(), quantizer.get_scale())
            assert torch.equal(other.get_offset(), quantizer.get_offset())
    for one, other in zip(alone.adapters, together.adapters, strict=True):
        assert other.logits_sqnr_db > min(one.logits_sqnr_db, 30) - 6


def test_weights_alone(sim: Any, lora_ids: Tensor) -> None:
    lora.quantize(sim, ["one"], [lora_ids], activations=None)
    content = lora_state(sim).adapters["one"][Q0]
    assert content.quantizers["A_output"] is None
    assert content.quantizers["A"] is not None


@pytest.mark.parametrize(
    ("adapters", "settings", "message"),
    [
        (None, {"weights": QSpec(granularity=LPBQ(32))}, "PerTensor or PerChannel, got LPBQ"),
        (None, {"shared": True}, r"granularity=PerTensor\(\)\) is required with shared"),
        (["three"], {}, r"of \[.*'one', 'two'\], got \['three'\]"),
        ([], {}, "names of adapters"),
    ],
)
def test_what_cannot_be_done_is_said(
    sim: Any, lora_ids: Tensor, adapters: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lora.quantize(sim, adapters, [lora_ids], **settings)


def test_a_failure_leaves_the_adapter_as_it_was(
    sim: Any, lora_ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora.quantize(sim, ["one"], [lora_ids])
    lora.switch(sim, "one")
    before = logits(sim, lora_ids)
    from aimet_ext.lora import calibrate

    calls = []

    def fail(model: Any, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return model(batch)

    monkeypatch.setattr(calibrate, "call_model", fail)
    with pytest.raises(KeyboardInterrupt):
        lora.quantize(sim, ["one"], [lora_ids], weights=QSpec(bitwidth=4))
    assert len(calls) == 2
    assert torch.equal(logits(sim, lora_ids), before)
