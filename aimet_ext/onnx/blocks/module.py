"""A decoder block of an ONNX graph as a torch module, its layers and norms named by their roles."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from aimet_ext.errors import TransformRefused
from aimet_ext.onnx.blocks.find import SHAPE_ARITHMETIC, BlockPlan
from aimet_ext.onnx.blocks.flow import Flow
from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.ops.translate import Operation, TranslatedGraph, check_translation
from aimet_ext.onnx.values import torch_array
from aimet_ext.walk.stream import BlockCall

# Allowed deviation of a translated block, relative to the largest value: at least this, and so many
# units in the last place.
_TOLERANCE, _TOLERANCE_UNITS = 1e-4, 16
_MOST_SHAPES = 64  # of batches, to remember integers for

# From the name of a tensor in the graph and its value to what takes its place.
Observer = Callable[[str, Tensor], Tensor]


class OnnxLinear(nn.Linear):
    """A linear layer that computes with its weight as a simulation quantizes it.

    :param weight: ``[out, in]``.
    :param bias: ``[out]``.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)
        #: From the weight to what the simulation uses in its place; None: itself.
        self.quantize: Callable[[Tensor], Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name
        """Return the product with the quantized weight, and the bias added."""
        weight = self.weight if self.quantize is None else self.quantize(self.weight)
        return functional.linear(input, weight, self.bias)


class OnnxBlock(TranslatedGraph):
    """A block that computes what its part of the graph does, differentiably.

    Parameters are copies, of layers and norms alone; :func:`write_back` puts them into the graph.

    :param flow: the graph that the plan speaks of.
    :param arguments: names by which the block's other tensors are given, in the plan's order.
    :raises TransformRefused: an operator has no differentiable form here; all are listed.
    """

    def __init__(self, flow: Flow, plan: BlockPlan, arguments: Iterable[str]) -> None:
        self.plan = plan
        self.arguments = tuple(arguments)
        parameters = {
            f"{role}.{key}": name
            for role, norm in plan.norms.items()
            for key, name in (("weight", norm.gain), ("bias", norm.bias))
            if name is not None
        }
        try:
            super().__init__(
                flow.graph,
                [*plan.constants, *plan.nodes],
                [plan.start, *plan.arguments],
                [plan.end],
                plan.layers,
                parameters,
            )
        except TransformRefused as refused:
            raise TransformRefused(f"{plan.topology.name}: {refused}") from refused
        #: Sees every floating-point tensor of the block and says what takes its place.
        self.observer: Observer | None = None
        self._products = {
            role: flow.graph.nodes[use.node].output[0]
            for role, layer in plan.layers.items()
            for use in layer.uses
            if use.add is not None
        }
        for role in plan.layers:
            parent, _, last = role.rpartition(".")
            layer = self.get_submodule(role)
            bias = layer.bias if isinstance(layer.bias, nn.Parameter) else None
            self.get_submodule(parent).add_module(
                last, OnnxLinear(layer.get_parameter("weight"), bias)
            )
        self._fixed = _by_shapes_alone(self._steps, self._host)
        #: By the shapes and types of inputs, what follows from these alone, by number of a step.
        self._known: dict[tuple[Any, ...], dict[int, dict[str, Tensor]]] = {}
        self._known_now: dict[int, dict[str, Tensor]] = {}
        self._leading = torch.Size()  # batch and seq of the call
        self._batch = static_batch(flow.graph)
        self._attention = _find_attention(self._steps, self.outputs)
        if self._attention is not None:
            reads = [[*step.read()] for step in self._steps]
            reads[self._attention.last] += self._attention.inputs
            self._dead = self._last_read(reads)
        self.requires_grad_(False).eval()

    def forward(  # type: ignore[override]  # as decoder blocks of transformers are called
        self,
        hidden_states: Tensor,
        *others: Tensor,
        attention_mask: Tensor | None = None,
        **tensors: Tensor,
    ) -> Tensor:
        """Return the hidden states ``[batch, seq, hidden]`` after the block.

        :param others: the other tensors, in the plan's order; or else by name:
        :param attention_mask: tensor added to the scores, or the mask that is fed to the graph.
        :param tensors: other tensors that the block reads.
        """
        if not others:
            named = {"attention_mask": attention_mask, **tensors}
            others = tuple(named[name] for name in self.arguments)  # type: ignore[misc]
        count = len(hidden_states)
        if self._batch is not None and count < self._batch:
            full = torch.arange(self._batch, device=hidden_states.device) % count
            hidden_states = hidden_states[full]
            others = tuple(x[full] if x.dim() and len(x) == count else x for x in others)
        output: Tensor = super().forward(hidden_states, *others)  # type: ignore[assignment]
        return output[:count]

    def _start(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        if len(self._known) > _MOST_SHAPES:
            self._known.clear()
        self._known_now = self._known.setdefault(tuple((x.shape, x.dtype) for x in inputs), {})
        self._leading = inputs[0].shape[:-1]
        values = super()._start(inputs)
        return {name: self._seen(name, value) for name, value in values.items()}

    def _run(self, i: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs of one step; a linear layer is always given ``[batch, seq, in]``."""
        if i in self._fixed:
            if i not in self._known_now:
                self._known_now[i] = super()._run(i, values)
            return self._known_now[i]
        attention = self._attention
        if attention is not None and self.observer is None:
            if i == attention.last:
                return {attention.output: attention(values)}
            if i in attention.skipped:
                return {}
        step = self._steps[i]
        source = None if step.linear is None else values[step.inputs[0]]
        if source is not None and source.ndim == 2:
            values = {**values, step.inputs[0]: source.view(*self._leading, -1)}
            found = super()._run(i, values)
            found = {name: value.flatten(0, -2) for name, value in found.items()}
        else:
            found = super()._run(i, values)
        product = self._products.get(step.linear or "")
        if self.observer is not None and product is not None:
            # No get_parameter: while it is replaced in a functional call, it is a plain tensor.
            bias: Any = self.get_submodule(step.linear or "").bias
            found = {name: self._seen(product, v - bias) + bias for name, v in found.items()}
        return {name: self._seen(name, value) for name, value in found.items()}

    def _seen(self, name: str, value: Tensor) -> Tensor:
        if self.observer is None or not value.is_floating_point():
            return value
        return self.observer(name, value)


@dataclass(frozen=True)
class _FusedAttention:
    """``softmax(query · key + mask) · value`` among the steps of a block.

    :param key: tensor of the keys, turned as the product takes them: ``[…, channels, seq]``.
    :param mask: tensor added to the scores, None without one.
    :param skipped: numbers of the steps that it takes the place of, but the last.
    :param last: number of the last one.
    """

    query: str
    key: str
    value: str
    mask: str | None
    output: str
    skipped: frozenset[int]
    last: int

    def __call__(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the output ``[…, seq, channels]``."""
        query = values[self.query]
        mask = None if self.mask is None else values[self.mask].to(query.dtype)
        keys = values[self.key].transpose(-1, -2)
        return functional.scaled_dot_product_attention(
            query, keys, values[self.value], attn_mask=mask, scale=1.0
        )

    @property
    def inputs(self) -> list[str]:
        """Names of the tensors that it reads."""
        return [name for name in (self.query, self.key, self.value, self.mask) if name is not None]


def _find_attention(steps: Sequence[Operation], outputs: Sequence[str]) -> _FusedAttention | None:
    """Return the one attention of a block that is spelt out in products, None if there is none.

    :param outputs: tensors that are asked for, which must stay.
    """
    softmax = [n for n, step in enumerate(steps) if step.node.op_type == "Softmax"]
    if len(softmax) != 1:
        return None
    step = steps[softmax[0]]
    if step.attributes.get("axis", -1) not in (-1, 3):
        return None
    made = {name: n for n, other in enumerate(steps) for name in other.outputs}
    readers: dict[str, list[int]] = {}
    for number, other in enumerate(steps):
        for name in other.read():
            readers.setdefault(name, []).append(number)

    def product(name: str) -> int | None:
        number = made.get(name)
        plain = number is not None and steps[number].node.op_type == "MatMul"
        return number if plain and steps[made[name]].linear is None else None

    scores, mask, skipped = step.inputs[0], None, [softmax[0]]
    added = made.get(scores)
    if added is not None and steps[added].node.op_type == "Add":
        sides = [name for name in steps[added].inputs if product(name) is not None]
        if len(sides) != 1:
            return None
        mask = next(name for name in steps[added].inputs if name != sides[0])
        scores = sides[0]
        skipped.append(added)
    first, last = product(scores), readers.get(step.outputs[0], [])
    if first is None or len(last) != 1 or steps[last[0]].node.op_type != "MatMul":
        return None
    skipped.append(first)
    probabilities, value = steps[last[0]].inputs[:2]
    inner = [name for number in skipped for name in steps[number].outputs]
    if probabilities != step.outputs[0] or set(inner) & set(outputs):
        return None
    if any(len(readers.get(name, ())) != 1 for name in inner):
        return None
    query, key = steps[first].inputs[:2]
    output = steps[last[0]].outputs[0]
    return _FusedAttention(query, key, value, mask, output, frozenset(skipped), last[0])


def static_batch(graph: OnnxGraph) -> int | None:
    """Return the number of sequences that a graph was exported for, None if it is free."""
    shapes = [value.type.tensor_type.shape.dim for value in graph.inputs.values()]
    found = {dims[0].dim_value for dims in shapes if len(dims) > 1} - {1}  # 0: any number
    return found.pop() if len(found) == 1 and 0 not in found else None


def _by_shapes_alone(steps: Sequence[Operation], integers: Collection[str]) -> frozenset[int]:
    """Return numbers of the steps whose integers follow from the shapes of the inputs alone.

    :param integers: names of constants.
    """
    fixed: set[str] = set()
    found = set()
    for number, step in enumerate(steps):
        small = step.node.op_type in SHAPE_ARITHMETIC and step.linear is None
        known = small and all(name in fixed or name in integers for name in step.read())
        if step.node.op_type == "Shape" or known:
            fixed.update(step.outputs)
            found.add(number)
    return frozenset(found)


def write_back(flow: Flow, block: OnnxBlock) -> None:
    """Put a block's parameters where the graph stores them, in the stored types."""
    for name, parameter, transposed in _stored(block):
        flow.graph.set_tensor(name, parameter.T if transposed else parameter)


@torch.no_grad()
def read_again(flow: Flow, block: OnnxBlock) -> None:
    """Have a block's parameters be what the graph stores now."""
    for name, parameter, transposed in _stored(block):
        value = flow.graph.tensor(name)
        parameter.copy_(value.T if transposed else value)


def _stored(block: OnnxBlock) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Name of each stored value, its parameter, and whether that is the transposed value."""
    for role, layer in block.plan.layers.items():
        yield layer.weight, block.get_parameter(f"{role}.weight"), layer.transposed
        if layer.bias is not None:
            yield layer.bias, block.get_parameter(f"{role}.bias"), False
    for role, norm in block.plan.norms.items():
        yield norm.gain, block.get_parameter(f"{role}.weight"), False
        if norm.bias is not None:
            yield norm.bias, block.get_parameter(f"{role}.bias"), False


@contextmanager
def observed(module: nn.Module, observer: Observer) -> Iterator[None]:
    """Open a context in which every tensor of a block passes through a function.

    :param observer: Function from a tensor's name and value to its new value.
    :raises ValueError: the module is not a block that can be watched.
    """
    block: Any = module
    if not hasattr(block, "observer"):
        raise ValueError(
            "a decoder block of the ONNX model is required to watch tensors, got a module that "
            "computes nothing by itself; call find_blocks first"
        )
    before = block.observer
    block.observer = observer
    try:
        yield
    finally:
        block.observer = before


def observed_ranges(
    module: nn.Module, run: Callable[[], object], names: Collection[str]
) -> dict[str, tuple[float, float]]:
    """Return the range of each named tensor of a block that is seen while ``run`` runs it."""
    ranges: dict[str, tuple[float, float]] = {}
    wanted = frozenset(names)

    def observe(name: str, tensor: Tensor) -> Tensor:
        if name in wanted and tensor.numel() and tensor.is_floating_point():
            low, high = ranges.get(name, (float("inf"), -float("inf")))
            ranges[name] = (min(low, float(tensor.min())), max(high, float(tensor.max())))
        return tensor

    with observed(module, observe):
        run()
    return ranges


def check_block(flow: Flow, block: OnnxBlock, call: BlockCall) -> float:
    """Return the largest deviation of a translated block from onnxruntime, relative to the maximum.

    :param block: with its float weights, no quantizer on.
    :param call: inputs to compare on.
    :raises TransformRefused: they differ; the first node that does is named.
    """
    tensors = [call.hidden, *(call.kwargs[name] for name in block.arguments)]
    feed = {
        name: torch_array(value.detach().cpu().contiguous())
        for name, value in zip(block.inputs, tensors, strict=True)
    }
    try:
        units = torch.finfo(call.hidden.dtype).eps * _TOLERANCE_UNITS
        return check_translation(flow.graph, block, [feed], max(_TOLERANCE, units))
    except TransformRefused as refused:
        raise TransformRefused(f"{block.plan.topology.name}: {refused}") from refused
