"""Capture of the inputs of an ONNX graph's decoder blocks, and a check of blocks against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from aimet_ext.data.batches import attended_tokens
from aimet_ext.errors import TransformRefused
from aimet_ext.onnx.blocks.find import BlockPlan
from aimet_ext.onnx.blocks.flow import Flow
from aimet_ext.onnx.blocks.module import OnnxBlock
from aimet_ext.onnx.graph import Part
from aimet_ext.onnx.ops.translate import check_translation
from aimet_ext.onnx.values import torch_array
from aimet_ext.walk.stream import BlockCall, BlockStream

__all__ = ["argument_names", "capture_blocks", "check_block"]

# Allowed deviation of a translated block, relative to the largest value: at least this, and so many
# units in the last place.
_TOLERANCE, _TOLERANCE_UNITS = 1e-4, 16
_MASK = "attention_mask"
_TAKEN = (_MASK, "hidden_states")  # parameters of a block


def argument_names(plans: Sequence[BlockPlan]) -> tuple[str, ...]:
    """Return names by which all blocks are given their other tensors, those of the first one."""
    first = plans[0]
    names = (f"{name}_" if name in _TAKEN else name for name in first.arguments)
    pairs = zip(first.arguments, names, strict=True)
    return tuple(_MASK if own == first.mask else name for own, name in pairs)


def capture_blocks(
    flow: Flow,
    plans: Sequence[BlockPlan],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    quantized: Callable[[str], Tensor | None],
    cache_dir: str | Path | None = None,
    device: torch.device | str | None = None,
) -> BlockStream:
    """Capture the first block's inputs for every batch, and the other tensors all blocks read.

    :param batches: inputs of the graph by name.
    :param quantized: function from a layer's name to the weight ``[out, in]`` to use for it, None
        for the stored one.
    :raises ValueError: blocks differ in what they receive, a batch is masked whole, or hidden
        states are not finite or not ``[batch, seq, hidden]``.
    :raises RuntimeError: onnxruntime failed on a batch.
    """
    wanted = dict.fromkeys([plans[0].start, *(n for plan in plans for n in plan.arguments)])
    outputs = [name for name in wanted if name not in flow.graph.inputs]
    graph = flow.graph
    nodes = graph.subgraph(graph.inputs, outputs)
    before = [name for name, layer in flow.found.items() if layer.uses[0].node in set(nodes)]
    weights = {name: weight for name in before if (weight := quantized(name)) is not None}
    part = Part(
        graph,
        nodes,
        list(graph.inputs),
        outputs,
        layers=flow.found,
        weights=weights,
    )
    names = argument_names(plans)
    stream = BlockStream(torch.device("cpu") if device is None else device, cache_dir)
    try:
        for number, batch in enumerate(batches):
            found = {**batch, **_run(part, batch, number)}
            _check_equal(plans, found, number)
            hidden = _hidden(found[plans[0].start], number)
            kwargs = {
                name: found[inner] for name, inner in zip(names, plans[0].arguments, strict=True)
            }
            mask = _real_tokens(batch, kwargs.get(_MASK), hidden, number)
            stream.append(hidden, (hidden,), kwargs, mask)
    except BaseException:
        stream.close()
        raise
    return stream


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


def _run(part: Part, batch: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    try:
        return part.run(batch)
    except Exception as error:
        raise RuntimeError(
            f"onnxruntime failed on batch {number} with {type(error).__name__}: {error}"
        ) from error


def _check_equal(plans: Sequence[BlockPlan], found: Mapping[str, Tensor], number: int) -> None:
    """Check that all blocks receive the same tensors, whatever their names."""
    for plan in plans[1:]:
        for mine, first in zip(plan.arguments, plans[0].arguments, strict=True):
            if mine != first and not torch.equal(found[mine], found[first]):
                raise ValueError(
                    f"all blocks must receive the same tensors beside the hidden states, but in "
                    f"batch {number} {mine!r} of {plan.topology.name} differs from {first!r} of "
                    f"{plans[0].topology.name}; calibrate without cached keys and values, models "
                    "whose layers have different masks are not supported"
                )


def _hidden(hidden: Tensor, number: int) -> Tensor:
    if hidden.ndim != 3 or not bool(hidden.isfinite().all()):
        raise ValueError(
            "the first block must receive finite hidden states [batch, seq, hidden], got "
            f"{'NaN or infinity' if hidden.ndim == 3 else list(hidden.shape)} for batch {number}; "
            "check the batch and the embedding's weights"
        )
    return hidden


def _real_tokens(
    batch: Mapping[str, Tensor], attention: Tensor | None, hidden: Tensor, number: int
) -> Tensor:
    """Return the mask ``[batch, seq]`` of the batch, else of the block, else all true."""
    shape = (hidden.shape[0], hidden.shape[1])
    given = batch.get(_MASK)
    mask: Tensor | None = None
    if given is not None and given.ndim == 2 and given.shape[1] >= shape[1]:
        mask = (given != 0)[:, given.shape[1] - shape[1] :]
    elif attention is not None:
        mask = attended_tokens(attention, shape)
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool)
    if not bool(mask.any()):
        raise ValueError(
            f"batch {number} must hold a token that is not masked, its attention_mask masks all "
            f"{mask.numel()}; remove the batch"
        )
    return mask
