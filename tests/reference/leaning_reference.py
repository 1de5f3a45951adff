"""Moments that lean on those of all experts, by least squares in entries."""

from __future__ import annotations

import torch
from torch import Tensor


def leaned_by_lstsq(
    second: Tensor, pool: Tensor, noise: float, shared: float
) -> tuple[float, float]:
    """Share of the pool, and share of noise in the mean, of two moments ``[in, in]``.

    :param noise: Share of noise in the products of ``second``.
    :param shared: Share of the pool's tokens that are those of ``second``.
    """
    width = len(second)
    pairs = [(i, j) for i in range(width) for j in range(width) if i != j]
    ours, theirs = (torch.stack([m[i, j] for i, j in pairs]) for m in (second, pool))
    variance = noise * float(ours @ ours)
    # What the true moment gives with each of the two, in expectation.
    met = torch.stack([ours @ ours - variance, ours @ theirs - shared * variance])
    clean = float(met[1])
    gram = met.new_tensor([[float(ours @ ours), clean], [clean, float(theirs @ theirs)]])
    a, b = torch.linalg.solve(gram, met).clamp_min(0).tolist()
    share = b / (a + b)
    mean = met.new_tensor([1 - share, share])
    return share, 1 - float(mean @ met) / float(mean @ gram @ mean)
