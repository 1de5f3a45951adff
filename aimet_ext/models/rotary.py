"""Cosine and sine of positions as tables, for graphs that quantize whatever they compute.

A rotary embedding computes ``cos(position * frequency)``. The product reaches the length of the
text, and a grid over that range has steps of a whole radian at 8 bits and 256 tokens, or at 16 bits
and 65,536: nothing remains of the angle. A table of the cosines has the range from -1 to 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.core.hadamard import hadamard
from aimet_ext.models.exportable import as_pairs

_CHANGING = ("dynamic", "longrope")
_ARGUMENTS = ("x", "position_ids")
_LONGEST = 1 << 17  # positions; what is longer would be larger than many a model


@dataclass(frozen=True)
class RotaryTable:
    """Cosine and sine of each position.

    :param cos: ``[context, width]``.
    :param sin: ``[context, width]``.
    :param is_complex: True if the module returns both as one complex number.
    """

    cos: Tensor
    sin: Tensor
    is_complex: bool

    def rows(self, positions: Tensor) -> Any:
        """Return what the module does for positions ``[batch, seq]``.

        In place of complex numbers these are pairs for code in
        :class:`~aimet_ext.models.exportable.Exportable`.
        """
        cos, sin = (nn.functional.embedding(positions, table) for table in (self.cos, self.sin))
        return as_pairs(cos, sin) if self.is_complex else (cos, sin)

    def to(self, like: Tensor) -> RotaryTable:
        """Return the table in the dtype of a tensor, and on its device."""
        return replace(self, cos=self.cos.to(like), sin=self.sin.to(like))


def rotary_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that compute the cosine and sine of positions, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(key.endswith("inv_freq") for key, _ in module.named_buffers(recurse=False))
    }


def check_rotary(model: nn.Module) -> None:
    """Refuse a model whose queries and keys cannot be turned behind the rotary embedding (R3).

    :raises ValueError: it has none, or heads of a width that no Hadamard matrix is known for.
    """
    if not rotary_modules(model):
        raise ValueError(
            "r3: a model with a rotary embedding (a module with a buffer inv_freq) is required, "
            f"but {type(model).__name__} has none; leave r3 out"
        )
    configs = (getattr(module, "config", None) for module in model.modules())
    config = next((each for each in configs if hasattr(each, "get_text_config")), None)
    width = None if config is None else _head_width(config.get_text_config())
    if width is not None and hadamard(width) is None:
        raise ValueError(
            f"r3: heads of a width with a known Hadamard matrix are required, got {width}; leave "
            "r3 out"
        )


def _head_width(config: Any) -> int | None:
    width = getattr(config, "head_dim", None)
    if width is None and hasattr(config, "hidden_size"):
        width = config.hidden_size // getattr(config, "num_attention_heads", 1)
    return width


@torch.no_grad()
def rotary_table(module: nn.Module, context: int, dtype: torch.dtype, *further: Any) -> RotaryTable:
    """Return the cosine and sine of each position of a context.

    :param dtype: Type of the hidden states.
    :param further: Arguments of the module after ``x`` and ``position_ids``.
    """
    device = next(module.buffers()).device
    positions = torch.arange(context, device=device)[None]
    found = module(torch.zeros(1, 1, 1, dtype=dtype, device=device), positions, *further)
    is_complex = isinstance(found, Tensor)
    cos, sin = (found.real, found.imag) if is_complex else found
    return RotaryTable(cos[0].clone(), sin[0].clone(), is_complex)


def is_changing(module: nn.Module) -> bool:
    """Return True if a rotary embedding's angles change with the length of the text."""
    return any(word in str(getattr(module, "rope_type", "default")) for word in _CHANGING)


class RotaryTables:
    """The tables of a model's rotary embeddings, where the position alone determines the angle.

    :param model: Causal LM of transformers.
    :param context: Positions that it knows; without a limit, or beyond 131,072, there are no
        tables.
    """

    def __init__(self, model: Any, context: int | None) -> None:
        self._tables: dict[str, dict[tuple[Any, ...], RotaryTable]] = {}
        if context is None or context > _LONGEST:
            return
        types = getattr(model.config.get_text_config(), "layer_types", None) or ()
        kinds: dict[tuple[str, ...], list[tuple[Any, ...]]] = {
            _ARGUMENTS: [()],
            (*_ARGUMENTS, "layer_type"): [(kind,) for kind in sorted(set(types))],
        }
        for name, module in rotary_modules(model).items():
            calls = kinds.get(tuple(inspect.signature(module.forward).parameters), [])
            if calls and not is_changing(module) and not next(module.buffers()).is_meta:
                # In float32 whatever the model's dtype, as the modules themselves compute them.
                self._tables[name] = {
                    further: rotary_table(module, context, torch.float32, *further)
                    for further in calls
                }

    @contextmanager
    def looked_up(self, model: nn.Module) -> Iterator[None]:
        """Return a context in which the modules look cosine and sine up; exporters drop the rest.

        :param model: The causal LM, or a copy of it.
        """
        with ExitStack() as stack:
            for name, tables in self._tables.items():
                hook = partial(_look_up, tables)
                module = model.get_submodule(name)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield


def _look_up(
    tables: Mapping[tuple[Any, ...], RotaryTable], _: nn.Module, args: Any, kwargs: Any, output: Any
) -> Any:
    """Return the rows of a table in place of a rotary embedding's output."""
    given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    further = (*args[2:], *(v for name, v in kwargs.items() if name not in _ARGUMENTS))
    x, positions = (given[name] for name in _ARGUMENTS)
    if positions.dim() > 2:  # in time, height and width, which are the same in text
        positions = positions[0]
    return tables[further].to(x).rows(positions)
