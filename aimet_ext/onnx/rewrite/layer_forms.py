"""Layers in the forms that HTP computes right, put there before quantizers are placed.

What was measured on HTP v75, 16-bit activations, against the quantization simulation; a bias of 32
bits changes none of the outcomes but one:

===============  =========================  ========================  ==========================
weight           MatMul, then Add           Gemm                      Conv 1x1
===============  =========================  ========================  ==========================
LPBQ, 4 bits     84 to 86 dB                rejected; with a float    rejected, with and without
                                            bias accepted, the bias   a bias
                                            is dropped (1 dB)
blocks, 4 bits   68 to 72 dB                68 dB; with a float bias  68 dB; with a float bias
                                            rejected, int32 69 dB     accepted and wrong (-8 dB)
per channel, 4   63 to 68 dB                62 to 65 dB               63 to 68 dB
per channel, 8   84 to 86 dB                84 to 86 dB               84 to 86 dB
===============  =========================  ========================  ==========================

So layers whose weight has blocks become a MatMul, and their bias an Add after it. A convolution
with blocks, but not LPBQ, keeps its form, with its bias as an Add.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from aimet_ext.onnx.rewrite.fold import drop_unused

__all__ = ["set_apart"]

_BLOCKS = ("LPBQ", "PER_BLOCK")


def set_apart(model: onnx.ModelProto, kinds: Mapping[str, str]) -> list[str]:
    """Rewrite layers into the forms that HTP computes right, in place; the function is the same.

    Outputs keep their names, weights too, which are stored turned where a MatMul needs that.

    :param kinds: what the scales of a stored weight are for: ``"LPBQ"``, ``"PER_BLOCK"``, or
        others, which are left alone.
    :returns: names of the nodes that were rewritten.
    """
    return _Rewriter(model, kinds).rewrite()


class _Rewriter:
    """Rewrites the nodes of one model."""

    def __init__(self, model: onnx.ModelProto, kinds: Mapping[str, str]) -> None:
        self.graph = model.graph
        self.kinds = kinds
        self.stored = {proto.name: proto for proto in self.graph.initializer}
        for node in self.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.stored[node.output[0]] = node.attribute[0].t
        self.readers: dict[str, int] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers[name] = self.readers.get(name, 0) + 1
        self.changed: list[str] = []

    def rewrite(self) -> list[str]:
        forms = {"Gemm": self._gemm, "Conv": self._conv}
        nodes: list[onnx.NodeProto] = []
        for node in self.graph.node:
            found = None
            if node.op_type in forms and self.kinds.get(node.input[1]) in _BLOCKS:
                found = forms[node.op_type](node)
            if found is not None:
                self.changed.append(node.name)
            copies = [onnx.NodeProto() for _ in found or (node,)]
            for copy, each in zip(copies, found or (node,), strict=True):
                copy.CopyFrom(each)
            nodes += copies
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        if self.changed:
            drop_unused(self.graph)
        return self.changed

    def _gemm(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        given = _attributes(node)
        plain = all(given.get(key, 1.0) == 1.0 for key in ("alpha", "beta"))
        weight = self.stored.get(node.input[1])
        if not plain or given.get("transA", 0) or weight is None:
            return None
        if given.get("transB", 0):
            if self.readers[node.input[1]] > 1:
                return None
            self._store(weight, onnx.numpy_helper.to_array(weight).T)
        return self._matmul(node, node.input[0], node.output[0])

    def _conv(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        weight = self.stored.get(node.input[1])
        if weight is None:
            return None
        if self.kinds[node.input[1]] == "LPBQ":
            return self._pointwise(node, weight)
        if len(node.input) < 3 or node.input[2] not in self.stored:
            return None
        bias = self.stored[node.input[2]]
        name = f"{node.input[2]}_per_channel"
        shape = (-1, *[1] * (len(weight.dims) - 2))
        values = onnx.numpy_helper.to_array(bias).reshape(shape)
        self.graph.initializer.append(onnx.numpy_helper.from_array(values.copy(), name))
        alone = onnx.NodeProto()
        alone.CopyFrom(node)
        del alone.input[2:]
        alone.output[0] = f"{node.output[0]}_without_bias"
        return [alone, _node("Add", [alone.output[0], name], node.output[0], f"{node.name}/Add")]

    def _pointwise(
        self, node: onnx.NodeProto, weight: onnx.TensorProto
    ) -> list[onnx.NodeProto] | None:
        """A convolution that looks at one place at a time, as a MatMul with channels last."""
        given = _attributes(node)
        spatial = len(weight.dims) - 2
        ones = all(n == 1 for key in ("strides", "dilations") for n in given.get(key, ()))
        if (
            any(n > 1 for n in weight.dims[2:])
            or given.get("group", 1) > 1
            or any(given.get("pads", ()))
            or not ones
            or self.readers[node.input[1]] > 1
        ):
            return None
        values = onnx.numpy_helper.to_array(weight)
        self._store(weight, values.reshape(values.shape[:2]).T)
        last, first = f"{node.output[0]}_channels_last", f"{node.input[0]}_channels_last"
        to_last = [0, *range(2, spatial + 2), 1]
        to_first = [0, spatial + 1, *range(1, spatial + 1)]
        first = f"{first}_{node.name}"
        return [
            _node("Transpose", [node.input[0]], first, f"{node.name}/Transpose", perm=to_last),
            *self._matmul(node, first, last),
            _node("Transpose", [last], node.output[0], f"{node.name}/Transpose_1", perm=to_first),
        ]

    def _matmul(self, node: onnx.NodeProto, source: str, output: str) -> list[onnx.NodeProto]:
        if len(node.input) < 3 or not node.input[2]:
            return [_node("MatMul", [source, node.input[1]], output, node.name)]
        product = f"{output}_without_bias"
        return [
            _node("MatMul", [source, node.input[1]], product, node.name),
            _node("Add", [product, node.input[2]], output, f"{node.name}/Add"),
        ]

    def _store(self, proto: onnx.TensorProto, values: np.ndarray[Any, Any]) -> None:
        """Put values of another shape in a stored one's place."""
        name = proto.name
        proto.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))
        for info in [info for info in self.graph.value_info if info.name == name]:
            self.graph.value_info.remove(info)


def _node(
    op_type: str, inputs: list[str], output: str, name: str, **attributes: Any
) -> onnx.NodeProto:
    return onnx.helper.make_node(op_type, inputs, [output], name=name, **attributes)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
