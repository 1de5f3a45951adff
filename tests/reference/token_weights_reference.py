"""Slow and plain: what each token's output of a layer adds to a likelihood, layer by layer.

Every layer has a run of the model of its own, with a leaf added to its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def token_weights_by_loop(
    model: nn.Module, layers: Sequence[str], batches: Sequence[Any], masks: Sequence[Any], seed: int
) -> dict[str, Tensor]:
    """How much each token that counts does for each linear layer, 1 on average, ``[tokens]``.

    :param model: Float module that returns logits ``[batch, seq, classes]``.
    :param masks: For each batch, bool ``[batch, seq]``, None for all tokens.
    """
    found = {}
    for name in layers:
        generator = torch.Generator().manual_seed(seed)
        numbers = []
        for batch, mask in zip(batches, masks, strict=True):
            leaves: list[Tensor] = []

            def add(_: Any, args: Any, output: Tensor, leaves: list[Tensor] = leaves) -> Tensor:
                leaves.append(torch.zeros_like(output).requires_grad_())
                return output + leaves[0]

            hook = model.get_submodule(name).register_forward_hook(add)
            with torch.enable_grad():
                logits = model(**batch) if isinstance(batch, dict) else model(batch)
            hook.remove()
            likelihood = torch.zeros(())
            rows = logits[mask] if mask is not None else logits.flatten(0, 1)
            signs = 2 * torch.randint(0, 2, rows.shape, generator=generator, dtype=torch.int8) - 1
            for row, sign in zip(rows, signs, strict=True):
                chances = row.softmax(-1)
                likelihood = likelihood + (sign * chances.detach().sqrt() * chances.log()).sum()
            (gradient,) = torch.autograd.grad(likelihood, leaves[0])
            for sample in range(gradient.shape[0]):
                for token in range(gradient.shape[1]):
                    if mask is None or mask[sample, token]:
                        outputs = gradient[sample, token]
                        numbers.append(sum(float(each) ** 2 for each in outputs) / len(outputs))
        mean = sum(numbers) / len(numbers)
        found[name] = torch.tensor([number / mean for number in numbers])
    return found
