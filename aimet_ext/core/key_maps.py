"""Affine maps of keys, chosen so that a cache of few bits changes the model's outputs least.

The scores of an attention stay as they are, up to a number for each query that a softmax does not
see, when keys and queries behind the rotary embedding become, head by head,

    k' = k M + b,    q' = q M⁻ᵀ,    since  q' k'ᵀ = q kᵀ + q' bᵀ.

A uniform grid with one step Δ for all heads and channels adds an error of variance Δ²/12 to each
number of ``k'``, and so ``M⁻¹ (Δ²/12) M⁻ᵀ`` to ``k``. With the Fisher information of the keys,
``F = E[g gᵀ]`` for gradients ``g`` of the log-likelihood of outcomes drawn from the model, that
adds to the divergence of the outputs, to second order,

    ½ Δ²/12 Σ_heads tr(M⁻¹ F M⁻ᵀ),    Δ = (max k' − min k') / (2^bits − 1).

Were the range a multiple of the root mean square of ``k'``, the best map would be
``M = F^½ (F^½ S F^½)^-¼ Q`` for any orthogonal ``Q`` that makes the channels of ``k'`` alike, such
as a Hadamard matrix, with the keys' covariance ``S``. Gradient descent on the true range goes on
from there. A Hadamard matrix alone is QuaRot's, arXiv 2404.00456.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aimet_ext.core.hadamard import hadamard

_RIDGE = 1e-6  # of the mean eigenvalue
_RATE = 0.02
_TOKENS = 2048  # with the largest keys, which decide a range
_SHARPNESS = (16.0, 48.0)  # of the soft maximum, in both halves of the descent


@dataclass(frozen=True, eq=False)
class KeyMap:
    """The map of one attention's keys, ``k' = k matrix + shift``.

    :param matrix: ``[key heads, width, width]``, float64, each invertible.
    :param shift: ``[key heads, width]``, float64.
    """

    matrix: Tensor
    shift: Tensor

    @classmethod
    def alike(cls, matrix: Tensor, heads: int) -> KeyMap:
        """Return the map by one matrix ``[width, width]`` for all heads, without a shift."""
        matrix = matrix.double().expand(heads, -1, -1)
        return cls(matrix, matrix.new_zeros(matrix.shape[:2]))

    @property
    def of_queries(self) -> Tensor:
        """Matrices that queries are multiplied by, ``[key heads, width, width]``."""
        return torch.linalg.inv(self.matrix).mT

    def noise(self, keys: Tensor, fisher: Tensor, bits: int = 8) -> float:
        """Return what a grid of ``k'`` adds to the divergence of the outputs, for each key.

        :param keys: ``[key heads, tokens, width]``.
        :param fisher: ``[key heads, width, width]``.
        """
        mapped = keys.double() @ self.matrix + self.shift[:, None]
        step = (mapped.max() - mapped.min()) / (2**bits - 1)
        return float(step.square() / 24 * _spread(self.matrix, fisher.double()))


def _spread(matrix: Tensor, fisher: Tensor) -> Tensor:
    """Return ``Σ tr(M⁻¹ F M⁻ᵀ)``."""
    inverse = torch.linalg.inv(matrix)
    return torch.einsum("hij,hjk,hik->", inverse, fisher, inverse)


def balanced_map(keys: Tensor, fisher: Tensor) -> KeyMap:
    """Return the best map for keys whose range is a multiple of their root mean square.

    :param keys: ``[key heads, tokens, width]``.
    :param fisher: ``[key heads, width, width]``.
    """
    keys, fisher = keys.double(), fisher.double()
    mean = keys.mean(1, keepdim=True)
    centred = keys - mean
    covariance = centred.mT @ centred / keys.shape[1]
    half = _power(fisher, 0.5)
    matrix = half @ _power(half @ covariance @ half, -0.25)
    mixing = hadamard(keys.shape[-1])
    if mixing is not None:
        matrix = matrix @ mixing.to(matrix)
    matrix = matrix / (centred @ matrix).abs().amax((1, 2), keepdim=True)  # all fill one range
    return KeyMap(matrix, -(mean @ matrix)[:, 0])


def fit_key_map(keys: Tensor, fisher: Tensor, *, steps: int) -> KeyMap:
    """Return the map with the lowest noise that descent finds from :func:`balanced_map`.

    The keys that it is fitted to range from −1 to 1 behind it.

    :param keys: Keys of one attention behind the rotary embedding, ``[key heads, tokens, width]``.
    :param fisher: Their Fisher information ``[key heads, width, width]``.
    :param steps: Steps of Adam; none keeps the start.
    """
    start = balanced_map(keys, fisher)
    before = keys.double() @ start.matrix + start.shift[:, None]  # at most 1 in size
    largest = before.abs().amax((0, 2)).topk(min(_TOKENS, before.shape[1])).indices
    before = before[:, largest.sort().values]
    inverse = torch.linalg.inv(start.matrix)
    seen = inverse @ fisher.double() @ inverse.mT
    seen = seen / seen.diagonal(dim1=1, dim2=2).sum()
    matrix = torch.eye(keys.shape[-1]).to(before).expand_as(seen).clone().requires_grad_()
    shift = torch.zeros_like(start.shift).requires_grad_()
    descent = torch.optim.Adam([matrix, shift], lr=_RATE)
    best, lowest = (matrix.detach().clone(), shift.detach().clone()), math.inf
    for step in range(steps + 1):
        with torch.enable_grad():
            mapped = before @ matrix + shift[:, None]
            spread = _spread(matrix, seen)
            low, high = mapped.detach().min(), mapped.detach().max()
            score = float(2 * (high - low).log() + spread.detach().log())
            if score < lowest:
                best, lowest = (matrix.detach().clone(), shift.detach().clone()), score
            if step == steps:
                break
            sharpness = _SHARPNESS[step >= steps // 2]
            beyond = (mapped - (low + high) / 2).abs() / ((high - low) / 2)
            range_ = torch.logsumexp(sharpness * beyond, (0, 1, 2)) / sharpness * (high - low)
            loss = 2 * range_.log() + spread.log()
        descent.zero_grad()
        loss.backward()
        for group in descent.param_groups:
            group["lr"] = _RATE * (1 - step / steps)
        descent.step()
    made = KeyMap(start.matrix @ best[0], (start.shift[:, None] @ best[0])[:, 0] + best[1])
    return _filling(min(start, made, key=lambda own: own.noise(keys, fisher)), keys)


def _filling(own: KeyMap, keys: Tensor) -> KeyMap:
    """Return a map scaled, and shifted alike for all channels, so that keys range from −1 to 1."""
    mapped = keys.double() @ own.matrix + own.shift[:, None]
    low, high = mapped.min(), mapped.max()
    half = ((high - low) / 2).clamp_min(torch.finfo(low.dtype).tiny)
    return KeyMap(own.matrix / half, (own.shift - (low + high) / 2) / half)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Return a power of symmetric matrices ``[…, n, n]`` without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = values.mean(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny) * _RIDGE
    return vectors * values.maximum(floor).pow(exponent)[..., None, :] @ vectors.mT
