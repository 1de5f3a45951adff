"""Differentiable torch versions of ONNX operators: arithmetic, reductions, products and norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from aimet_ext.onnx.ops.common import (
    Attributes,
    Inputs,
    Limit,
    Operator,
    Outputs,
    floating,
    ints,
    operand,
)

__all__ = ["MATH", "MATH_LIMITS"]


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    """Operator of one input without attributes."""
    return lambda attributes, inputs, opset: function(inputs[0])


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """Operator of two inputs that broadcast, without attributes."""
    return lambda attributes, inputs, opset: function(inputs[0], inputs[1])


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """Operator of any number of inputs that are combined from left to right."""

    def combine(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
        result: Tensor = inputs[0]
        for other in inputs[1:]:
            result = function(result, other)
        return result

    return combine


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """Quotient; that of integers is cut off towards zero."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _mod(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Remainder with the divisor's sign, or with ``fmod=1`` the dividend's."""
    function = torch.fmod if attributes.get("fmod") else torch.remainder
    return function(inputs[0], inputs[1])


def _pow(a: Tensor, b: Tensor) -> Tensor:
    """Power in the base's dtype, whatever that of the exponent."""
    scalar = b.numel() == 1 and b.dim() <= a.dim() and not b.requires_grad
    power = b.item() if scalar and b.device.type == "cpu" else b  # no waiting for a device
    return torch.pow(a, power).to(a.dtype)


def _mean(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Mean of all inputs, which broadcast."""
    return torch.stack(torch.broadcast_tensors(*inputs)).mean(0)


def _clip(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Values limited to a range; its ends are inputs since opset 11, attributes before."""
    low = attributes.get("min", operand(inputs, 1))
    high = attributes.get("max", operand(inputs, 2))
    result: Tensor = inputs[0]
    result = result if low is None else result.clamp(min=low)
    return result if high is None else result.clamp(max=high)


def _gelu(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    return functional.gelu(inputs[0], approximate=attributes.get("approximate", "none"))


def _leaky_relu(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    return functional.leaky_relu(inputs[0], attributes.get("alpha", 0.01))


def _elu(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    return functional.elu(inputs[0], attributes.get("alpha", 1.0))


def _hard_sigmoid(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    x: Tensor = inputs[0]
    return (attributes.get("alpha", 0.2) * x + attributes.get("beta", 0.5)).clamp(0, 1)


def _prelu(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    x: Tensor = inputs[0]
    return torch.where(x < 0, inputs[1] * x, x)


def _swish(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    x: Tensor = inputs[0]
    return x * torch.sigmoid(attributes.get("alpha", 1.0) * x)


def _softmax(function: Callable[..., Tensor]) -> Operator:
    """Softmax or its logarithm along an axis; before opset 13 along all axes from there on."""

    def apply(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
        x: Tensor = inputs[0]
        if opset >= 13:
            return function(x, dim=attributes.get("axis", -1))
        axis = attributes.get("axis", 1)
        return function(x.flatten(axis), dim=-1).reshape(x.shape) if x.dim() else x

    return apply


def _reduce(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Operator:
    """Reduction along ``axes``, an attribute or the second input; along all axes without."""

    def apply(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
        x: Tensor = inputs[0]
        given = operand(inputs, 1)
        axes = attributes.get("axes", []) if given is None else ints(given)
        if not axes and attributes.get("noop_with_empty_axes"):
            return x
        axes = tuple(axis % x.dim() for axis in axes) if axes else tuple(range(x.dim()))
        return function(x, axes, bool(attributes.get("keepdims", 1))) if axes else x

    return apply


def _reduce_mean(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=keepdims)
    total = x.sum(axes, keepdim=keepdims, dtype=x.dtype)
    return torch.div(total, x.numel() // max(total.numel(), 1), rounding_mode="trunc")


def _reduce_prod(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keepdims, dtype=x.dtype)
    return x


def _sum(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    """Sum in the input's dtype, which torch would widen for integers."""
    return x.sum(axes, keepdim=keepdims, dtype=x.dtype)


def _argument(function: Callable[..., Tensor]) -> Operator:
    """Index of the largest or smallest value along an axis."""

    def apply(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
        x: Tensor = inputs[0]
        axis, keepdims = attributes.get("axis", 0), bool(attributes.get("keepdims", 1))
        if not attributes.get("select_last_index"):
            return function(x, dim=axis, keepdim=keepdims)
        return x.shape[axis] - 1 - function(x.flip(axis), dim=axis, keepdim=keepdims)

    return apply


def _cumsum(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Running sum along an axis, from the end with ``reverse``, without itself if ``exclusive``."""
    x, (axis,) = inputs[0], ints(inputs[1])
    ordered = x.flip(axis) if attributes.get("reverse") else x
    total: Tensor = ordered.cumsum(axis, dtype=x.dtype)
    if attributes.get("exclusive"):
        total = total - ordered
    return total.flip(axis) if attributes.get("reverse") else total


def _gemm(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """``alpha · A B + beta · C``, A and B transposed where asked."""
    a = inputs[0].mT if attributes.get("transA") else inputs[0]
    b = inputs[1].mT if attributes.get("transB") else inputs[1]
    result: Tensor = attributes.get("alpha", 1.0) * (a @ b)
    c = operand(inputs, 2)
    return result if c is None else result + attributes.get("beta", 1.0) * c


def _einsum(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    return torch.einsum(attributes["equation"], *inputs)


def layer_norm(attributes: Attributes, inputs: Inputs, opset: int) -> Outputs:
    """Normalized input, its mean and inverse standard deviation over the axes from ``axis`` on."""
    x = inputs[0].to(floating(attributes, inputs[0]))
    axes = tuple(range(attributes.get("axis", -1) % x.dim(), x.dim()))
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    variance = centred.square().mean(axes, keepdim=True)
    inverse = torch.rsqrt(variance + attributes.get("epsilon", 1e-5))
    result = (centred * inverse).to(inputs[0].dtype) * inputs[1]
    bias = operand(inputs, 2)
    return (result if bias is None else result + bias), mean, inverse


def rms_norm(attributes: Attributes, inputs: Inputs, opset: int) -> Outputs:
    """Input over its root mean square along the axes from ``axis`` on, and that root's inverse."""
    x = inputs[0].to(floating(attributes, inputs[0]))
    axes = tuple(range(attributes.get("axis", -1) % x.dim(), x.dim()))
    mean_square = x.square().mean(axes, keepdim=True)
    inverse = torch.rsqrt(mean_square + attributes.get("epsilon", 1e-5))
    return (x * inverse).to(inputs[0].dtype) * inputs[1], inverse


def _batch_norm(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    x, scale, bias, mean, variance = inputs[:5]
    return functional.batch_norm(
        x, mean, variance, scale, bias, eps=attributes.get("epsilon", 1e-5)
    )


def _is_inf(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    x: Tensor = inputs[0]
    negative = (x == -torch.inf) & bool(attributes.get("detect_negative", 1))
    return negative | ((x == torch.inf) & bool(attributes.get("detect_positive", 1)))


def _dropout(attributes: Attributes, inputs: Inputs, opset: int) -> Outputs:
    """The input as it is, as at inference, and a mask of ones."""
    return inputs[0], torch.ones_like(inputs[0], dtype=torch.bool)


def _no_training(attributes: Attributes, given: object) -> str | None:
    return "training_mode=1 is not translated" if attributes.get("training_mode") else None


_UNARY: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Asin": torch.asin,
    "Atan": torch.atan,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": functional.hardswish,
    "Identity": lambda x: x,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": functional.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": functional.softplus,
    "Softsign": functional.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}

_BINARY: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Div": _divide,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "MatMul": torch.matmul,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Pow": _pow,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}

_REDUCTIONS: Mapping[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "ReduceL1": lambda x, axes, keep: _sum(x.abs(), axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: torch.amax(x, axes, keepdim=keep),
    "ReduceMean": _reduce_mean,
    "ReduceMin": lambda x, axes, keep: torch.amin(x, axes, keepdim=keep),
    "ReduceProd": _reduce_prod,
    "ReduceSum": _sum,
    "ReduceSumSquare": lambda x, axes, keep: _sum(x * x, axes, keep),
}

MATH: Mapping[tuple[str, str], Operator] = {
    **{("", name): _unary(function) for name, function in _UNARY.items()},
    **{("", name): _binary(function) for name, function in _BINARY.items()},
    **{("", name): _reduce(function) for name, function in _REDUCTIONS.items()},
    ("", "ArgMax"): _argument(torch.argmax),
    ("", "ArgMin"): _argument(torch.argmin),
    ("", "BatchNormalization"): _batch_norm,
    ("", "Clip"): _clip,
    ("", "CumSum"): _cumsum,
    ("", "Dropout"): _dropout,
    ("", "Einsum"): _einsum,
    ("", "Elu"): _elu,
    ("", "Gelu"): _gelu,
    ("", "Gemm"): _gemm,
    ("", "HardSigmoid"): _hard_sigmoid,
    ("", "IsInf"): _is_inf,
    ("", "LayerNormalization"): layer_norm,
    ("", "LeakyRelu"): _leaky_relu,
    ("", "LogSoftmax"): _softmax(torch.log_softmax),
    ("", "Max"): _variadic(torch.maximum),
    ("", "Mean"): _mean,
    ("", "Min"): _variadic(torch.minimum),
    ("", "Mod"): _mod,
    ("", "PRelu"): _prelu,
    ("", "RMSNormalization"): rms_norm,
    # onnxruntime registers it in ONNX's own domain.
    ("", "SimplifiedLayerNormalization"): rms_norm,
    ("", "Softmax"): _softmax(torch.softmax),
    ("", "Sum"): _variadic(torch.add),
    ("", "Swish"): _swish,
}

MATH_LIMITS: Mapping[tuple[str, str], Limit] = {
    ("", "BatchNormalization"): _no_training,
}
