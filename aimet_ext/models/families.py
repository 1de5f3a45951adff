"""Families of decoder blocks by the names of their modules in transformers.

A new family is a new row of :data:`FAMILIES`. A row is a claim, and
:func:`aimet_ext.models.proof.prove_pairs` holds it against the model at hand.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TopologyDescription:
    """The modules of a decoder block, named relative to the block.

    Roles that share a module are fused: its output rows hold the roles one after another, in the
    order query, key, value or gate, up. Every module of the block that has a weight must be named.

    :param name: Name of the family, for messages.
    :param block_class: Class name of the block, matched against the classes it derives from.
    :param attention_norm: Norm that the attention's input projections read.
    :param mlp_norm: Norm that the MLP's input projections read.
    :param q: Projection to the queries; ``k``, ``v`` likewise, ``o`` the output projection.
    :param gate: projection that goes through the activation and multiplies ``up``; None for an
        MLP without a gate, where ``up`` goes through the activation.
    :param attention_readers: all other layers that read the attention norm.
    :param mlp_readers: all other layers that read the MLP norm, a router for example.
    :param qk_norms: norms between the q and k projections and their product.
    :param others: all other modules that have a weight and are in no pair.
    :param gain_offset: 1.0 where norms multiply by ``1 + weight``.
    :param head_dim: width of a head; None to read it from the attention module or the config.
    """

    name: str
    block_class: str
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention_readers: tuple[str, ...] = ()
    mlp_readers: tuple[str, ...] = ()
    qk_norms: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    gain_offset: float = 0.0
    head_dim: int | None = None

    @property
    def attention_inputs(self) -> tuple[str, ...]:
        """All layers that read the attention norm."""
        return tuple(dict.fromkeys((self.q, self.k, self.v, *self.attention_readers)))

    @property
    def mlp_inputs(self) -> tuple[str, ...]:
        """All layers that read the MLP norm."""
        gate = () if self.gate is None else (self.gate,)
        return tuple(dict.fromkeys((*gate, self.up, *self.mlp_readers)))

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """Linear layers in dependency order: what goes in and out of attention, then of the MLP."""
        return self.attention_inputs, (self.o,), self.mlp_inputs, (self.down,)


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
