"""Checks of an export's tensors: encodings and weights are the same in every file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aimet_ext.core.affine import to_blocks
from aimet_ext.files.factors import NORM_GAIN
from aimet_ext.files.manifest import LEDGER, QUANTIZERS, WEIGHTS
from aimet_ext.files.numbers import quantizer_faults, scale_faults
from aimet_ext.files.scales import SCALES_FILE
from aimet_ext.files.tensors import parameter_quantizer
from aimet_ext.integrity.stored import (
    Cells,
    StoredGraph,
    as_in_graph,
    encoded_cells,
    misfit,
    onnx_cells,
    torch_cells,
)

if TYPE_CHECKING:
    from aimet_ext.integrity.check import Examination

_ANEW = (
    "set the range again (sim.compute_encodings, or the technique that froze it) and export the "
    "sim, or put the weights back"
)
Array = np.ndarray[Any, Any]


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


def check_numbers(state: Examination) -> None:
    """Check that ranges of quantizers, and scales, are finite and make a grid."""
    stored = state.contents.stored(QUANTIZERS)
    described, form = stored.json("quantizers"), "{1}.{0}" if state.is_onnx else "{0}.{1}"
    found = [(QUANTIZERS, *f) for f in quantizer_faults(stored.tensors, described, form)]
    for file, field in ((SCALES_FILE, "pairs"), (LEDGER, "ledger")):
        scales = state.contents.stored(file)
        signed = f'"kind": "{NORM_GAIN}"' in scales.fields.get(field, "")
        found += [(file, *f) for f in scale_faults(scales.tensors, signed=signed)]
    for file, name, fault in found:
        state.doubted.add(name)
        state.add("numbers", name, f"in {file}: {fault}", (file, name))


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


def check_external_data(state: Examination) -> None:
    """Check that every constant of both models is on disk in full."""
    graphs = [state.contents.model, state.contents.qdq]
    for graph in filter(None, graphs):
        for name, problem in graph.incomplete.items():
            message = f"values of {graph.name} are not all there: {problem}"
            state.add("external data", name, message, (graph.name, name))


def check_weights(state: Examination) -> None:
    """Check that ``model.safetensors`` and the float model of a PyTorch sim hold the same."""
    graph = state.contents.model
    if graph is None:
        return
    weights = state.contents.stored(WEIGHTS).tensors
    for name, place in _places(state, graph):
        stored = weights.get(name)
        value = None if place is None else graph.value(place)
        if stored is None:
            problem = f"is gone from {WEIGHTS}, and {graph.name} has it"
        elif place is not None and graph.origin(place) in graph.incomplete:
            continue
        elif place is None or value is None:
            problem = f"was dropped: {graph.name} has no such constant"
        elif place not in graph.read:
            problem = f"was dropped: nothing in {graph.name} reads {place}"
        elif not _same(value, as_in_graph(stored)):
            problem = _difference(state, name, place, value, as_in_graph(stored))
        else:
            continue
        kind = "bias" if name.endswith("bias") else "weight"
        state.add(kind, name, problem, (graph.name, str(place)), (WEIGHTS, name))


def check_models(state: Examination) -> None:
    """Check that the QDQ model of an ONNX sim holds the float model's values, on their grids."""
    graph, qdq = state.contents.model, state.contents.qdq
    if graph is None or qdq is None:
        return
    here, there = graph.name, qdq.name
    described = state.contents.stored(QUANTIZERS).json("quantizers")
    parameters = [name for name, quantizer in described.items() if quantizer["param"]]
    for name in dict.fromkeys([*graph.constants, *parameters]):
        value = graph.value(name)
        place = f"{name}_qdq" if f"{name}_qdq" in qdq.index else name
        other = qdq.value(place)
        items = [(here, name), (there, name), (there, f"{name}_q")]
        used, used_there = name in graph.read, place in qdq.read
        is_bias = name.endswith("bias")
        if value is None:
            if name in graph.index or name not in qdq.read:
                continue
            problem, items = (
                f"was dropped: {there} reads it, {here} has no such constant",
                items[:1],
            )
        elif (
            value.dtype != np.float32 or value.size < 2 or {name, f"{name}_q"} & set(qdq.incomplete)
        ):
            continue
        elif used and (place not in qdq.index or not used_there):
            problem = f"was dropped: {here} reads it, {there} does not"
        elif used_there and not used:
            problem = f"was dropped: {there} reads it, {here} does not"
        elif other is not None and (fault := _off_grid(state, name, value, other)):
            blamed = [file for file, item in items[:2] if state.changed(file, item)]
            blamed = blamed or [file for file, item in items[2:] if state.changed(file, item)]
            what = f"; changed: {', '.join(blamed)}" if blamed else ""
            problem = f"{here} and {there} disagree: {fault}{what}"
        else:
            continue
        is_bias = is_bias or (value is not None and value.ndim == 1)
        state.add("bias" if is_bias else "weight", name, problem, *items)


def check_ranges(state: Examination) -> None:
    """Check that each weight is the one that its range was set for."""
    graph = state.contents.model
    if graph is None:
        return
    names = {place: name for name, place in _places(state, graph)}
    for tensor, entry in state.contents.encodings_2.items():
        name = tensor if state.is_onnx else names.get(tensor)
        value = graph.value(tensor)
        if name is None or value is None or not np.issubdtype(value.dtype, np.floating):
            continue
        try:
            cells = encoded_cells(entry, entry, tuple(value.shape))
        except ValueError:
            continue  # the check of encodings says so
        if cells is None or cells.steps >= 1 << 24:
            continue
        items = [(graph.name, graph.origin(tensor)), (WEIGHTS, name)]
        problem = None if tensor in state.doubted else misfit(_tensor(value), cells)
        if all(state.changed(*item) for item in items[: 1 if state.is_onnx else 2]):
            message = "was changed after its range was set, so that its encoding is stale"
        elif problem:
            message = f"its encoding was made for other values: {problem}"
        else:
            continue
        state.add("stale", name, message, *items, remedy=_ANEW)


def _places(state: Examination, graph: StoredGraph) -> Iterator[tuple[str, str | None]]:
    """Yield ``(name in model.safetensors, tensor of the model)`` of all that both must hold."""
    if state.is_onnx:
        return
    if "onnx_constants" in state.manifest:
        yield from state.manifest["onnx_constants"].items()
        return
    named = state.manifest.get("onnx_names", {})
    for name in state.contents.stored(WEIGHTS).tensors:
        known = [tensor for full, tensor in named.items() if full in (name, f"model.{name}")]
        candidates = [*known, name, f"model.{name}"]
        place = next((tensor for tensor in candidates if tensor in graph.index), None)
        if place is not None or known or name.endswith("bias"):
            yield name, place


def _same(value: Array, stored: Array) -> bool:
    return any(
        value.shape == other.shape and value.tobytes() == np.ascontiguousarray(other).tobytes()
        for other in (stored, stored.T)
    )


def _difference(state: Examination, name: str, place: str, value: Array, stored: Array) -> str:
    graph = state.contents.model
    assert graph is not None
    here = graph.name
    items = ((here, graph.origin(place)), (WEIGHTS, name))
    blamed = [file for file, item in items if state.changed(file, item)]
    what = f"; changed since the export: {', '.join(blamed)}" if blamed else ""
    if not value.any():
        return f"was dropped: it is zero in {here}{what}"
    if not stored.any():
        return f"was dropped: it is zero in {WEIGHTS}{what}"
    if value.size != stored.size:
        return f"has shape {value.shape} in {here} and {stored.shape} in {WEIGHTS}{what}"
    turned = stored if value.shape == stored.shape else stored.T
    largest = float(np.abs(value.astype(np.float64) - turned).max())
    return f"differs by {largest:.3g} between {here} and {WEIGHTS}{what}"


def _off_grid(state: Examination, name: str, value: Array, other: Array) -> str | None:
    """Return what is wrong with a constant of the QDQ model, None if it is right."""
    if value.shape != other.shape:
        return f"shapes {value.shape} and {other.shape}"
    encodings = state.contents.encodings
    found = (of_file.get(name) for of_file in reversed(encodings.values()))
    entry = next((entry for entry in found if entry is not None), None)
    wide, read = _tensor(value), _tensor(other)
    if name in state.doubted:
        return None
    if entry is None:
        return None if value.tobytes() == other.tobytes() else _distance(wide, read)
    newer = state.contents.encodings_2.get(name)
    cells = encoded_cells(entry, newer, value.shape)
    if cells is None:
        return None
    blocks, low, high, step = cells.beside(wide)
    nearest = torch.minimum(torch.maximum(blocks, low), high)
    allowed = 0.501 * step + 1e-6 * blocks.abs()
    wrong = (nearest - to_blocks(read, blocks.shape[::2])).abs() > allowed
    return _distance(wide, read) if bool(wrong.any()) else None


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _distance(one: torch.Tensor, two: torch.Tensor) -> str:
    if bool(one.any()) != bool(two.any()):
        return "one is zero"
    return f"they differ by {float((one - two).abs().max()):.3g}"
