"""Decoder blocks of 13 families as tables of the names of their modules in transformers."""

from aimet_ext import TopologyDescription

_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_SANDWICH = ("post_attention_layernorm", "post_feedforward_layernorm")

FAMILIES: tuple[TopologyDescription, ...] = (
    TopologyDescription(name="llama", block_class="LlamaDecoderLayer"),
    TopologyDescription(name="qwen2", block_class="Qwen2DecoderLayer"),
    TopologyDescription(name="qwen3", block_class="Qwen3DecoderLayer", qk_norms=_QK_NORMS),
    TopologyDescription(name="mistral", block_class="MistralDecoderLayer"),
    TopologyDescription(
        name="phi3",
        block_class="Phi3DecoderLayer",
        q="self_attn.qkv_proj",
        k="self_attn.qkv_proj",
        v="self_attn.qkv_proj",
        gate="mlp.gate_up_proj",
        up="mlp.gate_up_proj",
    ),
    TopologyDescription(name="gemma", block_class="GemmaDecoderLayer", gain_offset=1.0),
    TopologyDescription(
        name="gemma2",
        block_class="Gemma2DecoderLayer",
        mlp_norm="pre_feedforward_layernorm",
        others=_SANDWICH,
        gain_offset=1.0,
    ),
    TopologyDescription(
        name="gemma3",
        block_class="Gemma3DecoderLayer",
        mlp_norm="pre_feedforward_layernorm",
        qk_norms=_QK_NORMS,
        others=_SANDWICH,
        gain_offset=1.0,
    ),
    TopologyDescription(
        name="gpt2",
        block_class="GPT2Block",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        q="attn.c_attn",
        k="attn.c_attn",
        v="attn.c_attn",
        o="attn.c_proj",
        gate=None,
        up="mlp.c_fc",
        down="mlp.c_proj",
    ),
    TopologyDescription(
        name="opt",
        block_class="OPTDecoderLayer",
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        o="self_attn.out_proj",
        gate=None,
        up="fc1",
        down="fc2",
    ),
    TopologyDescription(name="stablelm", block_class="StableLmDecoderLayer"),
    TopologyDescription(
        name="starcoder2",
        block_class="Starcoder2DecoderLayer",
        gate=None,
        up="mlp.c_fc",
        down="mlp.c_proj",
    ),
    TopologyDescription(
        name="nemotron", block_class="NemotronDecoderLayer", gate=None, gain_offset=1.0
    ),
)
