"""Adapters in a simulation: the base stays what it was, and adapters can be exchanged."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor

import aimet_ext
from aimet_ext import lora
from aimet_ext.lora.adapter import read_adapters
from aimet_ext.lora.sim import lora_state
from aimet_ext.sim.protocol import adapt

peft = pytest.importorskip("peft")
pytest.importorskip("aimet_torch")

pytestmark = [
    # What peft 0.21 does with transformers 5.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning"),
]

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def sim(lora_peft: Any, lora_base: pathlib.Path) -> Any:
    return lora.create_sim(lora_peft, lora_base)


@torch.no_grad()
def logits(sim: Any, ids: Tensor) -> Tensor:
    return sim.model(ids)


def config(**changes: Any) -> Any:
    settings = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **changes}
    return peft.LoraConfig(**settings)


def test_without_an_adapter_it_is_the_base_bit_by_bit(
    sim: Any, lora_base: pathlib.Path, lora_ids: Tensor
) -> None:
    base = aimet_ext.load(lora_base)
    lora.switch(sim, None)
    assert torch.equal(logits(sim, lora_ids), logits(base, lora_ids))
    assert lora.base_hash(sim) == lora.base_hash(base)


@pytest.mark.parametrize("name", ["one", "two"])
def test_in_float_it_is_the_peft_model(
    sim: Any, lora_peft: Any, lora_ids: Tensor, name: str
) -> None:
    """Transformed base + folded adapter = original base + adapter."""
    lora.switch(sim, name)
    lora_peft.set_adapter(name)
    with torch.no_grad(), adapt(sim).disabled_quantizers():
        expected = lora_peft(input_ids=lora_ids, use_cache=False).logits
        found = sim.model(lora_ids)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    lora.switch(sim, None)
    with torch.no_grad(), adapt(sim).disabled_quantizers():
        without = sim.model(lora_ids)
    assert (without - expected).abs().max() > 1e-2 * expected.abs().max()


def test_switching_changes_nothing_of_the_base(sim: Any, lora_ids: Tensor) -> None:
    found: dict[str | None, Tensor] = {}
    before = lora.base_hash(sim)
    for name in ("one", "two", None, "two", "one"):
        lora.switch(sim, name)
        assert lora.base_hash(sim) == before
        output = logits(sim, lora_ids)
        assert torch.equal(found.setdefault(name, output), output)
    assert not torch.equal(found["one"], found["two"])


def test_the_hash_sees_a_change_of_the_base(sim: Any) -> None:
    before = lora.base_hash(sim)
    weight = sim.model.get_submodule(f"model.{Q0}.base_layer").weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 1e-3
    assert lora.base_hash(sim) != before
    with torch.no_grad():
        weight.copy_(kept)
    assert lora.base_hash(sim) == before


def test_a_copy_has_adapters_of_its_own(sim: Any, lora_ids: Tensor) -> None:
    lora.switch(sim, "one")
    first = logits(sim, lora_ids)
    copied = copy.deepcopy(sim)
    lora.switch(copied, "two")
    assert torch.equal(logits(sim, lora_ids), first)
    assert not torch.equal(logits(copied, lora_ids), first)
    lora.switch(sim, "two")
    assert torch.equal(logits(sim, lora_ids), logits(copied, lora_ids))


def test_only_the_adapter_can_be_trained(sim: Any) -> None:
    lora.switch(sim, "one")
    trained = [name for name, p in adapt(sim).float_parameters("").items() if p.requires_grad]
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)


# It warns of each that it would have changed, by rounding errors of its own.
@pytest.mark.filterwarnings("ignore:Bias/scale overflow:UserWarning")
def test_calibrating_leaves_the_base_as_it_is(sim: Any, lora_ids: Tensor) -> None:
    """AIMET's own ``compute_encodings`` finds every range of the base frozen."""
    lora.switch(sim, "one")
    before = lora.base_hash(sim)
    sim.compute_encodings(lambda module: module(lora_ids * 2 % 128))
    assert lora.base_hash(sim) == before


def test_unknown_names_and_other_simulations_are_refused(sim: Any, lora_base: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"\['one', 'two'\] or None, got 'three'"):
        lora.switch(sim, "three")
    with pytest.raises(TypeError, match="a simulation with adapters is required"):
        lora.switch(aimet_ext.load(lora_base), "one")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, rf"{Q0} \(a magnitude vector \(DoRA\)\)"),
        ({"modules_to_save": ["model.norm"]}, r"model\.norm \(a whole weight"),
    ],
)
def test_what_would_change_the_base_is_named(
    lora_model: Any, lora_base: pathlib.Path, changes: dict[str, Any], message: str
) -> None:
    model = peft.get_peft_model(copy.deepcopy(lora_model), config(**changes))
    with pytest.raises(ValueError, match=message):
        lora.create_sim(model, lora_base)


def test_a_further_adapter_needs_a_slot(sim: Any, lora_model: Any, lora_ids: Tensor) -> None:
    targets = ["q_proj", "gate_proj"]
    model = peft.get_peft_model(copy.deepcopy(lora_model), config(target_modules=targets))
    with pytest.raises(ValueError, match=r"mlp\.gate_proj \(no slot\)"):
        lora.quantize(sim, {"more": model}, [lora_ids])
    assert set(lora_state(sim).adapters) == {"one", "two"}


def test_a_bias_of_the_adapter_and_a_table_have_slots(
    lora_model: Any, lora_base: pathlib.Path, lora_ids: Tensor
) -> None:
    targets = ["k_proj", "embed_tokens"]
    settings = config(target_modules=targets, lora_alpha=3)
    biased = config(target_modules=["k_proj"], lora_bias=True)
    model = peft.get_peft_model(copy.deepcopy(lora_model), settings, adapter_name="table")
    model.add_adapter("biased", biased)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    sim = lora.create_sim(model, lora_base)
    for name in ("table", "biased"):
        lora.switch(sim, name)
        model.set_adapter(name)
        with torch.no_grad(), adapt(sim).disabled_quantizers():
            expected = model(input_ids=lora_ids, use_cache=False).logits
            found = sim.model(lora_ids)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_folders_and_mappings_are_adapters_too(
    sim: Any, lora_peft: Any, lora_base: pathlib.Path, lora_ids: Tensor, tmp_path: pathlib.Path
) -> None:
    """An adapter folded before is not folded again, and one of other scales is refused."""
    read_adapters(lora_peft)["two"].save(tmp_path / "raw")
    lora.fold_adapter(tmp_path / "raw", lora_base, tmp_path / "folded")
    lora.switch(sim, "two")
    expected = logits(sim, lora_ids)
    for folder in ("raw", "folded"):
        other = lora.create_sim({"mine": tmp_path / folder}, lora_base)
        assert list(lora_state(other).adapters) == ["mine"]
        assert torch.equal(logits(other, lora_ids), expected)
