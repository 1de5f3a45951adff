"""A random part of a layer's inputs, for objectives that second moments cannot express."""

from __future__ import annotations

import torch
from torch import Tensor

from aimet_ext.walk.protocol import Activation

__all__ = ["SampleSum"]


class SampleSum:
    """Rows drawn without preference from all that come, however they are cut into batches.

    Every row gets a random key, the rows with the largest keys stay.

    :param count: Rows to keep, at most.
    :param activation: The ReLU that follows the layer.
    :param seed: Seed of the keys.
    """

    def __init__(self, count: int, activation: Activation, seed: int = 0) -> None:
        self.count = count
        self.activation = activation
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0, dtype=torch.float64)
        self._rows: Tensor | None = None
        self._originals: Tensor | None = None

    def add(self, rows: Tensor, originals: Tensor) -> None:
        """Take in rows of both streams.

        :param rows: Rows of the quantized stream, ``[groups, n, in]``.
        :param originals: Rows of the float stream; the same object where there is only one stream.
        """
        one = originals is rows
        keys = torch.rand(rows.shape[1], dtype=torch.float64, generator=self._generator)
        keys = torch.cat([self._keys, keys])
        chosen = keys.topk(min(self.count, len(keys))).indices.sort().values
        self._rows = _pick(self._rows, rows, chosen)
        self._originals = self._rows if one else _pick(self._originals, originals, chosen)
        self._keys = keys[chosen]

    @property
    def inputs(self) -> Tensor:
        """Rows of the quantized stream, ``[groups, n, in]``."""
        assert self._rows is not None
        return self._rows

    @property
    def originals(self) -> Tensor:
        """The same rows in the float stream."""
        assert self._originals is not None
        return self._originals


def _pick(kept: Tensor | None, new: Tensor, chosen: Tensor) -> Tensor:
    """Return ``cat([kept, new], 1)[:, chosen]`` without the whole of it."""
    chosen = chosen.to(new.device)
    if kept is None:
        return new[:, chosen].clone()
    old = chosen < kept.shape[1]
    return torch.cat([kept[:, chosen[old]], new[:, chosen[~old] - kept.shape[1]]], 1)
