"""Contexts in which a model computes a little differently, and a look at what reaches a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from aimet_ext.walk.hooks import layer_input
from aimet_ext.walk.layers import checked_weight

__all__ = ["replaced_forward", "seen_input", "swapped_weights"]


class _Reached(BaseException):
    """Ends a forward pass; no Exception, so that a ``forward_fn`` does not catch it by mistake."""


def seen_input(layer: nn.Module, run: Callable[[], object]) -> Tensor | None:
    """What a layer is called with while ``run`` runs, which ends there; None if it is not."""
    seen: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(layer_input(args, kwargs))
        raise _Reached

    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with suppress(_Reached):
            run()
    finally:
        hook.remove()
    return seen[0] if seen else None


@contextmanager
def replaced_forward(module: nn.Module, output: Callable[[], Any]) -> Iterator[None]:
    """Context in which a module returns ``output()``, whatever it is called with."""
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
    """Context in which layers compute with other weights, and layers tied to them do not."""
    kept: list[tuple[dict[str, Any], Any]] = []
    try:
        for name in weights:
            layer = model.get_submodule(name)
            weight = checked_weight(name, layer, weights[name])
            kept.append((layer._parameters, layer._parameters["weight"]))
            layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for parameters, parameter in reversed(kept):
            parameters["weight"] = parameter
