"""Schedule of a walk over an ONNX graph: nodes to run from stage to stage, tensors to keep.

Three kinds of tensors are told apart. *Light* ones follow from the graph's inputs and stored values
without a layer's weight (masks, positions, rotary tables): they are computed anew wherever they are
read. Of the others, *common* ones depend on no weight that is going to change: both streams share
them. All else is computed once in each stream.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from onnx import NodeProto
from torch import nn
from torch.nn import functional

from aimet_ext.data.geometry import Geometry
from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.index import FLOATS, attribute, elements, reads
from aimet_ext.onnx.layers import OnnxLayer
from aimet_ext.walk.order import Activation

_LARGE = 2**16  # elements of a stored value; what a node makes of a larger one is kept
_AT_ONCE = 2**26  # elements of the weights that a section holds: 256 MiB of float32


@dataclass(frozen=True)
class PlannedStage:
    """Layers that read one tensor in the same way.

    :param source: the tensor.
    :param later: tensors that further uses of these layers read.
    :param padded: True if the input is handed out padded, since no shell can pad so.
    """

    layers: tuple[str, ...]
    source: str
    later: tuple[str, ...]
    activations: Mapping[str, Activation]
    geometry: Geometry
    padded: bool


@dataclass(frozen=True)
class Section:
    """Nodes that run in one go.

    :param nodes: indices, in order.
    :param inputs: kept tensors and inputs of the graph that they read.
    :param outputs: tensors to keep.
    :param common: True if both streams share them.
    """

    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    common: bool


@dataclass(frozen=True)
class Transition:
    """Sections that run between one stage and the next.

    :param sections: those of common tensors first.
    :param keep: tensors to keep until the next transition; the rest may be dropped.
    :param later: sections for the inputs of later uses, for this stage alone.
    :param open: nodes with a weight that run later than the sections.
    """

    sections: tuple[Section, ...]
    keep: frozenset[str]
    later: tuple[Section, ...]
    open: frozenset[int]


def plan_stages(
    graph: OnnxGraph,
    layers: Mapping[str, OnnxLayer],
    shells: Mapping[str, nn.Module],
    names: Iterable[str],
) -> tuple[PlannedStage, ...]:
    """Return the stages of these layers, in the graph's order.

    :raises ValueError: a batch norm directly follows a layer.
    :raises TypeError: a layer is neither linear nor a convolution.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    geometry: dict[str, Geometry] = {}
    for name in sorted(names, key=lambda name: layers[name].uses[0].node):
        layer = layers[name]
        _check_no_batch_norm(graph, layer)
        try:
            geometry[name] = Geometry.of(shells[name])
        except TypeError as error:
            raise TypeError(f"layer {name!r}: {error}") from error
        pads = None if layer.padding is not None else (layer.auto_pad, layer.pads)
        sources = tuple(dict.fromkeys(use.input for use in layer.uses))
        groups.setdefault((sources, geometry[name], pads), []).append(name)
    found = []
    for group in groups.values():
        first = layers[group[0]]
        source, *later = dict.fromkeys(use.input for use in first.uses)
        relus = {name: _activation_after(graph, layers[name]) for name in group}
        found.append(
            PlannedStage(
                layers=tuple(group),
                source=source,
                later=tuple(later),
                activations={name: relu for name, relu in relus.items() if relu is not None},
                geometry=geometry[group[0]],
                padded=first.padding is None,
            )
        )
    return tuple(found)


def plan_transitions(
    graph: OnnxGraph,
    layers: Mapping[str, OnnxLayer],
    stages: Sequence[PlannedStage],
    changed: Collection[str] | None,
) -> list[Transition]:
    """Plan how each stage is reached.

    :param layers: all of the graph.
    :param changed: names of layers whose weights differ between two streams; None if there is one
        stream only.
    """
    planner = _Planner(graph, layers, changed)
    needed = planner.needed([stage.source for stage in stages], set())
    extras = [planner.needed(stage.later, set()) for stage in stages]
    done: set[int] = set()
    kept: set[str] = set()
    transitions = []
    for number, stage in enumerate(stages):
        part = planner.needed([stage.source], done)
        part |= planner.shapes(needed - done - part, done | part)
        done |= part
        rest = needed - done
        extra = extras[number] - done
        targets = {stage.source, *stage.later, *(other.source for other in stages[number + 1 :])}
        made = {n for index in part for n in graph.nodes[index].output if n}
        known = made | {n for n in kept if not planner.is_light(n)}
        keep = {n for n in known if n in targets or planner.read_by(n, rest | extra)}
        if stage.source not in graph.inputs:
            keep.add(stage.source)
        sections = planner.sections(part, kept, keep)
        transitions.append(
            Transition(
                sections=tuple(sections),
                keep=frozenset(keep),
                later=tuple(planner.sections(extra, keep, set(stage.later))),
                open=frozenset((rest.union(*extras[number:]) - done) & planner.weighted),
            )
        )
        kept = keep
    return transitions


class _Planner:
    """Questions about the nodes of a graph; see :func:`plan_transitions`."""

    def __init__(
        self, graph: OnnxGraph, layers: Mapping[str, OnnxLayer], changed: Collection[str] | None
    ) -> None:
        self.graph = graph
        self.weighted = {use.node for layer in layers.values() for use in layer.uses}
        self._light = self._tell_light()
        moved = {use.node for name in changed or () for use in layers[name].uses}
        self._common = set() if changed is None else self._tell_common(moved)
        self._split = changed is not None

    def needed(self, targets: Iterable[str], done: Collection[int]) -> set[int]:
        """Return nodes whose results are kept, that targets depend on and that did not run yet."""
        producer, past = self.graph.producer, self._light.union(done)
        behind = self.graph.behind(targets, lambda name, _: producer[name] not in past)
        return {producer[name] for name in behind if name in producer} - past

    def shapes(self, wanted: Iterable[int], done: Collection[int]) -> set[int]:
        """Return the Shape nodes of known tensors, which then need not be kept for these."""
        producer = self.graph.producer
        return {
            index
            for index in wanted
            if self.graph.nodes[index].op_type == "Shape"
            and producer.get(self.graph.nodes[index].input[0]) in done
        }

    def read_by(self, tensor: str, nodes: Collection[int]) -> bool:
        """Return True if one of the nodes reads a tensor."""
        return any(index in nodes for index in self.graph.consumers.get(tensor, ()))

    def is_light(self, tensor: str) -> bool:
        """Return True if a tensor that is no input of the graph is computed wherever it is read."""
        index = self.graph.producer.get(tensor)
        return index in self._light if index is not None else tensor not in self.graph.inputs

    def sections(
        self, part: set[int], kept: Collection[str], wanted: Collection[str]
    ) -> Iterator[Section]:
        """Yield the sections that run the nodes of a part, from kept to wanted tensors.

        A session holds all weights of its section, so where layers between two stages are not
        walked to, several sections are made of what lies there.
        """
        known, rest = set(kept), set(part)
        for common in (True, False):
            portions = self._portions({i for i in part if (i in self._common) == common})
            for number, own in enumerate(portions):
                rest -= own
                made = {name for index in own for name in self.graph.nodes[index].output if name}
                outputs = {n for n in made if n in wanted or self.read_by(n, rest)} - known
                if common == self._split and number + 1 == len(portions):
                    outputs |= {n for n in wanted if self.is_light(n) and n not in known}
                if outputs:
                    yield self._section(part, outputs, known, common)
                    known |= outputs

    def _portions(self, nodes: set[int]) -> list[set[int]]:
        """Cut nodes, in order, where few tensors pass, so that no portion has too many weights."""
        order = sorted(nodes)
        sizes = [self._weights(index) for index in order]
        passing = self._passing(order)
        portions, begin, total = [], 0, 0
        for end, size in enumerate(sizes):
            while total and total + size > _AT_ONCE:
                first = next(i for i in range(begin, end) if sizes[i])
                cut = min(range(end, first, -1), key=lambda place: passing[place - 1])
                portions.append({*order[begin:cut]})
                begin, total = cut, sum(sizes[cut:end])
            total += size
        return [*portions, {*order[begin:]}]

    def _passing(self, order: Sequence[int]) -> list[int]:
        """Count the tensors made by these nodes that are read beyond each of them."""
        place = {index: number for number, index in enumerate(order)}
        change = [0] * (len(order) + 1)
        for index in order:
            for name in self.graph.nodes[index].output:
                readers = (place.get(i, -1) for i in self.graph.consumers.get(name, ()))
                last = max(readers, default=-1)
                if last > place[index]:
                    change[place[index]] += 1
                    change[last] -= 1
        return list(accumulate(change[:-1]))

    def _weights(self, index: int) -> int:
        """Count the elements of the layer weights that a node holds."""
        if index not in self.weighted:
            return 0
        stored = [self.graph.constant(name) for name in self.graph.reads[index]]
        return sum(elements(tensor) for tensor in stored if tensor is not None)

    def _section(
        self, part: set[int], outputs: Iterable[str], known: Collection[str], common: bool
    ) -> Section:
        given = {*known, *self.graph.inputs}
        names = tuple(sorted(outputs))
        nodes = self.graph.subgraph(given, names)
        assert part.issuperset(set(nodes) - self._light), "a node would run twice"
        read = {name for index in nodes for name in self.graph.reads[index]}
        return Section(tuple(nodes), tuple(sorted(read & given)), names, common)

    def _tell_light(self) -> set[int]:
        """Return light nodes, and those that compute with stored values alone."""
        light: set[int] = set()
        tensors: set[str] = {*self.graph.inputs}
        fixed: set[str] = {*self.graph.initializers}
        for index, node in enumerate(self.graph.nodes):
            read = set(reads(node))
            if read <= fixed and index not in self.weighted:
                fixed.update(node.output)
                light.add(index)
            elif read <= tensors | fixed and not self._is_heavy(index, node):
                tensors.update(node.output)
                light.add(index)
        return light

    def _is_heavy(self, index: int, node: NodeProto) -> bool:
        if index in self.weighted:
            return True
        stored = [self.graph.constant(name) for name in reads(node)]
        return any(t.data_type in FLOATS and elements(t) > _LARGE for t in stored if t)

    def _tell_common(self, moved: Collection[int]) -> set[int]:
        """Return nodes that depend on none of the nodes whose weights change."""
        common: set[int] = set()
        streamed: set[str] = set()
        for index, node in enumerate(self.graph.nodes):
            if index in moved or not streamed.isdisjoint(reads(node)):
                streamed.update(node.output)
            else:
                common.add(index)
        return common


def _activation_after(graph: OnnxGraph, layer: OnnxLayer) -> Activation | None:
    """Return the ReLU that alone reads a layer's output, at each of its uses; None without one."""
    found = {_relu(graph, _sole_reader(graph, use.output)) for use in layer.uses}
    return found.pop() if len(found) == 1 else None


def _check_no_batch_norm(graph: OnnxGraph, layer: OnnxLayer) -> None:
    """Refuse a layer whose output goes through a batch norm first.

    :raises ValueError: it does.
    """
    for use in layer.uses:
        reader = _sole_reader(graph, use.output)
        if reader is not None and reader.op_type == "BatchNormalization":
            raise ValueError(
                f"the batch norm {reader.name!r} after layer {layer.name!r} must be folded into "
                "it before the simulation is built; call "
                "aimet_onnx.batch_norm_fold.fold_all_batch_norms_to_weight(model)"
            )


def _sole_reader(graph: OnnxGraph, tensor: str) -> NodeProto | None:
    """Return the one node that reads a tensor's values; its shape may be read by others."""
    if tensor in graph.outputs:
        return None
    readers = [node for node in graph.readers(tensor) if node.op_type != "Shape"]
    return readers[0] if len(readers) == 1 else None


def _relu(graph: OnnxGraph, node: NodeProto | None) -> Activation | None:
    if node is None:
        return None
    if node.op_type == "Relu":
        return functional.relu
    if node.op_type != "Clip":
        return None
    low, high = _bound(graph, node, 1), _bound(graph, node, 2)
    if low != 0:
        return None
    return {6.0: functional.relu6, None: functional.relu}.get(high)


def _bound(graph: OnnxGraph, node: NodeProto, place: int) -> float | None:
    """Lower (1) or upper (2) bound of a Clip: an attribute up to opset 10, an input from 11 on.

    NaN where it is computed.
    """
    name = node.input[place] if len(node.input) > place else ""
    if not name:
        value = attribute(node, ("min", "max")[place - 1], None)
        return None if value is None else float(value)
    if graph.constant(name) is None:
        return float("nan")
    return float(graph.array(name).reshape(-1)[0])
