"""Weights that hide in packed parameters become layers that compute the same."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from aimet_ext.models.experts import all_tokens
from aimet_ext.models.hidden import Unpacked, expose_weights, packed, packings
from aimet_ext.walk.routing import RoutedLayers

SMALL = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_hidden_layers": 2}
FAMILIES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 3},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},  # transposed, with biases
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "llama4_text": {  # called with the tokens of each expert
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 16,
    },
}
IDS = torch.arange(18).reshape(2, 9) * 5 % 128


def known(module):
    """Return False: no other class is to stay."""
    return False


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_linear_layers(tiny_model, family):
    """Same outputs, same checkpoint, and the model itself is as it was."""
    model = tiny_model(family, **{**SMALL, **FAMILIES[family]})
    before, expected = copy.deepcopy(model.state_dict()), logits(model)
    exposed = expose_weights(model, known)
    assert exposed is not model
    torch.testing.assert_close(logits(exposed), expected, rtol=1e-5, atol=1e-6)
    assert all(p.dim() < 3 for p in exposed.parameters())
    state = dict(exposed.state_dict())
    whole = packed(exposed, state)
    assert whole.keys() == before.keys() == model.state_dict().keys()
    assert all(torch.equal(whole[name], value) for name, value in before.items())
    parts = Unpacked(exposed, before)
    assert parts.keys() == state.keys()
    assert all(torch.equal(parts[name], value) for name, value in state.items())
    assert torch.equal(logits(model), expected)


def test_experts_that_return_what_they_are_given(tiny_model):
    """LongCat's last experts: rows of their weight, of which nothing is computed, are zeros."""
    family = {
        **{k: v for k, v in FAMILIES["deepseek_v3"].items() if k not in ("n_group", "topk_group")},
        "num_layers": 1,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "moe_topk": 2,
        "zero_expert_num": 3,
    }
    model = tiny_model("longcat_flash", **{**SMALL, **family})
    before, expected = copy.deepcopy(model.state_dict()), logits(model)
    exposed = expose_weights(model, known)
    torch.testing.assert_close(logits(exposed), expected, rtol=1e-5, atol=1e-6)
    with all_tokens(exposed):
        torch.testing.assert_close(logits(exposed), expected, rtol=1e-5, atol=1e-6)
    assert all(p.dim() < 3 for p in exposed.parameters())
    (routed,) = (m for m in exposed.modules() if isinstance(m, RoutedLayers) and m.idle)
    assert (len(routed), routed.idle) == (4, 3)
    whole = packed(exposed, dict(exposed.state_dict()))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert whole.keys() == before.keys() and not whole[name][4:].any()
    whole[name][4:] = before[name][4:]
    assert all(torch.equal(whole[key], value) for key, value in before.items())
    model.load_state_dict(packed(exposed, dict(Unpacked(exposed, before))))
    torch.testing.assert_close(logits(model), expected)


def test_a_model_that_hides_nothing_is_not_copied(tiny_llama):
    assert expose_weights(tiny_llama, known) is tiny_llama
    assert packings(tiny_llama) == []


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("mixtral", torch.float32), ("mixtral", torch.bfloat16), ("llama4_text", torch.float32)],
)
def test_all_experts_on_all_tokens_give_the_same(tiny_model, family, dtype):
    """Graphs are traced in that form, as no shape in it depends on the data."""
    model = tiny_model(family, **{**SMALL, **FAMILIES[family]}).to(dtype)
    exposed = expose_weights(model, known)
    expected = logits(exposed)
    with all_tokens(exposed):
        close = (
            {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 0, "atol": 2e-2}
        )
        torch.testing.assert_close(logits(exposed), expected, **close)
    assert torch.equal(logits(exposed), expected)


class Experts(nn.Module):
    """Experts of one's own: a clamped gate, stored as ``[in, out]``."""

    def __init__(self, count=3, width=8, inner=6, bonus=0.0):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(count, width, 2 * inner))
        self.down_proj = nn.Parameter(torch.randn(count, inner, width))
        self.limit, self.bonus = 0.5, bonus

    def _apply_gate(self, x):
        gate, up = x.chunk(2, -1)
        return functional.silu(gate).clamp(max=self.limit) * up

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for expert, (up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            column, token = torch.where((top_k_index == expert).T)
            made = self._apply_gate(hidden_states[token] @ up) @ down + self.bonus
            out.index_add_(0, token, made * top_k_weights[token, column, None])
        return out


def test_experts_of_ones_own_are_told_by_their_structure():
    torch.manual_seed(0)
    model = nn.Sequential(Experts())
    exposed = expose_weights(model, known)
    assert [n for n, _ in exposed.named_parameters()] == [
        f"0.{name}.{number}.weight" for name in ("gate_up_proj", "down_proj") for number in range(3)
    ]
    # Number 7 is no expert's.
    call = torch.randn(4, 8), torch.tensor([[0, 1], [2, 7], [1, 2], [1, 0]]), torch.rand(4, 2)
    torch.testing.assert_close(exposed[0](*call), model[0](*call))


def test_what_computes_something_else_stays_packed(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(Experts(), Experts(bonus=1.0))
    exposed = expose_weights(model, known)
    assert not hasattr(exposed[0], "limit") or exposed[0].limit == 0.5
    assert isinstance(exposed[0].down_proj, RoutedLayers)
    assert isinstance(exposed[1].down_proj, nn.Parameter)
    assert "1 keep their packed weights" in caplog.text and "off by" in caplog.text
