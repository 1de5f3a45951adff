"""Every ONNX operator that has a torch version, on inputs that onnxruntime computes too."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

__all__ = ["CASES", "CONTRIB", "Case", "grouped"]

CONTRIB = "com.microsoft"
RANDOM = np.random.default_rng(0)
Array = np.ndarray[Any, Any]


def rand(*shape: int, low: float = -2.0, high: float = 2.0) -> Array:
    """Uniform float32 numbers, always new ones."""
    return RANDOM.uniform(low, high, shape).astype(np.float32)


def i64(*values: Any) -> Array:
    return np.array(values, dtype=np.int64)


def number(value: int) -> Array:
    return np.array(value, dtype=np.int64)


@dataclasses.dataclass
class Case:
    """An operator on inputs (None: left out), with attributes."""

    op: str
    inputs: Sequence[Array | None]
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    opset: int = 18
    outputs: int = 1
    domain: str = ""
    note: str = ""
    tolerance: float = 2e-6

    def __str__(self) -> str:
        return f"{self.op}-{self.note or 'plain'}-{self.opset}"

    def names(self) -> list[str]:
        return [f"in{i}" if x is not None else "" for i, x in enumerate(self.inputs)]

    def node(self) -> Any:
        outputs = [f"out{i}" for i in range(self.outputs)]
        return helper.make_node(
            self.op, self.names(), outputs, "node", domain=self.domain, **self.attributes
        )

    def expected(self) -> list[Array]:
        """What onnxruntime makes of it."""
        feed = {n: x for n, x in zip(self.names(), self.inputs, strict=True) if x is not None}
        node = self.node()
        graph = helper.make_graph(
            [node],
            "one",
            [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
                for n, x in feed.items()
            ],
            [helper.make_empty_tensor_value_info(name) for name in node.output],
        )
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        found: list[Array] = session.run(None, feed)
        return found

    def values(self) -> dict[str, torch.Tensor]:
        return {
            name: torch.from_numpy(np.array(x))
            for name, x in zip(self.names(), self.inputs, strict=True)
            if x is not None
        }


def smaller(op: str) -> Case:
    """Two inputs that broadcast."""
    return Case(op, [rand(3, 1, 4), rand(2, 4)])


def bools(*shape: int) -> Array:
    return RANDOM.random(shape) > 0.5


X = rand(2, 3, 4)

UNARY = "Abs Atan Ceil Cos Cosh Erf Exp Floor HardSwish Identity Mish Neg Reciprocal Relu Round"
UNARY += " Sigmoid Sign Sin Sinh Softplus Softsign Tan Tanh"
CASES = [
    *(Case(op, [X]) for op in UNARY.split()),
    *(Case(op, [rand(2, 3, low=-0.9, high=0.9)]) for op in ("Acos", "Asin")),
    *(Case(op, [rand(2, 3, low=0.1)]) for op in ("Log", "Sqrt")),
    Case("IsNaN", [np.array([1, np.nan], np.float32)], opset=20),
    Case("IsInf", [np.array([np.inf, -np.inf, 1], np.float32)], opset=20),
    Case("IsInf", [np.array([np.inf, -np.inf], np.float32)], {"detect_negative": 0}, opset=20),
    Case("Not", [bools(5)]),
    Case("BitwiseNot", [i64(0, 5, -3)]),
    *(smaller(op) for op in ("Add", "Sub", "Mul")),
    *(smaller(op) for op in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")),
    Case("Div", [X, rand(3, 1, low=0.5)]),
    Case("Div", [i64(7, -7, 7), i64(2, 2, -2)], note="integers"),
    Case("Equal", [i64(1, 2, 3), i64(1)]),
    Case("Equal", [X, X], note="floats"),
    Case("Pow", [rand(3, 4, low=0.1), rand(4)]),
    Case("Pow", [X, np.array(2.0, np.float32)], note="scalar"),
    Case("Pow", [i64(2, 3), np.array([2.0, 3.0], np.float32)], note="mixed"),
    Case("Mod", [i64(7, -7, 7, -7), i64(3, 3, -3, -3)]),
    Case("Mod", [rand(9), rand(9)], {"fmod": 1}, note="fmod"),
    *(Case(op, [bools(4, 3), bools(3)]) for op in ("And", "Or", "Xor")),
    *(Case(f"Bitwise{op}", [i64(12, 7), i64(10)]) for op in ("And", "Or", "Xor")),
    *(Case(op, [rand(3, 1), rand(4), rand(3, 4)]) for op in ("Max", "Min", "Sum", "Mean")),
    Case("MatMul", [rand(2, 1, 3, 4), rand(5, 4, 6)]),
    Case("MatMul", [rand(4), rand(2, 4, 3)], note="vector"),
    Case("Gemm", [rand(3, 4), rand(4, 5), rand(5)]),
    Case("Gemm", [rand(4, 3), rand(5, 4)], {"transA": 1, "transB": 1, "alpha": 0.5}, note="turned"),
    Case("Gemm", [rand(3, 4), rand(4, 5), rand(3, 1)], {"beta": 2.0}, note="beta"),
    Case("Einsum", [rand(2, 3, 4), rand(2, 4, 5)], {"equation": "bij,bjk->bik"}),
    Case("Clip", [X, np.array(-1, np.float32), np.array(0.5, np.float32)]),
    Case("Clip", [X, None, np.array(0.5, np.float32)], note="above"),
    Case("Clip", [X], {"min": -0.5}, opset=10, note="attributes"),
    Case("Gelu", [X], opset=20),
    Case("Gelu", [X], {"approximate": "tanh"}, opset=20, note="tanh"),
    Case("LeakyRelu", [X], {"alpha": 0.2}),
    Case("Elu", [X], {"alpha": 0.7}),
    Case("HardSigmoid", [X], {"alpha": 0.3}),
    Case("PRelu", [X, rand(4)]),
    Case("Swish", [X], {"alpha": 1.5}, opset=24),
    Case("Softmax", [X]),
    Case("Softmax", [X], {"axis": 1}, note="axis"),
    Case("Softmax", [X], {"axis": 1}, opset=12, note="from axis on"),
    Case("LogSoftmax", [X], {"axis": 0}),
    *(Case(f"Reduce{op}", [X], {"axes": [1, -1]}, opset=17) for op in ("Mean", "Max", "Min", "L2")),
    *(Case(f"Reduce{op}", [X, i64(-1)]) for op in ("Mean", "Sum", "Prod", "L1", "SumSquare")),
    *(Case(f"Reduce{op}", [X], {"keepdims": 0}, note="all") for op in ("Mean", "LogSumExp")),
    Case("ReduceLogSum", [rand(2, 3, low=0.1), i64(0, 1)]),
    Case("ReduceMean", [X], {"noop_with_empty_axes": 1}, note="none"),
    Case("ReduceMean", [i64(1, 2, 4)], note="integers"),
    Case("ReduceProd", [i64(1, 2, 4), i64(0)], note="integers"),
    *(Case(op, [X], {"axis": 1, "keepdims": 0}) for op in ("ArgMax", "ArgMin")),
    Case("ArgMax", [np.zeros((2, 3), np.float32)], {"axis": 1, "select_last_index": 1}),
    Case("CumSum", [X, number(1)]),
    Case("CumSum", [X, number(-1)], {"exclusive": 1, "reverse": 1}, note="reverse"),
    Case("CumSum", [i64(1, 2, 3), number(0)], note="integers"),
    Case("LayerNormalization", [X, rand(4), rand(4)], outputs=3, opset=17),
    Case("LayerNormalization", [X, rand(3, 4)], {"axis": 1, "epsilon": 0.1}, note="axis"),
    Case("RMSNormalization", [X, rand(4)], {"epsilon": 0.01}, opset=23),
    Case("SimplifiedLayerNormalization", [X, rand(4)], {"axis": -1, "epsilon": 1e-6}),
    Case("BatchNormalization", [rand(2, 3, 4, 4), rand(3), rand(3), rand(3), rand(3, low=0.1)], {}),
    Case("Dropout", [X]),
    # Shapes
    Case("Cast", [X], {"to": TensorProto.INT64}),
    Case("Cast", [i64(0, 1, 5)], {"to": TensorProto.BOOL}, note="bool"),
    Case("Cast", [X], {"to": TensorProto.FLOAT16}, note="half"),
    Case("CastLike", [X, i64(1)]),
    Case("Reshape", [X, i64(0, -1, 2)]),
    Case("Reshape", [rand(0, 3), i64(3, 0)], {"allowzero": 1}, note="allowzero"),
    Case("Flatten", [X], {"axis": 2}),
    Case("Flatten", [X], {"axis": 0}, note="row"),
    Case("Flatten", [X], {"axis": -1}, note="negative"),
    Case("Transpose", [X], {"perm": [1, 2, 0]}),
    Case("Transpose", [X], note="reversed"),
    Case("Unsqueeze", [X, i64(-1, 1)]),
    Case("Unsqueeze", [X], {"axes": [0, 2]}, opset=12),
    Case("Squeeze", [rand(1, 2, 1), i64(0, -1)]),
    Case("Squeeze", [rand(1, 2, 1)], note="all"),
    Case("Squeeze", [rand(1, 2, 1)], {"axes": [0]}, opset=12),
    Case("Expand", [rand(3, 1), i64(2, 1, 4)]),
    Case("Tile", [X, i64(1, 2, 2)]),
    Case("Slice", [X, i64(1, -3), i64(2**62, -1), i64(1, -1)]),
    Case("Slice", [X, i64(-1), i64(-(2**63)), i64(2), i64(-2)], note="backwards"),
    Case("Slice", [X, i64(5), i64(-9), i64(1), i64(-1)], note="far ends"),
    Case("Slice", [X, i64(0), i64(9), i64(2), i64(3)], note="steps"),
    Case("Slice", [X, i64(1), i64(2)], note="first axes"),
    Case("Slice", [X], {"starts": [1], "ends": [3], "axes": [2]}, opset=9),
    Case("Split", [X, i64(1, 3)], {"axis": -1}, outputs=2),
    Case("Split", [X], {"axis": 1, "num_outputs": 2}, outputs=2, note="uneven"),
    Case("Split", [X], {"axis": 2}, outputs=2, opset=13, note="even"),
    Case("Split", [X], {"axis": 2, "split": [3, 1]}, outputs=2, opset=12),
    Case("Concat", [rand(2, 3), rand(2, 1)], {"axis": -1}),
    Case("Gather", [X, np.array([[0, -1]])], {"axis": 1}),
    Case("Gather", [X, number(1)], {"axis": -1}, note="scalar"),
    Case("Gather", [i64(4, 5), np.array([1], np.int32)], note="int32"),
    Case("GatherElements", [rand(2, 3), np.array([[0, -1], [2, 1]])], {"axis": 1}),
    Case("GatherND", [X, np.array([[0, 1], [-1, 2]])]),
    Case("GatherND", [X, np.array([[[0, 1]], [[2, 3]]])], {"batch_dims": 1}, note="batches"),
    Case("ScatterElements", [X[0], i64(1, 0).reshape(1, 2), rand(1, 2)], {"axis": 1}),
    Case(
        "ScatterElements",
        [X[0], i64(1, -3).reshape(1, 2), rand(1, 2)],
        {"axis": 1, "reduction": "add"},
        note="add",
    ),
    Case("ScatterND", [X, np.array([[0, 1], [-1, 2]]), rand(2, 4)]),
    Case("ScatterND", [X, np.array([[0], [0]]), rand(2, 3, 4)], {"reduction": "add"}, note="add"),
    Case("Shape", [X]),
    Case("Shape", [X], {"start": -2, "end": -1}, note="part"),
    Case("Size", [X]),
    Case("Constant", [], {"value_floats": [0.5, 2.0]}),
    Case("Constant", [], {"value_int": 3}, note="integer"),
    Case("Constant", [], {"value": onnx.numpy_helper.from_array(X)}, note="tensor"),
    Case("ConstantOfShape", [i64(2, 3)]),
    Case(
        "ConstantOfShape", [i64(2)], {"value": onnx.numpy_helper.from_array(i64(7))}, note="value"
    ),
    Case("Range", [number(2), number(9), number(3)]),
    Case("Range", [np.array(x, np.float32) for x in (1, -1, -0.5)], note="floats"),
    Case("Where", [bools(3, 1), rand(4), rand(2, 3, 4)]),
    Case("Trilu", [rand(3, 4)], {"upper": 0}),
    Case("Trilu", [rand(2, 4, 4), number(1)], note="above"),
    Case("EyeLike", [rand(3, 4)], {"k": 1, "dtype": TensorProto.INT64}),
    Case("OneHot", [i64(0, -1, 2), number(3), rand(2)]),
    Case("OneHot", [i64(0, -1, 2), number(3), rand(2)], {"axis": 0}, note="axis"),
    Case("Pad", [rand(2, 3), i64(0, 1, 2, -1), np.array(0.5, np.float32)]),
    Case("Pad", [rand(2, 3), i64(1, 2), None, i64(-1)], note="axes"),
    Case("Pad", [rand(2, 3)], {"pads": [1, 0, 0, 1], "value": 2.0}, opset=10, note="attributes"),
    Case("TopK", [X, i64(2)], {"axis": 1}, outputs=2),
    Case("TopK", [X, i64(2)], {"largest": 0}, outputs=2, note="smallest"),
    Case("NonZero", [np.array([[0, 1], [2, 0]], np.float32)]),
]


def contrib(op: str, inputs: Sequence[Array | None], note: str = "", **changes: Any) -> Case:
    fields = {key: changes.pop(key) for key in ("outputs", "tolerance") if key in changes}
    return Case(op, inputs, changes, domain=CONTRIB, note=note, **fields)


CASES += [
    contrib("BiasGelu", [X, rand(4)]),
    contrib("FastGelu", [X, rand(4)]),
    contrib("FastGelu", [X], "without bias"),
    contrib("Gelu", [X]),
    contrib("QuickGelu", [X], alpha=1.5),
    contrib("FusedMatMul", [rand(2, 3, 4), rand(2, 5, 4)], transB=1, alpha=0.5),
    contrib("FusedMatMul", [rand(2, 4, 3), rand(2, 4, 5)], "left", transA=1),
    contrib("FusedMatMul", [rand(3, 2, 4), rand(2, 4, 5)], "batch", transBatchA=1),
    contrib("FusedMatMul", [rand(3, 2, 4), rand(4, 2, 5)], "both", transBatchA=1, transBatchB=1),
    contrib("FusedMatMul", [rand(4, 2, 3), rand(2, 4, 5)], "twice", transBatchA=1, transA=1),
    contrib("SkipLayerNormalization", [X, rand(2, 3, 4), rand(4), rand(4), rand(4)], epsilon=1e-5),
    contrib("SkipLayerNormalization", [X, rand(2, 3, 4), rand(4)], "plain", epsilon=1e-5),
    contrib("SkipSimplifiedLayerNormalization", [X, rand(2, 3, 4), rand(4)], epsilon=1e-5),
    contrib(
        "SkipSimplifiedLayerNormalization",
        [X, rand(2, 3, 4), rand(4), rand(4)],
        "bias",
        epsilon=1e-5,
    ),
]

CACHE = (rand(32, 8), rand(32, 8))  # cos and sin of head size 16


def grouped(note: str, lengths: Sequence[int], seq: int = 5, past: int = 0, **changes: Any) -> Case:
    """GroupQueryAttention of 4 heads over 2, size 16."""
    batch, heads, kv_heads, size = len(lengths), 4, 2, 16
    extra = [changes.pop(key, None) for key in ("positions", "bias", "sink")]
    if changes.pop("packed", False):
        tensors = [rand(batch, seq, (heads + 2 * kv_heads) * size), None, None]
    else:
        tensors = [rand(batch, seq, n * size) for n in (heads, kv_heads, kv_heads)]
    cache = [rand(batch, kv_heads, past, size) for _ in range(2)]
    total = np.array(max(lengths), np.int32)
    rotary = CACHE if changes.get("do_rotary") else (None, None)
    inputs = [*tensors, *cache, np.array(lengths, np.int32) - 1, total, *rotary, *extra]
    while inputs[-1] is None:
        inputs.pop()
    changes = {"num_heads": heads, "kv_num_heads": kv_heads, **changes}
    return contrib("GroupQueryAttention", inputs, note, outputs=3, tolerance=5e-6, **changes)


CASES += [
    grouped("prompt", [5, 5]),
    grouped("rotary", [5, 5], do_rotary=1),
    grouped("interleaved", [5, 5], do_rotary=1, rotary_interleaved=1),
    grouped("packed", [5, 5], do_rotary=1, packed=True),
    grouped("positions", [5], do_rotary=1, positions=np.arange(3, 8)[None]),
    grouped("softcap", [5, 5], softcap=2.0, scale=0.7),
    grouped("window", [9], seq=9, local_window_size=3),
    grouped("past", [7], seq=1, past=6, do_rotary=1),
    grouped("long past", [8], seq=2, past=6, do_rotary=1),
    grouped("bias", [5, 5], bias=rand(1, 4, 5, 5)),
    grouped("sink", [5, 5], sink=rand(4)),
    grouped("smooth", [5, 5], smooth_softmax=1),
    contrib("RotaryEmbedding", [rand(2, 5, 64), np.arange(10).reshape(2, 5), *CACHE]),
    contrib("RotaryEmbedding", [rand(2, 4, 5, 16), i64(3), *CACHE], "heads"),
    contrib("RotaryEmbedding", [rand(1, 5, 64), i64(0), *CACHE], "interleaved", interleaved=1),
    contrib(
        "RotaryEmbedding", [rand(1, 5, 96), i64(0), *CACHE], "part",
        rotary_embedding_dim=16, num_heads=4,
    ),
    Case("RotaryEmbedding", [rand(2, 4, 5, 16), *CACHE, np.arange(10).reshape(2, 5)], opset=23),
    Case(
        "RotaryEmbedding", [rand(2, 5, 96), rand(2, 5, 8), rand(2, 5, 8)],
        {"num_heads": 4, "rotary_embedding_dim": 16, "interleaved": 1}, opset=23, note="tables",
    ),
    contrib(
        "MultiHeadAttention", [rand(2, 5, 32), rand(2, 6, 32), rand(2, 6, 32)],
        num_heads=4, tolerance=5e-6,
    ),
    contrib(
        "MultiHeadAttention", [rand(2, 5, 32), rand(2, 5, 32), rand(2, 5, 32), rand(96)],
        "bias, causal", num_heads=4, unidirectional=1, scale=0.3, tolerance=5e-6,
    ),
    contrib(
        "MultiHeadAttention",
        [
            rand(2, 5, 32), rand(2, 5, 32), rand(2, 5, 32), None, None, rand(2, 1, 5, 8),
            rand(2, 4, 3, 8), rand(2, 4, 3, 8),
        ],
        "past", num_heads=4, outputs=3, tolerance=5e-6,
    ),
    contrib(
        "MultiHeadAttention",
        [
            rand(2, 5, 32), rand(2, 5, 32), rand(2, 5, 32), None,
            np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32),
        ],
        "padding", num_heads=4, tolerance=5e-6,
    ),
    Case("Attention", [rand(2, 4, 5, 8), rand(2, 2, 5, 8), rand(2, 2, 5, 8)], opset=23),
    Case(
        "Attention", [rand(2, 5, 32), rand(2, 5, 16), rand(2, 5, 16), rand(5, 5)],
        {"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.4}, opset=23, note="flat, mask",
    ),
    Case(
        "Attention", [rand(2, 4, 5, 8), rand(2, 4, 5, 8), rand(2, 4, 5, 8)],
        {"is_causal": 1, "softcap": 1.5}, opset=23, note="causal",
    ),
    Case(
        "Attention",
        [rand(2, 4, 5, 8), rand(2, 4, 5, 8), rand(2, 4, 5, 8), np.tri(5, dtype=bool)],
        opset=23, note="bool mask",
    ),
]  # fmt: skip
