"""How each tensor of an adapter follows a transform ``W' = diag(output) W diag(input)``.

A change ``ΔW = BA`` of the weight becomes ``diag(output) B A diag(input)``, so that
``W' + ΔW' = diag(output) (W + ΔW) diag(input)``: the adapted weight is transformed as the base is,
and what the transform leaves unchanged on the base, it leaves unchanged with any adapter.

DoRA multiplies the rows of ``W + ΔW`` by ``m / ‖W + ΔW‖``. The transformed rows have other norms,
``n' = |output| ‖(W + ΔW) diag(input)‖``, so ``m' = m n' / n`` keeps every factor as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aimet_ext.files.ledger import ModuleScales

__all__ = ["columns", "dora_magnitude", "rows"]


def rows(value: Tensor, scale: Tensor | None) -> Tensor:
    """``diag(scale) value``: the first dimension of ``value`` ``[n, …]`` times ``scale`` ``[n]``.

    :raises ValueError: ``scale`` has another length.
    """
    return _times(value, scale, 0)


def columns(value: Tensor, scale: Tensor | None) -> Tensor:
    """``value diag(scale)``: the second dimension of ``value`` times ``scale``.

    :raises ValueError: ``scale`` has another length.
    """
    return _times(value, scale, 1)


def dora_magnitude(
    magnitude: Tensor,
    scales: ModuleScales,
    weight: Tensor | None = None,
    change: Tensor | None = None,
) -> Tensor:
    """Magnitudes ``m'`` with which DoRA multiplies each row by what it multiplied it by before.

    :param magnitude: ``m``, ``[out]``, or ``[1, out, 1, …]`` of a convolution.
    :param weight: ``W`` ``[out, in, …]`` of the original base; not needed where ``scales.input`` is
        None, as norms then change by ``|output|`` alone.
    :param change: ``ΔW``, of the same shape.
    :raises ValueError: a row of ``W + ΔW`` is zero, and has no direction.
    """
    factor = torch.ones_like(magnitude, dtype=torch.float64).flatten()
    if scales.output is not None:
        factor = factor * scales.output.double().abs()
    if scales.input is not None:
        assert weight is not None and change is not None
        adapted = weight.double() + change.double()  # [out, in, …]
        before = adapted.flatten(1).norm(dim=1)
        if not bool((before > 0).all()):
            raise ValueError("a row of its weight is zero, which DoRA cannot multiply to a norm")
        factor = factor * columns(adapted, scales.input).flatten(1).norm(dim=1) / before
    return (magnitude.double() * factor.view(magnitude.shape)).to(magnitude.dtype)


def _times(value: Tensor, scale: Tensor | None, dim: int) -> Tensor:
    if scale is None:
        return value
    if value.dim() <= dim or len(scale) != value.shape[dim]:
        raise ValueError(
            f"a width of {len(scale)} is required, as the scales have, got shape "
            f"{tuple(value.shape)}"
        )
    shape = [1] * value.dim()
    shape[dim] = -1
    return (value.double() * scale.to(value.device).double().view(shape)).to(value.dtype)
