"""The quantizers of a PyTorch simulation one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aimet_ext.core.interrupts import uninterrupted
from aimet_ext.data.batches import ForwardFn, call_model
from aimet_ext.files.tensors import of_parameter, parameter_quantizer
from aimet_ext.models.topology import BlockTopology
from aimet_ext.sim.points import Kind, Look, NormGain, Point, Points, Range, Run, first_output
from aimet_ext.sim.torch.state import named_quantizers
from aimet_ext.walk.blocks import find_stack
from aimet_ext.walk.hooks import evaluating

_KINDS: dict[str, Kind] = {
    "param_quantizers": "weight",
    "output_quantizers": "activation",
    "input_quantizers": "input",
}


def _unquantized(name: str, tensor: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
    return tensor


def _looked(
    look: Look, name: str, quantize: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    return lambda tensor: look(name, tensor, quantize)


class TorchPoints(Points):
    """See :class:`aimet_ext.sim.points.Points`."""

    sim: Any

    def points(self, places: Collection[str] | None = None) -> dict[str, Point]:
        found: dict[int, Point] = {}
        model = self.sim.model
        if places is None:
            every = named_quantizers(model)
        else:
            every = [(place, model.get_submodule(place)) for place in places]
        for place, quantizer in every:
            if id(quantizer) not in found and hasattr(quantizer, "qmin"):
                found[id(quantizer)] = _point(place, quantizer)
        return {point.name: point for point in found.values()}

    @contextmanager
    def looking(self, look: Look, forward_fn: ForwardFn | None = None) -> Iterator[Run]:
        forwards = {
            point.own: _looked(look, name, _own_forward(point.own))
            for name, point in self.points().items()
        }

        def run(batch: Any) -> Tensor:
            return first_output(call_model(self.sim.model, batch, forward_fn))

        with replaced_quantizers(forwards):
            yield run

    @contextmanager
    def seeing_keys(
        self, see: Callable[[int, Tensor], Tensor], forward_fn: ForwardFn | None = None
    ) -> Iterator[Run]:
        from aimet_ext.models.kv_cache import seen_keys  # loads transformers

        with seen_keys(self.sim.model, see), self.looking(_unquantized, forward_fn) as run:
            yield run

    @contextmanager
    def seeing_outputs(
        self,
        layers: Sequence[str],
        see: Callable[[str, int, Tensor], Tensor],
        forward_fn: ForwardFn | None = None,
    ) -> Iterator[Run]:
        model = self.sim.model
        passing = {quantizer: _passing for _, quantizer in named_quantizers(model)}

        def run(batch: Any) -> Tensor:
            return first_output(call_model(model, batch, forward_fn))

        with replaced_quantizers(passing), evaluating(model), ExitStack() as stack:
            for name in layers:
                hook = partial(_seen_output, partial(see, name, 0))
                stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
            for block in find_stack(model, layers):
                stack.enter_context(_recomputed(model.get_submodule(block)))
            yield run

    @contextmanager
    def running(self, names: Collection[str], forward_fn: ForwardFn | None = None) -> Iterator[Run]:
        def look(name: str, tensor: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
            return quantize(tensor) if name in names else tensor

        with torch.no_grad(), self.looking(look, forward_fn) as run:
            yield run

    @contextmanager
    def substituting(
        self,
        weights: Mapping[str, Callable[[], Tensor]],
        gains: Mapping[str, Callable[[], Tensor]],
        forward_fn: ForwardFn | None = None,
    ) -> Iterator[Run]:
        model = self.sim.model
        replaced = {f"{name}.param_quantizers.weight" for name in weights}
        replaced |= {parameter_quantizer(name) for name in gains}
        forwards: dict[Any, Callable[[Tensor], Tensor]] = {}
        for name, quantizer in named_quantizers(model):
            if not of_parameter(name) or name in replaced or not quantizer.is_initialized():
                forwards[quantizer] = _passing
        for name, compute in weights.items():
            quantizer = model.get_submodule(name).param_quantizers["weight"]
            forwards[quantizer] = partial(_instead, compute)
        held = [
            (model.get_submodule(name.rpartition(".")[0])._parameters, name.rpartition(".")[2])
            for name in gains
        ]
        own = [parameters[key] for parameters, key in held]
        blocks = [model.get_submodule(name) for name in find_stack(model, list(weights))]

        def run(batch: Any) -> Tensor:
            for (parameters, key), compute in zip(held, gains.values(), strict=True):
                parameters[key] = compute()
            return first_output(call_model(model, batch, forward_fn))

        try:
            with replaced_quantizers(forwards), evaluating(model), ExitStack() as stack:
                for block in blocks:
                    stack.enter_context(_recomputed(block))
                yield run
        finally:
            with uninterrupted():
                for (parameters, key), parameter in zip(held, own, strict=True):
                    parameters[key] = parameter

    def norm_gains(self, blocks: Sequence[BlockTopology]) -> list[NormGain]:
        return norm_gains(self.sim.model, blocks)

    def read_gain(self, name: str) -> Tensor:
        return self.sim.model.get_parameter(name).detach()

    @torch.no_grad()
    def write_gain(self, name: str, values: Tensor) -> None:
        self.sim.model.get_parameter(name).copy_(values)

    @contextmanager
    def seeing(self, module: str, see: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        forwards: dict[Any, Callable[[Tensor], Tensor]] = {}
        for name, quantizer in named_quantizers(self.sim.model.get_submodule(module), module):
            if not of_parameter(name):
                forwards.setdefault(quantizer, partial(see, name))
        with replaced_quantizers(forwards):
            yield

    @contextmanager
    def with_ranges(self, module: str, ranges: Mapping[str, Range]) -> Iterator[None]:
        every = named_quantizers(self.sim.model.get_submodule(module), module)
        points = {name: _point(name, quantizer) for name, quantizer in every if name in ranges}

        def see(name: str, tensor: Tensor) -> Tensor:
            point = points.get(name)
            return tensor if point is None else point.quantize(tensor, *ranges[name])

        with self.seeing(module, see):
            yield

    def calibrate_all(self, batches: Sequence[Any], forward_fn: ForwardFn | None = None) -> None:
        def run(model: nn.Module) -> None:
            with torch.no_grad():
                for batch in batches:
                    call_model(model, batch, forward_fn)

        self.sim.compute_encodings(run)

    @torch.no_grad()
    def write_range(self, point: Point, low: float, high: float, *, freeze: bool = True) -> None:
        own = point.own
        grid = point.grid(low, high)
        like = own.get_min() if own.is_initialized() else torch.empty(own.shape)
        ends = (grid.scale * (grid.offset + end) for end in (point.qmin, point.qmax))
        own.set_range(*(end.reshape(()).to(like).expand(own.shape) for end in ends))
        own.allow_overwrite(not freeze)


def _point(place: str, quantizer: Any) -> Point:
    module, _, rest = place.rpartition(".")
    module, _, kind = module.rpartition(".")
    name = {"param_quantizers": f"{module}.{rest}", "output_quantizers": module}.get(kind, "")
    if kind == "output_quantizers" and rest != "0":
        name = f"{module} (output {rest})"
    if kind == "input_quantizers":
        name = f"{module} (input {rest})"
    known = quantizer.is_initialized()
    return Point(
        name=name.lstrip("."),
        kind=_KINDS.get(kind, "activation"),
        qmin=int(quantizer.qmin),
        qmax=int(quantizer.qmax),
        symmetric=bool(quantizer.symmetric),
        low=float(quantizer.get_min().detach().min()) if known else None,
        high=float(quantizer.get_max().detach().max()) if known else None,
        frozen=not quantizer.is_overwrite_allowed(),
        single=quantizer.block_size is None and math.prod(quantizer.shape) == 1,
        half_up=False,
        place=place,
        own=quantizer,
    )


def _passing(tensor: Tensor) -> Tensor:
    return tensor


def _seen_output(see: Callable[[Tensor], Tensor], _: nn.Module, args: Any, output: Any) -> Tensor:
    return see(output)


def _instead(compute: Callable[[], Tensor], tensor: Tensor) -> Tensor:
    return compute().to(tensor.dtype)


@contextmanager
def _recomputed(block: Any) -> Iterator[None]:
    """Open a context in which a block keeps its inputs alone for its way back."""
    own, kept = block.forward, vars(block).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return own(*args, **kwargs)
        return checkpoint(own, *args, use_reentrant=False, **kwargs)

    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if kept is not None:
            block.forward = kept


def norm_gains(model: nn.Module, blocks: Sequence[BlockTopology]) -> list[NormGain]:
    """Return the gains of a model's norms: modules named after one, with a vector as weight."""
    found: list[NormGain] = []
    known = {
        f"{block.name}.{pair.sides[0].module}": (block, pair)
        for block in blocks
        for pair in block.pairs
        if pair.kind in ("norm_qkv", "norm_mlp")
    }
    offset = next((pair.sides[0].gain_offset for _, pair in known.values()), 0.0)
    inside = tuple(f"{block.name}." for block in blocks)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, module in model.named_modules():
        weight: Any = module._parameters.get("weight")
        if weight is None or weight.dim() != 1 or "norm" not in type(module).__name__.lower():
            continue
        readers: tuple[str, ...] = ()
        added = offset
        if name in known:
            block, pair = known[name]
            added = pair.sides[0].gain_offset
            if all(side.index is None for side in pair.sides):
                readers = tuple(f"{block.name}.{side.module}" for side in pair.sides[1:])
        elif blocks and not name.startswith(inside):
            outside = ((n, m) for n, m in model.named_modules() if not n.startswith(inside))
            readers = tuple(
                n
                for n, m in outside
                if isinstance(m, nn.Linear)
                and m.in_features == len(weight)
                and id(m.weight) not in tables
            )
        keys = [key for key in ("weight", "bias") if module._parameters.get(key) is not None]
        names = {key: f"{name}.{key}" for key in keys}
        found.append(NormGain(module=name, part=name, names=names, offset=added, readers=readers))
    return found


def _own_forward(quantizer: nn.Module) -> Callable[[Tensor], Tensor]:
    return partial(type(quantizer).forward, quantizer)


@contextmanager
def replaced_quantizers(replacements: Mapping[Any, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Open a context in which quantizers compute something else."""
    try:
        for quantizer, forward in replacements.items():
            quantizer.forward = forward
        yield
    finally:
        for quantizer in replacements:
            vars(quantizer).pop("forward", None)
