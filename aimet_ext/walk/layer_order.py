"""In which order a forward pass calls layers, which of them read one input, what can be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from aimet_ext.walk.hooks import Watch, tensor_version
from aimet_ext.walk.layers import check_folded, geometries, relu_of, twice_called, uncalled
from aimet_ext.walk.protocol import Activation

__all__ = ["LayerOrder", "Wrap", "layer_order", "layers_around"]

Wrap = Callable[[Tensor], Any]


@dataclass(eq=False)
class LayerOrder:
    """What forward passes of a module do with some of its layers.

    :param order: all layers in the order of their calls.
    :param stages: layers that read one tensor in the same way, by their first one's place in it.
    :param activations: the ReLU that alone reads a layer's output, by layer.
    :param parts: direct children of the module whose output is their last layer's output, with
        that layer and what makes the child's output of the layer's.
    :param returns: what makes the module's own output of its first tensor.
    """

    order: list[str] = field(default_factory=list)
    stages: list[tuple[str, ...]] = field(default_factory=list)
    activations: dict[str, Activation] = field(default_factory=dict)
    parts: dict[str, tuple[str, Wrap]] = field(default_factory=dict)
    returns: Wrap = field(default=lambda tensor: tensor)


@torch.no_grad()
def layer_order(
    module: nn.Module,
    layers: Sequence[str],
    passes: Iterable[Callable[[], object]],
    prefix: str = "",
) -> LayerOrder:
    """Watch forward passes until each layer was called: an expert may not be, in some of them.

    :param layers: names within ``module``.
    :param passes: each runs the module once.
    :param prefix: of the layers' names in errors, which then are those in the whole model.
    :raises ValueError: a layer is called twice in a pass, or never, or a batch norm follows it.
    :raises TypeError: a layer is neither linear nor a convolution.
    """
    found = LayerOrder()
    geometry = geometries({name: module.get_submodule(name) for name in layers})
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
            raise twice_called(f"{prefix}{watch.twice}")
        partners = watch.partners(geometry)
        stages: dict[str, list[str]] = {}
        for name in [name for name in watch.reads if name in missing]:
            del missing[name]
            found.order.append(name)
            stages.setdefault(partners[name], []).append(name)
            reader = watch.sole_reader(name)
            check_folded(f"{prefix}{name}", reader)
            if relu := relu_of(reader):
                found.activations[name] = relu
        found.stages += [tuple(names) for names in stages.values()]
        found.parts.update(ends.parts(list(watch.reads)))
        found.returns = ends.returns or found.returns
        if not missing:
            return found
    raise uncalled(f"{prefix}{name}" for name in missing)


def layers_around(
    model: nn.Module,
    blocks: Sequence[str],
    layers: Sequence[str],
    passes: Iterable[Callable[[], object]],
) -> tuple[list[str], LayerOrder]:
    """Layers called before the first of some blocks, and the order of those after the last.

    :param layers: names of layers in none of the blocks.
    :param passes: each runs the model once.
    :raises ValueError: a layer is called between two blocks; else as :func:`layer_order`.
    """
    if not layers:
        return [], LayerOrder()
    order: dict[str, int] = {}

    def note(name: str, module: nn.Module, args: Any) -> None:
        order.setdefault(name, len(order))

    with ExitStack() as hooks:
        for name in (*layers, blocks[0], blocks[-1]):
            hook = model.get_submodule(name).register_forward_pre_hook(partial(note, name))
            hooks.callback(hook.remove)
        found = layer_order(model, layers, passes)
    begin, end = (order.get(block, len(order)) for block in (blocks[0], blocks[-1]))
    for name in found.order:
        if begin < order[name] < end:
            raise ValueError(
                f"layer {name!r} must be called before or after the repeated blocks "
                f"({blocks[0]} to {blocks[-1]}), it is called between them; leave it out"
            )
    before = [name for name in found.order if order[name] < begin]
    stages = [tuple(name for name in names if name not in before) for names in found.stages]
    after = [name for name in found.order if name not in before]
    return before, replace(found, order=after, stages=[names for names in stages if names])


class _Ends:
    """Finds children that return what one of their layers returned. No tensor is kept for it."""

    def __init__(self, layers: list[str]) -> None:
        self.layers = layers
        self.returns: Wrap | None = None
        self._ends: dict[str, tuple[str, Wrap]] = {}
        # With how often it had been changed in place when the layer returned it.
        self._outputs = WeakTensorKeyDictionary()

    def hook(self, module: nn.Module, hooks: ExitStack) -> None:
        for name in self.layers:
            layer = module.get_submodule(name)
            hooks.callback(layer.register_forward_hook(self._keep(name)).remove)
        for name, child in module.named_children():
            if name not in self.layers:
                hooks.callback(child.register_forward_hook(self._ended(name)).remove)
        hooks.callback(module.register_forward_hook(self._returned).remove)

    def parts(self, order: Sequence[str]) -> dict[str, tuple[str, Wrap]]:
        """By child that ends with the last of its layers, that layer and the form of its output.

        :param order: of the layers' calls.
        """
        last = {name.partition(".")[0]: name for name in order}
        return {part: end for part, end in self._ends.items() if last[part] == end[0]}

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self._outputs[output] = (name, tensor_version(output))

        return hook

    def _ended(self, child: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            first = _first(output)
            alone = first is output or not any(value is not None for value in output[1:])
            if not isinstance(first, Tensor) or not alone:
                return
            name, version = self._outputs.get(first, ("", 0))
            if name.startswith(f"{child}.") and version == tensor_version(first):
                self._ends[child] = (name, _wrap(output))

        return hook

    def _returned(self, _: nn.Module, args: Any, output: Any) -> None:
        self.returns = _wrap(output)


def _first(output: Any) -> Any:
    return output[0] if type(output) in (tuple, list) and output else output


def _wrap(output: Any) -> Wrap:
    """What makes an output of this form of its first value."""
    if _first(output) is output:
        return lambda tensor: tensor
    kind, rest = type(output), output[1:]
    return lambda tensor: kind([tensor, *rest])
