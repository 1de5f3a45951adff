"""Nodes of an ONNX graph as steps of a computation in torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from onnx import NodeProto
from torch import Tensor

from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.layers import OnnxLayer
from aimet_ext.onnx.ops.common import Attributes
from aimet_ext.onnx.ops.table import (
    apply_operator,
    attributes_of,
    key_of,
    outputs_by_name,
    widened,
)

__all__ = ["Step", "compute", "find_steps", "needed_steps"]


@dataclass(frozen=True)
class Step:
    """A node, or a linear layer with its bias.

    :param node: the layer's own node in that case.
    :param label: what it is called in errors.
    :param inputs: names of tensors, "" for those left out.
    :param linear: name of the submodule that computes it.
    """

    node: NodeProto
    label: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    linear: str | None = None
    attributes: Attributes = field(default_factory=dict)
    wide: Attributes = field(default_factory=dict)

    def read(self) -> Iterator[str]:
        """Names of the inputs that are there."""
        return filter(None, self.inputs)

    def prepared(self) -> Step:
        """The step with its attributes read, in the node's precision and in float64."""
        attributes = attributes_of(self.node) if self.linear is None else {}
        return replace(self, attributes=attributes, wide=widened(attributes))


def compute(
    step: Step, inputs: Sequence[Any], opset: int, *, wide: bool = False
) -> dict[str, Tensor]:
    """Outputs of a node by name.

    :raises ValueError: they cannot be computed.
    """
    attributes = step.wide if wide else step.attributes
    try:
        outputs = apply_operator(key_of(step.node), attributes, inputs, opset)
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        shapes = [None if x is None else (*x.shape,) for x in inputs]
        raise ValueError(f"{step.label} on inputs of shapes {shapes}: {error}") from error
    return outputs_by_name(step.outputs, outputs)


def find_steps(
    graph: OnnxGraph, nodes: Sequence[int], linears: Mapping[str, OnnxLayer]
) -> list[Step]:
    """All nodes in order, those of linear layers with the Add of their bias in one."""
    uses = {use.node: (name, use) for name, layer in linears.items() for use in layer.uses}
    done = {use.output for _, use in uses.values() if use.node in nodes}
    steps = []
    for index in nodes:
        node = graph.nodes[index]
        label = f"{node.op_type} {node.name or node.output[0]!r}"
        if index in uses:
            name, use = uses[index]
            steps.append(Step(node, label, (use.input,), (use.output,), linear=name))
        elif not done.intersection(node.output):
            steps.append(Step(node, label, tuple(node.input), tuple(node.output)))
    return steps


def needed_steps(
    steps: Sequence[Step], inputs: Sequence[str], outputs: Sequence[str]
) -> list[Step]:
    """Steps that outputs need, in order.

    :raises ValueError: no step makes an output.
    """
    wanted, kept = {*outputs} - {*inputs}, []
    for step in reversed(steps):
        if wanted.intersection(step.outputs):
            kept.append(step)
            wanted.difference_update(step.outputs)
            wanted.update({*step.read()} - {*inputs})
    made = {name for step in kept for name in step.outputs} | {*inputs}
    for name in outputs:
        if name not in made:
            raise ValueError(
                f"output {name!r} is made by none of the nodes given, or lies between a linear "
                "layer and its bias; ask for the tensor behind the bias"
            )
    return kept[::-1]
