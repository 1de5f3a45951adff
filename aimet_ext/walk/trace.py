"""The graph of a model without blocks: in which order its layers run, and what reads what."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd

from aimet_ext.data.batches import call_model, map_leaves, map_tensors
from aimet_ext.walk.layers import check_folded, geometries, relu_of, twice_called, uncalled
from aimet_ext.walk.protocol import Activation

__all__ = ["GIVEN", "Group", "NotTraceable", "Trace", "batch_tensors", "trace_model"]

_SHAPES = {"dim", "dtype", "device", "ndim", "shape", "size"}
_ROOT = "model"

GIVEN = ("placeholder", "get_attr")
"""Kinds of nodes that are no operations: a batch's tensors, and constants of the model."""


class NotTraceable(ValueError):
    """The forward pass of a model is no fixed graph of operations."""


@dataclass(frozen=True, eq=False)
class Group:
    """Layers of one geometry that read one value.

    :param layers: names in the order of their calls.
    :param source: gives the value.
    :param start: position of the first call.
    :param activations: the ReLU that alone reads a layer's output, by layer.
    """

    layers: tuple[str, ...]
    source: fx.Node
    start: int
    activations: Mapping[str, Activation]


@dataclass(frozen=True, eq=False)
class Trace:
    """The operations of a model in order.

    :param root: module that the graph's names refer to; the model is its only child.
    :param graph: operations on a batch's tensors; leaf modules are called.
    :param groups: the layers asked for, in order.
    """

    root: nn.Module
    graph: fx.Graph
    groups: tuple[Group, ...]

    @cached_property
    def nodes(self) -> list[fx.Node]:
        """All operations in order."""
        return list(self.graph.nodes)

    @cached_property
    def inputs(self) -> list[fx.Node]:
        """Where the batch's tensors come in, in the order of :func:`batch_tensors`."""
        return [node for node in self.nodes if node.op == "placeholder"]

    @cached_property
    def last_call(self) -> dict[str, int]:
        """Position of the last call of each module, by its name in the graph."""
        return {
            str(node.target): position
            for position, node in enumerate(self.nodes)
            if node.op == "call_module"
        }

    def places(self, layer: str) -> list[tuple[str, str]]:
        """Which modules compute with a layer's weight, and the weight's name in each."""
        module = self.root.get_submodule(f"{_ROOT}.{layer}")
        path = next(name for name, found in self.root.named_modules() if found is module)
        return [
            (called, f"{path}.weight".removeprefix(f"{called}."))
            for called in self.last_call
            if path == called or path.startswith(f"{called}.")
        ]

    def live(self, position: int, stop: int) -> list[fx.Node]:
        """Which results of the operations before a position are read from there on.

        Inputs and constants are left out: they are there at any time.

        :param stop: what is read from this position on is ignored.
        """
        last: dict[fx.Node, int] = {}
        for place, node in enumerate(self.nodes[:stop]):
            last.update(dict.fromkeys(node.all_input_nodes, place))
        return [
            node
            for node in self.nodes[:position]
            if last.get(node, -1) >= position and node.op not in GIVEN
        ]


class _Root(nn.Module):
    """Calls a model with a batch, of which it is given the tensors only."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        super().__init__()
        self.add_module(_ROOT, model)
        self.form = _form(batch)

    def forward(self, tensors: Sequence[Any]) -> Any:
        def fill(leaf: Any) -> Any:
            return tensors[leaf.number] if isinstance(leaf, _Hole) else leaf

        return call_model(self.get_submodule(_ROOT), map_leaves(fill, self.form))


class _Tracer(fx.Tracer):
    """Calls leaves: AIMET's and torch's modules, and all others without children."""

    def __init__(self, layers: Iterable[nn.Module], opened: set[nn.Module], inputs: int) -> None:
        super().__init__()
        self._layers = set(layers)
        self._opened = opened
        self._inputs = inputs

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self._layers or m in self._opened:
            return m in self._layers
        if isinstance(m, nn.Sequential):
            return False
        childless = next(m.children(), None) is None or hasattr(m, "param_quantizers")
        return childless or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        proxies = [
            self.create_proxy("placeholder", f"tensor_{number}", (), {})
            for number in range(self._inputs)
        ]
        return root_fn, [self.root, proxies]


def trace_model(model: nn.Module, batches: Iterable[Any], layers: Mapping[str, nn.Module]) -> Trace:
    """The graph of a model, by symbolic tracing with its layers as leaves.

    :param batches: all of the data; only tensors may differ from batch to batch.
    :param layers: what to walk to, modules by name.
    :raises NotTraceable: the forward pass depends on values or shapes, or batches on their kind.
    :raises ValueError: a layer is called twice or never, or a batch norm after one is not folded.
    :raises TypeError: a layer is neither linear nor a convolution.
    """
    kinds = iter(batches)
    first = next(kinds)
    form = _form(first)
    if any(_form(batch) != form for batch in kinds):
        raise NotTraceable("batches differ in more than their tensors")
    root = _Root(model, first)
    opened = {root.get_submodule(parent) for name in layers for parent in _parents(name)}
    tracer = _Tracer(layers.values(), opened, len(batch_tensors(first)))
    try:
        graph = tracer.trace(root)
    except Exception as error:
        raise NotTraceable(f"{type(error).__name__}: {error}") from error
    groups = _group(root, list(graph.nodes), layers)
    return Trace(root, graph, tuple(sorted(groups, key=lambda group: group.start)))


def batch_tensors(batch: Any) -> list[Tensor]:
    """The tensors in a batch, or in a model's output, in order."""
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, tuple | list):
        return [tensor for item in batch for tensor in batch_tensors(item)]
    return [batch] if isinstance(batch, Tensor) else []


@dataclass(frozen=True)
class _Hole:
    """Stands for a tensor of a batch."""

    number: int


def _form(batch: Any) -> Any:
    """A batch with holes in place of its tensors."""
    numbers = iter(range(len(batch_tensors(batch))))
    return map_tensors(lambda tensor: _Hole(next(numbers)), batch)


def _parents(name: str) -> Iterator[str]:
    parts = [_ROOT, *name.split(".")]
    return (".".join(parts[:end]) for end in range(1, len(parts)))


def _group(
    root: nn.Module, nodes: Sequence[fx.Node], layers: Mapping[str, nn.Module]
) -> list[Group]:
    """Layers that read one value, before anything changes it in place, in one way."""
    names = {module: name for name, module in layers.items()}
    geometry = geometries(layers)
    changes: Counter[fx.Node] = Counter()
    calls: dict[str, int] = {}
    members: dict[Any, list[str]] = {}
    for position, node in enumerate(nodes):
        name = names.get(_module(root, node)) if node.op == "call_module" else None
        if name is not None:
            if name in calls:
                raise twice_called(name)
            calls[name] = position
            source = node.args[0] if node.args else node.kwargs.get("input")
            assert isinstance(source, fx.Node), f"{name} reads a constant"
            key = (source, changes[source], geometry[name])
            members.setdefault(key, []).append(name)
        changes.update(_changed(root, node))
    if missing := [name for name in layers if name not in calls]:
        raise uncalled(missing)
    readers = {name: _sole_reader(root, nodes[position]) for name, position in calls.items()}
    for name, reader in readers.items():
        check_folded(name, reader)
    relus = {name: relu for name, reader in readers.items() if (relu := relu_of(reader))}
    return [
        Group(
            tuple(group),
            source,
            calls[group[0]],
            {name: relus[name] for name in group if name in relus},
        )
        for (source, *_), group in members.items()
    ]


def _module(root: nn.Module, node: fx.Node) -> nn.Module:
    return root.get_submodule(str(node.target))


def _operation(root: nn.Module, node: fx.Node) -> Any:
    """What a node calls: a module, a function or the name of a method."""
    return _module(root, node) if node.op == "call_module" else node.target


def _sole_reader(root: nn.Module, node: fx.Node) -> Any:
    """What alone reads a result, behind modules that do nothing in evaluation mode."""
    while True:
        readers = [reader for reader in node.users if not _reads_shape(reader)]
        if len(readers) != 1 or readers[0].op == "output":
            return None
        (node,) = readers
        reader = _operation(root, node)
        if not isinstance(reader, nn.Identity | _DropoutNd):
            return reader


def _reads_shape(node: fx.Node) -> bool:
    named = node.args[1] if node.target is getattr else node.target
    return node.op in ("call_function", "call_method") and named in _SHAPES


_OPERATORS = "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift"
_IN_PLACE = (*(getattr(operator, name) for name in _OPERATORS.split()), operator.setitem)


def _changed(root: nn.Module, node: fx.Node) -> list[fx.Node]:
    """Which values an operation may change in place; rather one too many."""
    if node.op not in ("call_module", "call_function", "call_method"):
        return []
    operation = _operation(root, node)
    name = operation if isinstance(operation, str) else getattr(operation, "__name__", "")
    flags = (*node.args[1:], node.kwargs.get("inplace"), getattr(operation, "inplace", False))
    in_place = (
        operation in _IN_PLACE
        or (name.endswith("_") and not name.endswith("__"))
        or any(flag is True for flag in flags)
    )
    return node.all_input_nodes if in_place else []
