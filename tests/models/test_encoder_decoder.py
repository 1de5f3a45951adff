import copy
import warnings

import pytest
import torch
from encoder_decoders import batch_of, encoder_decoder

from aimet_ext import prepare_model
from aimet_ext.models.huggingface import causal_lm, language_model

FAMILIES = ("t5", "bart", "whisper")


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def doubled(family):
    batch = batch_of(family, 0)
    floats = ("input_features",)
    batch = {name: t.double() if name in floats else t for name, t in batch.items()}
    return encoder_decoder(family).double(), batch


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_transformers(family, attention):
    model, batch = doubled(family)
    model.set_attn_implementation(attention)
    prepared = prepare_model(model)
    assert prepared.model is model and prepare_model(prepared) is prepared
    real = batch["decoder_attention_mask"].bool()
    close(prepared(**batch)[real], model(**batch, use_cache=False).logits[real])
    plain = {name: value for name, value in batch.items() if "mask" not in name}
    close(prepared(**plain), model(**plain, use_cache=False).logits)
    assert language_model(prepared) is model and causal_lm(prepared) is None


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_neither_padding_nor_the_future_is_seen(family):
    model, batch = doubled(family)
    prepared = prepare_model(model, mask_value=-100.0)
    expected = prepared(**batch)
    other = copy.deepcopy(batch)
    if "input_ids" in batch:
        other["input_ids"][batch["attention_mask"] == 0] = 3
    other["decoder_input_ids"][:, 4:] = 3
    close(prepared(**other)[:, :4], expected[:, :4])
    other["decoder_input_ids"][:, 0] = 3
    assert not torch.allclose(prepared(**other)[:, 3], expected[:, 3])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_trace_takes_other_lengths(family):
    prepared = prepare_model(encoder_decoder(family))
    first, other = batch_of(family, 0), batch_of(family, 1, rows=2, target=9)
    order = sorted(first, key=lambda n: (n.startswith("decoder"), n.endswith("mask"), n))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and it is what AIMET uses
        traced = torch.jit.trace(prepared, tuple(first[n] for n in order), check_trace=False)
    torch.testing.assert_close(
        traced(*(other[n] for n in order)), prepared(**other), rtol=1e-4, atol=1e-5
    )


def test_what_is_missing_or_misshapen_is_named():
    prepared = prepare_model(encoder_decoder("t5"))
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"decoder_input_ids .* are required, got none.*labels"):
        prepared(ids)
    with pytest.raises(ValueError, match=r"^attention_mask must be of the shape \(2, 5\)"):
        prepared(ids, ids[:, :4], ids)
    with pytest.raises(ValueError, match=r"^decoder_attention_mask must be of the shape \(2, 5\)"):
        prepared(ids, None, ids, ids[:1])
