"""In which order a forward pass calls layers, which of them read one input, what can be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.model.layers import relu_of, twice_called, uncalled
from aimet_ext.model.walk import Activation
from aimet_ext.model.watch import Watch

__all__ = ["LayerOrder", "Wrap", "layer_order"]

Wrap = Callable[[Tensor], Any]


@dataclass(eq=False)
class LayerOrder:
    """What forward passes of a module do with some of its layers.

    :param stages: layers called one after another that read one tensor, in order.
    :param activations: the ReLU that alone reads a layer's output, by layer.
    :param parts: direct children of the module whose output is their last layer's output, with
        that layer and what makes the child's output of the layer's.
    :param returns: what makes the module's own output of its first tensor.
    """

    stages: list[tuple[str, ...]] = field(default_factory=list)
    activations: dict[str, Activation] = field(default_factory=dict)
    parts: dict[str, tuple[str, Wrap]] = field(default_factory=dict)
    returns: Wrap = field(default=lambda tensor: tensor)

    @property
    def order(self) -> list[str]:
        """All layers in the order of their calls."""
        return [layer for stage in self.stages for layer in stage]


@torch.no_grad()
def layer_order(
    module: nn.Module, layers: Sequence[str], passes: Iterable[Callable[[], object]]
) -> LayerOrder:
    """Watch forward passes until each layer was called: an expert may not be, in some of them.

    :param layers: names within ``module``.
    :param passes: each runs the module once.
    :raises ValueError: a layer is called twice in a pass, or never.
    """
    found = LayerOrder()
    missing = dict.fromkeys(layers)
    for run in passes:
        watch, ends = Watch(), _Ends(list(layers))
        with ExitStack() as hooks:
            for name in layers:
                watch.hook(name, module.get_submodule(name), hooks)
            ends.hook(module, hooks)
            with watch:
                run()
        if watch.twice is not None:
            raise twice_called(watch.twice)
        _add(found, watch, ends, missing)
        for name in watch.reads:
            missing.pop(name, None)
        if not missing:
            return found
    raise uncalled(missing)


def _add(found: LayerOrder, watch: Watch, ends: _Ends, missing: Mapping[str, Any]) -> None:
    """Add what a pass shows of layers that no earlier one called."""
    last = None
    for name, token in watch.reads.items():
        if name not in missing:
            continue
        if token == last:
            found.stages[-1] = (*found.stages[-1], name)
        else:
            found.stages.append((name,))
        last = token
        if relu := relu_of(watch.sole_reader(name)):
            found.activations[name] = relu
    order = list(watch.reads)
    for part, (layer, wrap) in ends.parts.items():
        if layer == [name for name in order if name.startswith(f"{part}.")][-1]:
            found.parts[part] = (layer, wrap)
    found.returns = ends.returns or found.returns


class _Ends:
    """Finds children that return what one of their layers returned."""

    def __init__(self, layers: list[str]) -> None:
        self.layers = layers
        self.parts: dict[str, tuple[str, Wrap]] = {}
        self.returns: Wrap | None = None
        self._outputs: dict[str, Tensor] = {}

    def hook(self, module: nn.Module, hooks: ExitStack) -> None:
        for name in self.layers:
            layer = module.get_submodule(name)
            hooks.callback(layer.register_forward_hook(self._keep(name)).remove)
        for name, child in module.named_children():
            if name not in self.layers:
                hooks.callback(child.register_forward_hook(self._ended(name)).remove)
        hooks.callback(module.register_forward_hook(self._returned).remove)

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self._outputs[name] = output

        return hook

    def _ended(self, child: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            wrap = _wrap(output)
            first = output[0] if isinstance(output, tuple) and output else output
            for name, tensor in self._outputs.items():
                if name.startswith(f"{child}.") and tensor is first and wrap is not None:
                    self.parts[child] = (name, wrap)

        return hook

    def _returned(self, _: nn.Module, args: Any, output: Any) -> None:
        self.returns = _wrap(output)


def _wrap(output: Any) -> Wrap | None:
    """What makes an output of this form of its first tensor; None if it holds other tensors."""
    if isinstance(output, Tensor):
        return lambda tensor: tensor
    if type(output) is tuple and output and isinstance(output[0], Tensor):
        rest = output[1:]
        if not any(isinstance(value, Tensor) for value in rest):
            return lambda tensor: (tensor, *rest)
    return None
