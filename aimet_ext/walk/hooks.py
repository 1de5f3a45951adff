"""What a forward pass does with layers: which tensors they read, and what reads their outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from aimet_ext.data.batches import map_tensors
from aimet_ext.data.moments import Geometry

__all__ = ["Watch", "layer_input", "tensor_version"]

# A tensor's number, and how often it was changed in place.
_Token = tuple[int, int]


class Watch(TorchFunctionMode):
    """Which tensors layers read in a forward pass, and which functions read their outputs.

    No tensor is kept alive for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: dict[str, _Token] = {}
        self.twice: str | None = None
        self._readers: dict[str, list[Callable[..., Any]]] = {}
        self._outputs: dict[_Token, str] = {}
        self._numbers = WeakTensorKeyDictionary()
        self._next = count()

    def hook(self, name: str, module: nn.Module, hooks: ExitStack) -> None:
        """Watch a layer until ``hooks`` ends."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in self.reads:
                self.twice = name
            self.reads[name] = self._token(layer_input(args, kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._readers[name] = []
            if isinstance(output, Tensor):
                self._outputs[self._token(output)] = name

        hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        hooks.callback(module.register_forward_hook(after).remove)

    def partners(self, geometry: Mapping[str, Geometry]) -> dict[str, str]:
        """By layer, the first one that reads the same tensor in the same way."""
        first: dict[Any, str] = {}
        return {
            name: first.setdefault((token, geometry[name]), name)
            for name, token in self.reads.items()
        }

    def sole_reader(self, name: str) -> Callable[..., Any] | None:
        """The function that alone reads a layer's output."""
        readers = self._readers[name]
        return readers[0] if len(readers) == 1 else None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function, and note what it read unless it handed its input on as it is."""
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        read = [(x, self._outputs[t]) for x in inputs if (t := self._known(x)) in self._outputs]
        versions = [tensor_version(x) for x, _ in read]
        output = func(*args, **kwargs)
        outputs = _tensors(output)
        for (x, name), version in zip(read, versions, strict=True):
            passed_on = any(y is x for y in outputs) and tensor_version(x) == version
            if outputs and not passed_on:
                self._readers[name].append(_reader(func, args, kwargs))
        return output

    def _known(self, tensor: Tensor) -> _Token | None:
        number = self._numbers.get(tensor)
        return None if number is None else (number, tensor_version(tensor))

    def _token(self, tensor: Tensor) -> _Token:
        if tensor not in self._numbers:
            self._numbers[tensor] = next(self._next)
        return self._numbers[tensor], tensor_version(tensor)


def _reader(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What reads a tensor: a function, or the one that it is with these arguments."""
    if func is functional.hardtanh:  # what nn.ReLU6 calls
        low, high = [*args[1:3], None, None][:2]
        if (kwargs.get("min_val", low), kwargs.get("max_val", high)) == (0, 6):
            return functional.relu6
    return func


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(found.append, tree)
    return found


def tensor_version(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return 0 if tensor.is_inference() else tensor._version


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor that a layer is called with."""
    return args[0] if args else kwargs["input"]
