"""The streams of calibration data on their way through all repeated blocks of a model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import nn

from aimet_ext.data.batches import ForwardFn, call_model, token_ids
from aimet_ext.walk.hooks import on_device, swapped_weights
from aimet_ext.walk.sides import Sides
from aimet_ext.walk.stream import BlockStream, Within, capture_block_inputs
from aimet_ext.walk.streamed import StreamedBlock, Weights
from aimet_ext.walk.wiring import NotInSequence, block_kinds


class WalkOptions(TypedDict, total=False):
    """Arguments of a walk that a technique hands on from its caller.

    :param forward_fn: Function called as ``forward_fn(model, batch)`` in place of the model itself.
    :param cache_dir: Folder for memory-mapped caches; None keeps them in RAM.
    :param device: Device for the block or the inputs that are worked on.
    :param sides: Whose tokens layers and blocks read, of an encoder-decoder.
    """

    forward_fn: ForwardFn | None
    cache_dir: str | Path | None
    device: torch.device | str | None
    sides: Sides | None


@dataclass(eq=False)
class BlockPass:
    """The streams of calibration data on their way through the repeated blocks of a model.

    Per token only the residual stream is kept, and what an open block keeps of its parts.

    :param names: Full names of the blocks, in order.
    :param flows: Inputs of the first block by stream.
    :param device: Device for the block that is worked on; None leaves it where it is.
    :param kinds: Block whose arguments each block is called with, by name; empty: the first one's.
    """

    model: nn.Module
    names: Sequence[str]
    flows: Mapping[str, BlockStream]
    device: torch.device | str | None
    kinds: Sequence[str] = ()
    calls: int = 0

    def blocks(self) -> Generator[StreamedBlock]:
        """Yield each block in turn; who takes it moves the streams past it."""
        for name, kind in zip(self.names, self.kinds or [""] * len(self.names), strict=True):
            for flow in self.flows.values():
                flow.kind = kind
            module = self.model.get_submodule(name)
            block = StreamedBlock(module, name, self.flows)
            with on_device(module, self.device), closing(block):
                yield block
            self.calls += block.calls

    def drop(self, stream: str) -> None:
        """Do without a stream, if there is one of that name."""
        flows = dict(self.flows)
        if flow := flows.pop(stream, None):
            flow.close()
        self.flows = flows

    def close(self) -> None:
        """Drop the streams."""
        for flow in self.flows.values():
            flow.close()


def capture_streams(
    capture: Callable[[str, Weights], BlockStream],
    weights: Mapping[str, Weights],
    *,
    alike: bool = True,
) -> dict[str, BlockStream]:
    """Return the inputs of the first block by stream.

    :param capture: Function that captures those of a stream, with weights in place of the model's
        by layer.
    :param weights: Those weights by stream.
    :param alike: False if streams with the model's own weights differ all the same.
    """
    flows: dict[str, BlockStream] = {}
    try:
        for stream, own in weights.items():
            first = next(iter(flows.values()), None)
            if first is not None and alike and not any(weights.values()):
                flows[stream] = first.fork()
                continue
            flows[stream] = capture(stream, own)
            if first is not None:
                flows[stream].share_arguments(first)
    except BaseException:
        for flow in flows.values():
            flow.close()
        raise
    return flows


def open_pass(
    model: nn.Module,
    blocks: Sequence[str],
    batches: Sequence[Any],
    weights: Mapping[str, Weights],
    kinds: Sequence[int] | None = None,
    within: Mapping[str, Within] | None = None,
    **options: Unpack[WalkOptions],
) -> BlockPass:
    """Capture the streams at a model's first block, after which they can pass through all.

    :param blocks: Full names of the blocks, in order.
    :param weights: Weights outside the blocks that a stream does not take from the model, by
        stream and layer.
    :param kinds: Result of :func:`~aimet_ext.walk.wiring.block_kinds`, None to compute it.
    :param within: By stream, function from the number of a batch to a context in which the model
        runs on it.
    :raises ValueError: blocks are not called one after another, or a batch is unusable.
    """
    fault: Exception | None = None
    if kinds is None:
        try:
            kinds = kinds_of(model, blocks, batches, options.get("forward_fn"))
        except NotInSequence:
            raise
        except Exception as error:  # noqa: BLE001  (of the batch: the capture says more)
            kinds, fault = [0] * len(blocks), error
    others = [blocks[number] for number in sorted(set(kinds) - {0})]

    within = within or {}

    def capture(stream: str, own: Weights) -> BlockStream:
        own_within = within.get(stream)
        with swapped_weights(model, own):
            return capture_block_inputs(
                model, blocks[0], batches, others=others, within=own_within, **options
            )

    flows = capture_streams(capture, weights, alike=not within)
    found = BlockPass(model, blocks, flows, options.get("device"), [blocks[k] for k in kinds])
    if fault is not None:  # behind the first block, so that nothing is proved
        found.close()
        raise fault
    return found


def kinds_of(
    model: nn.Module, blocks: Sequence[str], batches: Sequence[Any], forward_fn: ForwardFn | None
) -> Sequence[int]:
    """Return the kinds of blocks by the first batch.

    :raises NotInSequence: see :func:`~aimet_ext.walk.wiring.block_kinds`.
    """
    if not batches:
        return [0] * len(blocks)  # the capture says that there are none
    run = partial(call_model, model, batches[0], forward_fn)
    return block_kinds(model, blocks, run, token_ids(batches[0]))
