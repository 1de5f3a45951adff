"""Encoder-decoders of Hugging Face as modules that a quantization simulation can trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PreparedEncoderDecoder(nn.Module):
    """A model that reads one sequence and writes another, traceable: T5, BART, Marian.

    The Hugging Face model is the submodule ``model``, the very object and not a copy, in its own
    dtype. Masks are computed here, because the library's own code for them cannot be traced, and
    nothing is cached between calls.

    :param model: model of transformers with ``config.is_encoder_decoder`` and an output layer.
    :param mask_value: added to the scores of masked tokens; None is half of the dtype's lowest.
    """

    def __init__(self, model: PreTrainedModel, mask_value: float | None = None) -> None:
        super().__init__()
        self.model = model
        self.mask_value = mask_value

    @property
    def config(self) -> Any:
        """Configuration of the Hugging Face model."""
        return self.model.config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the logits ``[batch, target, vocab]`` of every token of the decoder.

        :param input_ids: ``[batch, source]``, what the encoder reads.
        :param attention_mask: ``[batch, source]``, 0 for padding; None if all tokens are real.
        :param decoder_input_ids: ``[batch, target]``, what the decoder has written so far. Of
            labels, ``model.prepare_decoder_input_ids_from_labels(labels)`` makes them.
        :param decoder_attention_mask: ``[batch, target]``, 0 for padding.
        :raises ValueError: no ``decoder_input_ids``, or shapes that do not fit.
        """
        if attention_mask is not None and not torch.jit.is_tracing():
            _check_mask("attention_mask", attention_mask, "input_ids", input_ids)
        return self._logits(
            {"input_ids": input_ids}, attention_mask, decoder_input_ids, decoder_attention_mask
        )

    def _logits(
        self,
        source: dict[str, Tensor],
        source_mask: Tensor | None,
        target_ids: Tensor | None,
        target_mask: Tensor | None,
    ) -> Tensor:
        if target_ids is None or target_ids.dim() != 2:
            came = "none" if target_ids is None else f"shape {tuple(target_ids.shape)}"
            raise ValueError(
                f"decoder_input_ids [batch, target] are required, got {came}; of labels, "
                "model.prepare_decoder_input_ids_from_labels(labels) makes them"
            )
        if target_mask is not None and not torch.jit.is_tracing():
            _check_mask("decoder_attention_mask", target_mask, "decoder_input_ids", target_ids)
        order = torch.arange(target_ids.shape[-1], device=target_ids.device)
        allowed = (order[:, None] >= order[None, :])[None, None]  # [1, 1, query, key]
        if target_mask is not None:
            allowed = allowed & target_mask.bool()[:, None, None, :]
        # One mask of the source serves the encoder and what the decoder sees of it.
        seen = None if source_mask is None else self._term(source_mask.bool()[:, None, None, :])
        return self.model(
            **source,
            attention_mask=seen,
            decoder_input_ids=target_ids,
            decoder_attention_mask=self._term(allowed),
            use_cache=False,
            return_dict=False,
        )[0]

    def _term(self, allowed: Tensor) -> Tensor:
        """Return what is added to the scores, 0 where a key is allowed."""
        # Half of the lowest number: a score added to it must stay finite in float16 too.
        lowest = self.mask_value or torch.finfo(self.model.dtype).min / 2
        zero = torch.zeros((), dtype=self.model.dtype, device=allowed.device)
        return zero.masked_fill(~allowed, lowest)


class PreparedSpeechModel(PreparedEncoderDecoder):
    """A model that reads the features of sounds and writes text, traceable: Whisper."""

    def forward(  # type: ignore[override]  # of other inputs
        self,
        input_features: Tensor,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the logits ``[batch, target, vocab]`` of every token of the decoder.

        :param input_features: ``[batch, bins, frames]``, without padding that is to be masked.
        :param decoder_input_ids: ``[batch, target]``, what the decoder has written so far.
        :param decoder_attention_mask: ``[batch, target]``, 0 for padding.
        :raises ValueError: no ``decoder_input_ids``, or shapes that do not fit.
        """
        return self._logits(
            {"input_features": input_features}, None, decoder_input_ids, decoder_attention_mask
        )


PREPARED = {"input_ids": PreparedEncoderDecoder, "input_features": PreparedSpeechModel}
"""Way to prepare an encoder-decoder, by the name of its main input."""


def _check_mask(name: str, mask: Tensor, ids_name: str, ids: Tensor) -> None:
    if mask.shape != ids.shape:
        raise ValueError(
            f"{name} must be of the shape {tuple(ids.shape)} of {ids_name} (0 for padding), got "
            f"{tuple(mask.shape)}"
        )
