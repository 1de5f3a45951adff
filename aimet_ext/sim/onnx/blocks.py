"""Decoder blocks of an ONNX simulation as torch modules, their shared vectors copied and undone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import torch
from aimet_onnx.common import libpymo
from onnx import NodeProto, TensorProto, numpy_helper
from torch import Tensor, nn

from aimet_ext.core.affine import fake_quantize
from aimet_ext.models.description import TopologyDescription
from aimet_ext.models.topology import BlockTopology
from aimet_ext.onnx.blocks.find import (
    BlockPlan,
    argument_names,
    capture_blocks,
    find_onnx_blocks,
)
from aimet_ext.onnx.blocks.flow import Flow, Reading, SharedVector, to_copy
from aimet_ext.onnx.blocks.module import (
    OnnxBlock,
    OnnxLinear,
    check_block,
    read_again,
    static_batch,
    write_back,
)
from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.layers import OnnxLayer
from aimet_ext.onnx.shells import insert_module
from aimet_ext.sim.onnx.quantizers import quantizer_state, restore_quantizer
from aimet_ext.sim.points import NormGain
from aimet_ext.walk.passes import BlockPass, WalkOptions, capture_streams
from aimet_ext.walk.stream import BlockStream

if TYPE_CHECKING:
    from aimet_ext.sim.onnx.adaptor import OnnxSim

_QUANTIZER = "QcQuantizeOp"
_STACK = "model.layers"  # as checkpoints name it, so that one scales file fits both
_OTHER_STACK = "decoder.blocks"  # where nodes of the graph have such names
_CHECKED_ROWS = 2  # sequences of the first batch that blocks are checked on


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


@dataclass(frozen=True, eq=False, kw_only=True)
class OnnxPart:
    """A block of a model as a torch module, which holds copies of stored values.

    :param layers: Layers by their names within the block.
    :param stored: Names of all values that the block has copies of, weights of layers among them.
    :param tensors: Names of the tensors that it computes or reads.
    :param commit: Function that writes its parameters back.
    :param reload: Function that reads them again.
    """

    layers: Mapping[str, OnnxLayer]
    stored: Collection[str]
    tensors: Collection[str]
    commit: Callable[[], None]
    reload: Callable[[], None]


class BlockStack(nn.Module):
    """The blocks of a simulation under their numbers; each is translated when it is asked for.

    One at a time is kept: the parameters of a block are copies of what the model stores.

    :param adaptor: Adaptor of the simulation.
    :param flow: Graph of the plans.
    """

    def __init__(self, adaptor: OnnxSim, flow: Flow, plans: Sequence[BlockPlan]) -> None:
        super().__init__()
        self.adaptor, self.flow = adaptor, flow
        self.plans = {str(number): plan for number, plan in enumerate(plans)}
        self.arguments = argument_names(plans)
        self.open: tuple[str, OnnxBlock] | None = None
        self.checked = False

    def __getattr__(self, name: str) -> Any:
        """Return a block by its number, or an attribute of every module."""
        plans = self.__dict__.get("plans", {})
        return self.block(name) if name in plans else super().__getattr__(name)

    def block(self, number: str) -> OnnxBlock:
        """Return a block; the one before it is dropped."""
        if self.open is None or self.open[0] != number:
            block = OnnxBlock(self.flow, self.plans[number], self.arguments)
            for role, layer in block.plan.layers.items():
                linear = block.get_submodule(role)
                assert isinstance(linear, OnnxLinear)
                linear.quantize = _Quantize(self.adaptor, layer.name, linear)
            self.open = (number, block)
        return self.open[1]

    def commit(self, number: str) -> None:
        """Write a block's parameters into the model."""
        block = self.block(number)
        write_back(self.flow, block)
        _forget(block)

    def reload(self, number: str) -> None:
        """Read a block's parameters again, if there are copies of them."""
        if self.open is not None and self.open[0] == number:
            read_again(self.flow, self.open[1])
            _forget(self.open[1])

    def check(self, stream: BlockStream) -> None:
        """Compare all blocks with onnxruntime, once.

        :raises TransformRefused: a block as torch computes it is not what onnxruntime gives.
        """
        if self.checked:
            return
        device, stream.device = stream.device, torch.device("cpu")
        try:
            count = static_batch(self.flow.graph) or _CHECKED_ROWS
            call = stream.select(0, slice(0, count))
            for number, plan in self.plans.items():
                with self.adaptor.disabled_quantizers(plan.topology.name):
                    check_block(self.flow, self.block(number), call)
        finally:
            stream.device = device
        self.checked = True

    def part(self, number: str) -> OnnxPart:
        """Return a block in the form that the adaptor keeps."""
        plan = self.plans[number]
        nodes = [self.flow.graph.nodes[index] for index in plan.nodes]
        return OnnxPart(
            layers=plan.layers,
            stored=plan.stored,
            tensors=[name for node in nodes for name in node.output if name],
            commit=partial(self.commit, number),
            reload=partial(self.reload, number),
        )


class _Quantize:
    """Function from a layer's weight to its quantized weight, which is kept for its own weight.

    :param name: Name of the layer in the graph.
    """

    def __init__(self, adaptor: OnnxSim, name: str, layer: OnnxLinear) -> None:
        self.adaptor, self.name, self.layer = adaptor, name, layer
        self.known: Tensor | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        found = self.adaptor.weight_quantizer(self.name)
        if found is None or not found.initialized:
            return weight
        own = weight is self.layer.weight
        if own and self.known is not None and self.known.device == weight.device:
            return self.known
        grid = found.grid()
        grid = replace(
            grid, scale=grid.scale.to(weight.device), offset=grid.offset.to(weight.device)
        )
        result = fake_quantize(weight, grid)
        self.known = result.detach() if own else self.known
        return result


def _forget(block: OnnxBlock) -> None:
    """Drop a block's quantized weights, because weights or ranges were changed."""
    for module in block.modules():
        if isinstance(module, OnnxLinear) and isinstance(module.quantize, _Quantize):
            module.quantize.known = None


def add_blocks(adaptor: OnnxSim, description: TopologyDescription | None) -> list[BlockTopology]:
    """Find the decoder blocks of a simulation's model and put them into the adaptor's.

    :param description: Names for the roles of layers, Llama's if None.
    :raises ValueError: there are no blocks, or they are not as required.
    """
    name = _stack_name(adaptor)
    flow, plans = find_onnx_blocks(adaptor.graph, description, stack=name)
    stack = BlockStack(adaptor, flow, plans)
    insert_module(adaptor.model, name, stack)
    for number, plan in stack.plans.items():
        adaptor.parts[plan.topology.name] = stack.part(number)
    return [plan.topology for plan in plans]


def copy_shared(
    adaptor: OnnxSim, kinds: Collection[str], description: TopologyDescription | None
) -> Copies:
    """Copy what pairs of these kinds rescale and others read as well, for each such reader.

    :returns: the copies, which can be undone. The adaptor has to look at the graph again.
    :raises ValueError: there are no blocks, or they are not as required.
    """
    _, plans = find_onnx_blocks(adaptor.graph, description, stack=_stack_name(adaptor))
    shared = (v for plan in plans for kind in kinds for v in plan.shared.get(kind, ()))
    copies = Copies(adaptor.sim, adaptor.graph)
    try:
        for vector in to_copy(shared):
            copies.add(vector)
    except BaseException:
        copies.undo()
        raise
    return copies


def _stack_name(adaptor: OnnxSim) -> str:
    return _STACK if not _has(adaptor.model, _STACK) else _OTHER_STACK


def _has(root: nn.Module, name: str) -> bool:
    return any(found == name for found, _ in root.named_modules())


def open_pass(
    adaptor: OnnxSim,
    blocks: Sequence[str],
    batches: Sequence[Mapping[str, Tensor]],
    effective: Mapping[str, Tensor],
    **options: Unpack[WalkOptions],
) -> BlockPass:
    """Capture both streams at the first block; the first time, all blocks are checked on them.

    :param effective: Weights of layers before the blocks that the quantized stream uses.
    :raises TransformRefused: a block as torch computes it is not what onnxruntime gives.
    """
    stack = adaptor.model.get_submodule(blocks[0].rpartition(".")[0])
    assert isinstance(stack, BlockStack)

    def capture(_: str, weights: Mapping[str, Tensor]) -> BlockStream:
        return capture_blocks(
            stack.flow,
            list(stack.plans.values()),
            batches,
            quantized=weights.get,
            cache_dir=options.get("cache_dir"),
            device=options.get("device"),
        )

    found = BlockPass(
        adaptor.model,
        blocks,
        capture_streams(capture, {"float": {}, "quantized": effective}),
        options.get("device"),
    )
    try:
        stack.check(found.flows["float"])
    except BaseException:
        found.close()
        raise
    return found


def norm_gains(adaptor: OnnxSim, blocks: Sequence[BlockTopology]) -> list[NormGain]:
    """Return the gains of norms that layers of a simulation's blocks read, and nothing else."""
    if not blocks:
        return []
    stack = adaptor.model.get_submodule(blocks[0].name.rpartition(".")[0])
    assert isinstance(stack, BlockStack)
    found = []
    for plan, block in zip(stack.plans.values(), blocks, strict=True):
        for pair in block.pairs:
            if pair.kind not in ("norm_qkv", "norm_mlp"):
                continue
            first, *readers = pair.sides
            norm = plan.norms[first.module]
            names = {"weight": norm.gain, "bias": norm.bias}
            found.append(
                NormGain(
                    module=f"{block.name}.{first.module}",
                    part=block.name,
                    names={key: name for key, name in names.items() if name is not None},
                    offset=norm.gain_offset,
                    readers=tuple(f"{block.name}.{side.module}" for side in readers),
                )
            )
    return found
