"""Weights that are hidden in packed parameters become layers, each with a quantizer of its own."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.errors import some
from aimet_ext.models.attention import owns_projections, projections
from aimet_ext.models.experts import are_packed, split_experts
from aimet_ext.models.huggingface import checkpoint_prefix
from aimet_ext.models.linear_forms import find_linears, is_transposed
from aimet_ext.models.repeats import Inlined
from aimet_ext.models.stacks import show_stacks, stacks
from aimet_ext.walk.routing import PackedLayers

_log = logging.getLogger(__name__)


def expose_weights(
    model: nn.Module, known: Callable[[nn.Module], bool], dummy_input: Any = None
) -> nn.Module:
    """Return a copy of a model in which hidden weights are layers; the model if it hides none.

    * Packed experts become linear layers, with the same outputs on tokens for all of them. Those
      that would compute something else stay packed, which is logged.
    * ``nn.MultiheadAttention`` shows its projections as layers. It does not call them: they say
      what AIMET's attention, which takes its place, is to quantize.
    * Modules that compute ``x @ weight + bias``, such as GPT-2's ``Conv1D``, become linear layers.
    * So do matrices stacked in a parameter, see :mod:`aimet_ext.models.stacks`.

    :param model: Model, left as it is.
    :param known: Returns True for modules that are to stay, as their class is quantized already.
    :param dummy_input: Input to look at stacked matrices with; None leaves them as they are.
    """
    linears = find_linears(model, known)
    stacked = (
        [] if dummy_input is None else [n for n, m in model.named_modules() if _stacks(m, known)]
    )
    hidden = (_is_attention(m) or are_packed(m) for m in model.modules())
    if not linears and not stacked and not any(hidden):
        return model
    memo: dict[int, Any] = {id(model.get_submodule(name)): new for name, new in linears.items()}
    model = copy.deepcopy(model, memo)
    del memo  # it holds all that was copied
    left: dict[str, str] = {}
    replaced: list[str] = []
    for name in [name for name, _ in model.named_modules()]:
        if name.startswith(tuple(replaced)):
            continue  # with what holds it
        # One at a time: packed ones go as they are replaced.
        module: Any = model.get_submodule(name)
        if are_packed(module):
            split = split_experts(module)
            if isinstance(split, str):
                left[name] = split
            else:
                _replace(model, name, split)
                replaced.append(f"{name}.")
        elif _is_attention(module):
            for part, layer in projections(module).items():
                module.add_module(part, layer)
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which goes around the attention
    show_stacks(model, stacked, dummy_input)
    if left:
        _log.warning(
            "%s keep their packed weights, without quantizers: %s",
            some(list(left)),
            next(iter(left.values())),
        )
    return model


def _stacks(module: nn.Module, known: Callable[[nn.Module], bool]) -> bool:
    return bool(stacks(module)) and not known(module) and not are_packed(module)


def _is_attention(module: nn.Module) -> bool:
    return type(module) is nn.MultiheadAttention


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, module)


@dataclass(frozen=True)
class Packing:
    """A tensor of a checkpoint that stands in a model as several.

    :param name: Name in the checkpoint.
    :param parts: Names in the model, without the prefix of :func:`checkpoint_prefix`.
    :param stacked: True if the parts are stacked, False if they follow each other.
    :param transposed: True if each is transposed in the checkpoint.
    :param idle: Number of parts behind these that nothing computes with, zeros when packed.
    """

    name: str
    parts: tuple[str, ...]
    stacked: bool
    transposed: bool = False
    idle: int = 0

    def pack(self, parts: list[Tensor]) -> Tensor:
        """Return the tensor of the checkpoint."""
        turned = [part.T if self.transposed else part for part in parts]
        turned += [torch.zeros_like(turned[0])] * self.idle
        return torch.stack(turned) if self.stacked else torch.cat(turned)

    def unpack(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the parts, as views."""
        parts = tensor.unbind() if self.stacked else tensor.chunk(len(self.parts))
        return tuple(part.T if self.transposed else part for part in parts)


def packings(model: nn.Module) -> list[Packing]:
    """Return what stands in a model, prepared or simulated, as layers of once hidden weights."""
    prefix, found = checkpoint_prefix(model), []
    for full, module in model.named_modules():
        name = full.removeprefix(prefix)
        if isinstance(module, PackedLayers):
            layers = [f"{name}.{number}" for number in range(len(module))]
            holder = name.rpartition(".")[0]
            own = name if module.packed is None else f"{holder}.{module.packed}".lstrip(".")
            for key, _ in module[0].named_parameters(recurse=False):
                whole, turned = (
                    (own, module.transposed) if key == "weight" else (f"{own}_{key}", False)
                )
                parts = tuple(f"{n}.{key}" for n in layers)
                found.append(Packing(whole, parts, module.stacked, turned, module.idle))
        elif isinstance(module, nn.MultiheadAttention) and owns_projections(module):
            found += _attention_packings(f"{name}." if name else "", module)
        elif isinstance(module, Inlined):
            keys = [key for key, _ in module.module.named_parameters()]
            found += [Packing(f"{name}.{k}", (f"{name}.module.{k}",), False) for k in keys]
        elif is_transposed(module):
            found.append(Packing(f"{name}.weight", (f"{name}.weight",), False, True))
    return found


def _attention_packings(prefix: str, attention: nn.MultiheadAttention) -> list[Packing]:
    layers = [f"{prefix}{part}_proj" for part in "qkv"]
    keys = [key for key, _ in attention.get_submodule("q_proj").named_parameters(recurse=False)]
    whole = {key: tuple(f"{layer}.{key}" for layer in layers) for key in keys}
    found = [Packing(f"{prefix}in_proj_{key}", parts, False) for key, parts in whole.items()]
    if attention._qkv_same_embed_dim:
        return found
    single = [Packing(f"{layer}_weight", (f"{layer}.weight",), False) for layer in layers]
    return [p for p in found if not p.name.endswith("weight")] + single


def packed(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state by the names of the checkpoint.

    :param state: Tensors by name in the model, without the prefix of :func:`checkpoint_prefix`.
    """
    rest = dict(state)
    for packing in packings(model):
        rest[packing.name] = packing.pack([rest.pop(part) for part in packing.parts])
    return rest


class Unpacked(Mapping[str, Tensor]):
    """A state by the names of the model, the inverse of :func:`packed`.

    A tensor is read when it is asked for; of packed ones, the last one is kept.

    :param state: State by the names of the checkpoint.
    """

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        self._state = state
        self._last: tuple[str, tuple[Tensor, ...]] = ("", ())
        self._places: dict[str, tuple[Packing, int] | None] = {}
        known = {packing.name: packing for packing in packings(model)}
        for name in state:
            if name in known:
                parts = enumerate(known[name].parts)
                self._places.update({part: (known[name], place) for place, part in parts})
            else:
                self._places[name] = None

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        if place is None:
            return self._state[name]
        packing, number = place
        if self._last[0] != packing.name:
            self._last = packing.name, packing.unpack(self._state[packing.name])
        return self._last[1][number]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
