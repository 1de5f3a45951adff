"""The divergence of a model's outputs from the float model's, over batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from aimet_ext.core.divergence import Divergence, TopProbabilities
from aimet_ext.data.batches import as_tensors, output_mask, tensors_in, token_ids
from aimet_ext.files.tensors import hash_tensors
from aimet_ext.sim.points import Run


class Reference:
    """Outputs of the float model on some batches, and which of their rows count.

    :param run: Function from a batch to the float model's outputs, shape [..., classes].
    :param model: Torch module that takes positional arguments, to tell which one is a mask.
    :param top_k: Classes to keep of each row, the likeliest ones; None for all.
    :raises ValueError: Outputs are no logits of at least two classes.
    """

    def __init__(
        self, run: Run, batches: Sequence[Any], model: Any = None, *, top_k: int | None = None
    ) -> None:
        self.batches = batches
        self._data = _digest(batches)
        self._outputs: list[TopProbabilities] = []
        self._masks: list[Tensor | None] = []
        with torch.no_grad():
            for batch in batches:
                logits = run(batch)
                self._masks.append(row_mask(batch, logits, model))
                rows = self.rows(len(self._outputs), logits)
                self._outputs.append(TopProbabilities.of(rows, top_k))

    def rows(self, number: int, logits: Tensor) -> Tensor:
        """Return the rows of a batch's outputs that count, in float32, shape [rows, classes]."""
        return counted_rows(logits, self._masks[number])

    def log_probabilities(self, number: int) -> Tensor:
        """Return those kept of the float model, shape [rows, classes]."""
        return self._outputs[number].logs

    def tokens(self, number: int) -> int:
        """Return the number of rows of a batch that count."""
        return len(self._outputs[number])

    def fits(self, batches: Sequence[Any]) -> bool:
        """Return true if these are the batches, as far as their tensors tell."""
        return len(batches) == len(self.batches) and _digest(batches) == self._data

    @property
    def count(self) -> int:
        """Rows of all batches that count."""
        return sum(map(len, self._outputs))

    def loss(self, number: int, logits: Tensor) -> Tensor:
        """Return the sum over a batch's rows of KL(float || other) in nats, differentiable."""
        return self._outputs[number].divergence(self.rows(number, logits)).sum()

    def divergence(self, run: Run) -> float:
        """Return the mean KL divergence of a model from the float one, in nats."""
        return self.measure(run).kl if self.count else 0.0

    @torch.no_grad()
    def measure(self, run: Run, numbers: Iterable[int] | None = None) -> Divergence:
        """Compare a model's outputs with the float model's.

        :param numbers: Numbers of the batches to look at; None for all. Some row must count.
        """
        losses, flipped = [], []
        for number in range(len(self.batches)) if numbers is None else numbers:
            rows, own = self.rows(number, run(self.batches[number])), self._outputs[number]
            losses.append(own.divergence(rows).cpu())
            flipped.append((rows.argmax(-1) != own.likeliest).cpu())
        return Divergence.of(torch.cat(losses), torch.cat(flipped))


def row_mask(batch: Any, logits: Tensor, model: Any = None) -> Tensor | None:
    """Return which rows of a batch's outputs count, by its attention mask; None for all.

    :param model: Torch module that takes positional arguments, to tell which one is the mask.
    :raises ValueError: Outputs are no logits of at least two classes.
    """
    if logits.dim() < 2 or logits.shape[-1] < 2:
        raise ValueError(
            "outputs [..., classes] of two classes at least are required, which are "
            f"compared as probabilities, got a tensor of shape {list(logits.shape)}"
        )
    mask = output_mask(batch, model)
    fits = mask is not None and mask.shape == logits.shape[:-1]
    return mask.to(logits.device) if fits and mask is not None else None


def counted_rows(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows of outputs that count, in float32, shape [rows, classes]."""
    kept = logits.flatten(0, -2) if mask is None else logits[mask]
    return kept.float()


def _digest(batches: Sequence[Any]) -> str:
    """Hash the ids of batches, or all of their tensors where there are no ids."""

    def tensors() -> Iterator[Tensor]:
        for batch in map(as_tensors, batches):
            ids = token_ids(batch)
            yield from tensors_in(batch) if ids is None else [ids]

    named = enumerate(t if t.is_floating_point() else t.long() for t in tensors())
    return hash_tensors((str(number), tensor) for number, tensor in named)
