"""Perplexity of a model, a simulation or a session of onnxruntime."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aimet_ext.data.batches import (
    call_model,
    iterate_batches,
    token_ids,
    token_mask,
)
from aimet_ext.data.feeds import InputSpec, check_inputs, filled_batches
from aimet_ext.progress import bar as progress_bar
from aimet_ext.sim.protocol import adapt
from aimet_ext.walk.hooks import evaluating

_TYPES = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}
_IDS = "input_ids"


@torch.no_grad()
def evaluate_perplexity(
    model_or_sim: Any, batches: Iterable[Any], *, progress: bool = True
) -> float:
    """Return ``exp`` of the mean negative log-likelihood of all tokens but a window's first.

    A token counts if it and the one before it are real, by the batch's attention mask.

    :param model_or_sim: causal LM of transformers, a module that returns logits
        ``[batch, seq, vocab]``, or a simulation of either; a simulation of aimet_onnx, or a session
        of onnxruntime, whose graph has the output ``logits``.
    :param batches: as :func:`calibration_batches` makes them; tensors of ids ``[batch, seq]``,
        tuples that start with one, or mappings with ``input_ids``. Labels are ignored. An ONNX
        graph's other inputs come from mappings; a mask and positions are made where none is given.
    :param progress: show a progress bar.
    :raises TypeError: something without a model in it.
    :raises ValueError: no batch, no token that counts, or an input of an ONNX graph is missing.
    """
    model = model_of(model_or_sim)
    with evaluating(model):
        found = perplexity_of(_scored(model, batches, progress))
    if found is None:
        raise ValueError(
            "a real token after another real one is required in some batch, got none; "
            "give windows of at least two tokens that the attention mask does not hide"
        )
    return found


def _scored(
    model: nn.Module, batches: Iterable[Any], progress: bool
) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """Yield the logits of each batch, its ids and its mask."""
    named = model.feeds(batches) if isinstance(model, _SessionModel) else batches
    total = len(batches) if isinstance(batches, list | tuple) else None
    checked = iterate_batches(named)
    for batch in progress_bar(checked, "perplexity", total=total, leave=False, shown=progress):
        output = call_model(model, batch)
        ids = token_ids(batch)
        if ids is None:
            raise ValueError(f"each batch must hold {_IDS!r} [batch, seq], got {type(batch)}")
        logits = getattr(output, "logits", output).as_subclass(Tensor)
        yield logits, ids, token_mask(batch, model)


def perplexity_of(batches: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> float | None:
    """Return the perplexity over the tokens that count, None if there is none.

    It is infinity where it is beyond all numbers.

    :param batches: Logits, shape [batch, seq, vocab]; token ids, shape [batch, seq]; and tokens
        that are not padding, bool, shape [batch, seq], None for all.
    """
    total, count = 0.0, 0
    for logits, ids, real in batches:
        ids = ids.to(logits.device).long()
        real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.to(ids.device)
        counts = real[:, 1:] & real[:, :-1]  # [batch, seq - 1]
        chosen = logits[:, :-1][counts]  # [tokens, vocab]
        chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        losses = nn.functional.cross_entropy(chosen, ids[:, 1:][counts], reduction="sum")
        total, count = total + losses.item(), count + int(counts.sum())
    if not count:
        return None
    return math.exp(total / count) if total / count < math.log(float("1e308")) else math.inf


def prepared_module(model: Any) -> Any:
    """Return a model of transformers prepared, so that it pads on either side; others as they are.

    :param model: any object.
    """
    if not hasattr(model, "get_output_embeddings"):
        return model
    from aimet_ext.models.huggingface import prepare_model

    return prepare_model(model)


def model_of(model_or_sim: Any) -> nn.Module:
    """Return a module that computes the logits of a model, a simulation or a session.

    :raises TypeError: Something without a model in it.
    """
    model = model_or_sim
    if not isinstance(model, nn.Module) and not hasattr(model, "get_inputs"):  # no session either
        try:
            model = adapt(model_or_sim).runner
        except TypeError as error:
            raise TypeError(
                f"a model or a QuantizationSimModel is required, got {type(model_or_sim).__name__}"
            ) from error
    if not isinstance(model, nn.Module):
        return _SessionModel(model)
    prepared: nn.Module = prepared_module(model)
    return prepared


class _SessionModel(nn.Module):
    """A language model behind a session, called with its inputs by name.

    :param session: session of onnxruntime, of a graph with the input ``input_ids`` (or else its
        first one) and the output ``logits`` (or else its first one).
    """

    def __init__(self, session: Any) -> None:
        super().__init__()
        self._session = session
        self._types = {each.name: each.type for each in session.get_inputs()}
        self._shapes = {each.name: tuple(each.shape) or None for each in session.get_inputs()}
        outputs = [each.name for each in session.get_outputs()]
        self._output = "logits" if "logits" in outputs else outputs[0]
        self._ids = _IDS if _IDS in self._types else next(iter(self._types), _IDS)

    def feeds(self, batches: Iterable[Any]) -> Iterator[dict[str, Tensor]]:
        """Yield batches as inputs by name, with ``input_ids`` and a mask to score by."""
        inputs = {n: InputSpec(shape) for n, shape in self._shapes.items()}  # types are converted
        for number, batch in filled_batches(batches, inputs):
            check_inputs(batch, inputs, number)
            yield {_IDS: batch[self._ids], **batch}

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return logits ``[batch, seq, vocab]``."""
        feeds = {}
        for name, kind in self._types.items():
            array = inputs[name].detach().cpu().numpy()
            feeds[name] = array.astype(_TYPES[kind], copy=False) if kind in _TYPES else array
        (logits,) = self._session.run([self._output], feeds)
        return torch.from_numpy(logits)
