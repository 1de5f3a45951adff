"""Copies of stored vectors in an ONNX simulation, one for each reader, and their removal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from aimet_onnx.common import libpymo
from onnx import NodeProto, TensorProto, numpy_helper

from aimet_ext.onnx.blocks.topology import Reading, SharedVector
from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.sim.onnx.quantizer_state import quantizer_state, restore_quantizer

__all__ = ["Copies"]

_QUANTIZER = "QcQuantizeOp"


class Copies:
    """Copied vectors of a simulation, each with its removal.

    A reader that is given a copy reads it through a quantizer like that of the original, with the
    same range. AIMET's own view of the graph is told as well. The session is not.

    :param sim: ``aimet_onnx.QuantizationSimModel``.
    :param graph: Float view of its model.
    """

    def __init__(self, sim: Any, graph: OnnxGraph) -> None:
        self.sim, self.graph = sim, graph
        #: Names of the copies.
        self.names: list[str] = []
        self._undo: list[Callable[[], object]] = []

    def add(self, vector: SharedVector) -> None:
        """Copy a vector for the one that reads it at ``vector.reading``, if that can be done.

        It cannot where AIMET fused its readers to one node.
        """
        reading = vector.reading
        found = None if reading is None else self._reader(vector.stored, reading)
        if found is None:
            return
        node, place = found
        name = self._unused(vector.name)
        self._add_tensor(vector.stored, name)
        through = self._add_quantizer(vector.stored, name)
        self._add_product(vector.stored, name, node.name)
        self._rewire(node.output[0], place, through.get(node.input[place], name))
        self.names.append(name)

    def undo(self) -> None:
        """Take all copies out again, the last one first."""
        while self._undo:
            self._undo.pop()()
        self.names.clear()

    def _reader(self, stored: str, reading: Reading) -> tuple[NodeProto, int] | None:
        """Return the model's node that holds a node of the float view, and its one such input."""
        names = {stored, *(node.output[0] for node in self._quantizers(stored))}
        for node in self._nodes():
            if node.op_type == _QUANTIZER or not names.intersection(node.input):
                continue
            within = reading.node in self.graph.fused.get(node.name, ())
            if node.op_type.startswith("Skip"):  # seen as an addition and a norm
                within = reading.node.startswith(f"{node.name}/")
            if within or reading.output == node.output[0]:
                places = [i for i, name in enumerate(node.input) if name in names]
                return (node, places[0]) if len(places) == 1 else None
        return None

    def _add_tensor(self, stored: str, name: str) -> None:
        initializers = self.sim.model.model.graph.initializer
        tensor = initializers.add()
        self._undo.append(lambda: _remove(initializers, lambda found: found.name == name))
        source = self.graph.constant(stored)
        assert source is not None
        if source.data_location == TensorProto.EXTERNAL:
            source = numpy_helper.from_array(self.graph.array(stored))
        tensor.CopyFrom(source)
        tensor.name = name

    def _add_quantizer(self, stored: str, name: str) -> dict[str, str]:
        """Copy a vector's quantizer; return the new output by the output of the original one."""
        sim, nodes = self.sim, self.sim.model.model.graph.node
        through = {}
        for node in list(self._quantizers(stored)):
            original = sim.qc_quantize_op_dict[stored]
            quantizer = original._copy()
            restore_quantizer(quantizer, *quantizer_state(original))
            added = nodes.add()
            added.CopyFrom(node)
            added.name = f"{_QUANTIZER}_{name}"
            added.input[0], added.output[0] = name, name + node.output[0].removeprefix(stored)
            for attribute in added.attribute:
                if attribute.name == "op_name":
                    attribute.s = name.encode()
                elif attribute.name == "quant_info":
                    attribute.i = libpymo.PtrToInt64(quantizer.quant_info)
            output = added.output[0]
            through[node.output[0]] = output
            self._undo.append(partial(_remove_node, nodes, output))
            self._put(sim.qc_quantize_op_dict, name, quantizer)
            self._put(sim._producers, output, added)
        for names in (sim.param_names, sim.activation_names):
            if stored in names:
                names.insert(names.index(stored) + 1, name)
                self._undo.append(partial(names.remove, name))
        if stored in sim.activation_dtypes:
            self._put(sim.activation_dtypes, name, sim.activation_dtypes[stored])
        return through

    def _add_product(self, stored: str, name: str, reader: str) -> None:
        """Add the copy to AIMET's graph, as an input of the reader."""
        products = self.sim.connected_graph.get_all_products()
        op = self.sim.connected_graph.get_all_ops()[reader]
        old = products[stored]
        new = copy.copy(old)
        new.name = name
        new.set_consumers_to_null()
        new.add_consumer(op)
        self._put(products, name, new)
        before = (list(old.consumers), list(op.inputs), dict(op.parameters))

        def put(consumers: list[Any], inputs: list[Any], parameters: dict[str, Any]) -> None:
            old.consumers[:] = consumers
            op.inputs[:] = inputs
            op.parameters.clear()
            op.parameters.update(parameters)

        self._undo.append(lambda: put(*before))
        parameters = {
            name if key == stored else key: (new, kind) if product is old else (product, kind)
            for key, (product, kind) in before[2].items()
        }
        put(
            [found for found in before[0] if found is not op],
            [new if found is old else found for found in before[1]],
            parameters,
        )

    def _rewire(self, output: str, place: int, name: str) -> None:
        """Connect a node to another tensor, in the model and where AIMET holds copies of nodes."""

        def nodes() -> Iterator[NodeProto]:
            for node in self._nodes():
                if output in node.output:
                    yield node
                    yield self.sim.connected_graph.get_all_ops()[node.name].get_module()
            yield self.sim._producers[output]

        before = self.sim._producers[output].input[place]

        def put(name: str) -> None:
            for node in nodes():
                node.input[place] = name

        self._undo.append(lambda: put(before))
        put(name)

    def _put(self, where: dict[str, Any], key: str, value: Any) -> None:
        where[key] = value
        self._undo.append(lambda: where.pop(key))

    def _quantizers(self, stored: str) -> Iterator[NodeProto]:
        return (n for n in self._nodes() if n.op_type == _QUANTIZER and n.input[0] == stored)

    def _nodes(self) -> Iterable[NodeProto]:
        nodes: Iterable[NodeProto] = self.sim.model.model.graph.node
        return nodes

    def _unused(self, name: str) -> str:
        """Return the name, or one like it that no tensor has."""
        taken = self.sim.connected_graph.get_all_products()
        number, found = 0, name
        while found in taken:
            number += 1
            found = f"{name}_{number}"
        return found


def _remove_node(nodes: Any, output: str) -> None:
    _remove(nodes, lambda node: output in node.output)


def _remove(items: Any, matches: Callable[[Any], bool]) -> None:
    """Take the last item out that matches; the others stay where they are."""
    index = max(index for index, item in enumerate(items) if matches(item))
    del items[index]
