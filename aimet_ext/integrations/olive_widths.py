"""Widths of single layers in Olive's ``AimetQuantization`` pass, given or chosen under a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aimet_ext
from aimet_ext.integrations.olive_techniques import keep_report

_CHOSEN = ("budget", "choices", "groups", "modules_to_exclude", "on_indivisible")


def check_widths(widths: Any, techniques: Sequence[Mapping[str, Any]] = ()) -> None:
    """Check the ``widths`` of a pass.

    :param techniques: Techniques of the pass.
    :raises ValueError: An unknown setting, a file that is not there, or a technique that gives
        layers other grids.
    """
    if widths is None:
        return
    if any(str(each.get("name")).lower() == "lpbq" for each in techniques):
        raise ValueError(
            "widths cannot be set beside the technique 'lpbq', which gives layers other grids; "
            'leave it out, and give "int4:lpbq64" as a choice or an override'
        )
    if isinstance(widths, Mapping):
        unknown = [key for key in widths if key not in (*_CHOSEN, "overrides")]
        both = "overrides" in widths and len(widths) > 1
        if unknown or both or not {"overrides", "budget"} & set(widths):
            raise ValueError(
                f'widths: either "budget", with {", ".join(_CHOSEN[1:])} beside it if wanted, or '
                f'"overrides" alone is required, got {", ".join(map(repr, widths)) or "nothing"}'
            )
        if "overrides" in widths and not isinstance(widths["overrides"], Mapping):
            raise ValueError(
                'widths: "overrides" must map names of layers to widths such as "int4:64", got '
                f"{widths['overrides']!r}"
            )
    elif not Path(widths).is_file():
        raise ValueError(
            f"widths: a file that the report of assign_widths saved is required, {widths} is not "
            "there"
        )


def apply_widths(sim: Any, widths: Any, batches: Iterable[Any]) -> None:
    """Give layers of a simulation the grids that a pass says, and leave the reports there.

    :param widths: Those of the pass.
    :param batches: Data to choose by.
    """
    if widths is None:
        return
    given = widths
    if isinstance(widths, Mapping):
        given = widths.get("overrides")
        if given is None:
            groups = [g if isinstance(g, str) else tuple(g) for g in widths.get("groups", ())]
            settings = {**widths, "groups": groups}
            given = aimet_ext.assign_widths(sim, batches, progress=False, **settings)
            keep_report(sim, "assign_widths", given)
    keep_report(sim, "set_widths", aimet_ext.set_widths(sim, given))
