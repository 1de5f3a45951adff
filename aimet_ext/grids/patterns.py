"""Layers of a simulation that a call means: patterns, names, types, modules or a condition."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from functools import cached_property
from typing import Any, TypeAlias

from torch import nn

from aimet_ext.patterns import near
from aimet_ext.sim.protocol import SimAdaptor
from aimet_ext.specs import QSpec, WeightPlan, check_widths

#: Layers whose weight ``[out, in, …]`` can be cut into blocks along dimension 1.
LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)

_Layer: TypeAlias = str | nn.Module | type[nn.Module] | Callable[[nn.Module], bool]
#: One of these or several: pattern or name, module, type of module, AIMET's condition.
Layers: TypeAlias = _Layer | Iterable[_Layer]


class LayerTable(ABC):
    """The layers of a simulation, and how their weights get other grids.

    :param adaptor: Adaptor of the simulation.
    :param quantizers: Weight quantizer, of any type, of each layer of AIMET's that has a
        weight; None where the weight is float.
    """

    def __init__(self, adaptor: SimAdaptor, quantizers: Mapping[str, Any]) -> None:
        self.adaptor = adaptor
        self.model = adaptor.model
        self.quantizers = quantizers

    @cached_property
    def layers(self) -> dict[str, Any]:
        """Layers that can have a grid, quantized or not, by name."""
        every = ((name, self.model.get_submodule(name)) for name in self.quantizers)
        return {name: layer for name, layer in every if isinstance(layer, LAYERS)}

    @cached_property
    def quantized(self) -> list[str]:
        """Names of the layers whose weight is quantized today."""
        return [name for name, layer in self.layers.items() if self.quantizers[name] is not None]

    @cached_property
    def names(self) -> dict[int, str]:
        """The first name of each module by its identity."""
        return {id(module): name for name, module in self.model.named_modules()}

    @cached_property
    def sharing(self) -> dict[str, list[str]]:
        """Layers that have the weight of a layer, itself among them, by name."""
        shared = self.adaptor.shared_weights()
        return {
            name: [other for other in shared.get(name, (name,)) if other in self.layers]
            for name in self.layers
        }

    def inside(self, module: nn.Module) -> set[str]:
        """Return the names of a module and of all inside it."""
        return {self.names[id(inner)] for inner in module.modules()}

    @abstractmethod
    def matching(self, pattern: str) -> list[str]:
        """Return the names of the layers that fit a pattern under any of their names."""

    @abstractmethod
    def of_type(self, word: str, excluded: Collection[str]) -> list[str] | None:
        """Return the quantized layers of the type that a word stands for, None if it is no type.

        :param excluded: Names of layers that are not meant anyway.
        """

    @abstractmethod
    def excluded(self, pattern: str) -> set[str] | None:
        """Return the names of what fits a pattern and of all in it, None if nothing does."""

    @abstractmethod
    def is_name(self, pattern: str, name: str) -> bool:
        """Return True if a pattern is one of the names of a layer."""

    @abstractmethod
    def ends_with_name(self, pattern: str, name: str) -> bool:
        """Return True if a pattern ends with the last part of a layer's name."""

    @abstractmethod
    def is_frozen(self, name: str) -> bool:
        """Return True if an earlier technique froze the range of a layer's weight."""

    @property
    @abstractmethod
    def left_out(self) -> set[str]:
        """Names of embeddings and of the output layer of a language model."""

    @abstractmethod
    def shown(self) -> list[str]:
        """Return a name of each layer, for messages."""

    def example(self) -> str:
        """Return an example of a name, for messages."""
        return repr(next(iter(self.shown()), ""))

    @abstractmethod
    def apply(self, plan: WeightPlan, undo: ExitStack) -> dict[str, int]:
        """Give each layer of a plan its quantizer, with a range, tied weights the same one.

        :param undo: Stack that gets the calls which put everything back.
        :returns: new inner width of each MLP that was padded, by name of block.
        """


def select_specs(
    table: LayerTable,
    spec: QSpec,
    *,
    layers: Layers,
    modules_to_exclude: str | nn.Module | Iterable[str | nn.Module],
    overrides: Mapping[str, QSpec | None],
) -> dict[str, QSpec | None]:
    """Return the spec of every layer that is to change, tied ones included; nothing is changed.

    :param spec: Spec of the layers selected.
    :param overrides: Specs by pattern; the first one that fits counts.
    :raises TypeError: an argument is of another type.
    :raises ValueError: a pattern, name, type, module or condition that selects nothing, a module
        that can have no such grid, or two specs for one weight.
    """
    excluded = _excluded(table, modules_to_exclude)
    specs: dict[str, QSpec | None] = dict.fromkeys(_selected(table, layers, excluded), spec)
    for pattern, other in reversed(list(overrides.items())):  # the first pattern counts
        if not isinstance(pattern, str) or not (other is None or isinstance(other, QSpec)):
            raise TypeError(
                "overrides must map patterns to QSpec or None (float), "
                f"got {pattern!r}: {type(other).__name__}"
            )
        fitting = table.matching(pattern)
        if not fitting:
            raise ValueError(
                f"the pattern of an override must fit a layer with a weight, {pattern!r} fits "
                f"none; names look like {table.example()}{near(pattern, table.shown())}"
            )
        specs.update(dict.fromkeys(fitting, other))
    given = {"bitwidth": spec, **{f"overrides[{name!r}]": s for name, s in overrides.items()}}
    check_widths("weights", given)
    specs = {name: chosen for name, chosen in specs.items() if name not in excluded}
    if not specs:
        raise ValueError(
            "at least one layer must remain, but layers and overrides select none that "
            "modules_to_exclude leaves"
        )
    return _with_tied(table, specs, excluded)


def _excluded(table: LayerTable, entries: Any) -> set[str]:
    """Return the names of the modules excluded and of all inside them."""
    if isinstance(entries, str | nn.Module):
        entries = (entries,)
    excluded: set[str] = set()
    unknown = []
    for entry in entries or ():
        if isinstance(entry, str):
            found = table.excluded(entry)
        elif isinstance(entry, nn.Module):
            found = table.inside(entry) if id(entry) in table.names else None
        else:
            raise TypeError(
                f"modules_to_exclude must hold names or modules, got {type(entry).__name__}"
            )
        if found is None:
            unknown.append(entry)
        excluded.update(found or ())
    if unknown:
        texts = [each for each in unknown if isinstance(each, str)]
        shown = [repr(e) if isinstance(e, str) else f"a {type(e).__name__}" for e in unknown]
        raise ValueError(
            f"modules_to_exclude must name modules of sim.model, such as {table.example()}; "
            f"not found: {', '.join(shown)}{near(texts, table.shown())}"
        )
    return excluded


def _selected(table: LayerTable, layers: Any, excluded: set[str]) -> list[str]:
    if isinstance(layers, str | nn.Module | type) or callable(layers):
        layers = (layers,)
    elif not isinstance(layers, Iterable):
        raise _bad_entry(layers)
    names: list[str] = []
    for entry in layers:
        if isinstance(entry, str):
            names += _by_pattern(table, entry, excluded)
        elif isinstance(entry, nn.Module):
            names.append(_by_module(table, entry))
        elif isinstance(entry, type) and issubclass(entry, nn.Module):
            names += _by_condition(table, _instance_of(entry), f"type {entry.__name__}")
        elif callable(entry) and not isinstance(entry, type):
            names += _by_condition(table, entry, "condition")
        else:
            raise _bad_entry(entry)
    return names


def _bad_entry(entry: Any) -> TypeError:
    shown = entry.__name__ if isinstance(entry, type) else type(entry).__name__
    return TypeError(
        "layers must be patterns or names, modules of sim.model, types of torch.nn modules or a "
        f"condition of a module, got {shown}"
    )


def _by_pattern(table: LayerTable, pattern: str, excluded: set[str]) -> list[str]:
    fitting = table.matching(pattern)
    if not fitting and (typed := table.of_type(pattern, excluded)) is not None:
        return typed
    if any(table.is_name(pattern, name) for name in fitting):
        if table.quantizers[fitting[0]] is None:
            raise ValueError(
                f"{fitting[0]} is named in layers and its weight is float; to quantize it give it "
                "a QSpec in overrides"
            )
        return fitting
    kinds = (nn.Linear, nn.Conv2d) if pattern == "*" else LAYERS
    found = [
        name
        for name in fitting
        if table.quantizers[name] is not None
        and isinstance(table.layers[name], kinds)
        and (name not in table.left_out or table.ends_with_name(pattern, name))
    ]
    if not found:
        raise ValueError(
            f"layers={pattern!r} must fit a layer whose weight is quantized, it fits "
            f"{'only others: ' + ', '.join(fitting[:3]) if fitting else 'none'}; names look like "
            f"{table.example()}, and embeddings and the output layer must be named in full"
        )
    return found


def _by_module(table: LayerTable, module: nn.Module) -> str:
    if id(module) not in table.names:
        raise ValueError(
            f"layers must hold modules of sim.model, got a {type(module).__name__} that is not in "
            "it; QuantizationSimModel copies the model, take the module from sim.model"
        )
    return _supported(table, table.names[id(module)])


def _by_condition(
    table: LayerTable, condition: Callable[[nn.Module], bool], shown: str
) -> list[str]:
    quantized = [name for name, quantizer in table.quantizers.items() if quantizer is not None]
    found = [name for name in quantized if condition(table.model.get_submodule(name))]
    if not found:
        raise ValueError(
            f"layers: the {shown} must hold for a module whose weight is quantized, it holds for "
            "none"
        )
    return [_supported(table, name) for name in found]


def _instance_of(kind: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, kind)


def _supported(table: LayerTable, name: str) -> str:
    if name not in table.layers:
        kind = type(table.model.get_submodule(name)).__name__
        raise ValueError(
            f"{name}: a layer whose weight has input channels in dimension 1 is required "
            f"({', '.join(cls.__name__ for cls in LAYERS)}), got {kind}"
        )
    if table.quantizers[name] is None:
        raise ValueError(
            f"{name} is named in layers and its weight is float; to quantize it give it a QSpec "
            "in overrides"
        )
    return name


def _with_tied(
    table: LayerTable, specs: Mapping[str, QSpec | None], excluded: set[str]
) -> dict[str, QSpec | None]:
    """Add the layers that share a weight with one selected: one weight has one quantizer."""
    complete: dict[str, QSpec | None] = {}
    for name, spec in specs.items():
        for other in table.sharing[name]:
            if other in excluded:
                raise _conflict(name, other, "modules_to_exclude names one of them")
            if specs.get(other, spec) != spec:
                raise _conflict(name, other, f"got {spec} and {specs[other]}")
            if other not in specs and spec is not None and table.quantizers[other] is None:
                raise _conflict(name, other, f"and that of {other} is float; name both")
            complete[other] = spec
    return complete


def _conflict(name: str, other: str, problem: str) -> ValueError:
    return ValueError(f"{name} and {other} share one weight and need the same spec, {problem}")
