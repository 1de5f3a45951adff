"""Parts of ONNX graphs as differentiable torch modules, checked against onnxruntime."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from onnx import NodeProto
from torch import Tensor, nn

from aimet_ext.errors import TransformRefused
from aimet_ext.onnx.graph import OnnxGraph, Part
from aimet_ext.onnx.index import reads
from aimet_ext.onnx.layers import OnnxLayer
from aimet_ext.onnx.ops.attention import ATTENTION, ATTENTION_LIMITS
from aimet_ext.onnx.ops.math import MATH, MATH_LIMITS
from aimet_ext.onnx.ops.operator import (
    Attributes,
    Limit,
    Operator,
    apply_operator,
    attributes_of,
    key_of,
    widened,
)
from aimet_ext.onnx.ops.shape import SHAPE, SHAPE_LIMITS
from aimet_ext.onnx.shells import linear_module
from aimet_ext.onnx.values import to_torch

# By domain ("" for ONNX's own) and operator.
OPERATORS: Mapping[tuple[str, str], Operator] = {**MATH, **SHAPE, **ATTENTION}
_LIMITS: Mapping[tuple[str, str], Limit] = {**MATH_LIMITS, **SHAPE_LIMITS, **ATTENTION_LIMITS}

_OLDEST = 9  # opset; before it, operators broadcast in ways of their own
_SMALL = 1024  # elements; what is computed from small constants alone is computed once


def unsupported(nodes: Iterable[NodeProto]) -> list[str]:
    """List what is not translated of nodes: ``"domain::operator (node name)"`` and the reason.

    The reason stands behind a colon where the operator is translated but not the node's
    attributes; a node without name goes by its first output.
    """
    found = []
    for node in nodes:
        key = key_of(node)
        label = f"{key[0] or 'ai.onnx'}::{key[1]} ({node.name or node.output[0]})"
        if key not in OPERATORS:
            found.append(label)
        elif key in _LIMITS:
            reason = _LIMITS[key](attributes_of(node), [bool(name) for name in node.input])
            found += [f"{label}: {reason}"] if reason else []
    return found


@dataclass(frozen=True)
class Operation:
    """A node, or a linear layer with its bias.

    :param node: the layer's own node in that case.
    :param label: name in errors.
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

    @classmethod
    def of(cls, node: NodeProto) -> Operation:
        """Return the operation of a node alone."""
        label = f"{node.op_type} {node.name or node.output[0]!r}"
        return cls(node, label, tuple(node.input), tuple(node.output))

    @cached_property
    def key(self) -> tuple[str, str]:
        """Domain and operator, see :func:`key_of`."""
        return key_of(self.node)

    def read(self) -> Iterator[str]:
        """Yield the names of the inputs that are there."""
        return filter(None, self.inputs)

    def taken(self, values: Mapping[str, Tensor]) -> list[Tensor | None]:
        """Return the inputs by name, None for one that is left out."""
        return [values[name] if name else None for name in self.inputs]

    def prepared(self) -> Operation:
        """Return the step with its attributes read, in the node's precision and in float64."""
        attributes = attributes_of(self.node) if self.linear is None else {}
        return replace(self, attributes=attributes, wide=widened(attributes))


def _compute(
    step: Operation, inputs: Sequence[Any], opset: int, *, wide: bool = False
) -> dict[str, Tensor]:
    """Return the outputs of a node by name.

    :raises ValueError: they cannot be computed.
    """
    attributes = step.wide if wide else step.attributes
    try:
        operator = OPERATORS[step.key]
        outputs = apply_operator(operator, step.key[1], attributes, inputs, opset)
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        shapes = [None if x is None else (*x.shape,) for x in inputs]
        raise ValueError(f"{step.label} on inputs of shapes {shapes}: {error}") from error
    pairs = zip(step.outputs, outputs, strict=False)  # either may be longer
    return {name: value for name, value in pairs if name and value is not None}


def evaluate(
    node: NodeProto, values: Mapping[str, Tensor], opset: int, *, wide: bool = False
) -> dict[str, Tensor]:
    """Return the outputs of one node by tensor name, differentiable in its inputs.

    :param values: at least the node's inputs, by tensor name; none is written into.
    :param opset: version of ONNX's own domain that the model uses.
    :param wide: take float64 where the node asks for less, as a Cast to float32 does.
    :raises TransformRefused: the operator, or what its attributes ask for, is not translated.
    :raises ValueError: the outputs cannot be computed.
    """
    refused = unsupported([node])
    if refused:
        raise TransformRefused(f"no differentiable form of {refused[0]} is known")
    step = Operation.of(node).prepared()
    return _compute(step, step.taken(values), opset, wide=wide)


def _operations(
    graph: OnnxGraph, nodes: Sequence[int], linears: Mapping[str, OnnxLayer]
) -> list[Operation]:
    """Return all nodes in order, those of linear layers with the Add of their bias in one."""
    uses = {use.node: (name, use) for name, layer in linears.items() for use in layer.uses}
    done = {use.output for _, use in uses.values() if use.node in nodes}
    steps = []
    for index in nodes:
        step = Operation.of(graph.nodes[index])
        if index in uses:
            name, use = uses[index]
            steps.append(replace(step, inputs=(use.input,), outputs=(use.output,), linear=name))
        elif not done.intersection(step.outputs):
            steps.append(step)
    return steps


def _needed(
    steps: Sequence[Operation], inputs: Sequence[str], outputs: Sequence[str]
) -> list[Operation]:
    """Return steps that outputs need, in order.

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


class TranslatedGraph(nn.Module):
    """A part of a graph as a torch function ``module(*inputs)``, differentiable in everything.

    Values are copied from the graph's model when the module is made; the model is not written to.
    Layers in ``linears`` are submodules of class ``nn.Linear`` by their key, weight ``[out, in]``,
    with their bias where the layer has one; initializers in ``parameters`` are parameters by their
    key. Both may be replaced in a call, which is how fake-quantized weights come in::

        block = TranslatedGraph(graph, nodes, ["hidden"], ["next"], {"q": layers["/q/MatMul"]},
                                {"norm.weight": "model.norm.weight"})
        torch.func.functional_call(block, {"q.weight": fake}, (hidden,))

    All other floating-point initializers are buffers, of names of no meaning. After
    ``module.double()`` everything is computed in float64, casts to float32 within the part too,
    and inputs in lower precision are widened.

    :param nodes: indices of the graph's nodes, as ``graph.subgraph`` gives them; those that the
        outputs do not need are left out.
    :param inputs: tensors that a call takes, in this order.
    :param outputs: tensors that a call returns: one tensor alone, more as a tuple.
    :param linears: layers of kind ``linear`` by the name that the submodule shall have; all of a
        layer's uses among the nodes go through the one submodule. Dots nest.
    :param parameters: initializers by the dotted name that the parameter shall have; one of several
        names is one parameter, as torch ties them.
    :raises TransformRefused: operators that are not translated; all of them are listed.
    :raises ValueError: a tensor is needed that is not at hand, a layer that is not linear or has no
        use here, or an output that lies between a layer and its bias.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        nodes: Sequence[int],
        inputs: Sequence[str],
        outputs: Sequence[str],
        linears: Mapping[str, OnnxLayer] | None = None,
        parameters: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.opset = opset_of(graph)
        if self.opset < _OLDEST:
            raise TransformRefused(
                f"an opset of {_OLDEST} or later is translated, the model has {self.opset}; "
                "convert it with onnx.version_converter"
            )
        steps = _needed(_operations(graph, sorted(nodes), linears or {}), self.inputs, self.outputs)
        refused = unsupported(step.node for step in steps if step.linear is None)
        if refused:
            raise TransformRefused(
                f"no differentiable form is known of {len(refused)} nodes: " + "; ".join(refused)
            )
        steps = [step.prepared() for step in steps]
        used = {step.linear for step in steps}
        for name, layer in (linears or {}).items():
            if name not in used:
                raise ValueError(f"layer {layer.name!r} ({name}) has no use among the nodes given")
            self._place(name, linear_module(graph, layer))
        self._stored: dict[str, str] = {}  # initializer to dotted name
        self._host: dict[str, Tensor] = {}  # integers
        for name, initializer in (parameters or {}).items():
            if initializer in self._stored:
                self._place(name, self.get_parameter(self._stored[initializer]))
                continue
            self._place(name, nn.Parameter(graph.tensor(initializer)))
            self._stored[initializer] = name
        # Tells whether the module was made float64.
        self.register_buffer("_precision", torch.zeros(()), persistent=False)
        self._load(graph, steps)
        self._steps = self._folded(steps)
        self._dead = self._last_read([[*step.read()] for step in self._steps])

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs: one tensor alone, more as a tuple.

        :raises ValueError: another number of inputs, or a node cannot be computed on them.
        """
        values = self._start(inputs)
        for i, dead in enumerate(self._dead):
            values.update(self._run(i, values))
            for name in dead:
                values.pop(name, None)
        found = tuple(values[name] for name in self.outputs)
        return found[0] if len(found) == 1 else found

    def _last_read(self, reads: Sequence[Sequence[str]]) -> list[list[str]]:
        """Return the tensors that each step is the last one to read, but for outputs.

        :param reads: Tensors that each step reads.
        """
        last = {name: i for i, names in enumerate(reads) for name in names}
        return [
            [name for name in names if last[name] == i and name not in self.outputs]
            for i, names in enumerate(reads)
        ]

    def _start(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return inputs and constants by tensor name; subclasses may replace values."""
        if len(inputs) != len(self.inputs):
            raise ValueError(
                f"{len(self.inputs)} inputs {list(self.inputs)} are required, got {len(inputs)}"
            )
        values = dict(self._host)
        values.update({name: self._read(at) for name, at in self._stored.items()})
        for name, tensor in zip(self.inputs, inputs, strict=True):
            wide = self._is_wide and tensor.is_floating_point()
            values[name] = tensor.double() if wide else tensor
        return values

    @property
    def _is_wide(self) -> bool:
        return bool(self.get_buffer("_precision").dtype == torch.float64)

    def _run(self, i: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs of one step by tensor name; subclasses may replace values."""
        step = self._steps[i]
        if step.linear is not None:
            return {step.outputs[0]: self.get_submodule(step.linear)(values[step.inputs[0]])}
        return _compute(step, step.taken(values), self.opset, wide=self._is_wide)

    def _read(self, name: str) -> Tensor:
        *path, last = name.split(".")
        tensor: Tensor = getattr(self.get_submodule(".".join(path)), last)
        return tensor

    def _place(self, name: str, value: nn.Module | nn.Parameter) -> None:
        """Put a module or parameter at a dotted name."""
        *path, last = name.split(".")
        holder: nn.Module = self
        for piece in path:
            if not hasattr(holder, piece):
                holder.add_module(piece, nn.Module())
            holder = holder.get_submodule(piece)
        if hasattr(holder, last):
            raise ValueError(f"the name {name!r} is taken in a translated graph; choose another")
        setattr(holder, last, value)

    def _load(self, graph: OnnxGraph, steps: Sequence[Operation]) -> None:
        """Copy the constants that steps read."""
        known = {*self.inputs, *self._stored, *(name for step in steps for name in step.outputs)}
        for name in dict.fromkeys(name for step in steps for name in step.read()):
            if name in known:
                continue
            if graph.constant(name) is None:
                raise ValueError(
                    f"outputs {list(self.outputs)} must follow from {list(self.inputs)} by the "
                    f"nodes given, but {name!r} is needed too; give it as an input"
                )
            self._keep(name, graph.tensor(name))

    def _keep(self, name: str, value: Tensor) -> None:
        """Hold a constant: floating-point ones move with the module, integers stay on the host."""
        if not value.is_floating_point():
            self._host[name] = value
            return
        buffer = f"constant_{len(self._stored)}"
        self.register_buffer(buffer, value, persistent=False)
        self._stored[name] = buffer

    def _folded(self, steps: Sequence[Operation]) -> tuple[Operation, ...]:
        """Return the steps that are left once those of small constants alone are computed."""
        free = dict(self._host)
        free.update(
            {n: b for n, at in self._stored.items() if (b := self._buffers.get(at)) is not None}
        )
        kept = []
        for step in steps:
            inputs = [free.get(name) if name else None for name in step.inputs]
            if step.linear is not None or any(
                name and (value is None or value.numel() > _SMALL)
                for name, value in zip(step.inputs, inputs, strict=True)
            ):
                kept.append(step)
                continue
            for name, value in _compute(step, inputs, self.opset).items():
                self._keep(name, value)
                free[name] = value
        read = {name for step in kept for name in step.read()} | {*self.outputs}
        for name in [name for name in self._host if name not in read]:
            del self._host[name]
        for name in [name for name in self._stored if name not in read]:
            at = self._stored.pop(name)
            if at in self._buffers:
                del self._buffers[at]
        return tuple(kept)


def opset_of(graph: OnnxGraph) -> int:
    """Return the version of ONNX's own domain that a model uses."""
    return graph.opset.get("", graph.opset.get("ai.onnx", _OLDEST))


def check_translation(
    graph: OnnxGraph,
    module: TranslatedGraph,
    feeds: Sequence[Mapping[str, np.ndarray[Any, Any]]],
    tolerance: float = 1e-4,
) -> float:
    """Return the largest deviation of a translated part's outputs from onnxruntime's.

    It is ``max|torch − onnxruntime| / max|onnxruntime|``, the largest over all outputs and feeds,
    on the CPU and with the weights that the graph's model and the module have now.

    :param feeds: values of the module's inputs by tensor name, at least one.
    :param tolerance: largest deviation allowed.
    :raises TransformRefused: it is exceeded; the first node that differs on equal inputs is named.
    :raises ValueError: there is nothing to compare on.
    """
    if not feeds:
        raise ValueError("at least one feed is required to check a translation on, got none")
    nodes = graph.subgraph(module.inputs, module.outputs)
    part = Part(graph, nodes, module.inputs, module.outputs, layers={}, weights={})
    worst = 0.0
    for feed in feeds:
        inputs = {name: to_torch(np.array(feed[name])) for name in module.inputs}
        with torch.no_grad():
            found = module(*inputs.values())
        found = (found,) if isinstance(found, Tensor) else found
        expected = part.run(inputs)
        for name, value in zip(module.outputs, found, strict=True):
            deviation = _deviation(value, expected[name])
            if not deviation <= tolerance:
                raise TransformRefused(
                    f"the torch form of the part that ends in {name!r} must agree with onnxruntime "
                    f"to {tolerance:g}, got {deviation:g}; "
                    + _culprit(graph, module, inputs, tolerance)
                )
            worst = max(worst, deviation)
    return worst


def _deviation(found: Tensor, reference: Tensor) -> float:
    """Return ``max|found − reference| / max|reference|``, infinite for other shapes or integers."""
    if found.shape != reference.shape:
        return float("inf")
    if not found.numel():
        return 0.0
    if not reference.is_floating_point():
        return 0.0 if torch.equal(found.to(reference.dtype), reference) else float("inf")
    found, reference = found.detach().cpu().double(), reference.double()
    same = (found == reference) | (found.isnan() & reference.isnan())
    difference = torch.where(same, 0.0, (found - reference).abs()).max().item()
    scale = torch.where(reference.isfinite(), reference.abs(), 0.0).max().item()
    return difference / scale if scale else difference


def _culprit(
    graph: OnnxGraph, module: TranslatedGraph, inputs: Mapping[str, Tensor], tolerance: float
) -> str:
    """Return the first node whose torch form differs when it is given onnxruntime's values."""
    indices = graph.subgraph(module.inputs, module.outputs)
    nodes = [graph.nodes[index] for index in indices]
    known = {name for node in nodes for name in reads(node)} | {*module.outputs}
    asked = [name for node in nodes for name in node.output if name in known]
    part = Part(graph, indices, module.inputs, asked, layers={}, weights={})
    values = {**inputs, **part.run(inputs)}
    for node in nodes:
        for name in reads(node):
            if name not in values:
                values[name] = graph.tensor(name)
        with torch.no_grad():
            outputs = evaluate(node, values, opset_of(graph))
        for name, output in outputs.items():
            deviation = _deviation(output, values[name]) if name in values else 0.0
            if not deviation <= tolerance:
                label = f"{node.op_type} {node.name or name!r}"
                return f"the first node that differs is {label}, by {deviation:g}"
    return "no node differs alone: their deviations add up, or weights are not the graph's"
