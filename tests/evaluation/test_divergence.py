"""Divergence of a model from the float model: the definition, padding, what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import aimet_ext
from aimet_ext import evaluate_divergence, float_logits


def ids_of(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def other(tiny_llama: Any) -> Any:
    """A model that is not quite the same."""
    changed = copy.deepcopy(tiny_llama)
    for parameter in changed.parameters():
        parameter.data *= 1.4
    return changed


def test_is_the_mean_the_high_end_and_the_flips_of_all_tokens(tiny_llama: Any, other: Any) -> None:
    batches = [ids_of(3, 12), ids_of(1, 5)]
    losses, flips = [], []
    with torch.no_grad():
        for batch in batches:
            p, q = (model(batch).logits.softmax(-1).flatten(0, 1) for model in (tiny_llama, other))
            losses.append((p * (p / q).log()).sum(-1))
            flips.append(p.argmax(-1) != q.argmax(-1))
    found = evaluate_divergence(other, iter(batches), tiny_llama)
    assert found.rows == 41
    assert found.kl == pytest.approx(float(torch.cat(losses).mean()), rel=1e-3)
    assert found.kl_high == pytest.approx(float(torch.cat(losses).max()), rel=1e-3)
    assert found.flips == pytest.approx(float(torch.cat(flips).float().mean()))
    kept = evaluate_divergence(other, batches, float_logits(tiny_llama, batches, top_k=5))
    assert 0 < kept.kl < found.kl and kept.flips == found.flips
    itself = evaluate_divergence(tiny_llama, batches, float_logits(tiny_llama, batches))
    assert itself.kl < 1e-6 and itself.flips == 0


def test_padding_does_not_count(tiny_llama: Any, other: Any) -> None:
    ids = ids_of(2, 9)
    padded = torch.cat([torch.full((2, 3), 2), ids], 1)
    batch = {"input_ids": padded, "attention_mask": (padded != 2).long()}
    one = evaluate_divergence(other, [ids], tiny_llama)
    two = evaluate_divergence(other, [batch], tiny_llama)
    assert two.rows == one.rows == 18
    assert two.kl == pytest.approx(one.kl, rel=1e-3)


def test_a_simulation_computes_with_its_quantizers_and_is_float_without(tiny_llama: Any) -> None:
    pytest.importorskip("aimet_torch")
    batches = [ids_of(2, 9)]
    settings: dict[str, Any] = {"activations": None, "lm_head": None, "embedding": None}
    sim = aimet_ext.create_sim(tiny_llama, batches[0], **settings)
    reference = float_logits(sim, batches)
    assert evaluate_divergence(tiny_llama, batches, reference).kl < 1e-6
    assert evaluate_divergence(sim, batches, reference).kl > 1e-5


def test_what_is_refused(tiny_llama: Any, other: Any) -> None:
    batches = [ids_of(2, 9)]
    reference = float_logits(tiny_llama, batches)
    with pytest.raises(ValueError, match="reference must be of the batches given"):
        evaluate_divergence(other, [batches[0] + 1], reference)
    with pytest.raises(ValueError, match="top_k must be 1 or more"):
        float_logits(tiny_llama, batches, top_k=0)
    with pytest.raises(TypeError, match="sim must be a QuantizationSimModel"):
        float_logits("model", batches)
