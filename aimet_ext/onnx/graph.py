"""An ONNX model as a float graph: nodes in order, tensors by name, and parts that run alone.

Quantizers that AIMET put into the model are seen through, so that all names are those of the
model that went into the simulation. Values of initializers stay where they are, in the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from aimet_ext.onnx.nodes import attribute, float_nodes, in_order, reads
from aimet_ext.onnx.skeleton import is_large, large_constant, placeholder
from aimet_ext.onnx.types import infer_types, read_array, to_torch, torch_array, write_array

__all__ = ["OnnxGraph"]


class OnnxGraph:
    """Float view of a model, made once: nodes that are added later are not seen.

    Values are read from the model and written to it at each call, nothing is kept.

    :param model: with or without AIMET's quantizers.
    :param base_dir: folder of external data that is not loaded.
    :raises ValueError: the nodes form a cycle, or one reads a tensor that nothing makes.
    """

    def __init__(self, model: onnx.ModelProto, *, base_dir: str = "") -> None:
        self.proto = model
        self.base_dir = base_dir
        graph = model.graph
        nodes, names, self.fused = float_nodes(model)
        self.initializers: dict[str, TensorProto] = {t.name: t for t in graph.initializer}
        self.inputs: dict[str, onnx.ValueInfoProto] = {
            value.name: value for value in graph.input if value.name not in self.initializers
        }
        self.outputs: tuple[str, ...] = tuple(names.get(v.name, v.name) for v in graph.output)
        self.nodes: tuple[NodeProto, ...] = in_order(nodes, {*self.inputs, *self.initializers})
        self.producer: dict[str, int] = {
            output: index
            for index, node in enumerate(self.nodes)
            for output in node.output
            if output
        }
        self.consumers: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in dict.fromkeys(reads(node)):
                self.consumers.setdefault(name, []).append(index)
        self.opset: dict[str, int] = {
            entry.domain: entry.version
            for entry in model.opset_import
            if not entry.domain.startswith("aimet.")
        }
        self._functions = {(f.domain, f.name) for f in model.functions}
        self._types: dict[str, int] | None = None

    def constant(self, name: str) -> TensorProto | None:
        """The stored value of a tensor: an initializer's or a Constant node's, None for others."""
        if name in self.initializers:
            return self.initializers[name]
        index = self.producer.get(name)
        if index is None or self.nodes[index].op_type != "Constant":
            return None
        value = attribute(self.nodes[index], "value", None)
        return value if isinstance(value, TensorProto) else None

    def calls_function(self, node: NodeProto) -> bool:
        """Whether a node calls a function of the model, which is not looked into."""
        return (node.domain, node.op_type) in self._functions

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """A copy of an initializer's or a Constant node's value, in its own type.

        :raises ValueError: there is no stored value of that name.
        """
        return read_array(self._stored(name), self.base_dir)

    def set_array(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Write an initializer's or a Constant node's value into the model.

        :param array: of the same shape and type.
        :raises ValueError: it is not, or there is no stored value of that name.
        """
        write_array(self._stored(name), array)

    def tensor(self, name: str) -> Tensor:
        """The same as :meth:`array` for torch."""
        return to_torch(self.array(name))

    def set_tensor(self, name: str, values: Tensor) -> None:
        """The same as :meth:`set_array` for torch, which is converted to the stored type."""
        dtype = self.tensor_dtype(name)
        self.set_array(name, torch_array(values.detach().to("cpu", dtype).contiguous()))

    def tensor_dtype(self, name: str) -> torch.dtype:
        """Type of a stored value in torch's words."""
        stored = self.constant(name) or self._stored(name)
        empty = TensorProto(data_type=stored.data_type, dims=[0])
        return to_torch(read_array(empty, "")).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored value."""
        return tuple((self.constant(name) or self._stored(name)).dims)

    def elem_type(self, name: str) -> int:
        """ONNX's type of any tensor, such as ``TensorProto.FLOAT``.

        :raises ValueError: there is no such tensor, or its type cannot be told.
        """
        if self._types is None:
            self._types = infer_types(self._light(), self.nodes, self._known())
        if name not in self._types:
            raise ValueError(
                f"the type of a tensor of the graph is asked for, got {name!r}, which is not in "
                "it or whose type cannot be told; add it to the model's value_info"
            )
        return self._types[name]

    def subgraph(self, inputs: Iterable[str], outputs: Iterable[str]) -> list[int]:
        """Nodes that it takes to compute tensors from others, in order.

        :raises ValueError: a tensor is needed that neither is given nor can be computed.
        """
        given, outputs = set(inputs), list(outputs)
        needed: set[int] = set()
        todo = [name for name in outputs if name not in given]
        while todo:
            name = todo.pop()
            if name in self.initializers:
                continue
            if name not in self.producer:
                kind = "input of the graph" if name in self.inputs else "tensor nobody makes"
                raise ValueError(
                    f"{', '.join(outputs)} must follow from {', '.join(sorted(given)) or 'nothing'}"
                    f", but {name!r} is needed too ({kind}); give it as well"
                )
            index = self.producer[name]
            if index not in needed:
                needed.add(index)
                todo += [n for n in reads(self.nodes[index]) if n not in given]
        return sorted(needed)

    def model(
        self,
        nodes: Sequence[int],
        inputs: Iterable[str],
        outputs: Iterable[str],
        *,
        drop: Collection[str] = (),
        dropped: Literal["external", "inputs"] = "external",
    ) -> onnx.ModelProto:
        """A part of the graph that runs alone.

        :param nodes: indices, as :meth:`subgraph` gives them.
        :param inputs: tensors that are fed.
        :param outputs: tensors that come out.
        :param drop: initializers whose values stay out of the part.
        :param dropped: whether these are declared as external data, for
            ``SessionOptions.add_external_initializers``, or as further inputs.
        """
        inputs = list(inputs)
        part = [self.nodes[index] for index in sorted(nodes)]
        read = {name for node in part for name in reads(node)} | set(outputs)
        stored = [t for name, t in self.initializers.items() if name in read - set(inputs)]
        declared = [self._value_info(name) for name in inputs]
        kept: list[TensorProto] = []
        for tensor in stored:
            if tensor.name not in drop:
                kept.append(self._embedded(tensor))
            elif dropped == "external":
                kept.append(placeholder(tensor))
            else:
                declared.append(_tensor_info(tensor))
        graph = helper.make_graph(
            part,
            self.proto.graph.name or "part",
            declared,
            [self._value_info(name) for name in outputs],
            kept,
        )
        return self._model(graph)

    def _model(self, graph: onnx.GraphProto) -> onnx.ModelProto:
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid(d, v) for d, v in self.opset.items()]
        )
        model.ir_version = self.proto.ir_version
        kept = (f for f in self.proto.functions if not f.domain.startswith("aimet."))
        model.functions.extend(kept)
        return model

    def _stored(self, name: str) -> TensorProto:
        """The stored value in the model as it is now: AIMET may have put copies in its place."""
        stored: Iterable[TensorProto] = self.proto.graph.initializer
        for tensor in stored:
            if tensor.name == name:
                return tensor
        for node in self.proto.graph.node:
            if node.op_type == "Constant" and name in node.output:
                value = attribute(node, "value", None)
                if isinstance(value, TensorProto):
                    return value
        found = self.constant(name)  # inside of what AIMET fused
        if found is None:
            raise ValueError(
                f"an initializer or the value of a Constant node is required, got {name!r}"
            )
        return found

    def _embedded(self, tensor: TensorProto) -> TensorProto:
        if tensor.data_location != TensorProto.EXTERNAL:
            return tensor
        return numpy_helper.from_array(read_array(tensor, self.base_dir), tensor.name)

    def _value_info(self, name: str) -> onnx.ValueInfoProto:
        if name in self.inputs:
            return self.inputs[name]
        return helper.make_tensor_value_info(name, self.elem_type(name), None)

    def _known(self) -> dict[str, int]:
        """Types that the model states."""
        stated: dict[str, int] = {}
        values: Iterable[onnx.ValueInfoProto] = (
            *self.proto.graph.value_info,
            *self.proto.graph.input,
        )
        for value in values:
            if value.type.tensor_type.elem_type:
                stated[value.name] = value.type.tensor_type.elem_type
        for name, value in zip(self.outputs, self.proto.graph.output, strict=True):
            stated[name] = value.type.tensor_type.elem_type or stated.get(name, 0)
        stated.update({name: tensor.data_type for name, tensor in self.initializers.items()})
        return {name: kind for name, kind in stated.items() if kind}

    def _light(self) -> onnx.ModelProto:
        """The whole graph, large values left out: small enough whatever the model's size."""
        initializers = self.initializers.values()
        large = [t for t in initializers if is_large(t)]
        small = [self._embedded(t) for t in initializers if not is_large(t)]
        graph = helper.make_graph(
            [node for node in self.nodes if large_constant(node) is None],
            "types",
            [*self.inputs.values(), *map(_tensor_info, large), *self._large_constants()],
            [helper.make_empty_tensor_value_info(name) for name in self.outputs],
            small,
        )
        return self._model(graph)

    def _large_constants(self) -> list[onnx.ValueInfoProto]:
        found = ((node, large_constant(node)) for node in self.nodes)
        return [_tensor_info(value, node.output[0]) for node, value in found if value is not None]


def _tensor_info(tensor: TensorProto, name: str = "") -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name or tensor.name, tensor.data_type, tensor.dims)
