"""The weights of a torch model apart from its ONNX graph, while exporters work on the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import NodeProto, TensorProto, numpy_helper
from torch import Tensor

from aimet_ext.onnx.index import attribute, stored_values
from aimet_ext.onnx.reading import SMALLEST, read_model
from aimet_ext.onnx.writing import write_with_values

_QUANTIZERS = ("QuantizeDequantize", "FloatQuantizeDequantize", "quantize_dequantize")
# AIMET reads constant factors, to derive ranges of scaled tensors.
_READ_BY_VALUE = ("Mul", "Div")
_LEFT_OUT = "values.apart"


class WeightsApart:
    """Large weights of a graph that is being exported, none of them copied.

    The exporters of torch and AIMET hold the weights of a graph several times over, once for each
    form that the graph goes through. Here the graph that they see has weights without values;
    these are written behind them.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def serialize(
        self, export: Callable[..., Any], graph: Any, params: Mapping[str, Any], *options: Any
    ) -> tuple[bytes, Any, Any, Any]:
        """Return what ``torch._C.Graph._export_onnx`` returns, of a model without large weights.

        :param export: That method.
        :param options: Its further arguments.
        """
        large = {
            name: value
            for name, value in params.items()
            if value.dim() > 1 and value.numel() * value.element_size() >= SMALLEST
        }
        small = {name: value for name, value in params.items() if name not in large}
        content, _, external, names = export(graph, small, *options)
        model = onnx.ModelProto.FromString(content)
        inputs = [value for value in model.graph.input if value.name not in large]
        kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
        model.graph.ClearField("input")
        model.graph.input.extend(inputs)
        by_value = _read_by_value(model.graph)
        for name in [name for name in large if name in kinds]:
            value = large[name]
            tensor = model.graph.initializer.add(name=name, data_type=kinds[name], dims=value.shape)
            if name in by_value:
                tensor.raw_data = value.detach().cpu().contiguous().numpy().tobytes()
            else:
                self.leave_out(tensor, value)
        return model.SerializeToString(), {}, external, names

    def fold_transposes(self, model: onnx.ModelProto, folder: Any = None) -> dict[str, str]:
        """Let quantized weights that a Transpose follows lie transposed in the graph.

        It does what AIMET's ``_fold_linear_weight_transpose`` does, in one pass over the graph.

        :param model: Model, changed in place.
        :param folder: Not needed here.
        :returns: by name of a transposed weight that of the weight.
        """
        graph, folding, aliases = model.graph, _Folding(self, model.graph), {}
        for node in graph.node:
            grid = folding.weight_and_grid(node)
            if not grid:
                continue
            output = node.output[0]
            node.CopyFrom(folding.makers[node.input[0]])
            node.name, node.output[0] = f"{node.name}_copy", output
            for place, tensor in enumerate(grid):
                if place == 0 or math.prod(tensor.dims) > 1:
                    node.input[place] = folding.turned(tensor)
            aliases[node.input[0]] = grid[0].name
            for each in node.attribute:
                if each.name == "block_size":
                    each.ints[:] = each.ints[::-1]
        return aliases

    def write(self, path: Path) -> None:
        """Put the values into the file that the exporters wrote."""
        model = read_model(path, external=False)
        left = {t.name for t in model.graph.initializer if t.name in self.values}
        write_with_values(model, path, {name: self.values[name] for name in left})

    def leave_out(self, tensor: TensorProto, value: Tensor) -> None:
        """Keep the value of an initializer here."""
        self.values[tensor.name] = value.detach()
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=_LEFT_OUT)


class _Folding:
    """The constants of a graph, transposed where that is asked for.

    :param apart: Owner of the large values.
    """

    def __init__(self, apart: WeightsApart, graph: onnx.GraphProto) -> None:
        self.apart, self.graph = apart, graph
        self.makers = {name: node for node in graph.node for name in node.output}
        self._constants = stored_values(graph)
        self._taken = {name for node in graph.node for name in (*node.input, *node.output)}
        self._taken |= self._constants.keys()
        self._made: dict[str, str] = {}
        # Tensors that a quantizer reads.
        self._quantized = {n.input[0] for n in graph.node if n.op_type in _QUANTIZERS}

    def weight_and_grid(self, node: NodeProto) -> list[TensorProto]:
        """Return weight, scale and offset of what a Transpose reads; empty for any other node."""
        quantizer = self.makers.get(node.input[0]) if node.op_type == "Transpose" else None
        if quantizer is None or quantizer.op_type not in _QUANTIZERS:
            return []
        if attribute(node, "perm", [1, 0]) != [1, 0] or node.output[0] in self._quantized:
            return []
        found = [self._constant(name) for name in quantizer.input]
        known = [tensor for tensor in found if tensor is not None]
        return known if len(known) == len(found) and len(known[0].dims) == 2 else []

    def turned(self, tensor: TensorProto) -> str:
        """Return the name of a constant transposed, which is made at the first time."""
        if tensor.name not in self._made:
            name = self._free_name(tensor.name)
            value = self.apart.values.get(tensor.name)
            if value is not None:
                dims = tuple(value.T.shape)
                other = TensorProto(name=name, data_type=tensor.data_type, dims=dims)
                self.apart.leave_out(other, value.T)
            else:
                array = numpy_helper.to_array(tensor)
                other = numpy_helper.from_array(array.T.copy(), name)
                other.dims[:] = [*array.shape[::-1], *[1] * (2 - array.ndim)]
            self.graph.initializer.append(other)
            self._made[tensor.name] = name
        return self._made[tensor.name]

    def _constant(self, name: str) -> TensorProto | None:
        while name not in self._constants:
            maker = self.makers.get(name)
            if maker is None or maker.op_type != "Identity":
                return None
            name = maker.input[0]
        return self._constants[name]

    def _free_name(self, base: str) -> str:
        number = 0
        while (name := f"{base}_{number}") in self._taken:
            number += 1
        self._taken.add(name)
        return name


def _read_by_value(graph: onnx.GraphProto) -> set[str]:
    """Return the tensors whose values AIMET's exporter reads: scales, offsets and factors."""
    found = {name for node in graph.node if node.op_type in _QUANTIZERS for name in node.input[1:]}
    found |= {name for node in graph.node if node.op_type in _READ_BY_VALUE for name in node.input}
    for node in reversed(graph.node):
        if node.op_type in ("Identity", *_QUANTIZERS) and node.output[0] in found:
            found.add(node.input[0])
    return found
