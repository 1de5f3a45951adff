"""Deployment of a block's decision: checked, compared with plain rounding, noted."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from aimet_ext.core.equivalence import expand
from aimet_ext.core.objective import sqnr_db
from aimet_ext.errors import TransformRefused
from aimet_ext.files.tensors import Checkpoints
from aimet_ext.sim.protocol import Range, moved_ranges
from aimet_ext.techniques.blockwise.block import Block, BlockState, Choice
from aimet_ext.techniques.report import BlockReport
from aimet_ext.techniques.session import peak_memory

# Largest change of a block's output by folding, relative to its largest value: at least this, and
# so many units in the last place where weights are stored in fewer bits.
_LARGEST_CHANGE = 1e-4
_LARGEST_CHANGE_UNITS = 16
_PROBE_BATCHES = 4  # that tell which encodings a transform made stale


def float_ranges(block: Block, most: int | None = _PROBE_BATCHES) -> dict[str, Range]:
    """Return the ranges of what a block's quantizers read on the float stream.

    :param most: Batches to look at; None for all.
    """

    def run() -> None:
        for index in range(len(block.float_stream))[:most]:
            block.float_stream.call(block.module, index)

    return block.adaptor.tensor_ranges(block.name, run)


def settle(
    block: Block,
    choice: Choice,
    ranges_before: Mapping[str, Range],
    *,
    technique: str,
    compares: bool,
    started: float,
) -> tuple[BlockReport, Mapping[str, Tensor]]:
    """Deploy a choice or plain rounding, whichever is better, and freeze and note what it decides.

    Where ranges are left open, plain rounding leaves them open too.

    :param ranges_before: Result of :func:`float_ranges` before anything was changed.
    :param technique: Name in the ledger.
    :param compares: False to keep the choice where plain rounding is better, too.
    :param started: Start of the work on the block, of ``time.perf_counter``.
    :returns: Report, and the scales that were folded in.
    """
    best, kept = block.as_stored(choice.state), choice.kept
    block.deploy(best)
    if not best.codes:
        _check_function(block)
    deployed = block.score()
    nearest_state = block.nearest(rounded=bool(best.codes)) if best.grids else BlockState()
    nearest = block.score(block.state_params(nearest_state))
    if compares and not deployed < nearest:
        best, kept = nearest_state, "nearest"
        block.deploy(best)
        deployed = block.score()
    for layer in best.grids:
        block.quantizers[layer].freeze()
    settled = block.ranges if best.grids else ()
    stale = _renew_stale(block, ranges_before, settled) if best.smooth else ()
    record(block, technique, best.smooth)
    report = BlockReport(
        name=block.name,
        loss_nearest=nearest,
        loss_before=nearest if choice.score is None else choice.score,
        loss_after=deployed,
        sqnr_db=sqnr_db(block.signal(), deployed),
        kept=kept,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory(block.data.device),
        reset_encodings=stale,
    )
    return report, best.smooth


def _check_function(block: Block) -> None:
    """Compare the folded block, in float, with what it computed before.

    :raises TransformRefused: it computes something else.
    """
    call = block.float_stream.select(0)
    reference = block.targets.read(0, block.float_stream.device)
    with torch.no_grad(), block.adaptor.disabled_quantizers(block.name):
        change = (block.run(call) - reference)[call.mask].abs().max()
    deviation = float(change / reference[call.mask].abs().max().clamp_min(1e-30))
    bound = max(_LARGEST_CHANGE, _LARGEST_CHANGE_UNITS * torch.finfo(reference.dtype).eps)
    if not deviation <= bound:
        raise TransformRefused(
            f"{block.name}: folding the learnt scales must leave the float function unchanged, "
            f"but max|change| / max|output| is {deviation:.1e} (at most {bound:.0e} is "
            "allowed); report this, or leave kinds of pairs out"
        )


def _renew_stale(
    block: Block, before: Mapping[str, Range], settled: Collection[str]
) -> tuple[str, ...]:
    """Calibrate quantizers anew that have ranges and whose tensors a transform changed.

    :param settled: Quantizers whose ranges were deployed with the block.
    """
    after = float_ranges(block)
    moved = [name for name in moved_ranges(before, after) if name not in settled]
    if moved:
        after = float_ranges(block, None)
    return tuple(block.adaptor.renew_encodings({name: after[name] for name in moved}))


def record(block: Block, technique: str, smooth: Mapping[str, Tensor]) -> None:
    """Note in the ledger what was folded into the weights."""
    for pair, scale in block.chosen(smooth):
        sides = []
        for side in pair.sides:
            weight = block.params[f"{side.module}.weight"]
            multiplier = expand(side, scale.to(weight.dtype), weight.shape[side.axis == "in"])
            sides.append((f"{block.name}.{side.module}", side.axis, multiplier))
        producer = next((s.module for s in pair.sides if s.power == -1), "")
        block.adaptor.ledger.record(
            technique,
            block.name,
            pair.name,
            pair.kind,
            sides,
            size=pair.size,
            source=f"{block.name}.{producer}",
        )


def save(
    checkpoints: Checkpoints, block: Block, smooth: Mapping[str, Tensor], report: BlockReport
) -> None:
    """Write the checkpoint of a block that is settled."""
    tensors, meta = block.adaptor.snapshot(block.name)
    named = {f"smooth/{name}": scale for name, scale in smooth.items()}
    named |= {f"state/{name}": tensor for name, tensor in tensors.items()}
    checkpoints.save(block.number, named, {"state": meta, "report": report.to_dict()})


def resume(
    block: Block, technique: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> BlockReport:
    """Put a block in the state of its checkpoint, noted in the ledger."""
    parts: dict[str, dict[str, Tensor]] = {"smooth": {}, "state": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        parts[kind][name] = tensor
    block.adaptor.restore(block.name, parts["state"], meta["state"])
    record(block, technique, parts["smooth"])
    return BlockReport.from_checkpoint(meta["report"])
