"""The encodings files of an export against the quantizers, and against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aimet_ext.files.folders import QUANTIZERS, parameter_quantizer
from aimet_ext.integrity.grids import Cells, encoded_cells, onnx_cells, torch_cells

if TYPE_CHECKING:
    from aimet_ext.integrity.check import Examination

__all__ = ["check_encodings"]


@dataclass(frozen=True)
class _Source:
    """Grids by encoded tensor as one file has them.

    :param items: names in the file of the things that a tensor's grid comes from.
    """

    file: str
    grids: dict[str, Cells]
    items: Callable[[str], list[str]] = lambda name: [name]


def check_encodings(state: Examination) -> None:
    """Check that each tensor has one grid: in both encodings files, and in its quantizer."""
    sources = [_quantizers(state), *_files(state)]
    names = dict.fromkeys(name for source in sources for name in source.grids)
    odd = {name: _odd(state, name, sources) for name in names}
    for name, wrong in odd.items():
        state.doubted.update([name] * bool(wrong))
        for source in wrong:
            _report(state, name, source, wrong, sources)
    _check_listed(state, sources)


def _quantizers(state: Examination) -> _Source:
    stored = state.contents.stored(QUANTIZERS)
    described = stored.json("quantizers")
    if state.is_onnx:
        containers = state.manifest.get("containers", {})
        grids = onnx_cells(stored.tensors, described, containers)
        owners, prefix, keys = {name: name for name in grids}, "range.", [""]
    else:
        cells, owners = torch_cells(stored.tensors, described), _owners(state)
        grids = {name: cells[owner] for name, owner in owners.items() if owner in cells}
        prefix, keys = "", ["", ".min", ".max", ".scale", ".offset"]

    def items(name: str) -> list[str]:
        owner = owners.get(name, name)
        return [f"{prefix}{described.get(owner, {}).get('same_as', owner)}{key}" for key in keys]

    return _Source(QUANTIZERS, grids, items)


def _owners(state: Examination) -> dict[str, str]:
    """Return the quantizer of each encoded tensor of a PyTorch sim, as far as it is known."""
    if "quantizer_of" in state.manifest:
        return dict(state.manifest["quantizer_of"])
    names = state.manifest.get("onnx_names", {})
    return {tensor: parameter_quantizer(parameter) for parameter, tensor in names.items()}


def _files(state: Examination) -> list[_Source]:
    """Return both encodings files; an entry that cannot be read as a grid is a finding."""
    graph, newer = state.contents.model, state.contents.encodings_2
    sources = []
    for file, entries in state.contents.encodings.items():
        grids: dict[str, Cells] = {}
        for name, entry in entries.items():
            try:
                cells = encoded_cells(entry, newer.get(name), graph.shape(name) if graph else None)
            except ValueError as error:
                state.add("encodings", name, f"its encoding in {file} {error}", (file, name))
                state.doubted.add(name)
                continue
            if cells is not None:
                grids[name] = cells
        sources.append(_Source(file, grids))
    return sources


def _odd(state: Examination, name: str, sources: list[_Source]) -> list[_Source]:
    """Return the sources whose grid of a tensor is not what it must be."""
    having = [source for source in sources if name in source.grids]
    changed = [
        source
        for source in having
        if any(state.changed(source.file, item) for item in source.items(name))
    ]
    first = having[0].grids[name]
    if all(source.grids[name].same(first) for source in having[1:]):
        return changed  # changed in all of them alike, or not in its values
    if changed:
        return changed
    for source in having:  # nothing recorded: the one that the others outvote
        rest = [other.grids[name] for other in having if other is not source]
        if len(rest) > 1 and all(rest[0].same(other) for other in rest):
            return [source]
    return having


def _report(
    state: Examination, name: str, source: _Source, wrong: list[_Source], sources: list[_Source]
) -> None:
    """Add a finding for a wrong grid of a tensor in one file."""
    sound = [other for other in sources if other not in wrong]
    reference = next((other for other in sound if name in other.grids), None)
    mine = source.grids[name]
    check, what = "encodings", f"{mine}, is not what was exported"
    if reference is not None:
        expected = reference.grids[name]
        check, what = _diagnosis(name, mine, expected, reference)
    elif len(wrong) > 1 and not all(mine.same(other.grids[name]) for other in wrong):
        what = f"{mine}, is not that of the other files"
    elif state.record is not None:
        check = "stale"
        what = f"{mine}, is not what was exported: it comes from another calibration"
    items = source.items(name)
    place = f" (of {items[0]})" if items[0] != name else ""
    changed = ((source.file, item) for item in items)
    state.add(check, name, f"its grid in {source.file}{place}: {what}", *changed)


def _diagnosis(name: str, mine: Cells, expected: Cells, reference: _Source) -> tuple[str, str]:
    """Return the check that a wrong grid fails, and the message."""
    if mine.same(expected):
        return "encodings", "the same values, and yet something of it was changed"
    if expected.mirrored(mine):
        return "offset", f"the sign of its offset is wrong: {mine}; {expected} is required"
    twin = next(
        (other for other, cells in reference.grids.items() if other != name and mine.same(cells)),
        None,
    )
    if twin is not None:
        return "swapped", f"it is that of {twin}: {mine}; {expected} is required"
    return "encodings", f"{mine}; {expected} is required"


def _check_listed(state: Examination, sources: list[_Source]) -> None:
    """Check that a tensor with an encoding in one file, or a quantizer, has one in both files.

    For an ONNX sim, 2.0.0 lists outputs of operators that only move data, and 1.0.0 does not.
    """
    quantizers, older, newer = sources
    names = dict.fromkeys([*older.grids, *newer.grids, *quantizers.grids])
    for name in names:
        for source in (older, newer):
            if name in state.contents.encodings[source.file] or not source.grids:
                continue
            known = state.unchanged(source.file, name)
            wanted = name in older.grids if state.is_onnx else True
            if known is False or (state.record is None and wanted):
                message = f"has no encoding in {source.file}, and is quantized"
                state.add("encodings", name, message, (source.file, name))
