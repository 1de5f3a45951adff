"""A causal LM that is handed its cache: keys and values of earlier tokens in, new ones out.

A graph for an NPU has static shapes, so every call takes ``n`` tokens and looks back on a context
of ``c``: the caches that come in have ``c - n`` slots, of which the mask says how many are filled.
What comes out are the keys and values of the call's own ``n`` tokens alone, not the concatenation.
So the runtimes of NPUs do it: the cache stays where the application keeps it, a call writes ``n``
rows into it, and graphs of several ``n`` (prefill, decode) work on one and the same cache. Keys
are stored as attention reads them, that is after the rotary embedding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.models.exportable import Exportable
from aimet_ext.models.huggingface import (
    PreparedCausalLM,
    causal_lm,
    checkpoint_prefix,
)
from aimet_ext.models.huggingface import context_length as own_context
from aimet_ext.models.masks import Answer, MaskAsked, MaskCalls
from aimet_ext.models.rotary import RotaryTable, is_changing, rotary_modules, rotary_table
from aimet_ext.walk.hooks import replaced_forward

Sizes = tuple[tuple[int, int], ...]
Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class CacheShape:
    """The shape of a model's cache.

    :param context_length: tokens that a query sees at most, itself included.
    :param keys: heads and width of the keys of each layer.
    :param values: the same of the values.
    """

    context_length: int
    keys: Sizes
    values: Sizes

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> CacheShape:
        """Return the shape that :meth:`to_dict` described."""
        keys, values = (tuple((h, d) for h, d in plain[kind]) for kind in ("keys", "values"))
        return cls(plain["context_length"], keys, values)

    def to_dict(self) -> dict[str, Any]:
        """Return the shape as JSON values."""
        return asdict(self)

    def past_names(self, length: int) -> tuple[str, ...]:
        """Return the names of inputs with the cache for ``length`` tokens, if there is room."""
        return self._names("past") if length < self.context_length else ()

    def input_names(self, length: int) -> tuple[str, ...]:
        """Return all inputs of a call of ``length`` tokens, in order."""
        return ("input_ids", "attention_mask", "position_ids", *self.past_names(length))

    def output_names(self) -> tuple[str, ...]:
        """Return all outputs of a call, in order."""
        return ("logits", *self._names("present"))

    def past_shapes(self, length: int, batch: int) -> dict[str, tuple[int, int, int, int]]:
        """Return ``[batch, heads, context - length, width]`` of each incoming cache, by name."""
        sizes = [size for pair in zip(self.keys, self.values, strict=True) for size in pair]
        slots = self.context_length - length
        return {
            name: (batch, heads, slots, width)
            for name, (heads, width) in zip(self._names("past"), sizes, strict=True)
        }

    def _names(self, kind: str) -> tuple[str, ...]:
        layers = range(len(self.keys))
        return tuple(f"{kind}_{part}_{layer}" for layer in layers for part in ("key", "value"))


class CachedCausalLM(nn.Module):
    """A causal LM as a function of ids, mask, positions and caches, all of static shape.

    The Hugging Face model is the submodule ``model``, the very object and not a copy, as in
    :class:`~aimet_ext.models.huggingface.PreparedCausalLM`, so names stay those of a simulation.
    Cosine and sine of the positions are looked up in tables: as functions of a position they would
    be lost on a grid of 16 bits.

    :param module: causal LM of transformers, or what ``prepare_model`` made of one, quantized or
        not.
    :param context_length: tokens that a query sees at most, itself included.
    :raises TypeError: no causal LM of transformers.
    :raises ValueError: a context that is longer than the model's, or than the window of a layer;
        positions that are embedded in another way; layers that keep another kind of state.
    """

    def __init__(self, module: nn.Module, context_length: int) -> None:
        super().__init__()
        model = causal_lm(module)
        if model is None:
            raise TypeError(
                f"a causal language model of transformers is required, got {type(module).__name__}"
            )
        if checkpoint_prefix(module) not in ("", "model."):
            raise TypeError(
                "a model wrapped by prepare_model is required, got one that is the submodule "
                f"{checkpoint_prefix(module)!r} of a {type(module).__name__}"
            )
        self.model = model
        self.mask_value = module.mask_value if isinstance(module, PreparedCausalLM) else None
        limit = own_context(module)
        if context_length < 1 or (limit is not None and context_length > limit):
            raise ValueError(
                f"context_length must be in 1 ... {limit}, the model's own context, got "
                f"{context_length}"
            )
        self._masks = MaskCalls(model)
        self._rotary = _checked_rotary(model)
        self.shape = CacheShape(context_length, *self._probe(context_length))
        self._complex: list[bool] = []
        for number, module in enumerate(self._rotary):
            table = rotary_table(module, context_length, self.model.dtype)
            self.register_buffer(f"cos_{number}", table.cos, persistent=False)  # [context, width]
            self.register_buffer(f"sin_{number}", table.sin, persistent=False)  # [context, width]
            self._complex.append(table.is_complex)

    @property
    def config(self) -> Any:
        """Configuration of the Hugging Face model."""
        return self.model.config

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Return logits ``[batch, n, vocab]``, new keys and values ``[batch, heads, n, width]``.

        :param input_ids: ``[batch, n]``.
        :param attention_mask: ``[batch, 1, n, context]``, added to the scores: 0 for what a token
            sees, a large negative number for what it does not. The caches come first, then the
            call's own tokens.
        :param position_ids: ``[batch, n]``.
        :param past: key and value of each layer, ``[batch, heads, context - n, width]``; none if
            ``n`` is the whole context.
        """
        cache = _Cache(past)
        with ExitStack() as stack:
            for number, module in enumerate(self._rotary):
                cos, sin = (getattr(self, f"{part}_{number}") for part in ("cos", "sin"))
                table = RotaryTable(cos, sin, self._complex[number])
                stack.enter_context(replaced_forward(module, partial(table.rows, position_ids)))
            if any(self._complex):
                stack.enter_context(Exportable())
            logits = self._logits(input_ids, attention_mask, position_ids, cache)
        return (logits, *(tensor for pair in cache.present.values() for tensor in pair))

    def _logits(
        self,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: _Cache,
        answer: Answer = lambda asked: asked.padding,
    ) -> Tensor:
        with self._masks.answered(answer):
            logits: Tensor = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=False,
            ).logits
        return logits

    @torch.no_grad()
    def _probe(self, context: int) -> tuple[Sizes, Sizes]:
        """Run one token and see what is put into the cache: heads and widths of each layer.

        :raises ValueError: a layer does not see the whole context, or keeps no keys and values.
        """
        device = next(self.model.parameters()).device
        zero = torch.zeros(1, 1, dtype=torch.long, device=device)
        mask = torch.zeros(1, 1, 1, 1, dtype=self.model.dtype, device=device)
        cache = _Cache(())
        windows: set[int] = set()

        def answer(asked: MaskAsked) -> Tensor:
            windows.update(size for size in (asked.window, asked.chunk) if size is not None)
            return mask

        self._logits(zero, mask, zero, cache, answer)
        if windows and min(windows) < context:
            raise ValueError(
                f"layers that look back on the whole context of {context} tokens are required, but "
                f"there are layers with a window of {min(windows)}; give a context_length of at "
                "most that"
            )
        layers = self.config.get_text_config().num_hidden_layers
        if sorted(cache.present) != list(range(layers)):
            raise ValueError(
                f"keys and values of each of the {layers} layers are required to be cached, but "
                f"{type(self.model).__name__} caches those of the layers {sorted(cache.present)}; "
                "a model that shares or lacks them cannot be exported with a cache"
            )
        pairs = (cache.present[layer] for layer in range(layers))
        sizes = [[(x.shape[1], x.shape[3]) for x in pair] for pair in pairs]
        return tuple(keys for keys, _ in sizes), tuple(values for _, values in sizes)


class TokenCache:
    """Keys and values of the tokens so far, as an application keeps them between calls.

    :param shape: Shape of the model's cache.
    :param mask_value: Value added to the scores of what a token does not see; about -100 where
        activations are quantized, as for ``prepare_model``.
    :param batch: sequences, which grow together.

    >>> cache = TokenCache(cached.shape)
    >>> outputs = run(cache.feed(ids, 16))
    >>> cache.extend(outputs)
    """

    def __init__(
        self,
        shape: CacheShape,
        *,
        mask_value: float = -100.0,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.shape = shape
        self.mask_value = mask_value
        self.batch = batch
        self.dtype = dtype
        self.length = 0
        self._given = 0
        slots = shape.past_shapes(0, batch)
        self._past = {name: torch.zeros(size, dtype=dtype) for name, size in slots.items()}

    def feed(self, ids: Tensor, length: int) -> dict[str, Tensor]:
        """Return the inputs of a call of ``length`` tokens, by name.

        :param ids: ``[batch, m]`` with ``1 <= m <= length``; what lacks is filled with zeros,
            whose outputs mean nothing.
        :raises ValueError: more ids than the call takes, or no room for the call in the context.
        """
        context, given = self.shape.context_length, ids.shape[1]
        if ids.dim() != 2 or ids.shape[0] != self.batch or not 1 <= given <= length:
            raise ValueError(
                f"ids [{self.batch}, 1 to {length}] are required, got shape {tuple(ids.shape)}"
            )
        if self.length + length > context:
            raise ValueError(
                f"a call of {length} tokens after {self.length} needs a context of "
                f"{self.length + length} tokens, got {context}; make shorter calls, or export "
                "with a longer context_length"
            )
        self._given = given
        padded = torch.zeros(self.batch, length, dtype=torch.long)
        padded[:, :given] = ids
        seen = torch.zeros(length, context, dtype=torch.bool)
        seen[:, : self.length] = True
        seen[:, context - length :] = torch.ones(length, length).tril().bool()
        mask = torch.zeros(seen.shape, dtype=self.dtype).masked_fill(~seen, self.mask_value)
        positions = torch.arange(self.length, self.length + length)
        past = self.shape.past_names(length)
        return {
            "input_ids": padded,
            "attention_mask": mask.expand(self.batch, 1, length, context).contiguous(),
            "position_ids": positions.expand(self.batch, length).contiguous(),
            **{name: self._past[name][:, :, : context - length].contiguous() for name in past},
        }

    def extend(self, outputs: Mapping[str, Tensor]) -> None:
        """Add the keys and values of the ids that the last :meth:`feed` was given."""
        end = self.length + self._given
        for name, cache in self._past.items():
            new = outputs[name.replace("past", "present", 1)]
            cache[:, :, self.length : end] = new[:, :, : self._given].to(cache)
        self.length, self._given = end, 0


def run_with_cache(
    calls: Mapping[int, Run], cache: TokenCache, ids: Tensor, prompt: int | None = None
) -> Tensor:
    """Return the logits ``[batch, seq, vocab]`` of ids, a part of them at a time.

    :param calls: Function that runs a call, by the number of its tokens.
    :param cache: Cache of earlier tokens; it is extended.
    :param ids: ``[batch, seq]``.
    :param prompt: Number of ids that are taken as many as possible at a time; the others, one by
        one or as few as there is a call for. None: all of them.
    """
    longest, shortest = max(calls), min(calls)
    prompt = ids.shape[1] if prompt is None else prompt
    start, logits = 0, []
    while start < ids.shape[1]:
        rest = (prompt if start < prompt else ids.shape[1]) - start
        length = longest if start < prompt else shortest
        if cache.length + length > cache.shape.context_length:
            length = shortest
        part = ids[:, start : start + min(length, rest)]
        outputs = calls[length](cache.feed(part, length))
        cache.extend(outputs)
        logits.append(outputs["logits"][:, : part.shape[1]])
        start += part.shape[1]
    return torch.cat(logits, dim=1)


class _Cache:
    """A stand-in for transformers' cache that attention layers take during one call."""

    def __init__(self, past: Sequence[Tensor]) -> None:
        self._past = tuple(zip(past[::2], past[1::2], strict=True))
        self.present: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the whole context; the new ones are kept."""
        self.present[layer_idx] = (key, value)
        if not self._past:
            return key, value
        past_key, past_value = self._past[layer_idx]
        return torch.cat((past_key, key), dim=2), torch.cat((past_value, value), dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of slots of the cache, filled or not."""
        return self._past[layer_idx][0].shape[2] if self._past else 0


class _SeenKeys(_Cache):
    """An empty cache whose keys go through a function.

    :param see: Function of the layer's number and its keys.
    """

    def __init__(self, see: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__(())
        self._see = see

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return self._see(layer_idx, key), value


@contextmanager
def seen_keys(module: nn.Module, see: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Open a context in which the keys of each layer go through a function.

    :param module: What ``prepare_model`` made of a causal LM of transformers, quantized or not.
    :param see: Function of the layer's number and its keys ``[batch, heads, tokens, width]``
        behind the rotary embedding.
    :raises ValueError: A model that was not prepared.
    """
    model = causal_lm(module)
    if model is None or not isinstance(module, PreparedCausalLM):
        raise ValueError(
            'r3="fitted": a model wrapped by prepare_model is required, whose keys are known, got '
            f"{type(module).__name__}; pass r3=True"
        )

    def with_cache(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "past_key_values": _SeenKeys(see)}

    handle = model.register_forward_pre_hook(with_cache, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _checked_rotary(model: nn.Module) -> list[nn.Module]:
    """Return the modules that compute the cosine and sine of positions.

    :raises ValueError: they depend on more than a position.
    """
    found = []
    for name, module in rotary_modules(model).items():
        arguments = list(inspect.signature(module.forward).parameters)
        if is_changing(module):
            raise ValueError(
                f"{name}: a rotary embedding of which each position has fixed angles is required, "
                f'got rope_type "{module.rope_type}", whose angles change with the length of the '
                "text"
            )
        if arguments[:2] != ["x", "position_ids"] or len(arguments) > 2:
            raise ValueError(
                f"{name}: a rotary embedding that is the same for all layers and called with (x, "
                f"position_ids) is required, got arguments ({', '.join(arguments)})"
            )
        found.append(module)
    return found
