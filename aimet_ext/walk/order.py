"""The order in which a forward pass calls layers, and what they read and hand on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from aimet_ext.data.batches import tensors_in
from aimet_ext.data.geometry import Geometry
from aimet_ext.walk.hooks import layer_input
from aimet_ext.walk.routing import is_sent_to

Activation: TypeAlias = Callable[[Tensor], Tensor]
Wrap: TypeAlias = Callable[[Tensor], Any]

# A tensor's number, and how often it was changed in place.
_Token = tuple[int, int]

# In place or not, the function is the same; handed out is the one that leaves its input alone.
_RELUS: Mapping[Any, Activation] = {
    torch.relu: functional.relu,
    torch.relu_: functional.relu,
    functional.relu: functional.relu,
    Tensor.relu: functional.relu,
    Tensor.relu_: functional.relu,
    functional.relu6: functional.relu6,
}
_BATCH_NORMS = (functional.batch_norm, torch.batch_norm)


class Watch(TorchFunctionMode):
    """The tensors that layers read in a forward pass, and the functions that read their outputs.

    No tensor is kept alive for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: dict[str, tuple[_Token, ...]] = {}  # by layer, those of each call
        self.returns: Wrap | None = None
        self._readers: dict[str, list[Callable[..., Any]]] = {}
        self._outputs: dict[_Token | None, str] = {}
        self._ends: dict[str, tuple[str, Wrap]] = {}
        self._numbers = WeakTensorKeyDictionary()
        self._next = count()

    def hook(
        self,
        module: nn.Module,
        layers: Sequence[str],
        hooks: ExitStack,
        together: Mapping[str, Sequence[str]],
    ) -> None:
        """Watch layers of a module, its children and the module itself, until ``hooks`` ends."""
        for name in layers:
            before, after = partial(self._before, name), partial(self._after, name)
            for own in (name, *together.get(name, ())):
                layer = module.get_submodule(own)
                hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(layer.register_forward_hook(after).remove)
        for name, child in module.named_children():
            if name not in layers:
                ended = partial(self._child_after, name)
                hooks.callback(child.register_forward_hook(ended).remove)
        hooks.callback(module.register_forward_hook(self._module_after).remove)

    def parts(self) -> dict[str, tuple[str, Wrap]]:
        """Return the children that end with the last of their layers.

        :returns: by child, that layer and a function from the layer's output to the child's.
        """
        last = {name.partition(".")[0]: name for name in self.reads}
        return {part: end for part, end in self._ends.items() if last[part] == end[0]}

    def _before(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        read = self._token(layer_input(args, kwargs))
        self.reads[name] = (*self.reads.get(name, ()), read)

    def _after(self, name: str, _: nn.Module, args: Any, output: Any) -> None:
        self._readers.setdefault(name, [])
        if isinstance(output, Tensor):
            self._outputs[self._token(output)] = name

    def _child_after(self, child: str, _: nn.Module, args: Any, output: Any) -> None:
        first = _first(output)
        alone = first is output or not any(value is not None for value in output[1:])
        if isinstance(first, Tensor) and alone:
            name = self._outputs.get(self._known(first), "")
            if name.startswith(f"{child}."):
                self._ends[child] = (name, _wrap(output))

    def _module_after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.returns = _wrap(output)
        for tensor in tensors_in(output):  # whoever called the module may read these
            if (token := self._known(tensor)) in self._outputs:
                self._readers[self._outputs[token]].append(type(module).__call__)

    def partners(self, geometry: Mapping[str, Geometry]) -> dict[str, str]:
        """Return, by layer, the first one that reads the same tensor in the same way."""
        first: dict[Any, str] = {}
        return {
            name: first.setdefault((tokens, geometry[name]), name)
            for name, tokens in self.reads.items()
        }

    def sole_reader(self, name: str) -> Callable[..., Any] | None:
        """Return the function that alone reads a layer's output, in each of its calls."""
        readers = self._readers[name]
        alone = len(readers) == len(self.reads[name]) and len(set(readers)) == 1
        return readers[0] if alone else None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function, and note what it read unless it handed its input on as it is."""
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        read = [(x, self._outputs[t]) for x in inputs if (t := self._known(x)) in self._outputs]
        versions = [_version(x) for x, _ in read]
        output = func(*args, **kwargs)
        outputs = tensors_in(output)
        for (x, name), version in zip(read, versions, strict=True):
            passed_on = any(y is x for y in outputs) and _version(x) == version
            if outputs and not passed_on:
                self._readers[name].append(_reader(func, args, kwargs))
        return output

    def _known(self, tensor: Tensor) -> _Token | None:
        number = self._numbers.get(tensor)
        return None if number is None else (number, _version(tensor))

    def _token(self, tensor: Tensor) -> _Token:
        if tensor not in self._numbers:
            self._numbers[tensor] = next(self._next)
        return self._numbers[tensor], _version(tensor)


def _reader(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the function that reads a tensor, or the one that it is with these arguments."""
    if func is functional.hardtanh:  # what nn.ReLU6 calls
        low, high = [*args[1:3], None, None][:2]
        if (kwargs.get("min_val", low), kwargs.get("max_val", high)) == (0, 6):
            return functional.relu6
    return func


def _first(output: Any) -> Any:
    return output[0] if type(output) in (tuple, list) and output else output


def _wrap(output: Any) -> Wrap:
    """Return a function that makes an output of this form of its first value."""
    if _first(output) is output:
        return lambda tensor: tensor
    kind, rest = type(output), output[1:]
    return lambda tensor: kind([tensor, *rest])


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place."""
    return 0 if tensor.is_inference() else tensor._version


class CalledAgain(ValueError):
    """A layer is called more than once in a forward pass."""


@dataclass(eq=False)
class LayerOrder:
    """The order in which forward passes of a module call some of its layers, and what is shared.

    :param order: Layers in the order of their calls.
    :param stages: Layers that read one tensor in the same way, in the order of their first one.
    :param activations: ReLU that alone reads a layer's output, by layer.
    :param parts: Children of the module whose output is their last layer's output, with that layer
        and a function from its output to the child's.
    :param idle: Layers of experts that no token is sent to.
    :param repeated: Layers that a pass calls several times.
    :param returns: Function from the first tensor of the module's output to the whole output.
    """

    order: list[str] = field(default_factory=list)
    stages: list[tuple[str, ...]] = field(default_factory=list)
    activations: dict[str, Activation] = field(default_factory=dict)
    parts: dict[str, tuple[str, Wrap]] = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)
    repeated: set[str] = field(default_factory=set)
    returns: Wrap = field(default=lambda tensor: tensor)


@torch.no_grad()
def layer_order(
    module: nn.Module,
    layers: Sequence[str],
    passes: Iterable[Callable[[], object]],
    prefix: str = "",
    *,
    repeats: bool = False,
    together: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> LayerOrder:
    """Watch forward passes until each layer was called: an expert may not be, in some of them.

    :param layers: Names within ``module``.
    :param passes: Functions that each run the module once.
    :param prefix: Prefix that makes the layers' names in errors those in the whole model.
    :param repeats: True for layers that a pass calls several times, but no expert's.
    :param together: Names of further modules whose calls count as a layer's.
    :raises CalledAgain: a layer is called several times where that is not asked for.
    :raises ValueError: a layer is never called and is no expert's, or a batch norm follows it.
    :raises TypeError: a layer is neither linear nor a convolution.
    """
    found = LayerOrder()
    geometry = geometries({name: module.get_submodule(name) for name in layers})
    watches: list[Watch] = []
    order: dict[str, None] = {}
    for run in passes:
        watch = Watch()
        with ExitStack() as hooks:
            watch.hook(module, layers, hooks, together)
            with watch:
                run()
        again = [name for name, tokens in watch.reads.items() if len(tokens) > 1]
        for name in again:
            if not repeats or is_sent_to(module, name):
                raise CalledAgain(
                    "a layer must be called once in a forward pass, "
                    f"{f'{prefix}{name}'!r} is called again; leave it out, or give each call a "
                    "layer of its own"
                )
        found.repeated.update(again)
        watches.append(watch)
        order.update(dict.fromkeys(watch.reads))
        found.parts.update(watch.parts())
        found.returns = watch.returns or found.returns
        if len(order) == len(geometry):
            break
    else:
        left = [name for name in layers if name not in order]
        if lost := [f"{prefix}{name}" for name in left if not is_sent_to(module, name)]:
            raise uncalled(lost)
        order.update(dict.fromkeys(left))
        found.idle = left
    partners = [watch.partners(geometry) for watch in watches]
    stages: dict[Any, list[str]] = {}
    for name in order:
        read = [first.get(name) for first in partners]
        stages.setdefault(tuple(read) if any(read) else name, []).append(name)
        readers = {watch.sole_reader(name) for watch in watches if name in watch.reads}
        reader = readers.pop() if len(readers) == 1 else None
        if reader in _BATCH_NORMS:
            raise ValueError(
                f"the batch norm after layer {f'{prefix}{name}'!r} must be folded into it before "
                "the simulation is built; call "
                "aimet_torch.batch_norm_fold.fold_all_batch_norms(model, input_shapes)"
            )
        if reader in _RELUS:
            found.activations[name] = _RELUS[reader]
    found.order, found.stages = [*order], [tuple(names) for names in stages.values()]
    return found


def geometries(layers: Mapping[str, nn.Module]) -> dict[str, Geometry]:
    """Return how each layer's input becomes rows.

    :raises TypeError: a layer is neither linear nor a convolution; it is named.
    """
    found = {}
    for name, module in layers.items():
        try:
            found[name] = Geometry.of(module)
        except TypeError as error:
            raise TypeError(f"layer {name!r}: {error}") from error
    return found


def uncalled(layers: Iterable[str]) -> ValueError:
    """Return the error for layers that are no part of the forward pass."""
    return ValueError(
        f"these layers never received data: {', '.join(layers)}; leave them out, or calibrate "
        "with batches that reach them"
    )
