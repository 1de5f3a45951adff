"""The graph of a traced model, and its execution in parts with other weights than its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from aimet_ext.data.batches import call_model, map_leaves, map_tensors, tensors_in

_ROOT = "model"
_ROUNDING = 1e-3  # of the largest output: convolutions need not be computed alike twice

GIVEN = ("placeholder", "get_attr")
"""Kinds of nodes that are no operations: a batch's tensors, and constants of the model."""


class NotTraceable(ValueError):
    """The forward pass of a model is no fixed graph of operations."""


@dataclass(frozen=True, eq=False)
class Trace:
    """The operations of a model in order.

    :param root: module that the graph's names refer to; the model is its only child.
    :param graph: operations on a batch's tensors; leaf modules are called.
    """

    root: nn.Module
    graph: fx.Graph

    @cached_property
    def nodes(self) -> list[fx.Node]:
        """All operations in order."""
        return list(self.graph.nodes)

    @cached_property
    def inputs(self) -> list[fx.Node]:
        """Nodes where the batch's tensors come in, in the order of :func:`tensors_in`."""
        return [node for node in self.nodes if node.op == "placeholder"]

    @cached_property
    def last_call(self) -> dict[str, int]:
        """Position of the last call of each module, by its name in the graph."""
        return {
            str(node.target): position
            for position, node in enumerate(self.nodes)
            if node.op == "call_module"
        }

    @cached_property
    def last_use(self) -> dict[str, int]:
        """Position of the last operation that computes with parameters of each module called."""
        last = dict(self.last_call)
        place = {node: position for position, node in enumerate(self.nodes)}
        for node in self.nodes:
            owner = str(node.target).rpartition(".")[0] if node.op == "get_attr" else ""
            if owner in last:
                last[owner] = max(last[owner], *(place[user] for user in node.users))
        return last

    def call(self, layer: str) -> tuple[int, fx.Node]:
        """Return the position of a layer's call, and the node that gives its input."""
        for called, _ in self.places(layer):
            node = self.nodes[self.last_call[called]]
            source = node.args[0] if node.args else node.kwargs.get("input")
            if isinstance(source, fx.Node):
                return self.last_call[called], source
        raise NotTraceable(f"{layer} reads nothing that the graph computes")

    def places(self, layer: str) -> list[tuple[str, str]]:
        """Return the modules that compute with a layer's weight, and the weight's name in each."""
        module = self.root.get_submodule(f"{_ROOT}.{layer}")
        path = next(name for name, found in self.root.named_modules() if found is module)
        return [
            (called, f"{path}.weight".removeprefix(f"{called}."))
            for called in self.last_call
            if path == called or path.startswith(f"{called}.")
        ]

    def live(self, position: int, stop: int) -> list[fx.Node]:
        """Return the results of the operations before a position that are read from there on.

        Inputs and constants are left out: they are there at any time.

        :param stop: Position from which on reads do not count.
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
    """Calls leaves: those given, torch's modules, and all others without children."""

    def __init__(
        self,
        layers: Iterable[nn.Module],
        leaves: Iterable[nn.Module],
        opened: set[nn.Module],
        inputs: int,
    ) -> None:
        super().__init__()
        self._layers = set(layers)
        self._leaves = set(leaves)
        self._opened = opened
        self._inputs = inputs

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self._layers or m in self._opened:
            return m in self._layers
        if isinstance(m, nn.Sequential):
            return False
        childless = next(m.children(), None) is None or m in self._leaves
        return childless or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        proxies = [
            self.create_proxy("placeholder", f"tensor_{number}", (), {})
            for number in range(self._inputs)
        ]
        return root_fn, [self.root, proxies]


def trace_model(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, nn.Module],
    leaves: Iterable[nn.Module] = (),
) -> Trace:
    """Trace a model symbolically, with its layers as leaves.

    :param batches: Batches of the run; only their tensors may differ.
    :param layers: Modules to walk to, by name.
    :param leaves: Modules with children that are called and not looked into.
    :raises NotTraceable: the forward pass depends on values or shapes, or batches on their kind.
    """
    kinds = iter(batches)
    first = next(kinds)
    form = _form(first)
    if any(_form(batch) != form for batch in kinds):
        raise NotTraceable("batches differ in more than their tensors")
    root = _Root(model, first)
    opened = {root.get_submodule(parent) for name in layers for parent in _parents(name)}
    tracer = _Tracer(layers.values(), leaves, opened, len(tensors_in(first)))
    try:
        graph = tracer.trace(root)
    except Exception as error:
        raise NotTraceable(f"{type(error).__name__}: {error}") from error
    return Trace(root, graph)


@dataclass(frozen=True)
class _Hole:
    """Stands for a tensor of a batch."""

    number: int


def _form(batch: Any) -> Any:
    """Return a batch with holes in place of its tensors."""
    numbers = iter(range(len(tensors_in(batch))))
    return map_tensors(lambda tensor: _Hole(next(numbers)), batch)


def _parents(name: str) -> Iterator[str]:
    parts = [_ROOT, *name.split(".")]
    return (".".join(parts[:end]) for end in range(1, len(parts)))


# By module in the graph, by name within it.
Weights: TypeAlias = dict[str, dict[str, Tensor]]
Values: TypeAlias = dict[fx.Node, Any]


class Segment:
    """A part of a graph: its operations, and which values and inputs it reads.

    :param start: Position of the first operation.
    :param stop: Position behind the last one.
    :param end: Position from which on reads do not count.
    :param kept: Nodes whose values are kept, by default those read between ``stop`` and ``end``.
    """

    def __init__(
        self,
        trace: Trace,
        start: int,
        stop: int,
        end: int,
        *,
        kept: Sequence[fx.Node] | None = None,
    ) -> None:
        self.read = trace.live(start, end)
        self.kept = trace.live(stop, end) if kept is None else kept
        self.nodes = [node for node in trace.nodes[start:stop] if node.op not in GIVEN]
        last = {node: node for node in self.nodes}
        for node in self.nodes:
            last.update(dict.fromkeys(node.all_input_nodes, node))
        self.inputs = [node for node in last if node.op == "placeholder"]
        for node in self.kept:
            last.pop(node, None)
        self.dying: dict[fx.Node, list[fx.Node]] = {}
        for node, reader in last.items():
            self.dying.setdefault(reader, []).append(node)


class Executor(fx.Interpreter):
    """Runs parts of a graph, with other weights than the modules' own."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace.root, garbage_collect_values=False, graph=trace.graph)
        self._constants = [node for node in trace.nodes if node.op == "get_attr"]
        self._weights: Weights = {}

    @torch.no_grad()
    def run_segment(self, segment: Segment, values: Values, weights: Weights) -> Values:
        """Return the values that a segment keeps, of those given and of its own."""
        self._weights = weights
        self.env = {**{node: self.run_node(node) for node in self._constants}, **values}
        try:
            for node in segment.nodes:
                self.env[node] = self.run_node(node)
                for dead in segment.dying.get(node, ()):
                    del self.env[dead]
            return {node: self.env[node] for node in segment.kept}
        finally:
            self.env = {}

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a constant, a weight that is read without its module as it was decided."""
        owner, _, name = str(target).rpartition(".")
        decided = self._weights.get(owner, {}).get(name)
        return super().get_attr(target, args, kwargs) if decided is None else decided

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a module computes with the weight decided for it."""
        if target not in self._weights:
            return super().call_module(target, args, kwargs)
        module, own = self.fetch_attr(target), self._weights[target]
        return torch.func.functional_call(module, own, args, kwargs, tie_weights=False)


def renewed(values: Values, versions: Mapping[fx.Node, Any]) -> Values:
    """Return the values that are not stored yet as they are, with all that share a tensor."""
    found = {node: tensor_versions(value) for node, value in values.items()}
    new = {node for node in values if found[node] != versions.get(node)}
    tensors = {tensor for node in new for tensor, _ in found[node]}
    return {
        node: value
        for node, value in values.items()
        if node in new or any(tensor in tensors for tensor, _ in found[node])
    }


def tensor_versions(value: Any) -> list[tuple[int, int]]:
    """Return the identities of the tensors in a value, and how often each was changed in place."""
    return [(id(tensor), tensor._version) for tensor in tensors_in(value)]


def equal(came: Any, expected: Any) -> bool:
    """Return True if two outputs hold as many tensors, equal but for rounding."""
    ours, theirs = tensors_in(came), tensors_in(expected)
    return len(ours) == len(theirs) and all(map(_close, ours, theirs))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or not a.is_floating_point():
        return torch.equal(a, b)
    size = float(b.abs().nan_to_num(0, 0, 0).amax()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=_ROUNDING * size, equal_nan=True)
