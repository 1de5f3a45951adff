"""LPBQ grids and the search of their scales in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aimet_ext.config import OnIndivisible, QSpec, SeqMSEParams
from aimet_ext.data.batches import ForwardFn
from aimet_ext.grids.blockwise import GridReport, lpbq_spec, set_grids
from aimet_ext.grids.patterns import Layers
from aimet_ext.techniques.aliases import accepts_aimet_arguments
from aimet_ext.techniques.call import run_layerwise
from aimet_ext.techniques.checks import merge_params
from aimet_ext.techniques.seq_mse import SeqMSE
from aimet_ext.techniques.session import RunOptions

__all__ = ["apply_lpbq"]


@accepts_aimet_arguments(order=("sim", "dataloader", "block_size"))
def apply_lpbq(
    sim: Any,
    dataloader: Iterable[Any] | None = None,
    block_size: int = 64,
    *,
    bitwidth: int = 4,
    scale_bits: int = 4,
    layers: Layers = "*",
    modules_to_exclude: str | nn.Module | Iterable[str | nn.Module] = (),
    overrides: Mapping[str, QSpec | None] | None = None,
    on_indivisible: OnIndivisible = "error",
    forward_fn: ForwardFn | None = None,
    output_path: str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    params: SeqMSEParams | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    **settings: Any,
) -> GridReport:
    """Quantize weights by LPBQ, and choose its scales by the layers' output error if data is given.

    :func:`set_lpbq`, and then the search of :func:`apply_seq_mse` on the layers that were set: the
    scale of every channel and the integers of its blocks are chosen under AIMET's constraint (the
    largest block carries the top integer), so that what is searched is what is deployed. Ranges
    that were searched are frozen; without data they are those of plain rounding, and not frozen.
    If anything fails or is interrupted, the simulation is left as it was, old grids included.

    :param sim: ``QuantizationSimModel`` of aimet_torch or aimet_onnx, of any model with linear
        layers or convolutions. Mutated.
    :param dataloader: batches, as for :func:`apply_seq_mse`; None sets the grids alone.
    :param block_size: input channels of a block, 64 if not given.
    :param bitwidth: of a quantized weight.
    :param scale_bits: of the integer scales.
    :param layers: which layers, as for :func:`set_lpbq`.
    :param modules_to_exclude: names, patterns or modules to leave as they are.
    :param overrides: other specs by pattern; the first one that fits counts.
    :param on_indivisible: what to do with a layer whose width ``block_size`` does not divide:
        ``"error"``, ``"per_channel"`` or ``"pad"``, as for :func:`set_lpbq`.
    :param forward_fn: called as ``forward_fn(model, batch)`` in place of ``model(batch)``; not for
        an ONNX model.
    :param output_path: folder for the report of the search.
    :param checkpoint_dir: folder for a checkpoint of each finished stage of the search.
    :param cache_dir: folder for memory-mapped caches; None keeps them in RAM.
    :param params: settings of the search, see :class:`SeqMSEParams`.
    :param device: where the block being worked on goes; None leaves it where it is.
    :param progress: show a progress bar.
    :param settings: fields of :class:`SeqMSEParams`, in place of ``params``.
    :returns: the grids; their ``search`` is the report of the search.
    :raises TypeError: as :func:`set_lpbq` and :func:`apply_seq_mse`.
    :raises ValueError: likewise; or ``output_path`` or ``checkpoint_dir`` without data.

    >>> report = apply_lpbq(sim, batches, 64)
    >>> sim.compute_encodings(run_calibration)
    """
    merged = merge_params(SeqMSEParams, "apply_lpbq", params, settings)
    if dataloader is None and (output_path is not None or checkpoint_dir is not None):
        raise ValueError(
            "output_path and checkpoint_dir belong to the search of scales, which needs a "
            "dataloader, got None; pass one, or leave them out"
        )
    spec = lpbq_spec(block_size, bitwidth, scale_bits, on_indivisible)
    options = RunOptions(
        forward_fn=forward_fn,
        checkpoint_dir=checkpoint_dir,
        cache_dir=cache_dir,
        device=device,
        progress=progress,
    )
    with ExitStack() as undo:
        report = set_grids(sim, spec, layers, modules_to_exclude, overrides, undo)
        if dataloader is not None:
            search = run_layerwise(
                sim,
                dataloader,
                SeqMSE(merged, technique="lpbq"),
                options,
                modules_to_exclude=(),
                output_path=output_path,
                max_bitwidth=merged.max_bitwidth,
                only=[name for name, chosen in report.specs.items() if chosen is not None],
            )
            report = replace(report, search=search)
        undo.pop_all()  # all went well
    return report
