"""The prepared model computes what transformers computes, can be traced, and refuses clearly."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch

from aimet_ext.models.huggingface import (
    PreparedCausalLM,
    causal_lm,
    checkpoint_prefix,
    context_length,
    original_name,
    prepare_model,
)

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "mistral-window": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "llama4_text": {
        "attention_chunk_size": 6,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "moe_layers": [],
        "intermediate_size_mlp": 96,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "bloom": {"n_head": 4, "n_layer": 2},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2},
}


@pytest.fixture(params=list(FAMILIES))
def family_model(request, tiny_model):
    model = tiny_model(request.param.split("-")[0], **FAMILIES[request.param])
    return copy.deepcopy(model)


def ids_of(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(0))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_logits_are_those_of_transformers(family_model, attention):
    family_model.set_attn_implementation(attention)
    prepared = prepare_model(family_model)
    for ids in (ids_of(1, 1), ids_of(3, 17)):
        logits = prepared(ids)
        assert logits.shape == (*ids.shape, 128)
        close(logits, family_model(ids, use_cache=False).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_not_seen(family_model, side):
    prepared = prepare_model(family_model)
    ids = ids_of(1, 12)
    padding = torch.full((1, 4), 2)
    parts = [padding, ids] if side == "left" else [ids, padding]
    padded = torch.cat(parts, 1)
    real = padded != 2
    other = padded.masked_fill(~real, 99)
    logits = prepared(padded, real.long())
    assert logits.isfinite().all()
    close(logits[real][None], prepared(ids))
    assert torch.equal(prepared(other, real.long())[real], logits[real])


@torch.no_grad()
def test_a_trace_takes_another_batch_length_and_mask(family_model):
    prepared = prepare_model(family_model)
    ids, mask = ids_of(1, 8), torch.ones(1, 8, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and it is what AIMET uses
        traced = torch.jit.trace(prepared, (ids, mask), check_trace=False)
    other, mask = ids_of(3, 21), torch.ones(3, 21, dtype=torch.long)
    mask[0, :4] = 0
    close(traced(other, mask), prepared(other, mask))


@torch.no_grad()
def test_bfloat16_stays_bfloat16(tiny_llama):
    logits = prepare_model(tiny_llama.to(torch.bfloat16))(ids_of(2, 9), torch.ones(2, 9))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_the_model_is_wrapped_and_left_as_it_is(tiny_llama):
    state = copy.deepcopy(tiny_llama.state_dict())
    prepared = prepare_model(tiny_llama)
    assert prepared.model is tiny_llama and prepare_model(prepared) is prepared
    prepared(ids_of(1, 5))
    assert tiny_llama.config.use_cache and tiny_llama.config.to_dict()["use_cache"]
    assert all(torch.equal(state[name], value) for name, value in tiny_llama.state_dict().items())


def test_length_up_to_the_context_and_no_further(tiny_model):
    model = tiny_model("llama", max_position_embeddings=16)
    prepared = prepare_model(model)
    assert context_length(prepared) == context_length(model) == 16
    assert prepared(ids_of(1, 16)).shape[1] == 16
    with pytest.raises(ValueError, match=r"at most 16 tokens.*got 17"):
        prepared(ids_of(1, 17))


def test_bad_shapes_are_named(tiny_llama):
    prepared = prepare_model(tiny_llama)
    with pytest.raises(ValueError, match=r"input_ids \[batch, seq\] is required, got shape \(5,\)"):
        prepared(ids_of(1, 5)[0])
    with pytest.raises(ValueError, match=r"ids' shape \(2, 5\).*got \(2, 4\)"):
        prepared(ids_of(2, 5), torch.ones(2, 4))


def test_what_cannot_be_prepared_is_named(tiny_llama, tiny_model):
    with pytest.raises(TypeError, match=r"causal language model.*got Linear"):
        prepare_model(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got LlamaModel"):
        prepare_model(tiny_llama.model)
    tiny_llama.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="to be traced, got 'flash_attention_2'"):
        prepare_model(tiny_llama)


def test_names_lead_back_to_the_checkpoint(tiny_llama):
    prepared = prepare_model(tiny_llama)
    names = {original_name(name, prepared) for name, _ in prepared.named_parameters()}
    assert names == dict(tiny_llama.named_parameters()).keys()
    by_hand = torch.nn.ModuleDict({"net": torch.nn.ModuleList([prepared])})
    assert checkpoint_prefix(by_hand) == "net.0.model."
    assert checkpoint_prefix(tiny_llama) == "" == checkpoint_prefix(torch.nn.Linear(1, 1))
    assert causal_lm(by_hand) is tiny_llama and causal_lm(torch.nn.Linear(1, 1)) is None
    assert isinstance(prepared, PreparedCausalLM)


@torch.no_grad()
def test_a_mask_that_an_integer_grid_can_hold(family_model):
    prepared = prepare_model(family_model)
    finite = prepare_model(prepared, mask_value=-100.0)
    assert finite.model is prepared.model and prepared.mask_value is None
    close(finite(ids_of(2, 9)), prepared(ids_of(2, 9)))
    lowest = []

    def note(block, args, kwargs):
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.is_floating_point():
            lowest.append(float(mask.min()))

    for block in finite.modules():
        block.register_forward_pre_hook(note, with_kwargs=True)
    finite(ids_of(1, 9))
    assert set(lowest) <= {-100.0}


ROTARY = {
    "llama": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6},
}


def exported(model, **settings):
    """The graph of a prepared model, for any batch and length."""
    onnx = pytest.importorskip("onnx")
    axes = {"ids": {0: "batch", 1: "seq"}, "logits": {0: "batch", 1: "seq"}}
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter
        torch.onnx.export(
            prepare_model(model, **settings),
            (ids_of(1, 8),),
            buffer,
            input_names=["ids"],
            output_names=["logits"],
            dynamic_axes=axes,
            dynamo=False,
        )
    return onnx.load_from_string(buffer.getvalue())


@pytest.mark.parametrize("family", ROTARY)
@torch.no_grad()
def test_a_graph_for_integers_looks_cosines_up(tiny_model, family):
    """Angles reach the length of the text, and no grid of 8 bits holds them."""
    runtime = pytest.importorskip("onnxruntime")
    model = tiny_model(family, **ROTARY[family])
    graph = exported(model, mask_value=-100.0)
    assert not {"Cos", "Sin"} & {node.op_type for node in graph.graph.node}
    session = runtime.InferenceSession(graph.SerializeToString())
    ids = ids_of(3, 21)
    found = torch.from_numpy(session.run(None, {"ids": ids.numpy()})[0])
    close(found, model(ids, use_cache=False).logits)


def test_angles_that_change_with_the_length_are_computed(tiny_model):
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model("llama", num_hidden_layers=1, rope_parameters=scaling)
    assert "Cos" in {node.op_type for node in exported(model, mask_value=-100.0).graph.node}


@pytest.mark.parametrize("value", [0.0, 5.0, -float("inf"), float("nan")])
def test_a_mask_value_must_be_a_negative_number(tiny_llama, value):
    with pytest.raises(ValueError, match=f"mask_value must be a negative number.*got {value}"):
        prepare_model(tiny_llama, mask_value=value)
