import dataclasses

import pytest
import torch
from families_reference import FAMILIES
from torch import nn

from aimet_ext.models.description import TopologyDescription
from aimet_ext.models.topology import find_blocks, select_pairs

LLAMA = FAMILIES[0]

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")


def pair(block, kind):
    (found,) = select_pairs(block, [kind])
    return found


def test_llama_blocks_as_names(tiny_llama):
    blocks = find_blocks(tiny_llama)
    assert [block.name for block in blocks] == ["model.layers.0", "model.layers.1"]
    assert blocks[0].stages == (ATTENTION, ("self_attn.o_proj",), MLP, ("mlp.down_proj",))
    assert blocks[0].linears == (*ATTENTION, "self_attn.o_proj", *MLP, "mlp.down_proj")
    assert [(p.kind, p.size) for p in blocks[0].pairs] == [
        ("norm_qkv", 64),
        ("v_o", 32),
        ("norm_mlp", 64),
        ("up_down", 128),
        ("q_k", 16),
    ]
    assert blocks[0].pairs[0].name == "input_layernorm->q_proj,k_proj,v_proj"
    assert not blocks[0].unavailable


def test_wrapper_prefixes_the_names(tiny_llama):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_llama

        def forward(self, ids):
            return self.inner(input_ids=ids, use_cache=False).logits

    assert [b.name for b in find_blocks(Wrapper())] == [
        "inner.model.layers.0",
        "inner.model.layers.1",
    ]


def test_a_block_by_itself_has_the_empty_name(tiny_llama):
    (block,) = find_blocks(tiny_llama.model.layers[0], LLAMA)
    assert block.name == ""
    assert pair(block, "v_o").size == 32


def test_value_heads_are_repeated_as_groups(tiny_model):
    """Columns of o_proj, one query head after another: heads 0 and 1 read value head 0."""
    block = find_blocks(tiny_model("llama", head_dim=2))[0]
    assert pair(block, "v_o").sides[1].index.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]


def test_query_scale_is_tied_across_rotary_pairs(tiny_model):
    """Channels i and i + d/2 of a head share an entry; so do the query heads of a key head."""
    block = find_blocks(tiny_model("llama", head_dim=4))[0]
    query, key = pair(block, "q_k").sides
    assert key.index.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert query.index.tolist() == [0, 1, 0, 1] * 2 + [2, 3, 2, 3] * 2


def test_fused_projections_are_slices(tiny_model):
    block = find_blocks(tiny_model("phi3"))[0]
    assert block.stages[0] == ("self_attn.qkv_proj",)
    assert block.stages[2] == ("mlp.gate_up_proj",)
    assert [side.module for side in pair(block, "norm_qkv").sides] == [
        "input_layernorm",
        "self_attn.qkv_proj",
    ]
    assert [side.rows for side in pair(block, "q_k").sides] == [(0, 64), (64, 96)]
    assert pair(block, "v_o").sides[0].rows == (96, 128)
    assert pair(block, "up_down").sides[0].rows == (128, 256)


def test_gemma_norms_multiply_by_one_plus_weight(tiny_model):
    for family in ("gemma", "gemma2", "gemma3_text"):
        for kind in ("norm_qkv", "norm_mlp"):
            norm = pair(find_blocks(tiny_model(family))[0], kind).sides[0]
            assert norm.gain_offset == 1.0
    assert norm.module == "pre_feedforward_layernorm"


def test_sizes_come_from_the_weights_where_there_is_no_config(tiny_llama):
    block = tiny_llama.model.layers[0]
    del block.self_attn.config
    assert pair(find_blocks(block, LLAMA)[0], "v_o").size == 32


# ---- unavailable pairs ---------------------------------------------------------------------------


def test_query_key_norms_leave_no_query_pair(tiny_model):
    block = find_blocks(tiny_model("qwen3"))[0]
    assert set(block.unavailable) == {"q_k"}
    assert "self_attn.q_norm, self_attn.k_norm" in block.unavailable["q_k"]
    assert [p.kind for p in select_pairs(block, ["v_o", "q_k"])] == ["v_o"]


def test_partial_rotary_leaves_no_query_pair(tiny_model):
    for family in ("llama", "phi3"):
        model = tiny_model(family)
        model.config.partial_rotary_factor = 0.5
        assert "got 0.5 of 16" in find_blocks(model)[0].unavailable["q_k"]


def test_partial_rotary_in_the_parameters_of_a_layer_type(tiny_llama):
    tiny_llama.config.rope_parameters = {"full_attention": {"partial_rotary_factor": 0.25}}
    assert "got 0.25 of 16" in find_blocks(tiny_llama)[0].unavailable["q_k"]


def test_unknown_head_width_is_said(tiny_llama):
    block = tiny_llama.model.layers[0]
    del block.self_attn.config, block.self_attn.head_dim
    (found,) = find_blocks(block, LLAMA)
    assert set(found.unavailable) == {"v_o", "q_k"}
    assert "head_dim is neither on the attention" in found.unavailable["v_o"]
    description = TopologyDescription(name="own", block_class="LlamaDecoderLayer", head_dim=16)
    assert not find_blocks(block, description)[0].unavailable


def test_heads_that_contradict_the_config_are_refused(tiny_llama):
    tiny_llama.config.num_key_value_heads = 4
    reason = find_blocks(tiny_llama, LLAMA)[0].unavailable["v_o"]
    assert "does not fit 4 query and 4 key-value heads of 16" in reason


def test_gated_attention_keeps_the_value_pair_only(tiny_llama):
    """A query projection with twice the rows holds a gate: it is not scaled as a query."""
    for layer in tiny_llama.model.layers:
        layer.self_attn.q_proj = nn.Linear(64, 128, bias=False)
    block = find_blocks(tiny_llama, LLAMA)[0]
    assert set(block.unavailable) == {"q_k"}
    assert "self_attn.q_proj must have 64 (q) rows, got 128" in block.unavailable["q_k"]


def test_an_mlp_without_gate_has_no_up_pair():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.head_dim = 4
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
            self.attn, self.router = Attention(), nn.Linear(8, 2)
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    description = TopologyDescription(
        name="own",
        block_class="Block",
        attention_norm="norm1",
        mlp_norm="norm2",
        q="attn.qkv",
        k="attn.qkv",
        v="attn.qkv",
        o="attn.out",
        gate=None,
        up="fc1",
        down="fc2",
        mlp_readers=("router",),
    )
    (block,) = find_blocks(Block(), description)
    assert set(block.unavailable) == {"up_down"}
    assert "fc1 goes through the activation" in block.unavailable["up_down"]
    assert [side.module for side in pair(block, "norm_mlp").sides] == ["norm2", "fc1", "router"]
    assert block.stages[2] == ("fc1", "router")


# ---- errors --------------------------------------------------------------------------------------


def test_every_mismatch_is_listed_at_once(tiny_llama):
    first, second = tiny_llama.model.layers
    del first.self_attn.v_proj
    first.self_attn.extra = nn.Linear(64, 64)
    second.mlp.up_proj = nn.Linear(64, 100)
    second.mlp.gate_proj = nn.Conv2d(64, 128, 3)
    with pytest.raises(ValueError) as error:
        find_blocks(tiny_llama, LLAMA)
    text = str(error.value)
    assert "model.layers.0 (description 'llama'): self_attn.v_proj with a weight is missing" in text
    assert (
        "model.layers.0 (description 'llama'): self_attn.extra is in the block and not in" in text
    )
    assert (
        "model.layers.1 (description 'llama'): mlp.gate_proj must have a weight [out, in]" in text
    )
    second.mlp.gate_proj = nn.Linear(32, 128)
    with pytest.raises(ValueError) as error:
        find_blocks(tiny_llama, LLAMA)
    text = str(error.value)
    assert "mlp.gate_proj reads 32 channels of post_attention_layernorm [64]" in text
    assert "mlp.up_proj must have 128 rows for mlp.down_proj, got 100" in text


def test_a_description_of_another_class_is_compared_with_what_is_there(tiny_model):
    with pytest.raises(ValueError) as error:
        find_blocks(tiny_model("olmo2"), LLAMA)
    text = str(error.value)
    assert "is of class LlamaDecoderLayer" in text
    assert "model.layers holds 2 of class Olmo2DecoderLayer" in text
    assert "input_layernorm with a weight is missing" in text
    assert "post_feedforward_layernorm is in the block and not in the table" in text
    assert "description 'llama'" in text


def test_a_module_without_blocks_is_an_error():
    with pytest.raises(ValueError, match=r"no decoder block of Linear is known.*no stack"):
        find_blocks(nn.Linear(2, 2))


def test_a_description_takes_the_place_of_what_is_found(tiny_model):
    model = tiny_model("granite")
    with pytest.raises(ValueError, match="all modules fit"):
        find_blocks(model, LLAMA)
    description = dataclasses.replace(LLAMA, block_class="GraniteDecoderLayer", gain_offset=2.0)
    for block in find_blocks(model, description):
        assert pair(block, "norm_qkv").sides[0].gain_offset == 2.0
    with pytest.raises(ValueError, match="of class Qwen2DecoderLayer"):
        find_blocks(tiny_model("qwen2"), description)


def test_indices_cover_their_modules(tiny_model):
    """Every side covers its rows or columns exactly, in every family."""
    for family in ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma2", "gemma3_text"):
        model = tiny_model(family)
        for block in find_blocks(model):
            for found in block.pairs:
                used = torch.cat(
                    [s.index.unique() for s in found.sides if s.index is not None]
                    or [torch.arange(found.size)]
                )
                assert set(used.tolist()) == set(range(found.size))
