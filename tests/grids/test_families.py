"""Models of any architecture become simulations, whether or not AIMET knows their classes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aimet_ext
from aimet_ext import QSpec
from aimet_ext.grids.create import create_sim
from aimet_ext.models.huggingface import prepare_model
from aimet_ext.sim.protocol import adapt

aimet_torch = pytest.importorskip("aimet_torch")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(24).reshape(2, 12) * 5 % 125 + 3
# A family for each thing that AIMET does not know: Conv1D; a scaled embedding; embeddings of
# positions and fused projections; norms by heads; norms without gains; a classic gated MLP.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64},
    "gemma": {},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64},
    "stablelm": {"qk_layernorm": True, "use_qkv_bias": True},
    "olmo": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 48},
}


@pytest.fixture
def build(tiny_model: Callable[..., Any]) -> Callable[[str], Any]:
    def build(family: str) -> Any:
        return tiny_model(family, **{"num_hidden_layers": 1, **FAMILIES[family]})

    return build


@torch.no_grad()
def logits(model: nn.Module, *args: Any) -> Tensor:
    return model(*(args or (IDS,)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_has_a_quantizer_and_the_function_stays(build, family):
    model = build(family)
    before = copy.deepcopy(model.state_dict())
    sim = create_sim(model, IDS)
    sim.compute_encodings(logits)
    parameters = adapt(sim).float_parameters("")
    matrices = {name for name, value in parameters.items() if value.dim() > 1}
    quantized = {
        f"{name}.{key}"
        for name, module in sim.model.named_modules()
        for key, quantizer in dict(getattr(module, "param_quantizers", {})).items()
        if quantizer is not None
    }
    assert matrices <= quantized and sim.aimet_ext_settings["left_float"] == []
    with adapt(sim).disabled_quantizers():
        torch.testing.assert_close(logits(sim.model), logits(prepare_model(model)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["gpt2", "gemma", "opt"])
def test_techniques_and_the_export_take_the_sim(build, family, tmp_path):
    pytest.importorskip("onnx")
    model = build(family)
    sim = create_sim(model, IDS)
    report = aimet_ext.apply_gptq(sim, [IDS], progress=False)
    assert len(report.layers) == sum(isinstance(m, nn.Linear) for m in sim.model.modules())
    sim.compute_encodings(logits)
    aimet_ext.export(sim, tmp_path / "out", "m", IDS, hf_checkpoint=True)
    again = aimet_ext.load(tmp_path / "out")
    assert str(again.model) == str(sim.model)
    assert torch.equal(logits(again.model), logits(sim.model))
    # Both folders of weights have the names and the layout of transformers.
    for folder, on in (("out", False), ("out/checkpoint", True)):
        stored = prepare_model(type(model).from_pretrained(tmp_path / folder))
        with adapt(sim).disabled_quantizers(weights=not on):
            torch.testing.assert_close(logits(stored), logits(sim.model), rtol=1e-4, atol=1e-4)


DELTA = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "first_k_dense_replace": 1,
}
SCAN = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "attn_layer_indices": []}
# Rotary embeddings in complex numbers; a short convolution and a delta rule, whose code reads the
# weight of a convolution; state space models, one of which decays by a matrix of single numbers.
STATES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "deepseek_v2": (
        {**LATENT, "num_key_value_heads": 4, "v_head_dim": 16, "head_dim": 8},
        [],
    ),
    "lfm2": (
        {"layer_types": ["conv"], "block_auto_adjust_ff_dim": False},
        ["model.layers.0.conv.conv.weight"],
    ),
    "qwen3_5_text": (DELTA, ["model.layers.0.linear_attn.conv1d.weight"]),
    "bamba": (SCAN, ["model.layers.0.mamba.conv1d.weight"]),
    "falcon_mamba": (
        {"state_size": 16, "time_step_rank": 8},
        ["backbone.layers.0.mixer.conv1d.weight"],
    ),
}


@pytest.mark.parametrize("family", STATES)
def test_layers_that_keep_a_state_are_exported(tiny_model, family, tmp_path):
    """What code beside a layer reads stays float, is said, and stands in nobody's way."""
    pytest.importorskip("onnx")
    settings, left = STATES[family]
    model = tiny_model(family, **{"num_hidden_layers": 1, **settings})
    sim = create_sim(model, IDS)
    assert sim.aimet_ext_settings["left_float"] == left
    report = aimet_ext.apply_gptq(sim, [IDS], progress=False)
    assert {layer.name for layer in report.layers} == {
        name for name, module in sim.model.named_modules() if isinstance(module, nn.Linear)
    }
    sim.compute_encodings(logits)
    aimet_ext.export(sim, tmp_path / "out", "m", IDS)  # compared in onnxruntime
    assert torch.equal(logits(aimet_ext.load(tmp_path / "out").model), logits(sim.model))


# Experts whose matrices follow each other; experts called with sorted rows, in the attention too;
# routers that a block calls twice.
OWN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "dbrx": (
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 1,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {
                "hidden_size": 64,
                "ffn_hidden_size": 32,
                "moe_num_experts": 4,
                "moe_top_k": 2,
            },
        },
        [],
    ),
    "jetmoe": ({"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, []),
    "gemma3n_text": (
        {
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 128,
            "altup_num_inputs": 2,
            "laurel_rank": 8,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.0],
            "layer_types": ["full_attention"],
        },
        ["model.layers.0.altup.modality_router.module.weight"],
    ),
}


@pytest.mark.parametrize("family", OWN)
def test_experts_and_routers_of_a_family_alone(tiny_model, family, tmp_path):
    pytest.importorskip("onnx")
    settings, left = OWN[family]
    model = tiny_model(family, **{"num_hidden_layers": 1, **settings})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # some of them start as they are in memory
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif not bool(parameter.any()):
                parameter.fill_(0.1)
    sim = create_sim(model, IDS)
    assert sim.aimet_ext_settings["left_float"] == left
    with adapt(sim).disabled_quantizers():
        torch.testing.assert_close(logits(sim.model), logits(prepare_model(model)))
    aimet_ext.apply_gptq(sim, [IDS], progress=False)
    sim.compute_encodings(logits)
    aimet_ext.export(sim, tmp_path / "out", "m", IDS, hf_checkpoint=True)  # onnxruntime compares
    assert torch.equal(logits(aimet_ext.load(tmp_path / "out").model), logits(sim.model))
    stored = prepare_model(type(model).from_pretrained(tmp_path / "out"))
    with adapt(sim).disabled_quantizers():
        torch.testing.assert_close(logits(stored), logits(sim.model), rtol=1e-4, atol=1e-4)


def test_what_is_called_twice_may_be_meant_to_stay_float(tiny_model):
    """By its name in the checkpoint; what was not to be changed is not."""
    model = tiny_model("gemma3n_text", **{"num_hidden_layers": 1, **OWN["gemma3n_text"][0]})
    before = list(model.state_dict())
    router = "model.layers.0.altup.modality_router"
    sim = create_sim(model, IDS, overrides={router: None})
    assert sim.aimet_ext_settings["left_float"] == []
    assert list(model.state_dict()) == before


def test_rows_of_conv1d_are_outputs_of_the_linear_layer(build):
    model = build("gpt2")
    sim = create_sim(model, IDS, activations=None)
    layer = sim.model.get_submodule("model.transformer.h.0.mlp.c_fc")
    source = model.transformer.h[0].mlp.c_fc
    assert isinstance(layer, nn.Linear) and not isinstance(source, nn.Linear)
    assert torch.equal(layer.weight.T, source.weight) and torch.equal(layer.bias, source.bias)
    assert adapt(sim).weight_quantizer("model.transformer.h.0.mlp.c_fc").shape == (256, 1)


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Product(nn.Module):
    """``x @ weight``, which is a linear layer unless it does something besides."""

    def __init__(self, power: int) -> None:
        super().__init__()
        self.power = power
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x.pow(self.power) @ self.weight


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.cos(), x.sin()


class Net(nn.Module):
    def __init__(self, power: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.gain, self.pair, self.product = Gain(), Pair(), Product(power)
        self.out = nn.Linear(16, 64)

    def forward(self, ids: Tensor) -> Tensor:
        first, second = self.pair(self.gain(self.embed(ids)))
        return self.out(self.product(first + second))


def quantizers(module: Any) -> dict[str, Any]:
    return {
        key: list(getattr(module, key, ()))
        for key in ("input_quantizers", "output_quantizers", "param_quantizers")
    }


def test_a_module_is_quantized_by_what_it_does():
    torch.manual_seed(0)
    net, ids = Net().eval(), torch.arange(12).reshape(2, 6)
    sim = create_sim(net, ids)
    assert quantizers(sim.model.pair) == quantizers(net.pair)  # makes two tensors: float
    assert sim.model.gain.param_quantizers["weight"].bitwidth == 16
    assert sim.model.gain.output_quantizers[0] is not None
    assert adapt(sim).weight_quantizer("product").spec() == QSpec(bitwidth=4)
    assert isinstance(net.product, Product)
    sim.compute_encodings(lambda model: model(ids))
    assert not torch.equal(logits(sim.model, ids), logits(net, ids))
    with pytest.raises(RuntimeError, match="not registered"):  # AIMET itself is as it was
        aimet_torch.QuantizationSimModel(net, ids)


def test_matrices_that_stay_float_are_named_and_many_are_an_error(caplog):
    torch.manual_seed(0)
    net, ids = Net(power=2).eval(), torch.arange(12).reshape(2, 6)
    with pytest.raises(
        ValueError, match=r"at most 5\.0% of .* 11\.1% .* product\.weight.*allow_float=0\.12"
    ):
        create_sim(net, ids)
    with caplog.at_level(logging.WARNING, logger="aimet_ext"):
        sim = create_sim(net, ids, allow_float=0.12)
    assert "stay float: product.weight" in caplog.text
    assert sim.aimet_ext_settings["left_float"] == ["product.weight"]
    create_sim(net, ids, weights=None)  # asked for


class Decaying(nn.Module):
    """A decay for each number of the states, computed of a matrix that nothing multiplies by."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(12, 8), nn.Linear(8, 12)
        self.A_log = nn.Parameter(torch.randn(8, 8) / 4)
        self.mixed = mixed

    def forward(self, ids: Tensor) -> Tensor:
        decay, x = torch.exp(-self.A_log.float()), self.table(ids)
        states = x[..., None] * decay[None] + 1  # [batch, seq, 8, 8]
        return self.head(x @ decay if self.mixed else states.sum(-1))


def test_what_is_used_element_by_element_is_no_matrix():
    ids = torch.arange(12).reshape(2, 6)
    assert create_sim(Decaying(mixed=False).eval(), ids).aimet_ext_settings["left_float"] == []
    with pytest.raises(ValueError, match=r"25\.0% of them .* A_log"):
        create_sim(Decaying(mixed=True).eval(), ids)


def test_what_was_registered_with_aimet_stays():
    from aimet_torch.nn import QuantizationMixin

    class Mine(QuantizationMixin, Product):
        def forward(self, x: Tensor) -> Tensor:
            with self._patch_quantized_parameters():
                return super().forward(x)

    torch.manual_seed(0)
    net, ids = Net().eval(), torch.arange(12).reshape(2, 6)
    try:
        QuantizationMixin.implements(Product)(Mine)
        sim = create_sim(net, ids)
        assert type(sim.model.product) is Mine and sim.model.product.param_quantizers["weight"]
    finally:
        QuantizationMixin.cls_to_qcls.pop(Product)
    QuantizationMixin.ignore_unknown_modules(True)
    try:
        sim = create_sim(Net(power=2).eval(), ids)
        assert type(sim.model.gain) is Gain and sim.aimet_ext_settings["left_float"] == []
        assert QuantizationMixin._ignore_unknown_modules
    finally:
        QuantizationMixin.ignore_unknown_modules(False)
