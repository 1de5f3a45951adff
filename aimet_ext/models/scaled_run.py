"""One run of a block in which every layer's output has a multiplier that starts at 1.

The gradients of what a layer reads with respect to the multipliers say which channels of which
other layer reach it, and how: that is all that is looked at, whatever the block computes between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aimet_ext.data.batches import map_tensors, tensors_in
from aimet_ext.models.experts import all_tokens
from aimet_ext.models.proof import Float64Casts
from aimet_ext.walk.hooks import evaluating, replaced_forward
from aimet_ext.walk.states import hidden_state

_NOISE = 0.05  # beside outputs and gains, so that no channel is zero throughout


@dataclass(eq=False)
class Seen:
    """A layer or norm in a run.

    :param x: What it reads, ``[..., in]``.
    :param y: What it returns, with multipliers of 1.
    :param call: Arguments of its call.
    :param is_norm: True if its weight is a vector.
    :param channels: The multiplier of each output channel, ``[out]``; None if it returns something
        else than a tensor of its rows, as a router may.
    :param tokens: That of each token, ``[..., 1]``.
    """

    name: str
    module: nn.Module
    x: Tensor
    y: Any
    call: tuple[tuple[Any, ...], dict[str, Any]]
    is_norm: bool
    channels: Tensor | None = None
    tokens: Tensor | None = None


@dataclass(eq=False)
class ScaledRun:
    """A block's run in float64 on a fixed call, and further ones with multipliers of choice.

    Layers have a matrix ``[out, in]`` as weight and map the last dimension; norms have a vector.
    A layer that is called more than once is neither.

    :param args: Positional arguments.
    :param kwargs: Keyword arguments.
    :param seen: Layers and norms by name, in the order of their calls.
    :param called: What each module with a weight reads, in the order of their calls.
    :param repeated: Modules with a weight that are called more than once.
    :param uncalled: Modules with a matrix as weight that are not called.
    :param leaving: Hidden states that leave the block, and all other tensors that do.
    :param written: Layers and norms whose outputs are among these hidden states, or added to them.
    """

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    seen: dict[str, Seen] = field(default_factory=dict)
    called: dict[str, Tensor] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)
    uncalled: list[str] = field(default_factory=list)
    leaving: list[Tensor] = field(default_factory=list)
    written: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._paused: str | None = None
        weighted = {
            name: module
            for name, module in self.block.named_modules()
            if name and isinstance(module._parameters.get("weight"), Tensor)
        }
        with ExitStack() as hooks:
            for name, module in weighted.items():
                before, after = partial(self._before, name), partial(self._note, name)
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after, with_kwargs=True).remove)
            with torch.enable_grad():
                leaving = self._run()
        self.leaving = [tensor.detach().clone() for tensor in leaving]
        self.written = self._written(leaving[0])
        for name in self.repeated:
            self.seen.pop(name, None)
            del self.called[name]
        called = self.called.keys() | self.repeated
        self.uncalled = [n for n, m in weighted.items() if n not in called and _is_matrix(m)]

    @cached_property
    def layers(self) -> dict[str, Seen]:
        """The layers, in the order of their calls."""
        return {name: seen for name, seen in self.seen.items() if not seen.is_norm}

    @cached_property
    def norms(self) -> dict[str, Seen]:
        """The norms, in the order of their calls."""
        return {name: seen for name, seen in self.seen.items() if seen.is_norm}

    def slopes(
        self, reader: str, cotangent: Tensor, *, of_tokens: bool = False
    ) -> dict[str, Tensor]:
        """Return the derivatives of ``Σ cotangent · x`` by the multipliers, where there are any.

        :param reader: Layer that reads ``x``.
        :param cotangent: Of the shape of ``x``.
        :param of_tokens: True for the multipliers of tokens, else those of channels.
        :returns: By the name of the layer or norm.
        """
        x = self.seen[reader].x
        if not x.requires_grad:
            return {}
        leaves = {
            name: leaf
            for name, seen in self.seen.items()
            if (leaf := seen.tokens if of_tokens else seen.channels) is not None and name != reader
        }
        found = torch.autograd.grad(
            x, [*leaves.values()], cotangent, retain_graph=True, allow_unused=True
        )
        return {
            name: slope.cpu()
            for name, slope in zip(leaves, found, strict=True)
            if slope is not None and bool(slope.any())
        }

    @torch.no_grad()
    def scaled(self, name: str, multiplier: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return what every layer reads, and all tensors that leave the block, in another run.

        All layers return what they did before.

        :param name: Layer or norm whose output channels are multiplied.
        :param multiplier: ``[out]``.
        """
        inputs: dict[str, Tensor] = {}

        def note(layer: str, _: nn.Module, args: Any, kwargs: Any) -> None:
            inputs[layer] = _first(args, kwargs).detach().clone()

        def held(seen: Seen) -> Any:
            if seen.name == name:
                return seen.y * multiplier
            return map_tensors(Tensor.clone, seen.y)

        def times(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output * multiplier

        with ExitStack() as stack:
            for layer, seen in self.layers.items():
                hook = partial(note, layer)
                handle = seen.module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
                stack.enter_context(replaced_forward(seen.module, partial(held, seen)))
            if name in self.norms:
                stack.callback(self.norms[name].module.register_forward_hook(times).remove)
            leaving = self._run()
        return inputs, [tensor.clone() for tensor in leaving]

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        new = name not in self.called and torch.is_grad_enabled()
        if new and _maps(module._parameters["weight"], _first(args, kwargs)):
            self._paused = name  # what a layer returns is taken as a constant
            torch.set_grad_enabled(False)

    def _note(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if name in self.called:
            self.repeated.add(name)
            return None
        if name == self._paused:
            self._paused = None
            torch.set_grad_enabled(True)
        x, weight = _first(args, kwargs), module._parameters["weight"]
        assert weight is not None
        call = args, dict(kwargs)
        if x is None:
            return None
        self.called[name] = x
        if not x.is_floating_point():
            return None
        if weight.dim() == 1 and isinstance(output, Tensor) and output.shape[-1:] == weight.shape:
            seen = self.seen[name] = Seen(name, module, x, output.detach(), call, True)
            return self._scale(seen, output)
        if not _maps(weight, x):
            return None
        output = map_tensors(Tensor.detach, output)
        seen = self.seen[name] = Seen(name, module, x, output, call, False)
        if not isinstance(output, Tensor) or output.shape[-1] != weight.shape[0]:
            return output
        generator = torch.Generator().manual_seed(len(self.seen))
        noise = torch.randn(output.shape, dtype=torch.float64, generator=generator).to(output)
        seen.y = output + _NOISE * noise * output.std(correction=0).clamp_min(1e-3)
        return self._scale(seen, seen.y)

    @staticmethod
    def _scale(seen: Seen, y: Tensor) -> Tensor:
        """Return an output times multipliers of 1, which are noted."""
        seen.channels = torch.ones_like(y.detach().flatten(0, -2)[0]).requires_grad_()
        seen.tokens = torch.ones_like(y.detach()[..., :1]).requires_grad_()
        return y * seen.channels * seen.tokens

    def _run(self) -> list[Tensor]:
        """Run the block; return its hidden states, and what else it returns or puts somewhere."""
        block = self.block

        def cast(tensor: Tensor) -> Tensor:
            tensor = tensor.detach()
            return tensor.double() if tensor.is_floating_point() else tensor.clone()

        args, kwargs = map_tensors(cast, (tuple(self.args), dict(self.kwargs)))
        given = {id(tensor) for tensor in tensors_in((args, kwargs))}
        with evaluating(block), Float64Casts(), all_tokens(block):
            output = functional_call(block, self.values, args, kwargs, tie_weights=False)
        stores = [value for value in (*args, *kwargs.values()) if isinstance(value, dict | list)]
        others = [tensor for tensor in tensors_in((output, stores)) if id(tensor) not in given]
        return [hidden_state(output), *others]

    def _written(self, hidden: Tensor) -> tuple[str, ...]:
        """Return the layers and norms whose outputs reach the block's without another layer."""
        leaves = {n: s.channels for n, s in self.seen.items() if s.channels is not None}
        if not hidden.requires_grad or not leaves:
            return ()
        found = torch.autograd.grad(
            hidden,
            [*leaves.values()],
            torch.ones_like(hidden),
            retain_graph=True,
            allow_unused=True,
        )
        return tuple(n for n, slope in zip(leaves, found, strict=True) if slope is not None)

    @cached_property
    def values(self) -> dict[str, Tensor]:
        """Parameters and buffers of the block in float64, gains with some noise.

        What is not finite is left to those who use the weights.
        """
        block = self.block
        named = (block.named_parameters, block.named_buffers)
        every = (pair for names in named for pair in names(remove_duplicate=False))
        values = {name: value.detach() for name, value in every}
        values = {n: v.double() if v.is_floating_point() else v for n, v in values.items()}
        for name, _ in block.named_parameters(remove_duplicate=False):
            values[name] = values[name].nan_to_num(0.0, 0.0, 0.0)
        generator = torch.Generator().manual_seed(0)
        for name, value in values.items():
            if name.rpartition(".")[2] == "weight" and value.dim() == 1:
                noise = torch.randn(value.shape, dtype=torch.float64, generator=generator)
                values[name] = value + _NOISE * noise.to(value)
        return values


def _first(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _maps(weight: Tensor | None, x: Tensor | None) -> bool:
    """Return True if a weight is a matrix for the last dimension of an input."""
    if weight is None or x is None or weight.dim() != 2:
        return False
    return x.is_floating_point() and x.shape[-1] == weight.shape[1]


def _is_matrix(module: Any) -> bool:
    shape = module.weight.shape
    return len(shape) >= 2 and all(side == 1 for side in shape[2:])
