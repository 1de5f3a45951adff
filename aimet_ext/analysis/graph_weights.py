"""The weights of an ONNX graph that get widths: PyTorch computes the graph, for its gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from aimet_ext.analysis.weight_costs import Fisher, Numbers, Unit, stored_bits
from aimet_ext.core.affine import Grid, dequantize, quantize
from aimet_ext.data.batches import ForwardFn
from aimet_ext.grids.onnx_layers import OnnxTable, without_type
from aimet_ext.sim.points import Run
from aimet_ext.sim.protocol import SimAdaptor
from aimet_ext.specs import QSpec, fit_blocks


@dataclass(frozen=True, eq=False)
class GraphWeights:
    """See :class:`aimet_ext.analysis.weight_costs.Subject`.

    A gradient is that of all samples in a batch: their outcomes are drawn one by one, so the
    square of their sum is, on the average, the sum of their squares.

    :param places: Layer of each unit, by its identity.
    """

    adaptor: SimAdaptor
    batches: Sequence[Any]
    forward_fn: ForwardFn | None
    places: dict[int, str] = field(default_factory=dict)
    mask_model: Any = None  # inputs have names

    def units(
        self, specs: Sequence[QSpec], left_out: Callable[[Sequence[str]], set[str]]
    ) -> list[Unit]:
        """Return the weights of linear layers that are quantized, but the output layer."""
        table = OnnxTable(self.adaptor)
        layers = {
            name: layer
            for name, layer in table.layers.items()
            if isinstance(layer, nn.Linear) and table.quantizers[name] is not None
            if not table.left_out.intersection(table.sharing[name])
        }
        aliases = {name: table.aliases[name] for name in layers}
        excluded = left_out([each for names in aliases.values() for each in reversed(names)])
        layers = {n: layer for n, layer in layers.items() if not excluded.intersection(aliases[n])}
        own_names = _dotted(layers)
        units: dict[str, Unit] = {}  # by the layer that is first to have a weight
        for name, layer in layers.items():
            first = table.sharing[name][0]
            if first not in units:
                units[first] = Unit(names=[], layers=[layer], bits=[], quantizers=[])
            units[first].names.append(own_names[name])
        for spec in specs:
            plan = fit_blocks(layers, dict.fromkeys(layers, spec))
            with ExitStack() as undo:  # grids as they will be deployed
                table.apply(plan, undo)
                for name, unit in units.items():
                    quantizer, own = self.adaptor.weight_quantizer(name), plan.specs[name]
                    assert quantizer is not None and own is not None
                    grid = quantizer.grid()
                    unit.quantizers.append(partial(_rounded, grid=grid))
                    unit.bits.append(stored_bits(own, unit.weight, grid.scale.numel()))
        self.places.update((id(unit), name) for name, unit in units.items())
        return list(units.values())

    @contextmanager
    def watched(self, fisher: Fisher) -> Iterator[Run]:
        """Open a context with a run whose gradients meet the units."""

        def value(unit: Unit) -> Tensor:
            unit.reached = True
            moved = unit.weight + fisher.root
            if moved.requires_grad:
                moved.register_hook(lambda gradient: unit.meet([gradient.detach()]))
            return moved

        with self._running({unit: partial(value, unit) for unit in fisher.units}) as run:
            yield run

    @contextmanager
    def changed(self, numbers: Numbers) -> Iterator[Run]:
        """Open a context with a run in which weights are rounded by their choices."""

        def value(unit: Unit, number: int) -> Tensor:
            return unit.weight + unit.error(number)

        with self._running({unit: partial(value, unit, n) for unit, n in numbers}) as run:
            yield run

    @contextmanager
    def _running(self, weights: Mapping[Unit, Callable[[], Tensor]]) -> Iterator[Run]:
        named = {self.places[id(unit)]: compute for unit, compute in weights.items()}
        with (
            self.adaptor.disabled_quantizers(),
            self.adaptor.substituting(named, {}, self.forward_fn) as run,
        ):
            yield run


def _dotted(names: Iterable[str]) -> dict[str, str]:
    """Return names like those of a checkpoint: ``model.layers.0.mlp.up_proj``.

    Names stay as they are where two would be one.
    """
    found = {name: without_type(name).strip("/").replace("/", ".") for name in names}
    counts = Counter(found.values())
    return {name: short if counts[short] == 1 else name for name, short in found.items()}


def _rounded(weight: Tensor, grid: Grid) -> Tensor:
    return dequantize(quantize(weight, grid), grid)


@contextmanager
def weights_of_graph(
    adaptor: SimAdaptor, dataloader: Any, forward_fn: ForwardFn | None
) -> Iterator[GraphWeights]:
    """Open a context with the float weights of a simulation of aimet_onnx."""
    batches = adaptor.batches(dataloader, opaque=forward_fn is not None)
    with adaptor.preserved_state():
        yield GraphWeights(adaptor, batches, forward_fn)
