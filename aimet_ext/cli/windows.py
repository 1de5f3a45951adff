"""Windows of a text on which quality is measured: those that no technique saw, and which of them.

``quantize``, ``evaluate`` and ``verify`` score the same ones.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aimet_ext
from aimet_ext.files.manifest import is_export
from aimet_ext.recipes.recipe import CalibrationPlan

if TYPE_CHECKING:
    from torch import Tensor

MOST = 16
"""Windows that are scored, where no other number is asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """The first windows of a text, by what techniques saw of them.

    :param unseen: Windows behind those that were calibrated on, each of shape [1, seq].
    :param seen: Windows that were calibrated on, wholly or in part.
    :param text: Description of the windows that are scored.
    :param size: Windows of a batch.
    """

    unseen: tuple[Tensor, ...]
    seen: tuple[Tensor, ...]
    text: str
    size: int = 1

    @property
    def scored(self) -> tuple[Tensor, ...]:
        """Windows to score on: those that no technique saw, unless these fill no batch."""
        return self.unseen if len(self.unseen) >= self.size else self.seen

    def batches(self) -> list[Tensor]:
        """Return the windows to score on in full batches, shape [size, seq].

        :raises ValueError: they do not fill one.
        """
        import torch

        windows, size = torch.cat(self.scored or self.unseen), self.size
        if len(windows) < size:
            raise ValueError(
                f"text for {size} windows of {windows.shape[1]} tokens is required, a batch of the "
                f"graph, got enough for {len(windows)} of {self.text}; give more text"
            )
        return list(windows[: len(windows) // size * size].split(size))


def read_windows(
    tokenizer: Any,
    text: Path | None,
    seq_length: int,
    *,
    plan: CalibrationPlan | None,
    text_field: str | None = None,
    most: int = MOST,
    size: int = 1,
) -> Windows:
    """Return the first windows of a text that no technique saw, and those that some did.

    Of several files, calibration takes the same number of windows; those behind follow in turn.

    :param text: File; None for all that was calibrated on.
    :param seq_length: Tokens of a window.
    :param plan: What was calibrated on, as :func:`plan_of` returns it; None if it is not known.
    :param text_field: Field of the text; None for that of the plan, where the text is of it.
    :param most: Most windows of either kind, or one batch.
    :param size: Windows of a batch.
    :raises ValueError: the text fills no window.
    """
    from aimet_ext.data.text import file_windows, in_turn, shares, too_little

    most = max(most, size)
    of_plan = [] if plan is None else files_of(plan)
    # Tokens that calibration took of each file.
    used = dict.fromkeys(of_plan if text is None else [text.resolve()], 0)
    if plan is not None:
        counts = shares(plan.num_batches * plan.batch_size, len(of_plan))
        for file, count in zip(of_plan, counts, strict=True):
            if file in used:
                used[file] = max(used[file], count * plan.seq_length)
                text_field = text_field or plan.text_field
    parts = []
    for file, tokens in used.items():
        start = -(-tokens // seq_length)
        windows = file_windows(tokenizer, file, seq_length, start + most, text_field=text_field)
        parts.append((windows[:start], windows[start:]))
    if not any(map(len, itertools.chain(*parts))):
        raise too_little(0, None, seq_length, None)
    seen, unseen = (tuple(in_turn(each)[:most, None]) for each in zip(*parts, strict=True))
    kept = len(unseen) >= size or not seen
    described = _described(text, calibrated=any(used.values()), unseen=kept)
    return Windows(unseen=unseen, seen=seen, text=described, size=size)


def _described(text: Path | None, *, calibrated: bool, unseen: bool) -> str:
    if text is None:
        return "text that was not calibrated on" if unseen else "the calibration text"
    if not calibrated:
        return text.name
    return f"{text.name}, {'behind what' if unseen else 'which'} was calibrated on"


def plan_of(folder: Path) -> CalibrationPlan | None:
    """Return what an export was calibrated on, None where that is no text or is not known.

    A graph of a fixed shape took windows of its own length and number.
    """
    from aimet_ext.cli.graphs import ARRAYS, fixed_shape
    from aimet_ext.cli.jobs import RECIPE

    if not (is_export(folder) and (folder / RECIPE).is_file()):
        return None
    plan = aimet_ext.read_recipe(folder / RECIPE).calibration
    if not plan.files or plan.files[0].lower().endswith(ARRAYS):
        return None
    size, length = fixed_shape(folder)
    return dataclasses.replace(
        plan, seq_length=length or plan.seq_length, batch_size=size or plan.batch_size
    )


def files_of(plan: CalibrationPlan) -> list[Path]:
    """Return the files that a plan names."""
    return [Path(file).resolve() for file in plan.files]


def absent_files(plan: CalibrationPlan) -> list[str]:
    """Return the names of those that are not there."""
    return [file for file in plan.files if not Path(file).is_file()]
