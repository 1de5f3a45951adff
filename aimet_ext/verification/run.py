"""Outputs of the sim, the float model and the device, and measures of their difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import nn

from aimet_ext.core.objective import outputs_sqnr
from aimet_ext.data.batches import token_ids, token_mask
from aimet_ext.data.feeds import Feed, run_feeds
from aimet_ext.evaluation.perplexity import perplexity_of, prepared_module, summed_losses
from aimet_ext.onnx.session import open_session
from aimet_ext.sim.protocol import adapt

__all__ = [
    "CpuSession",
    "Session",
    "array_sqnr",
    "float_outputs",
    "perplexity",
    "top1_agreement",
]

Array: TypeAlias = np.ndarray[Any, Any]


class Session(Protocol):
    """A compiled model, on the device or on the CPU."""

    outputs: tuple[str, ...]
    """Names of the outputs of :meth:`run`."""

    def run(self, feed: Mapping[str, Array]) -> list[Array]:
        """Return the outputs of one call."""

    def close(self) -> None:
        """Release the model."""


class CpuSession:
    """A QDQ model in onnxruntime on the CPU, its operators as they are.

    :param model: ONNX file.
    :param extra_outputs: tensors that come out too, after the graph's own outputs.
    """

    def __init__(self, model: Path, extra_outputs: Sequence[str] = ()) -> None:
        source: Any = model
        if extra_outputs:
            from aimet_ext.onnx.rewrite.qdq import with_outputs

            source = with_outputs(model, extra_outputs)
        self._session = open_session(source, optimize="none", folder=model.resolve().parent)
        self.outputs = tuple(value.name for value in self._session.get_outputs())

    def run(self, feed: Mapping[str, Array]) -> list[Array]:
        """Return the outputs of one call."""
        return list(self._session.run(None, dict(feed)))

    def close(self) -> None:
        """Release the session."""
        self._session = None


def float_outputs(sim: Any, reference: Any, feeds: Sequence[Feed]) -> list[Array]:
    """Return the first output of the float model, for each feed.

    :param reference: Module that takes the same inputs; None: the sim with its quantizers off.
    """
    if reference is None:
        with adapt(sim).disabled_quantizers():
            return run_feeds(adapt(sim).runner, feeds)
    model = prepared_module(reference)
    if not isinstance(model, nn.Module):
        raise TypeError(
            "reference must be a torch module that takes the inputs of the exported model, got "
            f"{type(reference).__name__}"
        )
    return run_feeds(model, feeds)


def array_sqnr(value: Any, target: Any) -> float:
    """Return the signal to noise ratio in dB of an array or a list of arrays against a target."""
    values, targets = ([a] if isinstance(a, np.ndarray) else list(a) for a in (value, target))
    return outputs_sqnr(map(torch.from_numpy, values), map(torch.from_numpy, targets))


def top1_agreement(
    outputs: Sequence[Array], targets: Sequence[Array], feeds: Sequence[Feed]
) -> float | None:
    """Return the share of tokens whose largest logit is at the same place, masked tokens left out.

    None where the outputs are no logits ``[batch, seq, vocab]`` or ``[batch, classes]``.
    """
    same = count = 0
    for output, target, feed in zip(outputs, targets, feeds, strict=True):
        if output.ndim not in (2, 3):
            return None
        equal = torch.from_numpy(output.argmax(-1) == target.argmax(-1))
        real = token_mask(feed)
        if output.ndim == 3 and real is not None:
            equal = equal[real]
        same, count = same + int(equal.sum()), count + equal.numel()
    return same / count if count else None


def perplexity(outputs: Sequence[Array], feeds: Sequence[Feed]) -> float | None:
    """Return ``exp`` of the mean negative log-likelihood of all tokens but each window's first.

    None where the inputs are no token ids or the outputs no logits ``[batch, seq, vocab]``.
    """
    total, count = 0.0, 0
    for output, feed in zip(outputs, feeds, strict=True):
        ids = token_ids(feed)
        if ids is None or output.ndim != 3 or ids.shape != output.shape[:2]:
            return None
        logits = torch.from_numpy(output).double()  # [batch, seq, vocab]
        losses, tokens = summed_losses(logits, ids, token_mask(feed))
        total, count = total + losses, count + tokens
    return perplexity_of(total, count) if count else None
