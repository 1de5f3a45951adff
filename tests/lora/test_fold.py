"""Base and adapter, and transformed base and folded adapter, are the same function."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import aimet_ext
from aimet_ext import PerTensor, QSpec
from aimet_ext.core.equivalence import expand, transform
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.scales import ModuleScales, Scales
from aimet_ext.files.tensors import hash_tensors
from aimet_ext.lora import attach_adapter, fold_adapter, fold_adapters, read_adapter
from aimet_ext.models.proof import Float64Casts
from aimet_ext.models.topology import find_blocks

peft = pytest.importorskip("peft")

pytestmark = [
    # What peft 0.21 does with transformers 5.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # What peft says of biases of their own, and of saved embeddings.
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
BIASES = {"attention_bias": True, "mlp_bias": True}
#: Large steps on a coarse grid that all rows share, so that every scale moves.
BOLD = {
    "num_iterations": 10,
    "init": "ones",
    "search_sweeps": 0,
    "let_lr": 0.03,
    "lr_schedule": "constant",
    "evaluations": 10,
    "pairs": ("norm_qkv", "v_o", "norm_mlp", "up_down", "q_k"),
    "progress": False,
}
FAMILIES = [
    ("llama", {}),
    ("llama", BIASES),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen3", {"attention_bias": True}),
    ("mistral", {}),
    ("phi3", {}),
    ("gemma2", {}),
]
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora with patterns": {
        "use_rslora": True,
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "o_proj": 6},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 32, "down_proj": 3},
    },
    "dora": {"use_dora": True},
    "biases of all": {"bias": "all"},
    "biases of lora": {"bias": "lora_only"},
    "biases of its own": {"lora_bias": True},
    "beyond the blocks": {
        "target_modules": [*LAYERS, "lm_head", "embed_tokens"],
        "modules_to_save": ["input_layernorm"],
    },
    "dora beyond the blocks": {
        "target_modules": [*LAYERS, "lm_head", "embed_tokens"],
        "use_dora": True,
    },
    "whole layers": {
        "target_modules": ["q_proj", "k_proj"],
        "modules_to_save": ["v_proj", "post_attention_layernorm", "lm_head"],
    },
    "tokens": {"trainable_token_indices": {"embed_tokens": [5, 9]}},
}


def trained(model: Any, name: str = "default", seed: int = 0, **config: Any) -> Any:
    """A PeftModel of a model whose adapter is random instead of a start without effect."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LAYERS, **config}
    if model.config.model_type == "phi3":
        settings["target_modules"] = FUSED
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings), adapter_name=name)
    return randomised(wrapped, seed)


def randomised(wrapped: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.1 * noise.to(parameter)
    return wrapped.eval()


def transformed(model: Any, techniques: int = 2, seed: int = 0) -> tuple[Any, Scales]:
    """A copy after so many rounds of all its scale pairs, with the scales in its own precision."""
    changed, ledger = copy.deepcopy(model), Ledger()
    add_rounds(changed, ledger, [f"technique {number}" for number in range(techniques)], seed)
    return changed, scales_of(ledger)


def add_rounds(model: Any, ledger: Ledger, techniques: list[str], seed: int) -> None:
    """Fold random scales into all pairs, in place, once for each technique."""
    generator = torch.Generator().manual_seed(seed)
    for technique in techniques:
        for block in find_blocks(model):
            for pair in block.pairs:
                exponent = 4 * torch.rand(pair.size, generator=generator, dtype=torch.float64) - 2
                fold_pair(model, ledger, technique, block.name, pair, 2**exponent)


def fold_pair(
    model: Any, ledger: Ledger, technique: str, block: str, pair: Any, scale: Tensor
) -> None:
    """Multiply a scale into its pair, in place, and note it."""
    params = dict(model.get_submodule(block).named_parameters())
    sides = []
    with torch.no_grad():
        for name, value in transform(params, [(pair, scale)]).items():
            params[name].copy_(value)
    for side in pair.sides:
        width = params[f"{side.module}.weight"].shape[0 if side.axis == "out" else 1]
        sides.append((f"{block}.{side.module}", side.axis, expand(side, scale, width)))
    ledger.record(technique, block, pair.name, pair.kind, sides, size=pair.size)


def scales_of(ledger: Ledger, origin: str | None = None) -> Scales:
    """What is in a file of scales, but in float64."""
    product: dict[tuple[str, str], Tensor] = {}
    for side in itertools.chain.from_iterable(entry.sides for entry in ledger.entries):
        key = side.module, "output" if side.axis == "out" else "input"
        product[key] = product.get(key, 1) * side.factor.double()
    modules = {
        name: ModuleScales(product.get((name, "input")), product.get((name, "output")))
        for name, _ in product
    }
    return Scales(modules, ledger.techniques, (), origin, "0")


def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(7))
    ids[:, :2] = torch.tensor([5, 9])
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return output[mask.bool()]


def deviation(model: Any, reference: Tensor) -> float:
    return float((logits(model) - reference).abs().max() / reference.abs().max())


def check_equal(original: Any, changed: Any, wrapped: Any, folded: Any) -> None:
    """The proof, in float64, and that it can fail: the adapter as it was fits no longer."""
    with Float64Casts():
        plain, reference = logits(original), logits(wrapped)
        assert float((plain - reference).abs().max() / reference.abs().max()) > 1e-3
        unfolded = attach_adapter(copy.deepcopy(changed), read_adapter(wrapped))
        assert deviation(changed, plain) <= 1e-10
        assert deviation(unfolded, reference) > 1e-3
        assert deviation(attach_adapter(changed, folded), reference) <= 1e-10


# ---- what holds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=str)
def test_same_function_after_stacked_techniques(tiny_model, family, changes, kv_heads):
    original = tiny_model(family, num_key_value_heads=kv_heads, **changes).double()
    changed, scales = transformed(original)
    wrapped = trained(copy.deepcopy(original))
    check_equal(original, changed, wrapped, fold_adapter(wrapped, scales))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("family", "changes"), [("qwen2", {}), ("llama", BIASES)], ids=str)
def test_same_function_whatever_the_adapter_is_made_of(tiny_model, family, changes, config):
    original = tiny_model(family, **changes).double()
    changed, scales = transformed(original)
    wrapped = trained(copy.deepcopy(original), **config)
    folded = fold_adapter(wrapped, scales, base=original)
    check_equal(original, changed, wrapped, folded)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {**BIASES, "num_key_value_heads": 4}),
        ("qwen2", {"num_key_value_heads": 2}),
        ("qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
        ("mistral", {"num_key_value_heads": 1}),
        ("phi3", {"num_key_value_heads": 2}),
    ],
    ids=str,
)
def test_same_function_after_omniquant_and_a_second_technique(tiny_model, family, changes):
    """Scales that OmniQuant learnt, folded again in float64, then another technique's."""
    pytest.importorskip("aimet_torch")
    original = tiny_model(family, max_position_embeddings=64, **changes)
    ids = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(1))
    spec = QSpec(bitwidth=3, granularity=PerTensor())
    quantized = aimet_ext.create_sim(original, ids, weights=spec, activations=None)
    aimet_ext.apply_omniquant(quantized, [ids], **BOLD)
    original = original.double()
    changed, ledger = copy.deepcopy(original), Ledger()
    pairs = {(b.name, pair.name): pair for b in find_blocks(changed) for pair in b.pairs}
    for entry in quantized.aimet_ext_ledger.entries:
        block = entry.block.removeprefix("model.")
        pair = pairs[block, entry.pair]
        fold_pair(changed, ledger, entry.technique, block, pair, learnt_scale(pair, entry))
    learnt = torch.cat(
        [vector.output for vector in scales_of(ledger).values() if vector.output is not None]
    )
    assert float((learnt - 1).abs().max()) > 0.01
    add_rounds(changed, ledger, ["smooth"], seed=3)
    assert ledger.techniques == ("omniquant", "smooth")
    wrapped = trained(copy.deepcopy(original))
    folded = fold_adapter(wrapped, scales_of(ledger))
    assert folded.folded["techniques"] == ["omniquant", "smooth"]
    check_equal(original, changed, wrapped, folded)


def test_same_function_after_smoothquant_and_awq(tiny_model, tmp_path):
    """The weights and the scales that they leave, in float32."""
    protocol = pytest.importorskip("aimet_ext.sim.protocol")
    pytest.importorskip("aimet_torch")
    original = tiny_model("qwen2", max_position_embeddings=64)
    ids = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(1))
    sim = aimet_ext.create_sim(original, ids, weights=QSpec(bitwidth=4), activations=None)
    aimet_ext.apply_smoothquant(sim, [ids], 0.7, progress=False)
    aimet_ext.apply_awq(sim, [ids], 4, output_path=tmp_path / "scales", progress=False)
    scales = aimet_ext.load_scales(tmp_path / "scales")
    assert scales.techniques == ("smoothquant", "awq")
    changed, wrapped = copy.deepcopy(original), trained(copy.deepcopy(original))
    state = protocol.adapt(sim).float_state()
    changed.load_state_dict({name.removeprefix("model."): v for name, v in state.items()})
    reference, plain = logits(wrapped), logits(original)
    assert deviation(changed, plain) <= 1e-5
    assert (
        deviation(attach_adapter(copy.deepcopy(changed), read_adapter(wrapped)), reference) > 1e-3
    )
    assert deviation(attach_adapter(changed, fold_adapter(wrapped, scales)), reference) <= 1e-5


def learnt_scale(pair: Any, entry: Any) -> Tensor:
    """The scale of a pair ``[size]`` in float64, from the multipliers in a ledger."""
    scale = torch.ones(pair.size, dtype=torch.float64)
    number = next(i for i, side in enumerate(pair.sides) if side.power == 1)
    side, multiplier = pair.sides[number], entry.sides[number].factor.double()
    start, stop = side.rows or (0, len(multiplier))
    scale[torch.arange(pair.size) if side.index is None else side.index] = multiplier[start:stop]
    return scale


def test_several_adapters_of_one_model(tiny_model):
    original = tiny_model("llama").double()
    changed, scales = transformed(original)
    wrapped = trained(copy.deepcopy(original), name="one", seed=1)
    wrapped.add_adapter("two", peft.LoraConfig(r=2, target_modules=["up_proj", "o_proj"]))
    wrapped.set_adapter("two")
    randomised(wrapped, 2)
    both = fold_adapters(wrapped, scales)
    assert sorted(both) == ["one", "two"]
    assert both["two"].layers["model.layers.1.mlp.up_proj"].rank == 2
    refitted = attach_adapter(attach_adapter(changed, both["one"]), both["two"])
    for name in both:
        for model in (wrapped, refitted):
            model.set_adapter(name)
        with Float64Casts():
            assert deviation(refitted, logits(wrapped)) <= 1e-10
    with pytest.raises(ValueError, match=r"one of \['one', 'two'\]; a name is required"):
        fold_adapter(wrapped, scales)
    alone = fold_adapter(wrapped, scales, name="one")
    assert all(torch.equal(t, both["one"].tensors[key]) for key, t in alone.tensors.items())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_base_inside_a_peft_model_is_recognised(tiny_model, tied, config):
    """Its hash is that of the model before PEFT; trained biases are no longer the base's."""
    original = tiny_model("qwen2", tie_word_embeddings=tied)
    state = original.state_dict()
    origin = hash_tensors((name, state[name]) for name in sorted(state))
    wrapped = trained(original, **config)
    name = "model.layers.0.self_attn.q_proj"
    table = Scales({name: ModuleScales(torch.ones(64))}, ("t",), (), origin, "0")
    assert fold_adapter(wrapped, table).folded["origin"] == origin
    other = Scales({name: ModuleScales(torch.ones(64))}, ("t",), (), "0" * 64, "0")
    if config.get("bias", "none") == "none":
        with pytest.raises(ValueError, match="hash 000000000000"):
            fold_adapter(wrapped, other)


def test_fused_slices_and_heads_are_scaled_one_by_one(tiny_model):
    """B of a fused projection: rows by the scales of q, k and v, each expanded to its heads."""
    original = tiny_model("phi3").double()
    _, scales = transformed(original)
    wrapped = trained(original)
    folded, before = fold_adapter(wrapped, scales), read_adapter(wrapped)
    name = "model.layers.0.self_attn.qkv_proj"
    b, expected = folded.layers[name].b, before.layers[name].b
    assert b.shape == (64 + 32 + 32, 4)
    torch.testing.assert_close(b, scales[name].output[:, None] * expected, rtol=1e-12, atol=0)
    a = before.layers[name].a * scales[name].input
    torch.testing.assert_close(folded.layers[name].a, a, rtol=1e-12, atol=0)


def test_without_scales_nothing_changes(tiny_model):
    wrapped = trained(tiny_model("llama"))
    before = read_adapter(wrapped)
    folded = fold_adapter(before, Scales({}, (), (), None, "0"))
    assert folded.folded is not None
    assert folded.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(folded.tensors[key], before.tensors[key]) for key in before.tensors)


def test_scaling_is_what_peft_computes(tiny_model):
    for config in ({}, CONFIGS["rslora with patterns"]):
        wrapped = trained(tiny_model("llama"), **config)
        layers = read_adapter(wrapped).layers
        assert len(layers) == 14
        for name, layer in layers.items():
            module = wrapped.get_base_model().get_submodule(name)
            assert layer.scaling == module.scaling["default"]
            assert layer.rank == module.r["default"]
            change = layer.scaling * layer.b @ layer.a
            torch.testing.assert_close(change, module.get_delta_weight("default"))
