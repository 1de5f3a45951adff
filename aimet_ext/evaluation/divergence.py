"""The divergence of a model, a simulation or a session of onnxruntime from the float model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.analysis.divergence import Reference
from aimet_ext.core.divergence import Divergence
from aimet_ext.data.batches import ForwardFn, call_model, iterate_batches
from aimet_ext.evaluation.perplexity import model_of
from aimet_ext.progress import bar as progress_bar
from aimet_ext.sim.points import Run, first_output
from aimet_ext.sim.protocol import adapt
from aimet_ext.walk.hooks import evaluating


def float_logits(
    model_or_sim: Any,
    dataloader: Iterable[Any],
    *,
    top_k: int | None = 256,
    forward_fn: ForwardFn | None = None,
    progress: bool = True,
) -> Reference:
    """Keep the outputs of the float model, to compare a quantized one with.

    :param model_or_sim: Float model: a causal LM of transformers, a module that returns logits, or
        a session of onnxruntime; or a simulation whose weights are not rounded yet, which computes
        with its quantizers off.
    :param dataloader: Batches as for the techniques. Tokens with attention mask 0 count nowhere.
    :param top_k: Classes that are kept of each token, the likeliest ones, 8 bytes each; all others
        count as one class. None keeps all.
    :param forward_fn: Function called as ``forward_fn(model, batch)`` in place of ``model(batch)``.
    :param progress: Show a progress bar.
    :returns: The ``reference`` of :func:`aimet_ext.apply_dwq` and
        :func:`aimet_ext.evaluate_divergence`, for these batches.
    :raises TypeError: Something without a model in it.
    :raises ValueError: No batch, outputs that are no logits, or a simulation of rounded weights.

    >>> reference = aimet_ext.float_logits(model, batches)
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, or None for all classes, got {top_k}")
    if isinstance(model_or_sim, nn.Module) or hasattr(model_or_sim, "get_inputs"):
        model = model_of(model_or_sim)
        batches = _batches(model, dataloader, forward_fn)
        with (
            _runner(model, forward_fn) as run,
            _shown(run, "float outputs", batches, progress) as shown,
        ):
            return Reference(shown, batches, None if forward_fn else model, top_k=top_k)
    adaptor = adapt(model_or_sim)
    rounded = [run for run in adaptor.ledger.runs if run.rounds] if adaptor.ledger else []
    if rounded:
        raise ValueError(
            f"a float model is required, but {rounded[0].technique} rounded weights of this "
            "simulation; call float_logits before that, or with the original model"
        )
    batches = adaptor.batches(dataloader, opaque=forward_fn is not None)
    _check(batches)
    torch_model = adaptor.framework == "torch" and forward_fn is None
    with adaptor.preserved_state():
        adaptor.model.eval()
        with adaptor.disabled_quantizers(), adaptor.running((), forward_fn) as run:
            named = adaptor.model if torch_model else None
            with _shown(run, "float outputs", batches, progress) as shown:
                return Reference(shown, batches, named, top_k=top_k)


def evaluate_divergence(
    model_or_sim: Any,
    dataloader: Iterable[Any],
    reference: Any,
    *,
    forward_fn: ForwardFn | None = None,
    progress: bool = True,
) -> Divergence:
    """Measure how far the outputs of a quantized model are from the float model's.

    Perplexity is a mean over one text: errors that help one token and harm another cancel. The
    divergence of each token's probabilities cannot; its largest values and the share of changed
    predictions show what a mean hides.

    :param model_or_sim: As for :func:`aimet_ext.evaluate_perplexity`; a simulation computes with
        its quantizers on.
    :param dataloader: Batches as for the techniques, those of the reference.
    :param reference: Result of :func:`aimet_ext.float_logits`, or the float model.
    :param forward_fn: Function called as ``forward_fn(model, batch)`` in place of ``model(batch)``.
    :param progress: Show a progress bar.
    :returns: ``kl``, the mean KL(float || quantized) over tokens in nats; ``kl_high``, its 99.9th
        percentile; ``flips``, the share of tokens whose likeliest next one is another; ``rows``,
        the tokens compared.
    :raises TypeError: Something without a model in it.
    :raises ValueError: A reference of other batches, no token that counts, no logits.

    >>> print(aimet_ext.evaluate_divergence(sim, batches, model))
    """
    model = model_of(model_or_sim)
    batches = _batches(model, dataloader, forward_fn)
    reference = reference_for(reference, batches, forward_fn=forward_fn, progress=progress)
    with (
        _runner(model, forward_fn) as run,
        _shown(run, "divergence", batches, progress) as shown,
    ):
        return reference.measure(shown)


def reference_for(
    given: Any,
    batches: Sequence[Any],
    *,
    top_k: int | None = 256,
    forward_fn: ForwardFn | None = None,
    progress: bool = True,
) -> Reference:
    """Return outputs of the float model on batches: those given, if they are, or of a model.

    :param given: Result of :func:`float_logits`, or what that takes.
    :raises ValueError: It was made of other batches.
    """
    if not isinstance(given, Reference):
        return float_logits(given, batches, top_k=top_k, forward_fn=forward_fn, progress=progress)
    if not given.fits(batches):
        raise ValueError(
            f"reference must be of the batches given, in their order, got that of "
            f"{len(given.batches)} batches with {given.count} tokens for {len(batches)} batches; "
            "call float_logits with the same data"
        )
    found = copy.copy(given)
    found.batches = batches
    return found


def _batches(
    model: nn.Module, dataloader: Iterable[Any], forward_fn: ForwardFn | None
) -> list[Any]:
    named = getattr(model, "feeds", None)
    given = dataloader if named is None else named(dataloader)
    found = list(iterate_batches(given, opaque=forward_fn is not None))
    _check(found)
    return found


def _check(batches: list[Any]) -> None:
    if not batches:
        raise ValueError("dataloader must give at least one batch, it gave none")


@contextmanager
def _runner(model: nn.Module, forward_fn: ForwardFn | None) -> Iterator[Run]:
    """Open a context with a function from a batch to a model's outputs."""
    with evaluating(model), torch.no_grad():
        yield lambda batch: first_output(call_model(model, batch, forward_fn))


@contextmanager
def _shown(run: Run, title: str, batches: Sequence[Any], progress: bool) -> Iterator[Run]:
    """Open a context with the same function, each call of which moves a bar."""
    with progress_bar(desc=title, total=len(batches), leave=False, shown=progress) as bar:

        def counted(batch: Any) -> Tensor:
            found = run(batch)
            bar.update(1)
            return found

        yield counted
