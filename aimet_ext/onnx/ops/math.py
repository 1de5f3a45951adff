"""Differentiable torch versions of ONNX operators: arithmetic, activations, products and norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from aimet_ext.onnx.ops.operator import (
    CONTRIB,
    Attributes,
    Inputs,
    Limit,
    Operator,
    Outputs,
    floating,
    ints,
    only,
    operand,
)


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    """Return the operator of one input without attributes."""
    return lambda attributes, inputs, opset: function(inputs[0])


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """Return the operator of two inputs that broadcast, without attributes."""
    return lambda attributes, inputs, opset: function(inputs[0], inputs[1])


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """Return the operator of any number of inputs that are combined from left to right."""

    def combine(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
        result: Tensor = inputs[0]
        for other in inputs[1:]:
            result = function(result, other)
        return result

    return combine


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """Return the quotient; that of integers is cut off towards zero."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _pow(a: Tensor, b: Tensor) -> Tensor:
    """Return the power in the base's dtype, whatever that of the exponent."""
    scalar = b.numel() == 1 and b.dim() <= a.dim() and not b.requires_grad
    power = b.item() if scalar and b.device.type == "cpu" else b  # no waiting for a device
    return torch.pow(a, power).to(a.dtype)


def _clip(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Return values limited to a range; its ends are inputs since opset 11, attributes before."""
    low = attributes.get("min", operand(inputs, 1))
    high = attributes.get("max", operand(inputs, 2))
    result: Tensor = inputs[0]
    result = result if low is None else result.clamp(min=low)
    return result if high is None else result.clamp(max=high)


def _swish(alpha: float) -> Operator:
    """Return ``x · σ(alpha x)``, ``alpha`` in place of a missing attribute."""
    return lambda a, x, opset: x[0] * torch.sigmoid(a.get("alpha", alpha) * x[0])


def _softmax(function: Callable[..., Tensor]) -> Operator:
    """Return a softmax or its logarithm along an axis; before opset 13 all axes from it on."""

    def apply(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
        x: Tensor = inputs[0]
        if opset >= 13:
            return function(x, dim=attributes.get("axis", -1))
        axis = attributes.get("axis", 1)
        return function(x.flatten(axis), dim=-1).reshape(x.shape) if x.dim() else x

    return apply


def _reduce(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Operator:
    """Return a reduction along ``axes``, an attribute or the second input; all axes without."""

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
    """Sum up along an axis, from the end with ``reverse``, without the element if ``exclusive``."""
    x, (axis,) = inputs[0], ints(inputs[1])
    ordered = x.flip(axis) if attributes.get("reverse") else x
    total: Tensor = ordered.cumsum(axis, dtype=x.dtype)
    if attributes.get("exclusive"):
        total = total - ordered
    return total.flip(axis) if attributes.get("reverse") else total


def _gemm(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Return ``alpha · A B + beta · C``, A and B transposed where asked."""
    a = inputs[0].mT if attributes.get("transA") else inputs[0]
    b = inputs[1].mT if attributes.get("transB") else inputs[1]
    result: Tensor = attributes.get("alpha", 1.0) * (a @ b)
    c = operand(inputs, 2)
    return result if c is None else result + attributes.get("beta", 1.0) * c


def _layer_norm(attributes: Attributes, inputs: Inputs, opset: int) -> Outputs:
    """Normalize over the axes from ``axis`` on; returns mean and inverse standard deviation too."""
    x = inputs[0].to(floating(attributes, inputs[0]))
    axes = tuple(range(attributes.get("axis", -1) % x.dim(), x.dim()))
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    variance = centred.square().mean(axes, keepdim=True)
    inverse = torch.rsqrt(variance + attributes.get("epsilon", 1e-5))
    result = (centred * inverse).to(inputs[0].dtype) * inputs[1]
    bias = operand(inputs, 2)
    return (result if bias is None else result + bias), mean, inverse


def _rms_norm(attributes: Attributes, inputs: Inputs, opset: int) -> Outputs:
    """Divide by the root mean square over axes from ``axis`` on; returns the inverse root too."""
    x = inputs[0].to(floating(attributes, inputs[0]))
    axes = tuple(range(attributes.get("axis", -1) % x.dim(), x.dim()))
    mean_square = x.square().mean(axes, keepdim=True)
    inverse = torch.rsqrt(mean_square + attributes.get("epsilon", 1e-5))
    return (x * inverse).to(inputs[0].dtype) * inputs[1], inverse


def _is_inf(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    x: Tensor = inputs[0]
    negative = (x == -torch.inf) & bool(attributes.get("detect_negative", 1))
    return negative | ((x == torch.inf) & bool(attributes.get("detect_positive", 1)))


def _with_skip(inputs: Inputs, bias: int) -> Tensor:
    """Sum of input, skip and the bias at a position, where there is one."""
    total: Tensor = inputs[0] + inputs[1]
    given = operand(inputs, bias)
    return total if given is None else total + given


def _skip_rms_norm(attributes: Attributes, inputs: Inputs, opset: int) -> Outputs:
    """Return the RMS norm of input + skip + bias, (mean), inverse root, and the sum itself."""
    total = _with_skip(inputs, 3)
    result, inverse = _rms_norm(_last_axis(attributes, 1e-12), [total, inputs[2]], opset)
    return result, None, inverse, total


def _skip_layer_norm(attributes: Attributes, inputs: Inputs, opset: int) -> Outputs:
    """Return the layer norm of input + skip + bias, mean, inverse deviation, and the sum itself."""
    total = _with_skip(inputs, 4)
    operands = [total, inputs[2], operand(inputs, 3)]
    result, mean, inverse = _layer_norm(_last_axis(attributes, 1e-12), operands, opset)
    return result, mean, inverse, total


def _last_axis(attributes: Attributes, epsilon: float) -> Attributes:
    return {"axis": -1, "epsilon": attributes.get("epsilon", epsilon)}


def _fused_matmul(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Return ``alpha · A B``; ``transBatchA`` moves A's first axis in front of its rows."""
    factors = []
    for x, which in zip(inputs, "AB", strict=True):
        if attributes.get(f"transBatch{which}"):
            x = x.movedim(0, -2)
        factors.append(x.mT if attributes.get(f"trans{which}") and x.dim() > 1 else x)
    result: Tensor = attributes.get("alpha", 1.0) * (factors[0] @ factors[1])
    return result


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
    ("", "BatchNormalization"): lambda a, x, opset: functional.batch_norm(
        x[0], x[3], x[4], x[1], x[2], eps=a.get("epsilon", 1e-5)
    ),
    ("", "Clip"): _clip,
    ("", "CumSum"): _cumsum,
    # As at inference, with a mask of ones.
    ("", "Dropout"): lambda a, x, opset: (x[0], torch.ones_like(x[0], dtype=torch.bool)),
    ("", "Einsum"): lambda a, x, opset: torch.einsum(a["equation"], *x),
    ("", "Elu"): lambda a, x, opset: functional.elu(x[0], a.get("alpha", 1.0)),
    ("", "Gelu"): lambda a, x, opset: functional.gelu(
        x[0], approximate=a.get("approximate", "none")
    ),
    ("", "Gemm"): _gemm,
    ("", "HardSigmoid"): lambda a, x, opset: (
        a.get("alpha", 0.2) * x[0] + a.get("beta", 0.5)
    ).clamp(0, 1),
    ("", "IsInf"): _is_inf,
    ("", "LayerNormalization"): _layer_norm,
    ("", "LeakyRelu"): lambda a, x, opset: functional.leaky_relu(x[0], a.get("alpha", 0.01)),
    ("", "LogSoftmax"): _softmax(torch.log_softmax),
    ("", "Max"): _variadic(torch.maximum),
    ("", "Mean"): lambda a, x, opset: torch.stack(torch.broadcast_tensors(*x)).mean(0),
    ("", "Min"): _variadic(torch.minimum),
    # With the divisor's sign, or with fmod=1 the dividend's.
    ("", "Mod"): lambda a, x, opset: (torch.fmod if a.get("fmod") else torch.remainder)(*x),
    ("", "PRelu"): _binary(lambda x, slope: torch.where(x < 0, slope * x, x)),
    ("", "RMSNormalization"): _rms_norm,
    # onnxruntime registers it in ONNX's own domain.
    ("", "SimplifiedLayerNormalization"): _rms_norm,
    ("", "Softmax"): _softmax(torch.softmax),
    ("", "Sum"): _variadic(torch.add),
    ("", "Swish"): _swish(1.0),
    (CONTRIB, "BiasGelu"): _binary(lambda x, bias: functional.gelu(x + bias)),
    (CONTRIB, "FastGelu"): lambda a, x, opset: functional.gelu(
        x[0] if operand(x, 1) is None else x[0] + x[1], approximate="tanh"
    ),
    (CONTRIB, "FusedMatMul"): _fused_matmul,
    (CONTRIB, "Gelu"): _unary(functional.gelu),
    (CONTRIB, "QuickGelu"): _swish(1.702),
    (CONTRIB, "SkipLayerNormalization"): _skip_layer_norm,
    (CONTRIB, "SkipSimplifiedLayerNormalization"): _skip_rms_norm,
}

MATH_LIMITS: Mapping[tuple[str, str], Limit] = {
    ("", "BatchNormalization"): only("training_mode", 0),
}
