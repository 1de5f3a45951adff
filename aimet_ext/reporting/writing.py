"""The report of a run, written beside what the run made."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aimet_ext.core.divergence import Divergence
from aimet_ext.errors import MissingExtraError
from aimet_ext.reporting.run_report import REPORT_HTML, REPORT_JSON, RunReport

_log = logging.getLogger(__name__)


def write_run(
    folder: Path, sim: Any, reports: Mapping[str, Any], quality: Mapping[str, Any], **facts: Any
) -> None:
    """Write the report of a run to its folder, as JSON, and as a page if that can be drawn.

    Whatever fails here is a warning: the export beside it is finished, and may be hours of work.

    :param folder: Folder of the run.
    :param sim: Simulation as it is deployed.
    :param reports: Reports by the names of the techniques, in order.
    :param quality: Perplexities by state, their divergences, and the text; empty where none
        were measured.
    :param facts: Further arguments of :meth:`aimet_ext.RunReport.of`.
    """
    name = REPORT_JSON
    try:
        if quality:
            divergences = quality.get("divergence", {}).items()
            facts |= {
                "perplexity": {name: quality[name] for name in ("float", "rounding", "quantized")},
                "divergence": {name: Divergence(**fields) for name, fields in divergences},
                "text": quality["text"],
                "windows": quality["windows"],
                "tokens": quality["seq_length"],
            }
        if recorder := facts.get("recorder"):
            recorder.stop()
        run = RunReport.of(sim, reports, **facts)
        run.save(folder / REPORT_JSON)
        name = REPORT_HTML
        run.save_html(folder / REPORT_HTML)
    except MissingExtraError as error:
        _log.warning("%s is not written: %s", name, error)
    except Exception as error:  # noqa: BLE001  (whatever it is, the export is worth more)
        _log.warning(
            "%s is not written: %s: %s. The export beside it is whole",
            name,
            type(error).__name__,
            error,
        )
