"""The graphs of a few nodes that ``htp_patterns`` compiles, and how each is quantized."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from aimet_ext.artifact.hand_off import write_qdq
from aimet_ext.onnx.rewrite.htp import set_apart

TOKENS, WIDTH, OUT = 16, 256, 64
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """A graph, and how its layer is quantized.

    :param weight: ``"8"`` or ``"4"`` (per channel), ``"4 tensor"``, ``"4 block 32"`` (a float scale
        per block), ``"LPBQ 64"``.
    :param bias: None, ``"float"``, ``"int32"``, or ``"add"``: an Add of its own, with ranges.
    :param activation: bits.
    :param float_constants: constants stay float, with quantize nodes of their own.
    :param bits: of single tensors, by name.
    """

    group: str
    name: str
    kind: str
    weight: str = "8"
    bias: str | None = None
    activation: int = 16
    float_constants: bool = False
    bits: Mapping[str, int] = field(default_factory=dict)
    symmetric: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


class Graph:
    """A float graph under construction."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, *shape: int, kind: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def constant(self, name: str, value: Array) -> str:
        self.stored.append(numpy_helper.from_array(value, name))
        return name

    def normal(self, name: str, *shape: int, scale: float = 1.0) -> str:
        return self.constant(name, (self.rng.normal(size=shape) * scale).astype(np.float32))

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def model(self, output: str) -> onnx.ModelProto:
        value = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "pattern", self.inputs, [value], self.stored)
        opset = [helper.make_opsetid("", 21)]
        return onnx.shape_inference.infer_shapes(
            helper.make_model(graph, opset_imports=opset, ir_version=10)
        )


def _bias(graph: Graph, size: int) -> str:
    # As large as the products: one that is lost shows.
    return graph.normal("bias", size)


def _matmul(p: Pattern) -> onnx.ModelProto:
    graph = Graph()
    x = graph.input("x", 1, TOKENS, WIDTH)
    y = graph.op("MatMul", x, graph.normal("weight", WIDTH, OUT, scale=WIDTH**-0.5), name="layer")
    if p.bias:
        y = graph.op("Add", y, _bias(graph, OUT), name="bias_add")
    return graph.model(y)


def _gemm(p: Pattern) -> onnx.ModelProto:
    graph = Graph()
    x = graph.input("x", TOKENS, WIDTH)
    inputs = [x, graph.normal("weight", OUT, WIDTH, scale=WIDTH**-0.5)]
    inputs += [_bias(graph, OUT)] if p.bias else []
    y = graph.op("Gemm", *inputs, name="layer", transB=1)
    if p.settings.get("relu"):
        y = graph.op("Relu", y)
    return graph.model(y)


def _conv(p: Pattern) -> onnx.ModelProto:
    graph, side = Graph(), p.settings.get("kernel", 1)
    groups = p.settings.get("groups", 1)
    x = graph.input("x", 1, WIDTH, 4, 4)
    rows = WIDTH if groups > 1 else OUT
    weight = graph.normal(
        "weight", rows, WIDTH // groups, side, side, scale=(WIDTH // groups * side**2) ** -0.5
    )
    inputs = [x, weight] + ([_bias(graph, rows)] if p.bias else [])
    pads = [side // 2] * 4
    return graph.model(graph.op("Conv", *inputs, name="layer", pads=pads, group=groups))


def _two_inputs(p: Pattern) -> onnx.ModelProto:
    graph = Graph()
    a = graph.input("a", 1, 4, TOKENS, 32)
    b = graph.input("b", 1, 4, 32, TOKENS)
    if p.settings.get("transposed"):
        graph.inputs.pop()
        b = graph.input("b", 1, 4, TOKENS, 32)
        b = graph.op("Transpose", b, name="turn", perm=[0, 1, 3, 2])
    return graph.model(graph.op("MatMul", a, b, name="layer"))


def _attention(_: Pattern) -> onnx.ModelProto:
    graph = Graph()
    q, k, v = (graph.input(name, 1, 4, TOKENS, 32) for name in "qkv")
    scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]), name="scores")
    scale = graph.constant("scale", np.float32(32**-0.5))
    mask = np.triu(np.full((1, 1, TOKENS, TOKENS), -100, np.float32), 1)
    scores = graph.op("Mul", scores, scale)
    scores = graph.op("Add", scores, graph.constant("mask", mask))
    return graph.model(graph.op("MatMul", graph.op("Softmax", scores, axis=-1), v))


def _unary(kind: str) -> Callable[[Pattern], onnx.ModelProto]:
    def build(_: Pattern) -> onnx.ModelProto:
        graph = Graph()
        return graph.model(graph.op(kind, graph.input("x", 1, TOKENS, WIDTH)))

    return build


def _binary(kind: str) -> Callable[[Pattern], onnx.ModelProto]:
    def build(_: Pattern) -> onnx.ModelProto:
        graph = Graph()
        inputs = [graph.input(name, 1, TOKENS, WIDTH) for name in "ab"]
        return graph.model(graph.op(kind, *inputs, **({"axis": -1} if kind == "Concat" else {})))

    return build


def _silu(_: Pattern) -> onnx.ModelProto:
    graph = Graph()
    x = graph.input("x", 1, TOKENS, WIDTH)
    return graph.model(graph.op("Mul", x, graph.op("Sigmoid", x)))


def _rms_norm(p: Pattern) -> onnx.ModelProto:
    graph = Graph()
    x = graph.input("x", 1, TOKENS, WIDTH)
    two, eps = graph.constant("two", np.float32(2)), graph.constant("eps", np.float32(1e-5))
    axes = graph.constant("axes", np.asarray([-1], np.int64))
    mean = graph.op("ReduceMean", graph.op("Pow", x, two), axes, keepdims=1)
    root = graph.op("Sqrt", graph.op("Add", mean, eps))
    one = graph.constant("one", np.float32(1))
    y = graph.op("Mul", x, graph.op("Div", one, root))
    gain = graph.constant("gain", (1 + 0.2 * graph.rng.normal(size=WIDTH)).astype(np.float32))
    return graph.model(graph.op("Mul", gain, y))


def _layer_norm(_: Pattern) -> onnx.ModelProto:
    graph = Graph()
    x = graph.input("x", 1, TOKENS, WIDTH)
    gain = graph.constant("gain", (1 + 0.2 * graph.rng.normal(size=WIDTH)).astype(np.float32))
    y = graph.op("LayerNormalization", x, gain, graph.normal("shift", WIDTH), name="norm", axis=-1)
    return graph.model(y)


def _gather(_: Pattern) -> onnx.ModelProto:
    graph = Graph()
    ids = graph.input("ids", 1, TOKENS, kind=TensorProto.INT64)
    return graph.model(graph.op("Gather", graph.normal("table", 128, WIDTH), ids, name="layer"))


BUILDERS: dict[str, Callable[[Pattern], onnx.ModelProto]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "two inputs": _two_inputs,
    "attention": _attention,
    "RMSNorm": _rms_norm,
    "LayerNorm": _layer_norm,
    "SiLU": _silu,
    "Gather": _gather,
    **{kind: _unary(kind) for kind in ("Softmax", "Sigmoid", "Gelu", "Relu", "Tanh", "Neg")},
    **{kind: _binary(kind) for kind in ("Add", "Mul", "Sub", "Concat")},
}


def feeds(model: onnx.ModelProto, seed: int) -> dict[str, Array]:
    """Made-up inputs of a graph."""
    rng = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for value in model.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.elem_type == TensorProto.INT64:
            found[value.name] = rng.integers(0, 128, shape)
        else:
            found[value.name] = rng.normal(size=shape).astype(np.float32)
    return found


def build_sim(pattern: Pattern, model: onnx.ModelProto, *, fitted: bool) -> Any:
    """The pattern's ``aimet_onnx`` simulation, with ranges from one batch.

    :param fitted: rewrite the layer first into a form that HTP computes right.
    """
    from aimet_onnx import QuantizationSimModel
    from aimet_onnx.quantsim import (
        set_blockwise_quantization_for_weights,
        set_grouped_blockwise_quantization_for_weights,
    )

    words = pattern.weight.split()
    if fitted:
        kind = "LPBQ" if words[0] == "LPBQ" else "PER_BLOCK" if "block" in words else "PER_CHANNEL"
        set_apart(model, {"weight": kind})
    with _config(fused=pattern.bias != "add" and not fitted) as config, _quiet():
        sim = QuantizationSimModel(
            model,
            param_type="int4" if words[0] == "4" else "int16" if words[0] == "16" else "int8",
            activation_type=f"int{pattern.activation}",
            config_file=config,
            dummy_input=feeds(model, 1),
            providers=["CPUExecutionProvider"],
        )
        kinds = ("MatMul", "Gemm", "Conv")
        if words[0] == "LPBQ":
            bits, wide = pattern.settings.get("bits", (4, 8))
            set_grouped_blockwise_quantization_for_weights(
                sim, kinds, bits, wide, int(words[1]), strict=True
            )
        elif "block" in words:
            set_blockwise_quantization_for_weights(
                sim, kinds, int(words[0]), True, int(words[-1]), strict=True
            )
        elif "tensor" in words:
            sim.qc_quantize_op_dict["weight"].enable_per_channel_quantization(False)
        for name, bits in pattern.bits.items():
            sim.qc_quantize_op_dict[name].set_bitwidth(bits)
        for name in pattern.symmetric:
            sim.qc_quantize_op_dict[name].use_symmetric_encodings = True
        sim.compute_encodings([feeds(model, 1)])
    return sim


def qdq_model(pattern: Pattern, sim: Any, *, target: str, fitted: bool) -> onnx.ModelProto:
    """The QDQ graph of a simulation, by AIMET with the pattern's biases, or by ``write_qdq``."""
    sim._hw_version = target.removeprefix("htp_").upper()
    with _quiet():
        if not fitted:
            return sim.to_onnx_qdq(
                prequantize_constants=not pattern.float_constants,
                export_int32_bias=pattern.bias == "int32",
            )
        with tempfile.TemporaryDirectory() as folder:
            return onnx.load(str(write_qdq(sim, Path(folder) / "model.onnx")))


@contextlib.contextmanager
def _config(fused: bool) -> Iterator[str]:
    """AIMET's configuration, with or without the pass that makes MatMul and Add one layer."""
    if fused:
        yield "htp_v79"
        return
    from aimet_onnx.common import quantsim_config

    source = Path(quantsim_config.__file__).parent / "htp_quantsim_config_v79.json"
    content = json.loads(source.read_text("utf-8"))
    content["supergroup_pass_list"].remove("MatmulAdd")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(content))
        yield str(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
