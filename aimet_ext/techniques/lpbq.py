"""LPBQ grids and the search of their scales in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace

from torch import nn

from aimet_ext.config import SeqMSEParams
from aimet_ext.grids.blockwise import GridReport, lpbq_spec, set_grids
from aimet_ext.grids.patterns import Layers
from aimet_ext.specs import OnIndivisible, QSpec
from aimet_ext.techniques.call import Call, technique
from aimet_ext.techniques.layerwise.loop import run_layerwise
from aimet_ext.techniques.seq_mse import SeqMSE


@technique("lpbq", needs_data=False)
def apply_lpbq(
    call: Call[SeqMSEParams],
    block_size: int = 64,
    *,
    bitwidth: int = 4,
    scale_bits: int = 4,
    layers: Layers = "*",
    modules_to_exclude: str | nn.Module | Iterable[str | nn.Module] = (),
    overrides: Mapping[str, QSpec | None] | None = None,
    on_indivisible: OnIndivisible = "error",
) -> GridReport:
    """Quantize weights by LPBQ, and choose its scales by the layers' output error if data is given.

    Source: the grids are those of AIMET 2.42; its search of scales is :func:`apply_seq_mse`'s.

    :func:`set_lpbq`, and then the search of :func:`apply_seq_mse` on the layers that were set: the
    scale of every channel and the integers of its blocks are chosen under AIMET's constraint (the
    largest block carries the top integer), so that what is searched is what is deployed. Without
    data the ranges are those of plain rounding, and not frozen. After a failure the simulation has
    its old grids, too.

    :param dataloader: Batches, as for :func:`apply_seq_mse`; None sets the grids alone.
    :param block_size: Input channels of a block, 64 if not given.
    :param bitwidth: Bits of a quantized weight.
    :param scale_bits: Bits of the integer scales.
    :param layers: Layers to set, as for :func:`set_lpbq`.
    :param modules_to_exclude: Names, patterns or modules to leave as they are.
    :param overrides: Other specs by pattern; the first one that fits counts.
    :param on_indivisible: Treatment of a layer whose width ``block_size`` does not divide:
        ``"error"``, ``"per_channel"`` or ``"pad"``, as for :func:`set_lpbq`.
    :param output_path: Folder for the report of the search.
    :param checkpoint_dir: Folder for a checkpoint of each finished stage of the search.
    :param params: Settings of the search, see :class:`SeqMSEParams`.
    :returns: The grids; their ``search`` is the report of the search.
    :raises TypeError: As :func:`set_lpbq` and :func:`apply_seq_mse`.
    :raises ValueError: Likewise; or ``output_path`` or ``checkpoint_dir`` without data.

    >>> report = apply_lpbq(sim, batches, 64)
    >>> sim.compute_encodings(run_calibration)
    """
    searched = call.dataloader is not None
    if not searched and (call.output_path is not None or call.options.checkpoint_dir is not None):
        raise ValueError(
            "output_path and checkpoint_dir belong to the search of scales, which needs a "
            "dataloader, got None; pass one, or leave them out"
        )
    spec = lpbq_spec(block_size, bitwidth, scale_bits, on_indivisible)
    with ExitStack() as undo:
        report = set_grids(call.sim, spec, layers, modules_to_exclude, overrides, undo)
        if searched:
            only = [name for name, chosen in report.specs.items() if chosen is not None]
            report = replace(report, search=run_layerwise(call, SeqMSE, only=only))
        undo.pop_all()  # all went well
    return report
