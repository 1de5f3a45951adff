"""What ``apply_seq_mse``, ``apply_gptq`` and ``apply_adaround`` have in common as calls."""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from aimet_ext.files.folders import check_output, replace_folder
from aimet_ext.files.manifest import write_manifest
from aimet_ext.sim.protocol import adapt
from aimet_ext.techniques.layerwise.choice import choose_layers
from aimet_ext.techniques.layerwise.loop import LayerwiseRun, Solver
from aimet_ext.techniques.layerwise.report import LayerwiseReport
from aimet_ext.techniques.session import RunOptions, open_ledger, undo_on_failure

__all__ = ["run_layerwise"]


def run_layerwise(
    sim: Any,
    dataloader: Iterable[Any],
    solver: Solver,
    options: RunOptions,
    *,
    modules_to_exclude: Sequence[str | nn.Module] | None,
    output_path: str | Path | None,
    max_bitwidth: int,
    only: Collection[str] | None = None,
) -> LayerwiseReport:
    """Apply a layer-wise technique to a simulation, or leave it as it was.

    :param only: names of the layers to decide at most; None for all.
    """
    started = time.perf_counter()
    folder = None if output_path is None else check_output(output_path)
    adaptor = adapt(sim)
    choice = choose_layers(
        adaptor,
        tuple(modules_to_exclude or ()),
        technique=solver.technique,
        max_bitwidth=max_bitwidth,
        rounds=solver.rounds,
        only=only,
    )
    ledger = open_ledger(adaptor, solver.technique, list(choice.decided))
    with undo_on_failure(adaptor, options.cache_dir, weights=solver.rounds) as keep:
        adaptor.ledger = ledger = copy.deepcopy(ledger)
        run = LayerwiseRun(adaptor, choice.decided, choice.others, solver, options, keep)
        with adaptor.calibrated(choice.others):
            layers = run.all_layers(dataloader)
        ledger.log_run(
            solver.technique,
            list(choice.decided),
            rounds=solver.rounds,
            settings=solver.params.to_dict(),
        )
        report = LayerwiseReport(
            technique=solver.technique,
            layers=tuple(layers),
            skipped=choice.skipped,
            settings=solver.params.to_dict(),
            cost=run.cost,
            seconds=time.perf_counter() - started,
        )
        if folder is not None:
            with replace_folder(folder) as place:
                report.save(place / "report.json")
                write_manifest(place, "report", techniques=list(ledger.techniques))
    return report
