"""An ONNX model as a float graph: nodes in order, tensors by name, and parts that run alone.

Quantizers that AIMET put into the model are seen through, so that all names are those of the
model that went into the simulation. Values of initializers stay where they are, in the model.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from aimet_ext.onnx.index import (
    GraphIndex,
    attribute,
    bodies,
    copied,
    drop_unused,
    in_order,
    inner_nodes,
    keep_where,
    make_part,
    reads,
    rename_reads,
    stored_value,
)
from aimet_ext.onnx.session import open_session
from aimet_ext.onnx.values import (
    can_be_given,
    infer_types,
    is_large,
    placeholder,
    read_array,
    to_torch,
    torch_array,
    without_large,
    write_array,
)

if TYPE_CHECKING:
    import torch

    from aimet_ext.onnx.layers import OnnxLayer

_QUANTIZER = "QcQuantizeOp"
_FUSED = "aimet.supergroup"  # domain of the functions in which AIMET fuses patterns of nodes
_WEIGHT_INPUT = {"MatMul": 1, "Gemm": 1, "Conv": 1, "ConvTranspose": 1, "Gather": 0}


class OnnxGraph(GraphIndex):
    """Float view of a model, made once: nodes that are added later are not seen.

    Values are read from the model and written to it at each call, nothing is kept.

    :param model: with or without AIMET's quantizers.
    :param base_dir: folder of external data that is not loaded.
    :raises ValueError: the nodes form a cycle, or one reads a tensor that nothing makes.
    """

    def __init__(self, model: onnx.ModelProto, *, base_dir: str = "") -> None:
        self.proto = model
        self.base_dir = base_dir
        nodes, names, self.fused = _without_quantizers(model)
        given = {value.name for value in (*model.graph.input, *model.graph.initializer)}
        super().__init__(model.graph, in_order(nodes, given))
        self.outputs = tuple(names.get(name, name) for name in self.outputs)
        self.opset: dict[str, int] = {
            entry.domain: entry.version
            for entry in model.opset_import
            if not entry.domain.startswith("aimet.")
        }
        self._functions = {(f.domain, f.name) for f in model.functions}
        self._types: dict[str, int] | None = None

    def with_nodes(self, nodes: Iterable[NodeProto], opset: Mapping[str, int]) -> OnnxGraph:
        """Return a view with other nodes and the same stored values.

        :param nodes: Nodes in order.
        :param opset: Versions of operators by domain.
        """
        found = copy.copy(self)
        found.set_nodes(nodes)
        found.opset, found._types = dict(opset), None
        return found

    def calls_function(self, node: NodeProto) -> bool:
        """Return True if a node calls a function of the model, which is not looked into."""
        return (node.domain, node.op_type) in self._functions

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """Return a copy of an initializer's or a Constant node's value, in its own type.

        :raises ValueError: there is no stored value of that name.
        """
        return read_array(self._stored(name), self.base_dir)

    def set_array(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Write an initializer's or a Constant node's value into the model.

        :param array: array of the same shape and type.
        :raises ValueError: it is not, or there is no stored value of that name.
        """
        write_array(self._stored(name), array)

    def tensor(self, name: str) -> Tensor:
        """Return :meth:`array` as a torch tensor."""
        return to_torch(self.array(name))

    def set_tensor(self, name: str, values: Tensor) -> None:
        """Write a torch tensor as :meth:`set_array` does, converted to the stored type."""
        dtype = self.tensor_dtype(name)
        self.set_array(name, torch_array(values.detach().to("cpu", dtype).contiguous()))

    def tensor_dtype(self, name: str) -> torch.dtype:
        """Return the type of a stored value in torch's words."""
        stored = self.stored.get(name) or self._stored(name)
        empty = TensorProto(data_type=stored.data_type, dims=[0])
        return to_torch(read_array(empty, "")).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a stored value."""
        return tuple((self.stored.get(name) or self._stored(name)).dims)

    def elem_type(self, name: str) -> int:
        """Return the ONNX type of any tensor, such as ``TensorProto.FLOAT``.

        :raises ValueError: there is no such tensor, or its type cannot be told.
        """
        if self._types is None:
            stored = self.initializers.values()
            small = (t if is_large(t) else self._embedded(t) for t in stored)
            outputs = [helper.make_empty_tensor_value_info(name) for name in self.outputs]
            light = make_part(
                self.proto,
                *without_large(self.nodes, small),
                self.inputs.values(),
                outputs,
                self.opset,
            )
            self._types = infer_types(light, self.nodes, self._known())
        if name not in self._types:
            raise ValueError(
                f"the type of a tensor of the graph is asked for, got {name!r}, which is not in "
                "it or whose type cannot be told; add it to the model's value_info"
            )
        return self._types[name]

    def subgraph(self, inputs: Iterable[str], outputs: Iterable[str]) -> list[int]:
        """Return nodes that it takes to compute tensors from others, in order.

        :raises ValueError: a tensor is needed that neither is given nor can be computed.
        """
        given, outputs = set(inputs), list(outputs)
        needed: set[int] = set()
        for name in self.behind(outputs, lambda name, _: name not in given):
            if name in given or name in self.initializers:
                continue
            if name not in self.producer:
                kind = "input of the graph" if name in self.inputs else "tensor nobody makes"
                raise ValueError(
                    f"{', '.join(outputs)} must follow from {', '.join(sorted(given)) or 'nothing'}"
                    f", but {name!r} is needed too ({kind}); give it as well"
                )
            needed.add(self.producer[name])
        return sorted(needed)

    def model(
        self,
        nodes: Sequence[int],
        inputs: Iterable[str],
        outputs: Iterable[str],
        *,
        drop: Collection[str] = (),
    ) -> onnx.ModelProto:
        """Return a part of the graph that runs alone.

        :param nodes: indices, as :meth:`subgraph` gives them.
        :param inputs: tensors that are fed.
        :param outputs: tensors that come out.
        :param drop: initializers whose values stay out of the part, declared as external data for
            ``SessionOptions.add_external_initializers``.
        """
        inputs, outputs = list(inputs), list(outputs)
        part = [self.nodes[index] for index in sorted(nodes)]
        read = {name for node in part for name in reads(node)} | set(outputs)
        stored = [t for name, t in self.initializers.items() if name in read - set(inputs)]
        return make_part(
            self.proto,
            part,
            (placeholder(t) if t.name in drop else self._embedded(t) for t in stored),
            map(self._value_info, inputs),
            map(self._value_info, outputs),
            self.opset,
        )

    def _stored(self, name: str) -> TensorProto:
        """Return the value that the model stores now: AIMET may have put a copy in its place."""
        graph = self.proto.graph
        makers = (node for node in graph.node if name in node.output)
        found = next((tensor for tensor in graph.initializer if tensor.name == name), None)
        found = found or next(filter(None, map(stored_value, makers)), None)
        found = found or self.stored.get(name)  # inside of what AIMET fused
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
        """Return types that the model states."""
        graph = self.proto.graph
        values = {value.name: value for value in (*graph.value_info, *graph.input)}
        values.update(zip(self.outputs, graph.output, strict=True))
        kinds = {name: value.type.tensor_type.elem_type for name, value in values.items()}
        kinds.update((name, tensor.data_type) for name, tensor in self.initializers.items())
        return {name: kind for name, kind in kinds.items() if kind}


class Part:
    """A session over a part of a graph. Large stored values lie in memory once, while it lives.

    :param graph: graph that the part belongs to.
    :param nodes: indices, in order.
    :param inputs: tensors that are fed.
    :param outputs: tensors that come out.
    :param layers: layers whose weights are replaced, at least.
    :param weights: weights ``[out, in, …]`` in place of those that are stored, by layer.
    :param providers: onnxruntime's providers, the CPU's if None.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        nodes: Sequence[int],
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        layers: Mapping[str, OnnxLayer],
        weights: Mapping[str, Tensor],
        providers: Sequence[Any] | None = None,
    ) -> None:
        read = {name for index in nodes for name in graph.reads[index]}
        stored = ((name, graph.initializers.get(name)) for name in read)
        large = {name for name, tensor in stored if tensor is not None and can_be_given(tensor)}
        model = graph.model(nodes, inputs, outputs, drop=large)
        fresh = _replace(model, sorted(nodes), layers, weights)
        drop_unused(model.graph, inputs=True)
        self._outputs = list(outputs)
        self._session = open_session(
            model,
            # Weights in another layout beside the given ones would take their size once more.
            optimize="basic",
            given={
                t.name: fresh[t.name] if t.name in fresh else graph.array(t.name)
                for t in model.graph.initializer
                if t.data_location == TensorProto.EXTERNAL
            },
            entries={
                "session.disable_prepacking": "1",
                "session.intra_op.allow_spinning": "0",
            },
            providers=providers,
            inter_op_num_threads=1,
            enable_cpu_mem_arena=False,
            enable_mem_pattern=False,
        )
        self._inputs = [value.name for value in self._session.get_inputs()]

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs for these inputs, which may be more than are read."""
        feeds = {name: torch_array(values[name].contiguous()) for name in self._inputs}
        found = self._session.run(self._outputs, feeds)
        return dict(zip(self._outputs, map(to_torch, found), strict=True))


def _replace(
    model: onnx.ModelProto,
    indices: Sequence[int],
    layers: Mapping[str, OnnxLayer],
    weights: Mapping[str, Tensor],
) -> dict[str, np.ndarray[Any, Any]]:
    """Have nodes of a part read other weights, which are declared as external data.

    :param indices: places of the part's nodes in the graph.
    :returns: the arrays by the names that these weights got.
    """
    places = dict(zip(indices, model.graph.node, strict=True))
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for number, (name, weight) in enumerate(weights.items()):
        for use in layers[name].uses:
            node = places.get(use.node)
            if node is None:
                continue
            other = layers[name].kind == "other" or bool(layers[name].directions)
            turned = not other and _is_turned(node)
            own = f"replaced_weight_{number}{'_turned' if turned else ''}"
            if other:
                rename_reads(node, {layers[name].weight: own})
            else:
                node.input[_WEIGHT_INPUT[node.op_type]] = own
            if own not in arrays:
                values = weight.T if turned else weight
                if directions := layers[name].directions:
                    values = weight.reshape(directions, -1, weight.shape[1])
                arrays[own] = torch_array(values.contiguous().cpu())
                model.graph.initializer.append(_declared(own, arrays[own]))
    return arrays


def _is_turned(node: NodeProto) -> bool:
    """Return True if a node reads its weight as ``[in, out]``."""
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB", 0))


def _declared(name: str, array: np.ndarray[Any, Any]) -> TensorProto:
    """Return an initializer whose value the session is given, or one that holds a small value."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = TensorProto(name=name, data_type=kind, dims=array.shape)
    if can_be_given(tensor):
        return placeholder(tensor)
    return numpy_helper.from_array(array, name)


def _without_quantizers(
    model: onnx.ModelProto,
) -> tuple[list[NodeProto], dict[str, str], dict[str, tuple[str, ...]]]:
    """Return nodes without AIMET's quantizers and without its fusions, and the names of tensors.

    :returns: copies of the nodes that read the tensors themselves; from the output of each
        quantizer, the tensor that it quantizes; from each fused node, the names of its nodes.
    """
    names = _seen_through(model.graph.node)
    fused = {
        (f.domain, f.name, f.overload): f for f in model.functions if f.domain.startswith(_FUSED)
    }
    nodes: list[NodeProto] = []
    calls: dict[str, tuple[str, ...]] = {}
    for node in model.graph.node:
        if node.op_type == _QUANTIZER:
            continue
        # A Constant is not copied, it may be large.
        seen = node if node.op_type == "Constant" else _plain(node, names)
        function = fused.get((node.domain, node.op_type, node.overload))
        if function is None:
            nodes.append(seen)
        else:
            nodes += _inlined(seen, function)
            calls[node.name] = tuple(inner.name for inner in function.node)
    return nodes, names, calls


def _inlined(call: NodeProto, function: onnx.FunctionProto) -> list[NodeProto]:
    """Return the nodes of a fused pattern; AIMET keeps their names, each call has its own function.

    :raises ValueError: the function has attributes, which no pattern of AIMET's has.
    """
    names = dict(zip(function.input, [*call.input] + [""] * len(function.input), strict=False))
    names.update(zip(function.output, call.output, strict=True))
    nodes = []
    for inner in function.node:
        if any(found.ref_attr_name for found in inner.attribute):
            raise ValueError(
                f"{call.name}: AIMET's fused nodes must not hand attributes on, {inner.name} of "
                f"{function.name} takes one; build the simulation without fusing"
            )
        own = _plain(inner, names)
        own.output[:] = [names.get(name, name) for name in own.output]
        nodes.append(own)
    return nodes


def _seen_through(nodes: Iterable[NodeProto]) -> dict[str, str]:
    """Map the output of each quantizer to the tensor that it quantizes."""
    every = (each for node in nodes for each in (node, *inner_nodes(node)))
    direct = {node.output[0]: node.input[0] for node in every if node.op_type == _QUANTIZER}
    found = {}
    for name, source in direct.items():
        while source in direct:
            source = direct[source]
        found[name] = source
    return found


def _plain(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    """Return a copy of a node that reads the tensors themselves, subgraphs without quantizers."""
    found = copied(node, names)
    for each in (found, *inner_nodes(found)):
        for graph in bodies(each):
            keep_where(graph.node, lambda inner: inner.op_type != _QUANTIZER)
    return found
