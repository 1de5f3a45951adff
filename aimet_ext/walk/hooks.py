"""Looks at the calls of modules, and contexts that change what modules compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.core.interrupts import uninterrupted
from aimet_ext.data.batches import ForwardFn, call_model, map_tensors, module_device


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the tensor that a layer is called with."""
    return args[0] if args else kwargs["input"]


@contextmanager
def counted_calls(model: nn.Module, names: Iterable[str]) -> Iterator[Counter[str]]:
    """Yield the number of calls of some modules, by name, counted until the context ends."""
    calls: Counter[str] = Counter()
    with ExitStack() as hooks:
        for name in names:
            hook = model.get_submodule(name).register_forward_pre_hook(
                lambda *_, name=name: calls.update([name])
            )
            hooks.callback(hook.remove)
        yield calls


class _Reached(BaseException):
    """Ends a forward pass; no Exception, so that a ``forward_fn`` does not catch it by mistake."""


def first_calls(
    modules: Sequence[nn.Module], run: Callable[[], object]
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the arguments of each module's first call, of those that are called, in their order.

    :param run: Forward pass, which ends once all have been called.
    """
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(number: int, call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        if number not in calls:
            # Copies, where the pass goes on: the module may change its arguments in place.
            calls[number] = call if len(modules) == 1 else map_tensors(Tensor.clone, call)
        if len(calls) == len(modules):
            raise _Reached

    with ExitStack() as hooks:
        for number, module in enumerate(modules):

            def hook(_: Any, args: Any, kwargs: Any, number: int = number) -> None:
                note(number, (args, dict(kwargs)))

            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        with suppress(_Reached):
            run()
    return [calls[number] for number in sorted(calls)]


def first_call(
    modules: Sequence[nn.Module], run: Callable[[], object]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments of the first call of any of some modules; None if none is called.

    :param run: Forward pass, which ends at that call.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, dict(kwargs)))
        raise _Reached

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(stop, with_kwargs=True).remove)
        with suppress(_Reached):
            run()
    return calls[0] if calls else None


def seen_inputs(layers: Sequence[nn.Module], run: Callable[[], object]) -> list[Tensor]:
    """Return the inputs of some layers, call by call, in a forward pass that runs to its end."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(layer_input(args, kwargs).clone())  # what comes later may change it in place

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        run()
    return seen


def seen_input(layers: Sequence[nn.Module], run: Callable[[], object]) -> Tensor | None:
    """Return the input of the first of some layers to be called; see :func:`first_call`."""
    call = first_call(layers, run)
    return None if call is None else layer_input(*call)


def run_batch(
    model: nn.Module, batch: Any, number: int, forward_fn: ForwardFn | None = None
) -> Any:
    """Return a model's output for a batch.

    :raises RuntimeError: the forward pass failed; the batch's number is named.
    """
    try:
        return call_model(model, batch, forward_fn)
    except Exception as error:
        who = "the model's forward pass" if forward_fn is None else "forward_fn"
        raise RuntimeError(
            f"{who} failed on batch {number} with {type(error).__name__}: {error}"
        ) from error


# ---- contexts -----------------------------------------------------------------------------------


def checked_weight(name: str, module: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight to compute with in place of the module's own, on its device, in its dtype.

    :raises ValueError: it has another shape.
    """
    own = module.weight
    assert isinstance(own, Tensor)
    if weight.shape != own.shape:
        raise ValueError(
            f"the weight of {name!r} must be of shape {list(own.shape)}, got {list(weight.shape)}"
        )
    return weight.detach().to(own)


@contextmanager
def replaced_forward(module: nn.Module, output: Callable[[], Any]) -> Iterator[None]:
    """Return a context in which a module returns ``output()`` for any arguments."""
    own = vars(module).get("forward")
    patched: Any = module
    patched.forward = lambda *args, **kwargs: output()
    try:
        yield
    finally:
        if own is None:
            del patched.forward
        else:
            patched.forward = own


@contextmanager
def swapped_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Return a context in which layers compute with other weights; layers tied to them do not."""
    kept: list[tuple[dict[str, Any], Any]] = []
    try:
        for name in weights:
            layer = model.get_submodule(name)
            weight = checked_weight(name, layer, weights[name])
            kept.append((layer._parameters, layer._parameters["weight"]))
            layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        with uninterrupted():
            for parameters, parameter in reversed(kept):
                parameters["weight"] = parameter


@contextmanager
def on_device(module: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """Move a module to a device (None: leave it) until the context ends."""
    if device is None:
        yield
        return
    home = module_device(module)
    try:
        module.to(device)
        yield
    finally:
        module.to(home)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Return a context of evaluation mode without key-value caches; flags are restored after it."""
    training = [(module, module.training) for module in model.modules()]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caching = [(c, c.use_cache) for c in configs.values() if hasattr(c, "use_cache")]
    try:
        model.eval()
        for config, _ in caching:
            config.use_cache = False
        yield
    finally:
        with uninterrupted():
            for module, flag in training:
                module.training = flag
            for config, value in caching:
                config.use_cache = value
