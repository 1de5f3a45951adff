"""A tiny decoder as a graph of the operators that onnxruntime-genai's model builder uses."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

__all__ = ["genai_inputs", "genai_llama"]


class _Builder:
    """Nodes and weights in the builder's names; what comes out of a node is ``{name}/output_0``."""

    def __init__(self, module: Any) -> None:
        self.state = {name: p.detach().numpy() for name, p in module.named_parameters()}
        self.config = module.config
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}

    def node(self, op_type, inputs, name, outputs=("output_0",), **attributes) -> str:
        names = [f"{name}/{output}" if output else "" for output in outputs]
        self.nodes.append(helper.make_node(op_type, inputs, names, name, **attributes))
        return names[0]

    def constant(self, name, array) -> str:
        self.weights.setdefault(name, np.asarray(array))
        return name

    def linear(self, x, path, source) -> str:
        """``path`` such as ``layers.0/attn/q_proj``; a bias becomes an Add."""
        dotted = path.replace("/", ".")
        weight = self.constant(f"model.{dotted}.MatMul.weight", self.state[f"{source}.weight"].T)
        y = self.node("MatMul", [x, weight], f"/model/{path}/MatMul")
        if f"{source}.bias" in self.state:
            bias = self.constant(f"model.{dotted}.Add.bias", self.state[f"{source}.bias"])
            y = self.node("Add", [y, bias], f"/model/{path}/Add")
        return y

    def norm(self, x, skip, path, source) -> tuple[str, str]:
        """What is normalised, and the sum that is."""
        weight = self.constant(f"model.{path.replace('/', '.')}.weight", self.state[source])
        epsilon = self.config.rms_norm_eps
        if skip is None:
            name = f"/model/{path}/LayerNorm"
            settings = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
            return self.node("SimplifiedLayerNormalization", [x, weight], name, **settings), x
        name = f"/model/{path}/SkipLayerNorm"
        y = self.node(
            "SkipSimplifiedLayerNormalization",
            [x, skip, weight],
            name,
            ("output_0", "", "", "output_3"),
            domain="com.microsoft",
            epsilon=epsilon,
        )
        return y, f"{name}/output_3"

    def attention(self, x, number) -> str:
        config, path, source = self.config, f"layers.{number}/attn", f"model.layers.{number}"
        q, k, v = (
            self.linear(x, f"{path}/{part}_proj", f"{source}.self_attn.{part}_proj")
            for part in "qkv"
        )
        past = [f"past_key_values.{number}.{kind}" for kind in ("key", "value")]
        name = f"/model/{path}/GroupQueryAttention"
        present = [f"present.{number}.{kind}" for kind in ("key", "value")]
        inputs = [q, k, v, *past, *self.lengths(), "cos_cache", "sin_cache"]
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                inputs,
                [f"{name}/output_0", *present],
                name,
                domain="com.microsoft",
                num_heads=config.num_attention_heads,
                kv_num_heads=config.num_key_value_heads,
                scale=config.head_dim**-0.5,
                do_rotary=1,
                rotary_interleaved=0,
            )
        )
        return self.linear(f"{name}/output_0", f"{path}/o_proj", f"{source}.self_attn.o_proj")

    def mlp(self, x, number) -> str:
        path, source = f"layers.{number}/mlp", f"model.layers.{number}.mlp"
        gate = self.linear(x, f"{path}/gate_proj", f"{source}.gate_proj")
        up = self.linear(x, f"{path}/up_proj", f"{source}.up_proj")
        sigmoid = self.node("Sigmoid", [gate], f"/model/{path}/act_fn/Sigmoid")
        act = self.node("Mul", [gate, sigmoid], f"/model/{path}/act_fn/Mul")
        product = self.node("Mul", [act, up], f"/model/{path}/Mul")
        return self.linear(product, f"{path}/down_proj", f"{source}.down_proj")

    def lengths(self) -> list[str]:
        """``seqlens_k`` and ``total_seq_len``, from the mask, computed once."""
        base = "/model/attn_mask_reformat/attn_mask_subgraph"
        found = [f"{base}/Sub/Cast/output_0", f"{base}/Gather/Cast/output_0"]
        if any(found[0] in node.output for node in self.nodes):
            return found
        one = self.constant("/model/constants/INT64/[1]", np.array([1]))
        sums = self.node("ReduceSum", ["attention_mask", one], f"{base}/ReduceSum", keepdims=0)
        less = self.node("Sub", [sums, one], f"{base}/Sub")
        self.node("Cast", [less], f"{base}/Sub/Cast", to=TensorProto.INT32)
        shape = self.node("Shape", ["attention_mask"], f"{base}/Shape")
        index = self.constant("/model/constants/INT64/1", np.array(1))
        total = self.node("Gather", [shape, index], f"{base}/Gather", axis=0)
        self.node("Cast", [total], f"{base}/Gather/Cast", to=TensorProto.INT32)
        return found

    def caches(self) -> None:
        config = self.config
        half = np.arange(0, config.head_dim, 2) / config.head_dim
        theta = config.rope_parameters["rope_theta"]
        angles = np.arange(config.max_position_embeddings)[:, None] / theta**half
        self.weights["cos_cache"] = np.cos(angles).astype(np.float32)
        self.weights["sin_cache"] = np.sin(angles).astype(np.float32)

    def build(self) -> onnx.ModelProto:
        config = self.config
        self.caches()
        table = self.constant("model.embed_tokens.weight", self.state["model.embed_tokens.weight"])
        x = self.node("Gather", [table, "input_ids"], "/model/embed_tokens/Gather")
        skip = None
        for number in range(config.num_hidden_layers):
            norm = f"model.layers.{number}.input_layernorm.weight"
            y, x = self.norm(x, skip, f"layers.{number}/input_layernorm", norm)
            skip = self.attention(y, number)
            norm = f"model.layers.{number}.post_attention_layernorm.weight"
            y, x = self.norm(x, skip, f"layers.{number}/post_attention_layernorm", norm)
            skip = self.mlp(y, number)
        path = f"layers.{config.num_hidden_layers}/final_norm_layernorm"
        y, _ = self.norm(x, skip, path, "model.norm.weight")
        head = self.constant("lm_head.MatMul.weight", self.head())
        self.nodes.append(helper.make_node("MatMul", [y, head], ["logits"], "/lm_head/MatMul"))
        return self.model()

    def head(self) -> np.ndarray:
        tied = self.state["model.embed_tokens.weight"]
        return self.state.get("lm_head.weight", tied).T

    def model(self) -> onnx.ModelProto:
        config = self.config
        kv = ["batch_size", config.num_key_value_heads]
        past, present = (
            [*kv, length, config.head_dim]
            for length in ("past_sequence_length", "total_sequence_length")
        )
        kinds = [(n, k) for n in range(config.num_hidden_layers) for k in ("key", "value")]
        ids = ["batch_size", "sequence_length"]
        info = helper.make_tensor_value_info
        inputs = [
            info("input_ids", TensorProto.INT64, ids),
            info("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
            *(info(f"past_key_values.{n}.{k}", TensorProto.FLOAT, past) for n, k in kinds),
        ]
        outputs = [
            info("logits", TensorProto.FLOAT, [*ids, config.vocab_size]),
            *(info(f"present.{n}.{k}", TensorProto.FLOAT, present) for n, k in kinds),
        ]
        weights = [numpy_helper.from_array(a.copy(), name) for name, a in self.weights.items()]
        graph = helper.make_graph(self.nodes, "main_graph", inputs, outputs, weights)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets)
        model.ir_version = 10
        return model


def genai_llama(module: Any = None, **changes: Any) -> tuple[onnx.ModelProto, Any]:
    """A Llama or Qwen2 of transformers as the builder writes it, and the module itself.

    :param module: causal LM, a tiny random one if None.
    :param changes: ``family`` and fields of the config for that.
    """
    if module is None:
        from onnx_models import tiny_causal_lm

        module = tiny_causal_lm(**changes)
    return _Builder(module).build(), module


def genai_inputs(model: onnx.ModelProto, ids: Any, mask: Any = None) -> dict[str, np.ndarray]:
    """All inputs for a prompt: nothing has gone before it.

    :param ids: ``[batch, seq]``.
    :param mask: ``[batch, seq]``, 0 for padding, which must stand on the right; None for none.
    """
    ids = torch.as_tensor(ids).numpy()
    mask = np.ones_like(ids) if mask is None else torch.as_tensor(mask).numpy()
    feeds = {"input_ids": ids, "attention_mask": mask.astype(np.int64)}
    for value in model.graph.input:
        if value.name.startswith("past_key_values."):
            dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            feeds[value.name] = np.zeros((len(ids), dims[1], 0, dims[3]), np.float32)
    return feeds
