"""Modules that AIMET does not know: quantized by what they do, or left as they are."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from aimet_torch.nn import QuantizationMixin
from aimet_torch.quantization.base import QuantizerBase
from torch import Tensor, nn

from aimet_ext.data.batches import call_model, map_tensors, tensors_in
from aimet_ext.errors import some
from aimet_ext.models.repeats import Inlined, inline, noted_repeats
from aimet_ext.walk.hooks import evaluating

_log = logging.getLogger(__name__)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def unknown_modules(model: nn.Module, dummy_input: Any) -> Iterator[set[str]]:
    """Open a context in which AIMET builds a simulation of any model.

    Gives the names of the modules that are not called. Code elsewhere may read their weights, where
    nothing would quantize them, and their activations would never have a range.

    AIMET refuses modules without children whose class it does not know. Here those that make one
    tensor of one tensor (norms, activations, linear layers and convolutions of one's own), and
    embeddings, get quantizers like the ones it knows; all others (rotary embeddings, routers) are
    computed in float, as AIMET itself does with the ones it knows. Classes that were registered
    with AIMET keep what they were registered with. AIMET's registry is restored at the end.

    Modules with parameters that one call of the module around calls twice, as the routers of
    Gemma 3n's, become a part of it in the model: they stay float, which is logged.

    :param model: Model that AIMET changes in place.
    :param dummy_input: Input that shows what the modules take and return.
    """
    ignoring = QuantizationMixin._ignore_unknown_modules
    kinds, uncalled, twice = _watch(model, dummy_input)
    if ignoring:
        kinds = []
    if twice:
        _log.warning("%s stay float, as one call of what holds them calls them twice", some(twice))
        inline(model, twice)
    try:
        QuantizationMixin.ignore_unknown_modules(True)
        for kind in kinds:
            QuantizationMixin.implements(kind)(_quantized(kind))
        yield uncalled | {f"{name}.module" for name in twice}
    finally:
        QuantizationMixin.ignore_unknown_modules(ignoring)
        for kind in kinds:
            QuantizationMixin.cls_to_qcls.pop(kind, None)


def is_registered(module: nn.Module) -> bool:
    """Return True if AIMET has a quantized class for a module."""
    return type(module) in QuantizationMixin.cls_to_qcls


def float_matrices(model: nn.Module, meant: Collection[str]) -> dict[str, int]:
    """Return the matrices of a simulation that no quantizer takes and nobody asked to leave float.

    A parameter counts as a matrix if two of its dimensions are larger than 1. Modules that AIMET
    was told to ignore are left out.

    :param model: ``sim.model``.
    :param meant: Names of the layers whose weight was to be left float, and of such parameters.
    :returns: number of elements by name of parameter.
    """
    found: dict[int, tuple[str, int]] = {}
    taken = set()
    inlined = {n: f"{n}.module" for n, m in model.named_modules() if isinstance(m, Inlined)}
    left = {inlined.get(name, name) for name in meant}
    for name, module in model.named_modules():
        if isinstance(module, QuantizerBase):
            continue
        quantizers = dict(getattr(module, "param_quantizers", {}))
        for key, value in module.named_parameters(name, recurse=False):
            own = key.rpartition(".")[2]
            asked = name in left or key in left
            if quantizers.get(own) is not None or asked or isinstance(module, _Unknown):
                taken.add(id(value))
            elif sum(side > 1 for side in value.shape) > 1 and not _ignored(module):
                found[id(value)] = key, value.numel()
    return {name: size for place, (name, size) in found.items() if place not in taken}


class _Unknown(QuantizationMixin):
    """Base of the quantized classes that are made here."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module on quantized inputs and parameters, and quantize the output."""
        for quantizer in self.input_quantizers:
            if quantizer is not None:
                args, kwargs = map_tensors(_floating(quantizer), (args, kwargs))
        with self._patch_quantized_parameters():
            output = super().forward(*args, **kwargs)
        (quantizer,) = self.output_quantizers
        return output if quantizer is None else quantizer(output)


@cache
def _quantized(kind: Any) -> type[_Unknown]:
    """Return the quantized class of a class of modules, always the same one."""

    class Quantized(_Unknown, kind):
        def __quant_init__(self) -> None:
            super().__quant_init__()
            if issubclass(kind, nn.Embedding):
                self.input_quantizers = nn.ModuleList([])

    Quantized.__name__ = Quantized.__qualname__ = f"Quantized{kind.__name__}"
    return Quantized


@torch.no_grad()
def _watch(model: nn.Module, dummy_input: Any) -> tuple[list[Any], set[str], list[str]]:
    """Return the unknown classes that can have quantizers for input, parameters and output.

    :returns: these, the names of modules that were not called, and of those that were called twice
        in one call of the module around.
    """
    leaves = {n: m for n, m in model.named_modules() if not any(True for _ in m.children())}
    fitting: dict[type[Any], bool] = {}
    called: set[nn.Module] = set()
    for attention in model.modules():
        if isinstance(attention, nn.MultiheadAttention):
            called.update(attention.modules())  # whose weights it reads quantized

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        called.add(module)
        if is_registered(module):
            return
        fits = isinstance(output, Tensor) and output.is_floating_point()
        if fits and not isinstance(module, nn.Embedding):
            given = tensors_in((*args, kwargs))
            fits = len(given) == 1 and given[0].is_floating_point()
            fits &= not _ignored(module)
            fits &= isinstance(module, _LAYERS) or all(
                value.dim() < 2 or value.shape == output.shape[-value.dim() :]  # gains, biases
                for value in module.parameters()
            )
        fitting[type(module)] = fits and fitting.get(type(module), True)

    hooks = [m.register_forward_hook(note, with_kwargs=True) for m in leaves.values()]
    try:
        with evaluating(model), noted_repeats(model) as twice:
            call_model(model, dummy_input)
    finally:
        for hook in hooks:
            hook.remove()
    uncalled = {name for name, module in leaves.items() if module not in called}
    return [kind for kind, fits in fitting.items() if fits], uncalled, list(twice)


def _ignored(module: nn.Module) -> bool:
    """Return True if AIMET was told to leave the module's class float."""
    kinds = QuantizationMixin._ignored_module_types
    return QuantizationMixin._ignore_unknown_modules or type(module) in kinds


def _floating(quantizer: Any) -> Any:
    return lambda tensor: quantizer(tensor) if tensor.is_floating_point() else tensor
