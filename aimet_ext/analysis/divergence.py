"""The divergence of a simulation's outputs from the float model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aimet_ext.data.batches import token_mask
from aimet_ext.sim.points import Run


class Reference:
    """Outputs of the float model on some batches, and which of their rows count.

    :param run: Function from a batch to the float model's outputs, shape [..., classes].
    :param model: Torch module that takes positional arguments, to tell which one is a mask.
    :raises ValueError: Outputs are no logits of at least two classes.
    """

    def __init__(self, run: Run, batches: Sequence[Any], model: Any = None) -> None:
        self.batches = batches
        self._outputs: list[Tensor] = []
        self._masks: list[Tensor | None] = []
        with torch.no_grad():
            for batch in batches:
                logits = run(batch)
                if logits.dim() < 2 or logits.shape[-1] < 2:
                    raise ValueError(
                        "outputs [..., classes] of two classes at least are required, which are "
                        f"compared as probabilities, got a tensor of shape {list(logits.shape)}"
                    )
                mask = token_mask(batch, model)
                fits = mask is not None and mask.shape == logits.shape[:-1]
                self._masks.append(mask.to(logits.device) if fits and mask is not None else None)
                self._outputs.append(self.rows(len(self._outputs), logits).log_softmax(-1))

    def rows(self, number: int, logits: Tensor) -> Tensor:
        """Return the rows of a batch's outputs that count, in float32, shape [rows, classes]."""
        mask = self._masks[number]
        kept = logits.flatten(0, -2) if mask is None else logits[mask]
        return kept.float()

    def log_probabilities(self, number: int) -> Tensor:
        """Return the float model's, shape [rows, classes]."""
        return self._outputs[number]

    @property
    def count(self) -> int:
        """Rows of all batches that count."""
        return sum(map(len, self._outputs))

    def loss(self, number: int, logits: Tensor) -> Tensor:
        """Return the sum over a batch's rows of KL(float || other) in nats, differentiable."""
        found = self.rows(number, logits).log_softmax(-1)
        own = self._outputs[number]
        return torch.nn.functional.kl_div(found, own, reduction="sum", log_target=True)

    @torch.no_grad()
    def divergence(self, run: Run) -> float:
        """Return the mean KL divergence of a model from the float one, in nats."""
        total = sum(float(self.loss(i, run(batch))) for i, batch in enumerate(self.batches))
        return total / max(self.count, 1)
