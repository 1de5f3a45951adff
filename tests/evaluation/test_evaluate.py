"""Perplexity: the definition, padding, and the reference figures of a trained model."""

from __future__ import annotations

import math

import pytest
import torch

from aimet_ext.data.text import calibration_batches
from aimet_ext.evaluation.perplexity import evaluate_perplexity
from aimet_ext.models.huggingface import prepare_model


def ids_of(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def loop_perplexity(model, batches) -> float:
    """Token by token."""
    losses = []
    for batch in batches:
        for row in batch:
            probabilities = model(row[None]).logits[0].softmax(-1)
            losses += [-math.log(probabilities[t - 1, row[t]]) for t in range(1, len(row))]
    return math.exp(sum(losses) / len(losses))


def test_is_the_mean_over_all_tokens_but_the_first_of_a_window(tiny_llama):
    batches = [ids_of(3, 12), ids_of(1, 5)]
    expected = loop_perplexity(tiny_llama, batches)
    assert evaluate_perplexity(tiny_llama, batches) == pytest.approx(expected, rel=1e-5)
    assert evaluate_perplexity(prepare_model(tiny_llama), batches) == pytest.approx(expected, 1e-5)


def test_forms_of_a_batch_are_equal_and_labels_ignored(tiny_llama):
    ids = ids_of(2, 9)
    expected = evaluate_perplexity(tiny_llama, [ids])
    mapping = {"input_ids": ids, "labels": ids * 0, "attention_mask": torch.ones_like(ids)}
    for batch in (mapping, (ids,), [ids, torch.ones_like(ids)]):
        assert evaluate_perplexity(tiny_llama, [batch]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(tiny_llama, side):
    ids = ids_of(2, 9)
    padding = torch.full((2, 3), 2)
    parts = (padding, ids) if side == "left" else (ids, padding)
    padded = torch.cat(parts, 1)
    batch = {"input_ids": padded, "attention_mask": (padded != 2).long()}
    expected = evaluate_perplexity(tiny_llama, [ids])
    assert evaluate_perplexity(tiny_llama, [batch]) == pytest.approx(expected, rel=1e-5)


def test_state_is_restored(tiny_llama):
    tiny_llama.train()
    tiny_llama.model.norm.eval()
    evaluate_perplexity(tiny_llama, [ids_of(1, 4)])
    assert tiny_llama.training and not tiny_llama.model.norm.training


def test_bad_input_is_named(tiny_llama):
    with pytest.raises(TypeError, match=r"a model or a QuantizationSimModel is required, got str"):
        evaluate_perplexity("model", [ids_of(1, 4)])
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate_perplexity(tiny_llama, [])
    with pytest.raises(ValueError, match="a real token after another real one"):
        evaluate_perplexity(tiny_llama, [ids_of(4, 1)])


def test_reference_figure_of_a_trained_model(assets):
    """Float perplexity of stories260K on the first 200 windows of its evaluation text."""
    transformers = pytest.importorskip("transformers")
    folder = assets / "stories260K-hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batches = calibration_batches(
        tokenizer,
        assets / "tinystories" / "eval.jsonl",
        seq_length=256,
        num_batches=10,
        batch_size=20,
    )
    assert evaluate_perplexity(model, batches) == pytest.approx(3.530, abs=0.002)
