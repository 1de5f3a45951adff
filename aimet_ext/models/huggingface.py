"""Language models of Hugging Face as modules that a quantization simulation can trace."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aimet_ext.models.encoder_decoder import PREPARED, PreparedEncoderDecoder
from aimet_ext.models.experts import SortedExperts
from aimet_ext.models.exportable import Exportable
from aimet_ext.models.masks import MaskCalls
from aimet_ext.models.rotary import RotaryTables

_ATTENTION = ("eager", "sdpa")


class PreparedCausalLM(nn.Module):
    """A causal LM that takes token ids and returns logits, with everything traceable inside.

    The Hugging Face model is the submodule ``model``, the very object and not a copy, in its own
    dtype. Masks and positions are computed here, because the library's own code for them cannot be
    traced, and nothing is cached between calls.

    :param model: causal LM of transformers, attention ``"eager"`` or ``"sdpa"``.
    :param mask_value: added to the scores of masked tokens; None is half of the dtype's lowest.
        With a number, exported graphs look the cosine and sine of a position up in tables.
    """

    def __init__(self, model: PreTrainedModel, mask_value: float | None = None) -> None:
        super().__init__()
        self.model = model
        self.mask_value = mask_value
        self._masks = MaskCalls(model)
        self._tables = RotaryTables(model, None if mask_value is None else context_length(model))

    @property
    def config(self) -> Any:
        """Configuration of the Hugging Face model."""
        return self.model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits ``[batch, seq, vocab]`` of every token.

        Padding may stand on either side. Real tokens neither see it nor count it in their
        positions, so their logits are those without padding; logits of padding mean nothing.

        :param input_ids: ``[batch, seq]``.
        :param attention_mask: ``[batch, seq]``, 0 for padding; None if all tokens are real.
        :raises ValueError: shapes that do not fit, or more tokens than the model's context.
        """
        if not torch.jit.is_tracing():
            self.check_input(input_ids, attention_mask)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # [batch, seq]
        # Half of the lowest number: a score added to it must stay finite in float16 too.
        lowest = self.mask_value or torch.finfo(self.model.dtype).min / 2
        exporting = torch.onnx.is_in_onnx_export() or torch.compiler.is_compiling()
        # A trace may not fix how many rows an expert gets.
        counts = torch.jit.is_tracing() and any(
            isinstance(m, SortedExperts) for m in self.modules()
        )
        with (
            Exportable(counts=counts) if exporting or counts else nullcontext(),
            self._tables.looked_up(self.model) if exporting else nullcontext(),
            self._masks.answered(lambda mask: mask.added(lowest)),
        ):
            return self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=positions,
                use_cache=False,
            ).logits

    def check_input(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Refuse what :meth:`forward` cannot take; nothing is computed.

        :raises ValueError: shapes that do not fit, ids that are not of the vocabulary, or more
            tokens than the model's context.
        """
        if input_ids.dim() != 2:
            raise ValueError(
                f"input_ids [batch, seq] is required, got shape {tuple(input_ids.shape)}; "
                "add a batch dimension with ids[None]"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"an attention_mask of the ids' shape {tuple(input_ids.shape)} is required "
                f"(0 for padding), got {tuple(attention_mask.shape)}"
            )
        limit = context_length(self)
        if limit is not None and input_ids.shape[1] > limit:
            raise ValueError(
                f"at most {limit} tokens, the model's context, can be taken at once, "
                f"got {input_ids.shape[1]}; cut the text into shorter windows"
            )
        check_token_ids(self.model, input_ids)


def prepare_model(model: nn.Module, *, mask_value: float | None = None) -> nn.Module:
    """Wrap a language model of transformers in a module that ``QuantizationSimModel`` can trace.

    A causal LM is called as ``module(input_ids, attention_mask=None)`` and returns logits
    ``[batch, seq, vocab]``, for any batch and any length up to the context. An encoder-decoder is
    called with ``input_ids, attention_mask, decoder_input_ids, decoder_attention_mask``, one that
    reads sounds with ``input_features, decoder_input_ids, decoder_attention_mask``, and returns the
    decoder's logits; masks may be left out. The model is wrapped
    as it is, in its own dtype and on its own device; what is prepared already comes back as it is.

    :param model: causal LM or encoder-decoder of transformers.
    :param mask_value: negative number that is added to the scores of masked tokens; None is half of
        the dtype's lowest number. Give about -100 for an ONNX graph whose activations are to be
        quantized to integers: their grid has to hold it, and with the lowest number it holds
        nothing else. The graph then holds tables of the cosine and sine of all positions up to
        131,072 as well, where the angles depend on the position alone: a grid of angles has steps
        of a whole radian at 8 bits and 256 tokens.
    :raises TypeError: ``model`` is neither.
    :raises ValueError: an attention that cannot be traced, or a ``mask_value`` of 0 or more.

    >>> prepared = prepare_model(AutoModelForCausalLM.from_pretrained(folder))
    >>> sim = QuantizationSimModel(prepared, sample_input_ids)
    """
    if mask_value is not None and not -math.inf < mask_value < 0:
        raise ValueError(f"mask_value must be a negative number, such as -100, got {mask_value}")
    if isinstance(model, PreparedCausalLM | PreparedEncoderDecoder):
        return model if mask_value is None else type(model)(model.model, mask_value)
    reads = getattr(model, "main_input_name", "")
    if not _is_language_model(model) or (_writes_another(model) and reads not in PREPARED):
        raise TypeError(
            "a causal language model of transformers (AutoModelForCausalLM.from_pretrained) is "
            f"required, or an encoder-decoder that reads {' or '.join(PREPARED)}, got "
            f"{type(model).__name__}; a module of your own that returns logits can be given to "
            "QuantizationSimModel directly"
        )
    kind = getattr(model.config, "_attn_implementation", "eager")
    if kind not in _ATTENTION:
        raise ValueError(
            f"attn_implementation must be one of {_ATTENTION} to be traced, got {kind!r}; "
            'call model.set_attn_implementation("sdpa") first'
        )
    if _writes_another(model):
        return PREPARED[reads](model, mask_value)
    return PreparedCausalLM(model, mask_value)


def check_token_ids(model: PreTrainedModel, *batches: Tensor) -> None:
    """Refuse token ids that the model's embedding does not have.

    :param model: causal LM of transformers.
    :raises ValueError: an id is not of the model's vocabulary.
    """
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if rows is None:
        return  # a table of another kind
    for ids in batches:
        if torch.compiler.is_compiling() or type(ids) is not Tensor:
            continue  # traced: the ids are none yet
        low, high = map(int, ids.aminmax()) if ids.numel() else (0, 0)
        if low < 0 or high >= rows:
            raise ValueError(
                f"token ids from 0 to {rows - 1}, the model's vocabulary, are required, got "
                f"{low if low < 0 else high}; use the tokenizer that the model was trained with"
            )


def causal_lm(module: nn.Module) -> PreTrainedModel | None:
    """Return the Hugging Face causal LM inside a module, prepared, wrapped by hand or bare."""
    found = language_model(module)
    return None if found is None or _writes_another(found) else found


def language_model(module: nn.Module) -> PreTrainedModel | None:
    """Return the Hugging Face causal LM or encoder-decoder inside a module; None without one."""
    return _find(module)[1]


def checkpoint_prefix(module: nn.Module) -> str:
    """Return the prefix of a checkpoint's names in ``module``: ``"model."`` once prepared."""
    name, found = _find(module)
    return f"{name}." if found is not None and name else ""


def original_name(name: str, module: nn.Module) -> str:
    """Name in the Hugging Face checkpoint of a submodule or parameter of ``module``.

    :param name: as ``module.named_modules()`` or ``module.named_parameters()`` give it.
    :param module: prepared model, a wrapper made by hand, or ``sim.model`` of either.
    """
    return name.removeprefix(checkpoint_prefix(module))


def context_length(module: nn.Module) -> int | None:
    """Return the most tokens that the language model takes at once, None if not configured."""
    model = module.model if isinstance(module, PreparedCausalLM) else causal_lm(module)
    if model is None:
        return None
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _find(module: nn.Module) -> tuple[str, PreTrainedModel | None]:
    for name, child in module.named_modules():
        if _is_language_model(child):
            return name, child
    return "", None


def _is_language_model(module: nn.Module) -> TypeGuard[PreTrainedModel]:
    return isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None


def _writes_another(model: nn.Module) -> bool:
    """Return True if a model reads one sequence and writes another."""
    return bool(getattr(model.config, "is_encoder_decoder", False))
