"""Encodings files of an export against the quantizers, and against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from aimet_ext.files.names import QUANTIZERS
from aimet_ext.integrity.files import AGAIN
from aimet_ext.integrity.grids import Cells, encoded_cells, onnx_cells, torch_cells
from aimet_ext.integrity.state import ExportState

__all__ = ["check_encodings"]

_Grids = dict[str, Cells]


@dataclass(frozen=True)
class _Source:
    """Grids by encoded tensor as one file has them.

    :param item: what the thing is called in the file that a tensor's grid comes from.
    """

    file: str
    grids: _Grids
    item: Callable[[str], str]


def check_encodings(state: ExportState) -> None:
    """Each tensor must have one grid: in both encodings files, and in its quantizer."""
    sources = [_quantizers(state), *_files(state)]
    names = dict.fromkeys(name for source in sources for name in source.grids)
    odd = {name: _odd(state, name, sources) for name in names}
    for name, wrong in odd.items():
        state.doubted.update([name] * bool(wrong))
        for source in wrong:
            _report(state, name, source, wrong, sources)
    _check_listed(state, sources)


def _quantizers(state: ExportState) -> _Source:
    stored = state.files.quantizers
    described = stored.json("quantizers")
    if state.is_onnx:
        containers = state.manifest.get("containers", {})
        grids = onnx_cells(stored.tensors, described, containers)
        return _Source(QUANTIZERS, grids, partial(_onnx_item, described))
    cells = torch_cells(stored.tensors, described)
    owners = _owners(state)
    found = {name: cells[owner] for name, owner in owners.items() if owner in cells}
    return _Source(QUANTIZERS, found, partial(_torch_item, owners, described))


def _owners(state: ExportState) -> Mapping[str, str]:
    """The quantizer of each encoded tensor of a PyTorch sim, as far as it is known."""
    if "quantizer_of" in state.manifest:
        return dict(state.manifest["quantizer_of"])
    owners = {}
    for parameter, tensor in state.manifest.get("onnx_names", {}).items():
        layer, _, key = parameter.rpartition(".")
        owners[tensor] = f"{layer}.param_quantizers.{key}".lstrip(".")
    return owners


def _onnx_item(described: Mapping[str, Any], name: str) -> str:
    return f"range.{described.get(name, {}).get('same_as', name)}"


def _torch_item(owners: Mapping[str, str], described: Mapping[str, Any], name: str) -> str:
    owner = owners.get(name, name)
    return str(described.get(owner, {}).get("same_as", owner))


def _files(state: ExportState) -> list[_Source]:
    """Both encodings files; what cannot be read as a grid is reported."""
    found = state.files.encodings
    newer = found[f"{state.files.prefix}.2.0.0.encodings"]
    graph = state.files.model
    sources = []
    for file, entries in found.items():
        grids: _Grids = {}
        for name, entry in entries.items():
            shape = None if graph is None else graph.shape(name)
            try:
                cells = encoded_cells(entry, newer.get(name), shape)
            except ValueError as error:
                state.add("encodings", name, f"its encoding in {file} {error}", AGAIN, (file, name))
                state.doubted.add(name)
                continue
            if cells is not None:
                grids[name] = cells
        sources.append(_Source(file, grids, str))
    return sources


def _odd(state: ExportState, name: str, sources: list[_Source]) -> list[_Source]:
    """The sources whose grid of a tensor is not what it must be."""
    having = [source for source in sources if name in source.grids]
    changed = [source for source in having if _unchanged(state, source, name) is False]
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


def _unchanged(state: ExportState, source: _Source, name: str) -> bool | None:
    item = source.item(name)
    if source.file != QUANTIZERS or state.is_onnx:
        return state.unchanged(source.file, item)
    keys = (item, *(f"{item}.{key}" for key in ("min", "max", "scale", "offset")))
    known = [state.unchanged(source.file, key) for key in keys]
    return None if all(one is None for one in known) else False not in known


def _report(
    state: ExportState, name: str, source: _Source, wrong: list[_Source], sources: list[_Source]
) -> None:
    """Say what is wrong with the grid of a tensor in one file."""
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
    place = f" (of {source.item(name)})" if source.item(name) != name else ""
    state.add(check, name, f"its grid in {source.file}{place}: {what}")
    item = source.item(name)
    state.explain(*((source.file, f"{item}{key}") for key in ("", ".min", ".max", ".scale")))
    state.explain((source.file, f"{item}.offset"))


def _diagnosis(name: str, mine: Cells, expected: Cells, reference: _Source) -> tuple[str, str]:
    """The kind of a wrong grid and what to say of it."""
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


def _check_listed(state: ExportState, sources: list[_Source]) -> None:
    """What has an encoding in one file must have one in the other, and a quantizer in both.

    Of an ONNX sim, 2.0.0 lists outputs of operators that only move data, and 1.0.0 does not.
    """
    quantizers, older, newer = sources
    names = dict.fromkeys([*older.grids, *newer.grids, *quantizers.grids])
    for name in names:
        for source in (older, newer):
            if name in state.files.encodings[source.file] or not source.grids:
                continue
            known = state.unchanged(source.file, name)
            wanted = name in older.grids if state.is_onnx else True
            if known is False or (state.record is None and wanted):
                message = f"has no encoding in {source.file}, and is quantized"
                state.add("encodings", name, message, AGAIN, (source.file, name))
