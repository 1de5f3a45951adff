"""Walks from layer to layer, in the order in which data flows: the protocol, layers, their order.

A walk hands out stages, groups of layers that read one input. Once all layers of a stage are
decided it moves on, so that each later stage sees what the decided layers make of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from aimet_ext.data.batches import map_leaves
from aimet_ext.data.moments import Geometry
from aimet_ext.walk.hooks import Watch, Wrap

Streams: TypeAlias = Literal["quantized", "float", "both"]

# Input in the quantized and in the float stream (None if not asked for), and which tokens count:
# bool of the input's leading dimensions, None for all.
Inputs: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
Activation: TypeAlias = Callable[[Tensor], Tensor]

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


def stream_names(streams: Streams) -> tuple[str, ...]:
    """Return the names of the streams that are asked for."""
    return ("quantized", "float") if streams == "both" else (streams,)


@dataclass(frozen=True, eq=False)
class Stage:
    """Layers that read one input.

    :param layers: Full names.
    :param activations: The ReLU that alone reads a layer's output, by layer, where there is one.
    :param batches: Function that returns a new iterator over the layers' input, batch by batch;
        it is computed anew at each call.
    """

    layers: tuple[str, ...]
    activations: Mapping[str, Activation]
    batches: Callable[[], Iterator[Inputs]]


class Walk(Protocol):
    """All stages of a model in order."""

    def stages(self) -> Iterator[Stage]:
        """Yield each stage; all layers of one must be decided before the next is asked for."""

    def hold(self, layer: str) -> None:
        """Have the float stream go on with this layer's weight as it is now, for it will change."""

    def decide(self, layer: str, weight: Tensor) -> None:
        """Have the quantized stream use this weight from now on, of the layer's shape."""

    @property
    def cost(self) -> dict[str, Any]:
        """Kind of the walk and the work that it took, for the report."""

    def close(self) -> None:
        """Drop all caches."""


def layers_by_name(
    model: nn.Module, names: Iterable[str], parameter: str = "layers"
) -> dict[str, nn.Module]:
    """Return the modules of these names, each with a weight.

    :param parameter: Word for the names in an error.
    :raises ValueError: a name is given twice or is not in the model, or a module has no weight.
    """
    found: dict[str, nn.Module] = {}
    for name in names:
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(
                f"{parameter} must name modules of {type(model).__name__}, got {name!r}: {error}"
            ) from error
        if name in found or module in found.values():
            raise ValueError(
                f"{parameter} must name each module once, {name!r} is there twice (a module may "
                "have several names); remove one"
            )
        if getattr(module, "weight", None) is None:
            raise ValueError(
                f"{parameter} must name modules with a weight, {name!r} "
                f"({type(module).__name__}) has none; leave it out"
            )
        found[name] = module
    return found


def known(layers: Mapping[str, nn.Module], name: str) -> nn.Module:
    """Return one of the layers walked to.

    :raises ValueError: it is none of them.
    """
    if name not in layers:
        raise ValueError(
            f"layer must be one of the {len(layers)} walked to, got {name!r}; see the stage's "
            "layers"
        )
    return layers[name]


def check_model(model: nn.Module) -> None:
    """Refuse a model that computes something else in training than in use.

    :raises ValueError: it is in training mode.
    """
    if model.training:
        raise ValueError(
            f"the model must be in evaluation mode, {type(model).__name__} is in training mode; "
            "call model.eval()"
        )


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


def fit_mask(mask: Tensor | None, x: Tensor, geometry: Geometry) -> Tensor | None:
    """Return the mask of a layer's input vectors; None where it does not read the batch's tokens.

    :param mask: Mask of the batch, bool ``[batch, seq]``.
    :param x: Input of the layer, ``[batch, seq, in]`` or ``[batch * seq, in]``.
    :returns: bool of the leading dimensions of ``x``.
    """
    if mask is None or geometry.kernel_size:
        return None
    if mask.shape == x.shape[:-1]:
        return mask.to(x.device)
    return mask.flatten().to(x.device) if x.shape[:-1] == (mask.numel(),) else None


def stage_inputs(
    name: str, module: nn.Module, number: int, seen: Mapping[str, Tensor], mask: Tensor | None
) -> Inputs:
    """Return a batch's inputs of a stage, and which of their rows count.

    :param name: Name of the stage's first layer, whose module is ``module``.
    :param number: Number of the batch.
    :param seen: Input by stream.
    :param mask: Mask of the batch, bool ``[batch, seq]``.
    :raises ValueError: the streams differ in shape.
    """
    first, *others = seen.values()
    if any(other.shape != first.shape for other in others):
        raise ValueError(
            f"layer {name!r} must receive the same tokens in the float and in the quantized "
            f"stream, batch {number} has {list(first.shape)} and {list(others[0].shape)}, as "
            "experts do that tokens are routed to; use one stream or leave the layer out"
        )
    fitting = fit_mask(mask, first, Geometry.of(module))
    return seen.get("quantized"), seen.get("float"), fitting


def uncalled(layers: Iterable[str]) -> ValueError:
    """Return the error for layers that are no part of the forward pass."""
    return ValueError(
        f"these layers never received data: {', '.join(layers)}; leave them out, or calibrate "
        "with batches that reach them"
    )


# ---- the order of calls -------------------------------------------------------------------------


@dataclass(eq=False)
class LayerOrder:
    """The order in which forward passes of a module call some of its layers, and what is shared.

    :param order: Layers in the order of their calls.
    :param stages: Layers that read one tensor in the same way, in the order of their first one.
    :param activations: ReLU that alone reads a layer's output, by layer.
    :param parts: Children of the module whose output is their last layer's output, with that layer
        and a function from its output to the child's.
    :param returns: Function from the first tensor of the module's output to the whole output.
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

    :param layers: Names within ``module``.
    :param passes: Functions that each run the module once.
    :param prefix: Prefix that makes the layers' names in errors those in the whole model.
    :raises ValueError: a layer is called twice in a pass, or never, or a batch norm follows it.
    :raises TypeError: a layer is neither linear nor a convolution.
    """
    found = LayerOrder()
    geometry = geometries({name: module.get_submodule(name) for name in layers})
    watches: list[Watch] = []
    order: dict[str, None] = {}
    for run in passes:
        watch = Watch()
        with ExitStack() as hooks:
            watch.hook(module, layers, hooks)
            with watch:
                run()
        if watch.twice is not None:
            raise ValueError(
                "a layer must be called once in a forward pass, "
                f"{f'{prefix}{watch.twice}'!r} is called again; leave it out, or give each call a "
                "layer of its own"
            )
        watches.append(watch)
        order.update(dict.fromkeys(watch.reads))
        found.parts.update(watch.parts())
        found.returns = watch.returns or found.returns
        if len(order) == len(geometry):
            break
    else:
        raise uncalled(f"{prefix}{name}" for name in layers if name not in order)
    partners = [watch.partners(geometry) for watch in watches]
    stages: dict[Any, list[str]] = {}
    for name in order:
        stages.setdefault(tuple(first.get(name) for first in partners), []).append(name)
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


def layers_around(
    model: nn.Module,
    blocks: Sequence[str],
    layers: Sequence[str],
    passes: Iterable[Callable[[], object]],
) -> tuple[list[str], LayerOrder]:
    """Return the layers called before the first block, and the order of those after the last.

    :param layers: Names of layers in none of the blocks.
    :param passes: Functions that each run the model once.
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


@torch.no_grad()
def check_same_arguments(
    model: nn.Module, blocks: Sequence[str], run: Callable[[], object]
) -> None:
    """Refuse blocks that cannot be called with the first block's arguments.

    :param blocks: full names, in order.
    :param run: runs the model once.
    :raises ValueError: a block's arguments differ; it is named, and the argument.
    """
    first: dict[str, Any] = {}
    with ExitStack() as hooks:
        for block in blocks:
            hook = _compare(block, blocks[0], first)
            module = model.get_submodule(block)
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        run()


def _compare(block: str, reference: str, first: dict[str, Any]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {f"argument {place}": value for place, value in enumerate(args)}
        named |= {f"argument {name!r}": value for name, value in kwargs.items()}
        hidden = "argument 0" if args else "argument 'hidden_states'"
        leaves = {name: _leaves(value) for name, value in named.items() if name != hidden}
        if block == reference:
            first.update(leaves)
            return
        for name in {**first, **leaves}:
            if not _equal(first.get(name), leaves.get(name)):
                raise ValueError(
                    f"{block} must receive what {reference} does beside the hidden states, but its "
                    f"{name} differs; blocks that are called in different ways are not supported"
                )

    return hook


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []

    def note(leaf: Any) -> Any:
        plain = leaf is None or isinstance(leaf, bool | int | float | str)
        if plain or isinstance(leaf, Tensor):
            found.append(leaf)  # anything else is a cache, which is dropped
        return leaf

    map_leaves(note, value)
    return found


def _equal(one: list[Any] | None, other: list[Any] | None) -> bool:
    if one is None or other is None or len(one) != len(other):
        return False
    return all(_same(a, b) for a, b in zip(one, other, strict=True))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and not isinstance(one, Tensor) and one == other
