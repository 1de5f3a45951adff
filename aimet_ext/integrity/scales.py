"""The scales file of an export against the ledger, whose product it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aimet_ext.files.folders import LEDGER
from aimet_ext.files.ledger import (
    AIMET_FILE,
    SCALES_FILE,
    Ledger,
    aimet_tensors,
    cumulative_tensors,
)

if TYPE_CHECKING:
    from aimet_ext.integrity.check import Examination

__all__ = ["check_scales"]

_FIELDS = ("techniques", "pairs", "origin", "version", "schema")


def check_scales(state: Examination) -> None:
    """Check that each vector is the product of the ledger's multipliers for its module and axis."""
    ledger = _ledger(state)
    mine = state.contents.stored(SCALES_FILE).tensors
    if ledger is None:
        return
    _check_multipliers(state, ledger)
    try:
        expected = cumulative_tensors(ledger, lambda name: _original(name, mine))
    except (ValueError, RuntimeError) as error:
        state.add("scales", LEDGER, f"its multipliers do not go together: {error}")
        return
    _compare(state, SCALES_FILE, mine, expected)
    _check_fields(state, ledger)
    if state.contents.has(AIMET_FILE):
        theirs = state.contents.stored(AIMET_FILE).tensors
        _compare(state, AIMET_FILE, theirs, aimet_tensors(expected))


def _ledger(state: Examination) -> Ledger | None:
    stored = state.contents.stored(LEDGER)
    if not stored.fields:
        return None  # the file could not be read, which was said
    try:
        return Ledger.from_tensors(stored.tensors, stored.json("ledger"))
    except (KeyError, TypeError, ValueError) as error:
        state.add("ledger", LEDGER, f"is damaged: {type(error).__name__} {error}")
        return None


def _original(name: str, known: Mapping[str, Tensor]) -> str:
    """Return a module's name in the checkpoint: that in the sim, without the wrapper's prefix."""
    for start in range(name.count(".") + 1):
        short = name.split(".", start)[-1]
        if f"{short}.input" in known or f"{short}.output" in known:
            return short
    return name


def _check_multipliers(state: Examination, ledger: Ledger) -> None:
    """Check multipliers against the record, by the module that they were folded into."""
    for number, entry in enumerate(ledger.entries):
        for place, side in enumerate(entry.sides):
            item = (LEDGER, f"{number}.{place}")
            if state.changed(*item):
                message = f"its multiplier ({side.axis}) by {entry.technique} was changed"
                state.add("ledger", side.module, f"{message} in {LEDGER}", item)
    if state.changed(LEDGER, "field ledger"):
        message = "its list of what was done to the sim was changed"
        state.add("ledger", LEDGER, message, (LEDGER, "field ledger"))


def _compare(
    state: Examination, file: str, mine: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    for name in dict.fromkeys([*expected, *mine]):
        item = (file, name)
        if name not in mine:
            state.add("scales", name, f"is gone from {file}", item)
        elif name not in expected:
            state.add("scales", name, f"{file} has it, and {LEDGER} does not", item)
        elif not torch.equal(mine[name], expected[name]):
            twin = next(
                (n for n, v in expected.items() if n != name and torch.equal(v, mine[name])), None
            )
            if twin is not None:
                message = f"in {file} is that of {twin}"
                state.add("swapped", name, message, item)
            else:
                message = f"in {file} is not what {LEDGER} comes to: {_how(mine, expected, name)}"
                state.add("scales", name, message, item)


def _how(mine: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> str:
    one, two = mine[name], expected[name]
    if one.shape != two.shape:
        return f"{tuple(one.shape)} values, {tuple(two.shape)} are required"
    wrong = (one != two).nonzero().flatten()
    first = int(wrong[0])
    return (
        f"{len(wrong)} of {len(one)} values differ, value {first} is {float(one[first]):.6g}, "
        f"{float(two[first]):.6g} is required"
    )


def _check_fields(state: Examination, ledger: Ledger) -> None:
    fields = state.contents.stored(SCALES_FILE).fields
    if not fields:
        return
    required = {"techniques": list(ledger.techniques), "origin": ledger.origin or ""}
    for name, value in required.items():
        text = fields.get(name)
        found = text if name == "origin" else json.loads(text or "null")
        if found != value:
            message = f"says {name} {found!r}, and {LEDGER} {value!r}"
            state.add("scales", SCALES_FILE, message, (SCALES_FILE, f"field {name}"))
    pairs = json.loads(fields.get("pairs", "[]"))
    kinds = [(pair["technique"], pair["pair"], pair["size"]) for pair in pairs]
    if kinds != [(entry.technique, entry.pair, entry.size) for entry in ledger.entries]:
        message = f"lists other scale pairs than {LEDGER}"
        state.add("scales", SCALES_FILE, message, (SCALES_FILE, "field pairs"))
    for name in _FIELDS:
        item = (SCALES_FILE, f"field {name}")
        if state.changed(*item):
            state.add("scales", SCALES_FILE, f"its field {name!r} was changed", item)
