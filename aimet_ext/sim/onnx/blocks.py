"""Decoder blocks of an ONNX simulation as torch modules, for techniques that train through them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from aimet_ext.core.affine import Grid, fake_quantize, minmax_range, scale_offset
from aimet_ext.models.topology import BlockTopology, TopologyDescription
from aimet_ext.onnx.blocks.capture import argument_names, capture_blocks, check_block
from aimet_ext.onnx.blocks.find import BlockPlan, find_onnx_blocks
from aimet_ext.onnx.blocks.flow import Flow
from aimet_ext.onnx.blocks.module import (
    OnnxBlock,
    OnnxLinear,
    read_again,
    static_batch,
    write_back,
)
from aimet_ext.onnx.blocks.topology import to_copy
from aimet_ext.onnx.layers import OnnxLayer, insert_module
from aimet_ext.sim.onnx.split import Copies
from aimet_ext.sim.protocol import Range
from aimet_ext.walk.stream import BlockStream
from aimet_ext.walk.streamed import BlockPass, capture_streams

if TYPE_CHECKING:
    from aimet_ext.sim.onnx.adaptor import OnnxSim

__all__ = [
    "OnnxPart",
    "add_blocks",
    "copy_shared",
    "live_quantizer",
    "observed",
    "observed_ranges",
    "open_pass",
]

_STACK = "model.layers"  # as checkpoints name it, so that one scales file fits both
_OTHER_STACK = "decoder.blocks"  # where nodes of the graph have such names
_CHECKED_ROWS = 2  # sequences of the first batch that blocks are checked on


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
    *,
    effective: Mapping[str, Tensor],
    cache_dir: str | Path | None,
    device: torch.device | str | None,
) -> BlockPass:
    """Capture both streams at the first block; the first time, all blocks are checked on them.

    :param effective: Weights of layers before the blocks that the quantized stream uses.
    :raises TransformRefused: a block as torch computes it is not what onnxruntime gives.
    """
    stack = adaptor.model.get_submodule(blocks[0].rpartition(".")[0])
    assert isinstance(stack, BlockStack)

    def capture(weights: Mapping[str, Tensor]) -> BlockStream:
        return capture_blocks(
            stack.flow,
            list(stack.plans.values()),
            batches,
            quantized=weights.get,
            cache_dir=cache_dir,
            device=device,
        )

    found = BlockPass(
        adaptor.model,
        blocks,
        capture_streams(capture, {"float": {}, "quantized": effective}),
        device,
    )
    try:
        stack.check(found.flows["float"])
    except BaseException:
        found.close()
        raise
    return found


@contextmanager
def observed(module: nn.Module, observer: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
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
) -> dict[str, Range]:
    """Return the range of each named tensor of a block that is seen while ``run`` runs it."""
    ranges: dict[str, Range] = {}
    wanted = frozenset(names)

    def observe(name: str, tensor: Tensor) -> Tensor:
        if name in wanted and tensor.numel() and tensor.is_floating_point():
            low, high = ranges.get(name, (float("inf"), -float("inf")))
            ranges[name] = (min(low, float(tensor.min())), max(high, float(tensor.max())))
        return tensor

    with observed(module, observe):
        run()
    return ranges


def live_quantizer(quantizer: Any) -> Callable[[Tensor], Tensor]:
    """Return a function that quantizes a tensor on its own range, as an activation quantizer would.

    Gradients pass straight through the rounding; the range counts as a constant.
    """
    symmetric = bool(quantizer.use_symmetric_encodings)
    steps = 2 ** int(quantizer.bitwidth) - 1
    low_int = -(steps + 1) // 2 if symmetric else 0
    integers = (low_int, low_int + steps, symmetric)

    def quantize(tensor: Tensor) -> Tensor:
        if not tensor.numel() or not tensor.is_floating_point():
            return tensor
        low, high = minmax_range(tensor.detach(), (1,), *integers)
        scale, offset = scale_offset(low.float(), high.float(), *integers)
        return fake_quantize(tensor, Grid(scale, offset, *integers[:2], half_up=True))

    return quantize
