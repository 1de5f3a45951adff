"""The rule for scales and ranges that are read from files: finite, and such that a grid exists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from aimet_ext.errors import CorruptFileError

# Keys of a quantizer's tensors, and of an entry of an encodings file.
_SCALES = ("scale", "raw_scale", "y_scale", "per_channel_float_scale")
_OFFSETS = ("offset", "y_zero_point", "zero_point_shift")
_INTEGER_SCALES = "per_block_int_scale"  # AIMET writes 0 for a block of zeros


def number_fault(values: Any, *, positive: bool) -> str | None:
    """Return what is wrong with numbers, None if they are finite, and above 0 if they must be.

    :param values: a tensor, or nested lists as JSON has them.
    """
    try:
        numbers = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return "numbers are required, got something else"
    wrong = ~numbers.isfinite()
    if positive:
        wrong |= numbers <= 0
    if not bool(wrong.any()):
        return None
    kind = "finite numbers above 0" if positive else "finite numbers"
    return f"{kind} are required, got {float(numbers[wrong].flatten()[0]):g}"


def grid_faults(named: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the numbers of one grid.

    :param named: by what they are called in an encodings file, or in a quantizer: ``scale``,
        ``offset``, ``min`` and ``max``, or ``range``, a row of step, offset, min and max a cell.
    """
    for key in (*_SCALES, *_OFFSETS):
        if key in named and (fault := number_fault(named[key], positive=key in _SCALES)):
            yield f"{key}: {fault}"
    if _INTEGER_SCALES in named:
        integers = named[_INTEGER_SCALES]
        fault = number_fault(integers, positive=False)
        if fault is None and bool((torch.as_tensor(integers) < 0).any()):
            fault = "numbers of at least 0 are required"
        if fault:
            yield f"{_INTEGER_SCALES}: {fault}"
    if "range" in named:
        rows = named["range"]
        if rows.dim() != 2 or rows.shape[1] != 4:
            yield f"range: rows of 4 numbers are required, got {list(rows.shape)}"
        elif fault := number_fault(rows[:, 0], positive=True) or number_fault(rows, positive=False):
            yield f"range: {fault}"
    if "min" in named and "max" in named:
        low, high = named["min"], named["max"]
        if fault := number_fault(low, positive=False) or number_fault(high, positive=False):
            yield f"range: {fault}"
        elif low.shape != high.shape or bool((high <= low).any()):
            yield "range: a max above the min is required in every cell"


def scale_faults(
    tensors: Mapping[str, Tensor], *, signed: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield ``(name, what is wrong)`` of factors that are not finite, and vectors not above 0.

    :param signed: True if vectors may hold zeros and negative numbers, as gains of norms do.
    """
    for name, tensor in tensors.items():
        if fault := number_fault(tensor, positive=tensor.dim() == 1 and not signed):
            yield name, fault


def quantizer_faults(
    tensors: Mapping[str, Tensor],
    described: Mapping[str, Mapping[str, Any]],
    form: str = "{}.{}",
) -> Iterator[tuple[str, str]]:
    """Yield ``(quantizer, what is wrong with its numbers)`` of quantizers in a file.

    :param described: descriptions of them in the file; those without a range are passed over.
    :param form: names of the tensors, of a quantizer and a key.
    """
    keys = ("min", "max", "scale", "offset", "range")
    for name, entry in described.items():
        state = entry.get("state")
        if entry.get("dtype") == "float" or not isinstance(state, dict):
            continue  # a cast, or another name of a quantizer
        if not state.get("initialized"):
            continue
        found = {key: form.format(name, key) for key in keys}
        own = {key: tensors[place] for key, place in found.items() if place in tensors}
        for fault in grid_faults(own):
            yield name, fault


def refuse_faults(path: object, faults: Iterable[tuple[str, str]]) -> None:
    """Raise an error for the first of these faults.

    :raises CorruptFileError: there is one; the text names the file and the tensor.
    """
    for name, fault in faults:
        raise CorruptFileError(f"{path}: {name}: {fault}; write the file again from its source")
