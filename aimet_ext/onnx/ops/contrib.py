"""Differentiable torch versions of onnxruntime's own operators: fused norms and activations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from aimet_ext.onnx.ops.common import Attributes, Inputs, Operator, Outputs, operand
from aimet_ext.onnx.ops.math import layer_norm, rms_norm

__all__ = ["CONTRIB"]


def _with_skip(inputs: Inputs, bias: int) -> Tensor:
    """Sum of input, skip and the bias at a position, where there is one."""
    total: Tensor = inputs[0] + inputs[1]
    given = operand(inputs, bias)
    return total if given is None else total + given


def _skip_rms_norm(attributes: Attributes, inputs: Inputs, opset: int) -> Outputs:
    """RMS norm of input + skip + bias, (mean), inverse root mean square, and the sum itself."""
    total = _with_skip(inputs, 3)
    result, inverse = rms_norm(_last_axis(attributes, 1e-12), [total, inputs[2]], opset)
    return result, None, inverse, total


def _skip_layer_norm(attributes: Attributes, inputs: Inputs, opset: int) -> Outputs:
    """Layer norm of input + skip + bias, mean, inverse standard deviation, and the sum itself."""
    total = _with_skip(inputs, 4)
    operands = [total, inputs[2], operand(inputs, 3)]
    result, mean, inverse = layer_norm(_last_axis(attributes, 1e-12), operands, opset)
    return result, mean, inverse, total


def _last_axis(attributes: Attributes, epsilon: float) -> Attributes:
    return {"axis": -1, "epsilon": attributes.get("epsilon", epsilon)}


def _fast_gelu(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    bias = operand(inputs, 1)
    return functional.gelu(inputs[0] if bias is None else inputs[0] + bias, approximate="tanh")


def _bias_gelu(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    return functional.gelu(inputs[0] + inputs[1])


def _gelu(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    return functional.gelu(inputs[0])


def _quick_gelu(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    x: Tensor = inputs[0]
    return x * torch.sigmoid(attributes.get("alpha", 1.702) * x)


def _fused_matmul(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """``alpha · A B``; ``transBatchA`` moves A's first axis in front of its rows, then B's."""
    factors = []
    for x, which in zip(inputs, "AB", strict=True):
        if attributes.get(f"transBatch{which}"):
            x = x.movedim(0, -2)
        factors.append(x.mT if attributes.get(f"trans{which}") and x.dim() > 1 else x)
    result: Tensor = attributes.get("alpha", 1.0) * (factors[0] @ factors[1])
    return result


_DOMAIN = "com.microsoft"

CONTRIB: Mapping[tuple[str, str], Operator] = {
    (_DOMAIN, "BiasGelu"): _bias_gelu,
    (_DOMAIN, "FastGelu"): _fast_gelu,
    (_DOMAIN, "FusedMatMul"): _fused_matmul,
    (_DOMAIN, "Gelu"): _gelu,
    (_DOMAIN, "QuickGelu"): _quick_gelu,
    (_DOMAIN, "SkipLayerNormalization"): _skip_layer_norm,
    (_DOMAIN, "SkipSimplifiedLayerNormalization"): _skip_rms_norm,
}
