"""Parameters that a model uses element by element, whatever their shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from aimet_ext.data.batches import call_model, tensors_in
from aimet_ext.walk.hooks import evaluating

# What computes each number of its result of one number of each operand; without underscores.
_ELEMENTWISE = {
    *("abs", "add", "clamp", "div", "exp", "expm1", "log", "log1p", "mul", "neg", "pow", "rsub"),
    *("reciprocal", "rsqrt", "sigmoid", "softplus", "sqrt", "sub", "tanh", "true_divide"),
    # The same numbers in another form.
    *("bfloat16", "double", "float", "half", "to", "type", "clone", "contiguous", "detach", "get"),
    *("expand", "getitem", "permute", "reshape", "squeeze", "transpose", "unsqueeze", "view"),
}


_ADDING = {"addbmm", "addmm", "addmv", "baddbmm"}


@torch.no_grad()
def elementwise(model: nn.Module, dummy_input: Any, names: Iterable[str]) -> set[str]:
    """Return the parameters of which a run uses each number by itself, up to where data comes in.

    No product, lookup or convolution reads them, nor what is computed of them and other parameters
    alone: they multiply as gains and decays do. Functions that are not known do not count as such.

    :param model: Model that computes in float.
    :param names: Names of the parameters to look at.
    """
    watch = _Watch({name: model.get_parameter(name) for name in names})
    with evaluating(model), watch:
        call_model(model, dummy_input)
    return watch.read - watch.multiplied


class _Watch(TorchFunctionMode):
    """Notes what reads parameters, and what is computed of parameters alone."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.read: set[str] = set()
        self.multiplied: set[str] = set()
        # With the tensors themselves: numbers of those that are gone are given again.
        self._made: dict[int, tuple[Tensor, set[str]]] = {
            id(value): (value, {name}) for name, value in parameters.items()
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function, and note the parameters among what it reads."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        given: list[Tensor] = tensors_in((args, kwargs))
        names = set[str]().union(*(self._made[id(x)][1] for x in given if id(x) in self._made))
        if not names:
            return output
        self.read |= names
        plain = (resolve_name(func) or "").rpartition(".")[2].strip("_")
        if plain in _ADDING and args and id(args[0]) in self._made:
            names = names - self._made[id(args[0])][1]  # it is added to a product of others
        if plain not in _ELEMENTWISE:
            self.multiplied |= names
        elif all(id(x) in self._made for x in given):
            self._made.update({id(x): (x, names) for x in tensors_in(output)})
        return output
