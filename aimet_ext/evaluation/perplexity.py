"""Perplexity of a model or a simulation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.data.batches import call_model, iterate_batches, token_mask
from aimet_ext.data.text import calibration_batches
from aimet_ext.evaluation.sessions import SessionModel
from aimet_ext.sim.protocol import adapt

__all__ = ["calibration_batches", "evaluate_perplexity", "perplexity_of", "summed_losses"]


@torch.no_grad()
def evaluate_perplexity(model_or_sim: Any, batches: Iterable[Any]) -> float:
    """``exp`` of the mean negative log-likelihood of all tokens but the first of each window.

    A token counts if it and the one before it are real, by the batch's attention mask.

    :param model_or_sim: causal LM of transformers, a module that returns logits
        ``[batch, seq, vocab]``, or a simulation of either; a simulation of aimet_onnx, or a session
        of onnxruntime, whose graph has the output ``logits``.
    :param batches: as :func:`calibration_batches` makes them; tensors of ids ``[batch, seq]``,
        tuples that start with one, or mappings with ``input_ids``. Labels are ignored. An ONNX
        graph's other inputs come from mappings; a mask and positions are made where none is given.
    :raises TypeError: something without a model in it.
    :raises ValueError: no batch, no token that counts, or an input of an ONNX graph is missing.
    """
    model = _model_of(model_or_sim)
    training = {module: module.training for module in model.modules()}
    total, count = 0.0, 0
    try:
        model.eval()
        for batch in _batches(model, batches):
            batch_total, batch_count = _negative_log_likelihood(model, batch)
            total, count = total + batch_total, count + batch_count
    finally:
        for module, was in training.items():
            module.training = was
    if count == 0:
        raise ValueError(
            "a real token after another real one is required in some batch, got none; "
            "give windows of at least two tokens that the attention mask does not hide"
        )
    return perplexity_of(total, count)


def summed_losses(logits: Tensor, ids: Tensor, real: Tensor) -> tuple[float, int]:
    """Return the negative log-likelihood summed over the tokens that count, and their number.

    :param logits: Logits, shape [batch, seq, vocab].
    :param ids: Token ids, shape [batch, seq].
    :param real: Tokens that are not padding, bool, shape [batch, seq].
    """
    counts = real[:, 1:] & real[:, :-1]  # [batch, seq - 1]
    chosen = logits[:, :-1][counts]  # [tokens, vocab]
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    losses = nn.functional.cross_entropy(chosen, ids[:, 1:][counts], reduction="sum")
    return losses.item(), int(counts.sum())


def perplexity_of(total: float, count: int) -> float:
    """Return the perplexity of a summed loss."""
    mean = total / count
    return math.exp(mean) if mean < math.log(float("1e308")) else math.inf


def _batches(model: nn.Module, batches: Iterable[Any]) -> Iterator[Any]:
    if isinstance(model, SessionModel):
        batches = map(model.named, batches)
    return iterate_batches(batches)


def _model_of(model_or_sim: Any) -> nn.Module:
    model = model_or_sim
    if not isinstance(model, nn.Module) and not hasattr(model, "get_inputs"):  # no session either
        try:
            model = adapt(model_or_sim).runner
        except TypeError as error:
            raise TypeError(
                f"a model or a QuantizationSimModel is required, got {type(model_or_sim).__name__}"
            ) from error
    if not isinstance(model, nn.Module):
        return SessionModel(model)
    if hasattr(model, "get_output_embeddings"):  # transformers' own: for its padding on the left
        from aimet_ext.models.huggingface import prepare_model

        return prepare_model(model)
    return model


def _negative_log_likelihood(model: nn.Module, batch: Any) -> tuple[float, int]:
    """Return the summed loss of a batch and the number of tokens that count."""
    output = call_model(model, batch)
    logits = getattr(output, "logits", output).as_subclass(Tensor)  # [batch, seq, vocab]
    ids = _ids(batch).to(logits.device)
    real = token_mask(batch, model)
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.to(ids.device)
    return summed_losses(logits, ids, real)


def _ids(batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        return batch["input_ids"]
    return batch if isinstance(batch, Tensor) else batch[0]
