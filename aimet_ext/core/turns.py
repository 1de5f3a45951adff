"""Rotations of weights: what layers read and write is turned, and norms lend out their gains.

Channels ``x`` become ``x R`` everywhere. A layer that reads them takes ``W R``, one that writes
them ``Rᵀ W`` and ``Rᵀ b``. An RMSNorm without gains commutes with every rotation, a LayerNorm with
those that keep the mean (``R 1 = 1``); so the gains go into the layers behind the norm first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aimet_ext.core.hadamard import Rotation

Axis = Literal["in", "out"]


@dataclass(frozen=True, eq=False)
class Turn:
    """One layer and the matrix ``F`` that its input or output channels ``x`` become ``x F`` by.

    :param module: Name of the layer.
    :param axis: ``"in"`` for ``W F``, ``"out"`` for ``Fᵀ W`` and ``Fᵀ b``.
    :param factor: A vector ``[width]``, a diagonal; a stack ``[n, d, d]``, matrices along the
        diagonal; or a rotation.
    :param rows: Start and stop of the channels that are turned, None for all.
    """

    module: str
    axis: Axis
    factor: Tensor | Rotation
    rows: tuple[int, int] | None = None

    def of_channels(self, x: Tensor) -> Tensor:
        """Return ``x F`` of vectors ``[…, width]``."""
        if self.rows is None:
            return _times(x, self.factor)
        start, stop = self.rows
        inner = _times(x[..., start:stop], self.factor)
        return torch.cat([x[..., :start], inner, x[..., stop:]], -1)

    def recorded(self, width: int) -> Tensor:
        """Return the factor for a ledger, ``F`` for columns and ``Fᵀ`` for rows.

        :param width: All channels of the layer on that side.
        :returns: ``[width]`` or ``[n, d, d]``; channels beside ``rows`` have the identity.
        """
        factor = self.factor
        if isinstance(factor, Rotation):
            factor = factor.matrix[None]
        if factor.dim() == 1:
            return factor
        factor = factor.mT if self.axis == "out" else factor
        if self.rows is None:
            return factor
        size, dim = factor.shape[-1], width // factor.shape[-1]
        start = self.rows[0] // size
        whole = torch.eye(size, dtype=factor.dtype, device=factor.device).repeat(dim, 1, 1)
        whole[start : start + len(factor)] = factor
        return whole


def _times(x: Tensor, factor: Tensor | Rotation) -> Tensor:
    if isinstance(factor, Rotation):
        return factor.apply(x)
    factor = factor.to(x)
    if factor.dim() == 1:
        return x * factor
    blocks = x.unflatten(-1, (len(factor), -1))  # […, n, d]
    return torch.einsum("...nd,nde->...ne", blocks, factor).flatten(-2)


def turn(params: Mapping[str, Tensor], step: Turn) -> dict[str, Tensor]:
    """Return the weight of a turn's layer, and its bias if rows are turned; differentiable.

    :param params: By ``"{module}.weight"``; weights ``[out, in]`` or ``[out, in, 1, 1]``. A norm,
        whose weight is a vector, has its bias turned alone.
    """
    names = [f"{step.module}.{key}".lstrip(".") for key in ("weight", "bias")]
    weight, bias = params[names[0]], params.get(names[1])
    changed = {}
    if weight.dim() > 1:
        matrix = weight.flatten(1)
        turned = matrix if step.axis == "in" else matrix.T
        turned = step.of_channels(turned)
        matrix = turned if step.axis == "in" else turned.T
        changed[names[0]] = matrix.reshape(weight.shape)
    if bias is not None and step.axis == "out":
        changed[names[1]] = step.of_channels(bias)
    return changed


def gains_of(params: Mapping[str, Tensor], norm: str, gain_offset: float) -> Tensor:
    """Return what a norm multiplies by, ``[width]``."""
    return params[f"{norm}.weight".lstrip(".")] + gain_offset


def without_gains(params: Mapping[str, Tensor], norm: str, gain_offset: float) -> dict[str, Tensor]:
    """Return weight and bias of a norm whose readers take over its gains.

    :raises ValueError: a gain is 0 and the bias beside it is not: no bias before the readers'
        columns, which are 0 then, is the same.
    """
    gains = gains_of(params, norm, gain_offset)
    names = [f"{norm}.{key}".lstrip(".") for key in ("weight", "bias")]
    changed = {names[0]: torch.full_like(gains, 1.0 - gain_offset)}
    bias = params.get(names[1])
    if bias is not None:
        lost = int(((gains == 0) & (bias != 0)).sum())
        if lost:
            raise ValueError(
                f"{norm}: gains other than 0 are required where the bias is not 0, {lost} of "
                f"{len(gains)} are 0; prune these channels, or leave r1 out"
            )
        changed[names[1]] = torch.where(gains == 0, bias, bias / gains)
    return changed
