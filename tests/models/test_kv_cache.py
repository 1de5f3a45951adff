"""A model that is handed its cache computes what it does without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from aimet_ext.models.huggingface import prepare_model
from aimet_ext.models.kv_cache import CachedCausalLM, CacheShape, TokenCache, run_with_cache
from aimet_ext.models.proof import Float64Casts

pytest.importorskip("transformers")

IDS = torch.arange(60).reshape(2, 30) * 7 % 125 + 3


def caller(model: CachedCausalLM) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    def call(feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        length = feed["input_ids"].shape[1]
        inputs = [feed[name] for name in model.shape.input_names(length)]
        return dict(zip(model.shape.output_names(), model(*inputs), strict=True))

    return call


@pytest.mark.parametrize(
    ("family", "attention", "changes"),
    [
        ("llama", "sdpa", {}),
        ("llama", "eager", {"num_key_value_heads": 4}),
        ("qwen2", "sdpa", {}),
        ("qwen3", "sdpa", {"num_key_value_heads": 1}),
        ("mistral", "sdpa", {"sliding_window": 40}),
        ("phi3", "eager", {}),
        ("gemma2", "eager", {"sliding_window": 40}),
    ],
)
@pytest.mark.parametrize("prompt", [30, 17, 0])
@torch.no_grad()
def test_calls_with_a_cache_are_the_plain_model(
    tiny_model: Callable[..., Any],
    family: str,
    attention: str,
    changes: dict[str, Any],
    prompt: int,
) -> None:
    """f(x)[t] = g(x[t], cache of x[:t]): prompts in parts, the last one not full, then tokens."""
    model = tiny_model(family, **changes).double()
    model.set_attn_implementation(attention)
    with Float64Casts():
        expected = prepare_model(model)(IDS)
        cached = CachedCausalLM(model, 40)
        cache = TokenCache(cached.shape, batch=2, dtype=torch.float64)
        calls = dict.fromkeys((8, 1), caller(cached))
        found = run_with_cache(calls, cache, IDS, prompt)
    assert cache.length == 30
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-10


@torch.no_grad()
def test_what_a_slot_that_is_not_filled_holds_does_not_matter(tiny_llama: Any) -> None:
    cached = CachedCausalLM(tiny_llama, 16)
    cache = TokenCache(cached.shape)
    call = caller(cached)
    cache.extend(call(cache.feed(IDS[:1, :4], 4)))
    feed = cache.feed(IDS[:1, 4:5], 1)
    expected = call(feed)["logits"]
    for name in cached.shape.past_names(1):
        feed[name][:, :, 4:] = 3.0
    assert torch.equal(call(feed)["logits"], expected)
    feed["past_key_1"][:, :, 3:] = 3.0
    assert not torch.allclose(call(feed)["logits"], expected)


@torch.no_grad()
def test_outputs_are_the_new_tokens_alone(tiny_llama: Any) -> None:
    cached = CachedCausalLM(tiny_llama, 16)
    assert cached.shape == CacheShape(16, ((2, 16), (2, 16)), ((2, 16), (2, 16)))
    assert CacheShape.from_dict(cached.shape.to_dict()) == cached.shape
    feed = TokenCache(cached.shape).feed(IDS[:1, :3], 3)
    assert list(feed) == list(cached.shape.input_names(3))
    assert feed["past_key_0"].shape == (1, 2, 13, 16)
    assert feed["attention_mask"].shape == (1, 1, 3, 16)
    outputs = caller(cached)(feed)
    assert outputs["present_value_1"].shape == (1, 2, 3, 16)
    assert cached.shape.past_names(16) == ()  # the call is the whole context
    whole = caller(cached)(TokenCache(cached.shape).feed(IDS[:1, :16], 16))
    torch.testing.assert_close(whole["logits"], prepare_model(tiny_llama)(IDS[:1, :16]))


def test_the_model_is_left_as_it_was(tiny_llama: Any) -> None:
    before = prepare_model(tiny_llama)(IDS).detach()
    cached = CachedCausalLM(prepare_model(tiny_llama, mask_value=-50), 16)
    caller(cached)(TokenCache(cached.shape).feed(IDS[:1, :4], 4))
    assert cached.mask_value == -50 and cached.model is tiny_llama
    assert "forward" not in vars(tiny_llama.model.rotary_emb)
    assert torch.equal(prepare_model(tiny_llama)(IDS).detach(), before)


@pytest.mark.parametrize(
    ("family", "changes", "context", "message"),
    [
        ("llama", {}, 129, "context_length must be in 1 ... 128"),
        ("mistral", {"sliding_window": 8}, 16, "layers with a window of 8"),
        ("gemma2", {"sliding_window": 8}, 16, "layers with a window of 8"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            16,
            'model.rotary_emb: .* got rope_type "dynamic"',
        ),
        ("gemma3_text", {}, 16, "layer_type"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tiny_model: Callable[..., Any],
    family: str,
    changes: dict[str, Any],
    context: int,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        CachedCausalLM(tiny_model(family, **changes), context)


def test_no_causal_lm() -> None:
    with pytest.raises(TypeError, match="causal language model of transformers"):
        CachedCausalLM(torch.nn.Linear(2, 2), 8)


def test_a_cache_that_is_full_says_so() -> None:
    cache = TokenCache(CacheShape(8, ((2, 4),), ((2, 4),)))
    with pytest.raises(ValueError, match=r"ids \[1, 1 to 4\] are required, got shape \(1, 5\)"):
        cache.feed(IDS[:1, :5], 4)
    cache.length = 6
    with pytest.raises(ValueError, match="4 tokens after 6 needs a context of 10 tokens, got 8"):
        cache.feed(IDS[:1, :4], 4)
