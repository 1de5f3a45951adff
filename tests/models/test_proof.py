import dataclasses

import pytest
import torch
from torch import nn

from aimet_ext.core.equivalence import Side, transform
from aimet_ext.errors import TransformRefused
from aimet_ext.models.proof import (
    BOUNDS,
    Float64Casts,
    failing_pairs,
    judge_pairs,
    probe,
    probe_inputs,
    prove_pairs,
    random_scale,
)
from aimet_ext.models.topology import find_blocks, select_pairs

KINDS = ("norm_qkv", "v_o", "norm_mlp", "up_down", "q_k")
BIASES = {"attention_bias": True, "mlp_bias": True}
VARIANTS = [
    ("llama", {}),
    ("llama", BIASES),
    ("llama", {"head_dim": 32, "attn_implementation": "eager"}),
    ("qwen2", {}),
    ("qwen3", {"attention_bias": True}),
    ("mistral", {"sliding_window": 8}),
    ("phi3", {}),
    ("gemma", {"attention_bias": True}),
    ("gemma2", {}),
    ("gemma3_text", {}),
]
NAMES = ["-".join([family, *changes]) for family, changes in VARIANTS]


class _CapturedError(Exception):
    pass


def captured(model, block, *, batch=2, length=24, use_cache=False):
    """Arguments that a block receives from its model."""
    calls = []

    def hook(_, args, kwargs):
        calls.append((args, kwargs))
        raise _CapturedError

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    ids = torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(0))
    with pytest.raises(_CapturedError):
        model(input_ids=ids, use_cache=use_cache)
    handle.remove()
    return calls[0]


def probed(model, number=0):
    """Topology, block function and parameters of a block of a plain model."""
    topology = find_blocks(model)[number]
    block = model.get_submodule(topology.name)
    inputs = probe_inputs(block, *captured(model, block))
    return topology, probe(block, (), inputs), dict(block.named_parameters())


# ---- what holds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=NAMES)
def test_every_pair_of_every_family_holds(tiny_model, family, changes, kv_heads):
    model = tiny_model(family, num_key_value_heads=kv_heads, **changes)
    topology, block_fn, params = probed(model)
    expected = set(KINDS) - {"q_k"} if family in ("qwen3", "gemma3_text") else set(KINDS)
    assert {pair.kind for pair in topology.pairs} == expected
    prove_pairs(block_fn, params, topology.pairs)


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=NAMES)
def test_whole_model_keeps_its_function(tiny_model, family, changes, kv_heads):
    """All pairs of all blocks at once: logits to 1e-10 in float64, to 1e-5 as the model is."""
    model = tiny_model(family, num_key_value_heads=kv_heads, **changes)
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0

    def logits(values):
        kwargs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        return torch.func.functional_call(model, values, (), kwargs).logits

    for dtype, bound in BOUNDS.items():
        values = {name: value.to(dtype) for name, value in model.named_parameters()}
        changed = {}
        for number, block in enumerate(find_blocks(model)):
            prefix = f"{block.name}."
            params = {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}
            scales = [(p, random_scale(p.size, number).to(dtype)) for p in block.pairs]
            changed |= {prefix + n: v for n, v in transform(params, scales).items()}
        if dtype is torch.float64:
            with Float64Casts(), torch.no_grad():
                before, after = logits(values), logits({**values, **changed})
        else:
            with torch.no_grad():
                before, after = logits(values), logits({**values, **changed})
        assert before.dtype is dtype
        assert (after - before).abs().max() / before.abs().max() <= bound


def test_the_mode_is_needed(tiny_model):
    """Without it the model's own float32 casts hide what the algebra does."""
    topology, block_fn, params = probed(tiny_model("gemma"))
    values = {name: value.detach().double() for name, value in params.items()}
    pair = topology.pairs[0]
    moved = {**values, **transform(values, [(pair, random_scale(pair.size, 0))])}
    plain = (block_fn(moved) - block_fn(values)).abs().max()
    with Float64Casts():
        wide = (block_fn(moved) - block_fn(values)).abs().max()
    assert wide < 1e-12 < 1e-9 < plain


def test_casts_become_float64():
    x = torch.ones(2, dtype=torch.float64)
    with Float64Casts():
        results = [
            x.float(),
            x.to(torch.float32),
            x.to(dtype=torch.float32),
            x.type(torch.float32),
            nn.functional.softmax(x, dim=-1, dtype=torch.float32),
            torch.softmax(x, -1, torch.float32),
            x.mean(dtype=torch.float32),
            torch.tensor(torch.finfo(x.dtype).min),
            torch.full((2,), torch.finfo(x.dtype).min),
        ]
    assert {result.dtype for result in results} == {torch.float64}
    assert x.float().dtype is torch.float32


def test_scales_are_log_uniform_and_distinct():
    scale = random_scale(4000, seed=3)
    assert scale.dtype is torch.float64
    assert 0.25 <= scale.min() < 0.26 < 3.9 < scale.max() <= 4
    assert scale.log().mean().abs() < 0.05
    assert scale.unique().numel() == 4000
    assert torch.equal(scale, random_scale(4000, seed=3))
    assert not torch.equal(scale, random_scale(4000, seed=4))


# ---- what is planted and refused -----------------------------------------------------------------


def change(topology, kind, module=None, **changes):
    """The pair of a kind with one side changed; a side changed to nothing is dropped."""
    (pair,) = select_pairs(topology, [kind])
    sides = [s if s.module != module else dataclasses.replace(s, **changes) for s in pair.sides]
    if not changes:
        sides = [side for side in pair.sides if side.module != module]
    return dataclasses.replace(pair, name=f"planted {pair.name}", sides=tuple(sides))


def refused(block_fn, params, pair, *good):
    """The planted pair, and none of the good ones, is named."""
    with pytest.raises(TransformRefused) as error:
        prove_pairs(block_fn, params, [*good, pair], where="model.layers.0")
    assert str(error.value).startswith("model.layers.0: ")
    assert f"{pair.name} ({pair.kind})" in str(error.value)
    assert all(other.name not in str(error.value).replace(pair.name, "") for other in good)
    (failure,) = failing_pairs(block_fn, params, [*good, pair])
    assert failure.pair is pair
    assert failure.deviation > 1e-7
    assert failure.dtype is torch.float64


@pytest.mark.parametrize("kv_heads", [2, 1], ids=["gqa", "mqa"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma"])
def test_value_scale_repeated_element_by_element_is_refused(tiny_model, family, kv_heads):
    topology, block_fn, params = probed(tiny_model(family, num_key_value_heads=kv_heads))
    index = torch.arange(kv_heads * 16).repeat_interleave(4 // kv_heads)
    planted = change(topology, "v_o", "self_attn.o_proj", index=index)
    refused(block_fn, params, planted, *topology.pairs)


def test_value_scale_element_by_element_is_right_for_multi_head(tiny_model):
    """With one query head per value head both repetitions are the same: nothing to refuse."""
    topology, block_fn, params = probed(tiny_model("llama", num_key_value_heads=4))
    planted = change(topology, "v_o", "self_attn.o_proj", index=torch.arange(64))
    assert failing_pairs(block_fn, params, [planted]) == []


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_query_scale_not_tied_is_refused(tiny_model, family, kv_heads):
    """One entry per channel, as the paper has it, and neighbours tied, as other rotations need."""
    topology, block_fn, params = probed(tiny_model(family, num_key_value_heads=kv_heads))
    channels = torch.arange(kv_heads * 16)
    for key in (channels, channels // 2):
        query = key.view(-1, 16).repeat_interleave(4 // kv_heads, dim=0).flatten()
        planted = change(topology, "q_k", "self_attn.q_proj", index=query)
        sides = (planted.sides[0], dataclasses.replace(planted.sides[1], index=key))
        planted = dataclasses.replace(planted, size=int(key.max()) + 1, sides=sides)
        refused(block_fn, params, planted, *topology.pairs)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_query_pair_across_norms_is_refused(tiny_model, family):
    topology, block_fn, params = probed(tiny_model(family))
    like_llama = find_blocks(tiny_model("llama"))[0]
    planted = change(like_llama, "q_k", "none of them")
    refused(block_fn, params, planted, *topology.pairs)


@pytest.mark.parametrize(
    ("kind", "reader"),
    [
        ("norm_qkv", "self_attn.q_proj"),
        ("norm_qkv", "self_attn.k_proj"),
        ("norm_qkv", "self_attn.v_proj"),
        ("norm_mlp", "mlp.gate_proj"),
        ("norm_mlp", "mlp.up_proj"),
        ("v_o", "self_attn.o_proj"),
        ("up_down", "mlp.down_proj"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
def test_forgotten_reader_is_refused(tiny_model, family, kind, reader):
    topology, block_fn, params = probed(tiny_model(family))
    refused(block_fn, params, change(topology, kind, reader), *topology.pairs)


@pytest.mark.parametrize(
    ("family", "changes", "kind", "producer"),
    [
        ("llama", BIASES, "v_o", "self_attn.v_proj"),
        ("llama", BIASES, "up_down", "mlp.up_proj"),
        ("llama", BIASES, "q_k", "self_attn.q_proj"),
        ("llama", BIASES, "q_k", "self_attn.k_proj"),
        ("qwen2", {}, "v_o", "self_attn.v_proj"),
        ("qwen2", {}, "q_k", "self_attn.k_proj"),
        ("qwen3", {"attention_bias": True}, "v_o", "self_attn.v_proj"),
    ],
)
def test_bias_left_undivided_is_refused(tiny_model, family, changes, kind, producer):
    """A transform that forgets the bias is one on a block whose bias is out of its reach."""
    topology, block_fn, params = probed(tiny_model(family, **changes))
    out_of_reach = {name: value for name, value in params.items() if name != f"{producer}.bias"}
    (pair,) = select_pairs(topology, [kind])
    refused(block_fn, out_of_reach, pair)
    prove_pairs(block_fn, params, [pair])


def test_one_plus_weight_norm_taken_for_a_plain_one_is_refused(tiny_model):
    topology, block_fn, params = probed(tiny_model("gemma"))
    planted = change(topology, "norm_qkv", "input_layernorm", gain_offset=0.0)
    refused(block_fn, params, planted, *topology.pairs)
    topology, block_fn, params = probed(tiny_model("llama"))
    planted = change(topology, "norm_mlp", "post_attention_layernorm", gain_offset=1.0)
    refused(block_fn, params, planted, *topology.pairs)


def test_wrong_slice_of_a_fused_projection_is_refused(tiny_model):
    """Keys for values, gates for ups."""
    topology, block_fn, params = probed(tiny_model("phi3"))
    planted = change(topology, "v_o", "self_attn.qkv_proj", rows=(64, 96))
    refused(block_fn, params, planted, *topology.pairs)
    planted = change(topology, "up_down", "mlp.gate_up_proj", rows=(0, 128))
    refused(block_fn, params, planted, *topology.pairs)


def test_partial_rotary_would_be_refused(tiny_model):
    """The pair that topology withholds there is indeed wrong."""
    model = tiny_model("phi3", partial_rotary_factor=0.5)
    topology, block_fn, params = probed(model)
    planted = change(find_blocks(tiny_model("phi3"))[0], "q_k", "none of them")
    refused(block_fn, params, planted, *topology.pairs)


def test_gated_mlp_without_its_gate_is_refused(tiny_llama):
    """A scale does not pass the activation."""
    topology, block_fn, params = probed(tiny_llama)
    pair = select_pairs(topology, ["up_down"])[0]
    sides = (Side(module="mlp.gate_proj", axis="out", power=-1), pair.sides[1])
    refused(block_fn, params, dataclasses.replace(pair, name="gate->down", sides=sides))


def test_several_failures_are_named_together(tiny_llama):
    topology, block_fn, params = probed(tiny_llama)
    first = change(topology, "norm_qkv", "self_attn.k_proj")
    second = change(topology, "up_down", "mlp.down_proj")
    with pytest.raises(TransformRefused, match=r"planted input_layernorm.*; planted up_proj"):
        prove_pairs(block_fn, params, [first, *topology.pairs, second])


# ---- the proof itself ----------------------------------------------------------------------------


def test_a_function_that_ignores_its_parameters_proves_nothing(tiny_llama):
    topology, _, params = probed(tiny_llama)
    with pytest.raises(ValueError, match="must compute its output from params"):
        prove_pairs(lambda _: torch.ones(2), params, topology.pairs)


def test_nan_is_an_error(tiny_llama):
    topology, block_fn, params = probed(tiny_llama)
    params["mlp.up_proj.weight"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="must give finite outputs"):
        prove_pairs(block_fn, params, topology.pairs)


def test_proof_leaves_the_block_as_it_was(tiny_model):
    model = tiny_model("llama", attention_dropout=0.5)
    topology, _, _ = probed(model)
    block = model.get_submodule(topology.name).train()
    block.mlp.eval()
    block_fn = probe(block, (), probe_inputs(block, *captured(model, block)))
    params = dict(block.named_parameters())
    before = {name: value.detach().clone() for name, value in params.items()}
    prove_pairs(block_fn, params, topology.pairs)
    assert block.training
    assert block.self_attn.training
    assert not block.mlp.training
    torch.testing.assert_close(dict(block.named_parameters()), before, rtol=0, atol=0)
    assert all(value.dtype is torch.float32 for value in block.parameters())


def test_bfloat16_models_are_proved_in_float32_and_float64(tiny_model):
    topology, block_fn, params = probed(tiny_model("llama").bfloat16())
    prove_pairs(block_fn, params, topology.pairs)


# ---- inputs of the proof -------------------------------------------------------------------------


def test_inputs_are_two_short_sequences_one_padded(tiny_llama):
    block = tiny_llama.model.layers[0]
    args, kwargs = captured(tiny_llama, block, batch=3, length=40)
    named = probe_inputs(block, args, kwargs)
    assert named["hidden_states"].shape == (2, 16, 64)
    assert [t.shape[-2:] for t in named["position_embeddings"]] == [(16, 16)] * 2
    visible = named["attention_mask"] == 0
    assert visible.shape == (2, 1, 16, 16)
    assert torch.equal(visible[0, 0], torch.ones(16, 16, dtype=torch.bool).tril())
    assert not visible[1, 0, :, 12:].any()
    assert torch.equal(visible[1, 0, :, :12], visible[0, 0, :, :12])


def test_a_single_sequence_gets_a_twin(tiny_llama):
    block = tiny_llama.model.layers[0]
    named = probe_inputs(block, *captured(tiny_llama, block, batch=1, length=9))
    assert named["hidden_states"].shape == (2, 9, 64)
    assert not torch.equal(*named["hidden_states"])
    topology = find_blocks(tiny_llama)[0]
    prove_pairs(probe(block, (), named), dict(block.named_parameters()), topology.pairs)


def test_a_cache_is_dropped(tiny_llama):
    """It would make every call see the keys of the calls before."""
    block = tiny_llama.model.layers[0]
    args, kwargs = captured(tiny_llama, block, use_cache=True)
    assert kwargs["past_key_values"] is not None
    block_fn = probe(block, (), probe_inputs(block, args, kwargs))
    prove_pairs(block_fn, dict(block.named_parameters()), find_blocks(tiny_llama)[0].pairs)


def test_short_sequences_are_an_error(tiny_llama):
    block = tiny_llama.model.layers[0]
    with pytest.raises(ValueError, match="at least 8 tokens, got 5"):
        probe_inputs(block, *captured(tiny_llama, block, length=5))


def test_masks_keep_their_form_and_unknown_tensors_their_length():
    class Block(nn.Module):
        def forward(self, x, bias, attention_mask=None, scale=None):
            return x

    x, bias = torch.randn(4, 20, 8), torch.randn(4, 20)
    named = probe_inputs(Block(), (x, bias), {"attention_mask": torch.ones(4, 20).long()})
    assert named["x"].shape == (2, 20, 8)
    assert named["bias"].shape == (2, 20)
    assert named["attention_mask"].sum(-1).tolist() == [20, 15]
    named = probe_inputs(Block(), (x, 1.0), {"attention_mask": torch.ones(4, 1, 20, 20) > 0})
    assert named["x"].shape == (2, 16, 8)
    assert named["attention_mask"].dtype is torch.bool


def test_a_block_must_name_its_parameters():
    class Block(nn.Module):
        def forward(self, x, *rest):
            raise NotImplementedError

    with pytest.raises(ValueError, match=r"Block\.forward must name its parameters, got \*rest"):
        probe_inputs(Block(), (torch.ones(2, 9, 4), 1), {})


def test_good_pairs_are_proved_together(tiny_model):
    """The block runs as often for five pairs as for one, and a bad one among them is found."""
    topology, block_fn, params = probed(tiny_model("llama"))
    runs = []

    def counted(length):
        def run(values):
            runs.append(length)
            return block_fn(values)

        return run

    assert judge_pairs(counted, params, topology.pairs[:1]) == ([], [])
    once = len(runs)
    assert len(topology.pairs) == 5
    assert judge_pairs(counted, params, topology.pairs) == ([], [])
    assert len(runs) == 2 * once
    planted = change(topology, "norm_qkv", "self_attn.k_proj")
    failures, exact = judge_pairs(counted, params, [*topology.pairs, planted])
    assert [failure.pair for failure in failures] == [planted] and exact == []
