"""Parts of an ONNX model that compute in torch, and what is watched or changed while they do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from aimet_ext.core.affine import Grid, fake_quantize, minmax_range, scale_offset
from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.layers import OnnxLayer
from aimet_ext.sim.protocol import Range

__all__ = [
    "FloatState",
    "OnnxPart",
    "carried",
    "live_quantizer",
    "no_forward_fn",
    "observed",
    "observed_ranges",
    "switched_off",
]

_FLOATS = frozenset((1, 10, 11, 16))  # float32, float16, float64, bfloat16


@dataclass(frozen=True, eq=False, kw_only=True)
class OnnxPart:
    """A block of a model as a torch module, which holds copies of stored values.

    :param layers: layers by their names within the block.
    :param stored: names of all values that the block has copies of, weights of layers among them.
    :param tensors: names of the tensors that it computes or reads.
    :param commit: writes its parameters back.
    :param reload: reads them again.
    """

    layers: Mapping[str, OnnxLayer]
    stored: Collection[str]
    tensors: Collection[str]
    commit: Callable[[], None]
    reload: Callable[[], None]


def carried(name: str) -> Any:
    """An attribute of an adaptor that AIMET's simulation carries, None before it is set.

    So it follows the simulation through ``copy.deepcopy``.
    """
    return property(
        lambda adaptor: getattr(adaptor.sim, name, None),
        lambda adaptor, value: setattr(adaptor.sim, name, value),
    )


@contextmanager
def switched_off(quantizers: Collection[Any]) -> Iterator[None]:
    """Context in which these quantizers, which are on, do nothing."""
    try:
        for quantizer in quantizers:
            quantizer.enabled = False
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enabled = True


def no_forward_fn() -> TypeError:
    """The error for a ``forward_fn``, which has no model to call."""
    return TypeError(
        "forward_fn must be left out for an ONNX simulation, whose model is called with its "
        "inputs by name; got one"
    )


class FloatState(Mapping[str, Tensor]):
    """Float initializers of a model by name, each one read when it is asked for.

    :param without: names that are left out.
    """

    def __init__(self, graph: OnnxGraph, without: Collection[str] = ()) -> None:
        self._graph = graph
        stored = graph.initializers.items()
        self._names = [n for n, t in stored if t.data_type in _FLOATS and n not in without]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._graph.initializers:
            raise KeyError(name)
        return self._graph.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextmanager
def observed(module: nn.Module, observer: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Context in which every tensor of a block passes through a function.

    :param observer: from a tensor's name and value to what takes its place.
    :raises ValueError: the module is not a block that can be watched.
    """
    block: Any = module
    if not hasattr(block, "observer"):
        raise ValueError(
            "a decoder block of the ONNX model is required to watch tensors, got a module that "
            "computes nothing by itself; call find_blocks first"
        )
    before = block.observer
    block.observer = observer
    try:
        yield
    finally:
        block.observer = before


def observed_ranges(
    module: nn.Module, run: Callable[[], object], names: Collection[str]
) -> dict[str, Range]:
    """Range of each named tensor of a block that is seen while ``run`` runs it."""
    ranges: dict[str, Range] = {}
    wanted = frozenset(names)

    def observe(name: str, tensor: Tensor) -> Tensor:
        if name in wanted and tensor.numel() and tensor.is_floating_point():
            low, high = ranges.get(name, (float("inf"), -float("inf")))
            ranges[name] = (min(low, float(tensor.min())), max(high, float(tensor.max())))
        return tensor

    with observed(module, observe):
        run()
    return ranges


def live_quantizer(quantizer: Any) -> Callable[[Tensor], Tensor]:
    """What an activation quantizer does once its range is that of the tensor at hand.

    Gradients pass straight through the rounding; the range counts as a constant.
    """
    symmetric = bool(quantizer.use_symmetric_encodings)
    steps = 2 ** int(quantizer.bitwidth) - 1
    low_int = -(steps + 1) // 2 if symmetric else 0
    integers = (low_int, low_int + steps, symmetric)

    def quantize(tensor: Tensor) -> Tensor:
        if not tensor.numel() or not tensor.is_floating_point():
            return tensor
        low, high = minmax_range(tensor.detach(), (1,), *integers)
        scale, offset = scale_offset(low.float(), high.float(), *integers)
        return fake_quantize(tensor, Grid(scale, offset, *integers[:2], half_up=True))

    return quantize
