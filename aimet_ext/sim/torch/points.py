"""The quantizers of a PyTorch simulation one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.data.batches import ForwardFn, call_model
from aimet_ext.files.tensors import of_parameter
from aimet_ext.sim.points import Kind, Look, Point, Points, Range, Run, first_output
from aimet_ext.sim.torch.state import named_quantizers

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

    def points(self) -> dict[str, Point]:
        found: dict[int, Point] = {}
        for place, quantizer in named_quantizers(self.sim.model):
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
    def running(self, names: Collection[str], forward_fn: ForwardFn | None = None) -> Iterator[Run]:
        def look(name: str, tensor: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
            return quantize(tensor) if name in names else tensor

        with torch.no_grad(), self.looking(look, forward_fn) as run:
            yield run

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
