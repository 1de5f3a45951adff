"""Errors of a quantized layer or block against its float original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_TILE = 128  # columns; smaller ones save more products, and make each slower


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """Moments of a linear layer's inputs that determine its output error exactly.

    With the quantized stream's inputs ``x̂`` and the float stream's ``x = x̂ + e``, over all tokens

        Σ ‖W x − Ŵ x̂‖² = tr(E H Eᵀ) − 2 tr(E C Wᵀ) + Σ ‖W e‖²,   E = Ŵ − W,

    ``H = Σ x̂ x̂ᵀ`` and ``C = Σ x̂ eᵀ``: the difference form, which does not cancel.

    :param second: ``H [in, in]``, divided by the number of tokens; ``[groups, in, in]`` for a
        convolution in groups, each of which has inputs and output rows of its own.
    :param cross: ``C``, of the same shape, likewise; None where the target is ``W x̂``.
    :param tokens: number of tokens.
    :param peak: largest magnitude of an input; 0 if it is not known.
    """

    second: Tensor
    cross: Tensor | None
    tokens: int
    peak: float = 0.0

    def pull(self, weight: Tensor) -> Tensor | None:
        """Return the linear term ``W Cᵀ [out, in]``: where upstream errors pull the weight to."""
        return None if self.cross is None else moment_product(weight, self.cross.mT)


def moment_product(rows: Tensor, moment: Tensor) -> Tensor:
    """Return ``rows · moment``, with each group's own moment for its rows.

    :param rows: ``[out, n]``.
    :param moment: ``[n, m]``, or ``[groups, n, m]`` where ``groups`` divides ``out``.
    :returns: ``[out, m]``.
    """
    if moment.dim() == 2:
        return rows @ moment
    grouped = rows.reshape(moment.shape[0], -1, rows.shape[1])  # [groups, out / groups, n]
    return (grouped @ moment).flatten(0, 1)  # [out, m]


def quadratic(rows: Tensor, moment: Tensor) -> Tensor:
    """Compute ``r H rᵀ`` of every row, with the tiles of ``H`` on and below its diagonal alone.

    That is half the products of ``(rows · H · rows).sum(-1)``.

    :param rows: ``[..., out, n]``.
    :param moment: symmetric, ``[..., n, n]``.
    :returns: ``[..., out]``.
    """
    width = rows.shape[-1]
    total = torch.zeros_like(rows[..., 0])
    for start in range(0, width, _TILE):
        end = min(start + _TILE, width)
        columns = rows[..., start:end]
        product = columns @ moment[..., start:end, start:end]
        if end < width:
            product += 2 * (rows[..., end:] @ moment[..., end:, start:end])
        total += (product * columns).sum(-1)
    return total


def row_errors(error: Tensor, second: Tensor, pull: Tensor | None) -> Tensor:
    """Return every output row's ``E H Eᵀ − 2 E · pull``: its mean squared error, up to a constant.

    :param error: quantized minus float weight, ``[out, in]``.
    :param second: ``H [in, in]`` or ``[groups, in, in]``.
    :param pull: ``[out, in]`` or None, see :meth:`SecondMoment.pull`.
    :returns: ``[out]``.
    """
    rows = error  # [out, in]
    if second.dim() == 3:
        rows = error.reshape(second.shape[0], -1, error.shape[1])  # [groups, out / groups, in]
    errors = quadratic(rows, second).flatten()
    return errors if pull is None else errors - 2 * (pull * error).sum(1)


def best_rows(candidates: Iterable[Tensor], errors: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the candidate with the lowest error for every row, of equal ones the first.

    :param candidates: at least one, ``[out, n]`` or ``[groups, n, rows]`` each.
    :param errors: function from a candidate to its rows' errors, ``[out]`` or ``[groups, rows]``.
    """
    candidates = iter(candidates)
    best = next(candidates)
    lowest = errors(best)
    for candidate in candidates:
        error = errors(candidate)
        better = error < lowest
        best = torch.where(better.unsqueeze(1), candidate, best)
        lowest = torch.where(better, error, lowest)
    return best


def sqnr_db(signal: float, noise: float) -> float:
    """Return the signal to quantization noise ratio in dB of two sums (or means) of squares."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def outputs_sqnr(outputs: Iterable[Tensor], targets: Iterable[Tensor]) -> float:
    """Return the ratio of :func:`sqnr_db` over all outputs, computed in float64.

    :param outputs: quantized outputs, one tensor a batch.
    :param targets: float outputs of the same shapes.
    """
    signal = noise = 0.0
    for output, target in zip(outputs, targets, strict=True):
        wide = target.double()
        signal += float(wide.square().sum())
        noise += float((output.double() - wide).square().sum())
    return -math.inf if math.isnan(noise) else sqnr_db(signal, noise)


def squared_error(output: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[float, int]:
    """Sum of squared differences and number of elements, in float32, over the tokens that count.

    :param output: ``[batch, seq, hidden]``.
    :param target: the same shape.
    :param mask: bool ``[batch, seq]``, None for all tokens.
    """
    difference = output.float() - target.float()
    if mask is not None:
        difference = difference[mask]
    return float(difference.square().sum(dtype=torch.float64)), difference.numel()
