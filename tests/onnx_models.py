"""Tiny ONNX models for tests: by hand, exported from torch, and as onnxruntime-genai builds them.

Always the same ones. ``genai_llama`` and its inputs stand in ``onnx_genai`` and are found here too.
"""

from __future__ import annotations

import functools
import io
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_genai import genai_inputs, genai_llama
from torch import nn

from aimet_ext.onnx.values import infer_shapes

__all__ = [
    "Exported",
    "conv_model",
    "exported_llama",
    "exported_module",
    "float_nodes",
    "genai_inputs",
    "genai_llama",
    "mlp_model",
    "run_onnx",
    "tiny_causal_lm",
]

OPSET = 17
IR_VERSION = 10


def finish(nodes, inputs, outputs, weights, *, opsets=(("", OPSET),)) -> onnx.ModelProto:
    """A checked model.

    :param inputs: by name, its type and shape.
    :param weights: arrays by name.
    """
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, *value) for name, value in inputs.items()],
        [helper.make_tensor_value_info(name, *value) for name, value in outputs.items()],
        initializers,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets]
    )
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model)
    return model


def run_onnx(model, feeds, outputs=None) -> list[np.ndarray]:
    """Outputs of a model, all or those of these names, even where they are no graph outputs."""
    if outputs is not None:
        whole = onnx.ModelProto()
        whole.CopyFrom(model)
        known = {value.name for value in model.graph.output}
        whole.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in dict.fromkeys(outputs) if name not in known
        )
        model = whole
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    arrays = {
        name: value.numpy() if isinstance(value, torch.Tensor) else value
        for name, value in feeds.items()
    }
    return session.run(outputs, arrays)


def mlp_model(
    widths: Sequence[int] = (8, 16, 16, 4),
    *,
    bias: str | None = "gemm",
    relu: bool = True,
    transposed: bool = False,
    seed: int = 0,
) -> onnx.ModelProto:
    """Linear layers ``fc0``, ``fc1`` … from ``x [batch, in]`` to ``y [batch, out]``.

    :param bias: ``"gemm"``: Gemm nodes with a bias; ``"add"``: MatMul and Add; None: MatMul alone.
    :param relu: put a Relu between two layers.
    :param transposed: store weights the other way round than exporters do: a Gemm's ``[in, out]``,
        a MatMul's ``[out, in]`` behind a Transpose node.
    """
    random = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, np.ndarray] = {}
    x = "x"
    for number, (in_, out) in enumerate(itertools.pairwise(widths)):
        name, last = f"fc{number}", number == len(widths) - 2
        weight = (random.standard_normal((out, in_)) / in_**0.5).astype(np.float32)
        weights[f"{name}.bias"] = random.standard_normal(out).astype(np.float32)
        if bias is None:
            del weights[f"{name}.bias"]
        weights[f"{name}.weight"] = weight if (bias == "gemm") != transposed else weight.T.copy()
        y = "y" if last else f"{name}_out"
        nodes += _linear(name, x, y, bias, transposed)
        if relu and not last:
            nodes.append(helper.make_node("Relu", [y], [f"relu{number}_out"], f"relu{number}"))
            y = f"relu{number}_out"
        x = y
    shapes = [["batch", widths[0]], ["batch", widths[-1]]]
    inputs, outputs = (
        {name: (TensorProto.FLOAT, shape)} for name, shape in zip("xy", shapes, strict=True)
    )
    return finish(nodes, inputs, outputs, weights)


def _linear(name, x, y, bias, transposed):
    """Nodes of one linear layer."""
    weight = f"{name}.weight"
    if bias == "gemm":
        inputs = [x, weight, f"{name}.bias"]
        return [helper.make_node("Gemm", inputs, [y], name, transB=int(not transposed))]
    nodes = []
    if transposed:
        turned = f"{name}_turned"
        nodes.append(
            helper.make_node("Transpose", [weight], [turned], f"{name}_transpose", perm=[1, 0])
        )
        weight = turned
    product = y if bias is None else f"{name}_product"
    nodes.append(helper.make_node("MatMul", [x, weight], [product], name))
    if bias == "add":
        nodes.append(helper.make_node("Add", [product, f"{name}.bias"], [y], f"{name}_add"))
    return nodes


@dataclass
class _Convolutions:
    """Nodes and weights of convolutions as they come."""

    random: np.random.Generator
    nodes: list[onnx.NodeProto]
    weights: dict[str, np.ndarray]

    def conv(self, name, x, channels, outputs, kernel=3, relu=None, groups=1, **attributes):
        """Add one, with a Relu or Clip after it; the name of what comes out."""
        shape = (outputs, channels // groups, kernel, kernel)
        scale = (channels // groups * kernel**2) ** -0.5
        weight = self.random.standard_normal(shape) * scale
        self.weights[f"{name}.weight"] = weight.astype(np.float32)
        self.weights[f"{name}.bias"] = self.random.standard_normal(outputs).astype(np.float32)
        self.node("Conv", [x, f"{name}.weight", f"{name}.bias"], name, group=groups, **attributes)
        if relu == "Clip":
            return self.node("Clip", [f"{name}_out", "zero", "six"], f"{name}_clip")
        return f"{name}_out" if relu is None else self.node(relu, [f"{name}_out"], f"{name}_relu")

    def node(self, op_type, inputs, name, **attributes):
        """Add any node; the name of what comes out."""
        self.nodes.append(helper.make_node(op_type, inputs, [f"{name}_out"], name, **attributes))
        return f"{name}_out"


def conv_model(*, batch_norm: bool = False, seed: int = 0) -> onnx.ModelProto:
    """Convolutions of all kinds from ``x [batch, 3, 8, 8]`` to ``y [batch, 5]``.

    ``stem`` has unequal pads, ``conv1`` and ``conv2`` are a residual block, ``down`` and
    ``shortcut`` have stride 2, ``left`` and ``right`` are groups of 1 × 1 that read one input,
    ``depthwise`` is padded automatically, ``head`` is a Gemm.

    :param batch_norm: put a BatchNormalization after ``stem``.
    """
    net = _Convolutions(np.random.default_rng(seed), [], {})
    net.weights |= {"zero": np.float32(0), "six": np.float32(6)}
    x = net.conv("stem", "x", 3, 4, relu=None if batch_norm else "Relu", pads=[0, 1, 1, 0])
    if batch_norm:
        names = [f"norm.{name}" for name in ("scale", "bias", "mean", "var")]
        net.weights |= {name: np.ones(4, np.float32) for name in names}
        x = net.node("BatchNormalization", [x, *names], "norm")
    y = net.conv("conv1", x, 4, 4, relu="Relu", pads=[1, 1, 1, 1])
    y = net.conv("conv2", y, 4, 4, pads=[1, 1, 1, 1])
    x = net.node("Relu", [net.node("Add", [x, y], "residual")], "residual_relu")
    y = net.conv("down", x, 4, 8, relu="Relu", strides=[2, 2], pads=[1, 1, 1, 1])
    z = net.conv("shortcut", x, 4, 8, kernel=1, strides=[2, 2])
    x = net.node("Add", [y, z], "joined")
    left = net.conv("left", x, 8, 6, kernel=1, groups=2)
    right = net.conv("right", x, 8, 8, kernel=1, groups=2)
    deep = net.conv(
        "depthwise", right, 8, 8, relu="Clip", groups=8, auto_pad="SAME_UPPER", strides=[1, 1]
    )
    x = net.node("Concat", [net.node("Tanh", [left], "tanh"), right, deep], "concat", axis=1)
    x = net.node("Flatten", [net.node("GlobalAveragePool", [x], "pool")], "flatten")
    net.weights["head.weight"] = net.random.standard_normal((5, 22)).astype(np.float32)
    net.weights["head.bias"] = net.random.standard_normal(5).astype(np.float32)
    net.nodes.append(
        helper.make_node("Gemm", [x, "head.weight", "head.bias"], ["y"], "head", transB=1)
    )
    return finish(
        net.nodes,
        {"x": (TensorProto.FLOAT, ["batch", 3, 8, 8])},
        {"y": (TensorProto.FLOAT, ["batch", 5])},
        net.weights,
    )


@dataclass(frozen=True)
class Exported:
    """A torch module and what was exported from it.

    :param model: the ONNX model, a copy of one's own.
    :param module: in evaluation mode.
    :param names: node by the torch module's name, of linear layers.
    """

    model: onnx.ModelProto
    module: nn.Module
    names: dict[str, str]


def tiny_causal_lm(family: str = "llama", *, untrained: bool = False, **changes: Any) -> Any:
    """A random causal LM of transformers as conftest's ``tiny_model`` builds it.

    :param untrained: gains are ones and biases zeros, as before training.
    """
    import transformers

    settings = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        **changes,
    }
    settings.setdefault("head_dim", settings["hidden_size"] // settings["num_attention_heads"])
    config = transformers.AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                std = 0.0 if untrained else 0.2
                nn.init.normal_(parameter, mean=float("norm" in name), std=std)
    return model.eval()


def exported_module(module, args, input_names, output_names, dynamic_axes) -> onnx.ModelProto:
    """What the exporter that keeps module names makes of a torch module."""
    target = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            args,
            target,
            dynamo=False,
            opset_version=OPSET,
            input_names=input_names,
            output_names=output_names,
            dynamic_axes=dynamic_axes,
        )
    return onnx.load_from_string(target.getvalue())


@functools.cache
def _exported(family: str, mask: bool, settings: tuple[tuple[str, Any], ...]):
    from aimet_ext import prepare_model

    module = prepare_model(tiny_causal_lm(family, **dict(settings))).eval()
    axes = {0: "batch", 1: "seq"}
    names = ["input_ids", "attention_mask"] if mask else ["input_ids"]
    ids = torch.zeros(2, 8, dtype=torch.long)
    args = (ids, torch.ones_like(ids)) if mask else (ids,)
    model = exported_module(
        module, args, names, ["logits"], dict.fromkeys([*names, "logits"], axes)
    )
    return model, module


def exported_llama(
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    bias: bool = False,
    hidden: int = 64,
    *,
    family: str | None = None,
    mask: bool = True,
    **changes: Any,
) -> Exported:
    """A random decoder from ``input_ids`` and ``attention_mask`` to ``logits``.

    :param bias: a Qwen2, whose q, k and v have biases, in place of a Llama.
    :param family: any other family of transformers.
    :param mask: whether ``attention_mask`` is an input.
    :param changes: further fields of the family's config, or ``untrained``.
    """
    settings = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        **changes,
    }
    family = family or ("qwen2" if bias else "llama")
    model, module = _exported(family, mask, tuple(sorted(settings.items())))
    own = onnx.ModelProto()
    own.CopyFrom(model)
    linears = {name for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    names = {}
    for node in own.graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            name = node.name.strip("/").rpartition("/")[0].replace("/", ".")
            if name in linears:
                names[name] = node.name
    return Exported(own, module, names)


def float_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of nodes with a float result that is not quantized next, which HTP has as float16.

    Those that an output of the graph comes from directly are among them.
    """
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    values = infer_shapes(model).graph.value_info
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    outputs = {value.name for value in model.graph.output}
    return [
        node.name
        for node in model.graph.node
        if node.op_type not in ("Constant", "DequantizeLinear", "QuantizeLinear")
        and any(
            kinds.get(name, TensorProto.FLOAT) == TensorProto.FLOAT
            and (name in outputs or readers.get(name, set()) != {"QuantizeLinear"})
            for name in node.output
            if name
        )
    ]
