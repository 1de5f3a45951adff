"""Weights and biases of an export: there, the same in every file, and read by the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from aimet_ext.core.affine import to_blocks
from aimet_ext.files.names import WEIGHTS
from aimet_ext.integrity.grids import encoded_cells, misfit
from aimet_ext.integrity.onnx_file import OnnxGraph
from aimet_ext.integrity.state import ExportState

__all__ = ["check_external_data", "check_models", "check_ranges", "check_weights"]

_ANEW = (
    "set the range again (sim.compute_encodings, or the technique that froze it) and export the "
    "sim, or put the weights back"
)
Array = np.ndarray[Any, Any]


def check_external_data(state: ExportState) -> None:
    """Every constant of both models must be on disk in full."""
    for graph in _graphs(state):
        for name, problem in graph.missing.items():
            message = f"values of {graph.path.name} are not all there: {problem}"
            state.add("external data", name, message)
            state.explain((graph.path.name, name))


def check_weights(state: ExportState) -> None:
    """``model.safetensors`` and the float model of a PyTorch sim must hold the same tensors."""
    graph = state.files.model
    if graph is None:
        return
    here = graph.path.name
    for name, place in _places(state, graph):
        stored = state.files.weights.tensors.get(name)
        kind = "bias" if name.endswith("bias") else "weight"
        value = None if place is None else graph.value(place)
        items = [(here, str(place)), (WEIGHTS, name)]
        if stored is None:
            state.add(kind, name, f"is gone from {WEIGHTS}, and {here} has it")
        elif place is not None and _source(graph, place) in graph.missing:
            continue
        elif place is None or value is None:
            state.add(kind, name, f"was dropped: {here} has no such constant")
        elif place not in graph.read:
            state.add(kind, name, f"was dropped: nothing in {here} reads {place}")
        elif not _same(value, stored.numpy()):
            state.add(kind, name, _difference(state, name, place, value, stored.numpy()))
        else:
            continue
        state.explain(*items)


def check_models(state: ExportState) -> None:
    """The QDQ model must hold what the float model of an ONNX sim does, on the sim's grids."""
    graph, qdq = state.files.model, state.files.qdq
    if graph is None or qdq is None:
        return
    here, there = graph.path.name, qdq.path.name
    parameters = [n for n, d in state.files.quantizers.json("quantizers").items() if d["param"]]
    for name in dict.fromkeys([*graph.constants, *parameters]):
        value = graph.value(name)
        if value is None:
            if name not in graph and name in qdq.read:
                message = f"was dropped: {there} reads it, {here} has no such constant"
                state.add("bias" if name.endswith("bias") else "weight", name, message)
                state.explain((here, name))
            continue
        if value.dtype != np.float32 or value.size < 2:
            continue
        place = f"{name}_qdq" if f"{name}_qdq" in qdq else name
        other = qdq.value(place)
        kind = "bias" if name.endswith("bias") or value.ndim == 1 else "weight"
        integers = (there, f"{name}_q")
        items = ((here, name), (there, name), integers)
        if {name, f"{name}_q"} & set(qdq.missing):
            continue
        used, used_there = name in graph.read, place in qdq.read
        if used and (place not in qdq or not used_there):
            state.add(kind, name, f"was dropped: {here} reads it, {there} does not")
        elif used_there and not used:
            state.add(kind, name, f"was dropped: {there} reads it, {here} does not")
        elif other is not None and (problem := _off_grid(state, name, value, other)):
            blamed = [file for file, _ in items[:2] if _changed(state, file, name)]
            blamed = blamed or ([there] if state.unchanged(*integers) is False else [])
            what = f"; changed: {', '.join(blamed)}" if blamed else ""
            state.add(kind, name, f"{here} and {there} disagree: {problem}{what}")
        else:
            continue
        state.explain(*items)


def check_ranges(state: ExportState) -> None:
    """A weight must be the one that its range was set for."""
    graph = state.files.model
    if graph is None:
        return
    newer = state.files.encodings[f"{state.files.prefix}.2.0.0.encodings"]
    names = {place: name for name, place in _places(state, graph)}
    for tensor, entry in newer.items():
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
        file = graph.path.name
        changed = state.unchanged(file, _source(graph, tensor)) is False
        if not state.is_onnx:
            changed = changed and state.unchanged(WEIGHTS, name) is False
        problem = None if tensor in state.doubted else misfit(_tensor(value), cells)
        if changed:
            message = "was changed after its range was set, so that its encoding is stale"
            state.add("stale", name, message, _ANEW)
        elif problem:
            state.add("stale", name, f"its encoding was made for other values: {problem}", _ANEW)
        else:
            continue
        state.explain((file, _source(graph, tensor)), (WEIGHTS, name))


def _graphs(state: ExportState) -> list[OnnxGraph]:
    return [graph for graph in (state.files.model, state.files.qdq) if graph is not None]


def _places(state: ExportState, graph: OnnxGraph) -> Iterator[tuple[str, str | None]]:
    """``(name in model.safetensors, tensor of the float model)`` of all that should be in both."""
    if state.is_onnx:
        return
    if "onnx_constants" in state.manifest:
        yield from state.manifest["onnx_constants"].items()
        return
    named = state.manifest.get("onnx_names", {})
    for name in state.files.weights.tensors:
        known = [tensor for full, tensor in named.items() if full in (name, f"model.{name}")]
        candidates = [*known, name, f"model.{name}"]
        place = next((tensor for tensor in candidates if tensor in graph), None)
        if place is not None or known or name.endswith("bias"):
            yield name, place


def _source(graph: OnnxGraph, name: str) -> str:
    """The constant behind Identity nodes."""
    while name not in graph.constants and name in graph.producers:
        name = graph.producers[name].input[0]
    return name


def _same(value: Array, stored: Array) -> bool:
    return any(
        value.shape == other.shape and value.tobytes() == np.ascontiguousarray(other).tobytes()
        for other in (stored, stored.T)
    )


def _changed(state: ExportState, file: str, name: str) -> bool:
    return state.unchanged(file, name) is False


def _difference(state: ExportState, name: str, place: str, value: Array, stored: Array) -> str:
    graph = state.files.model
    assert graph is not None
    here = graph.path.name
    blamed = []
    if _changed(state, here, _source(graph, place)):
        blamed.append(here)
    if _changed(state, WEIGHTS, name):
        blamed.append(WEIGHTS)
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


def _off_grid(state: ExportState, name: str, value: Array, other: Array) -> str | None:
    """What is wrong with a constant of the QDQ model, None if it is as it must be."""
    if value.shape != other.shape:
        return f"shapes {value.shape} and {other.shape}"
    encodings = state.files.encodings
    found = (of_file.get(name) for of_file in reversed(encodings.values()))
    entry = next((entry for entry in found if entry is not None), None)
    wide, read = _tensor(value), _tensor(other)
    if name in state.doubted:
        return None
    if entry is None:
        return None if value.tobytes() == other.tobytes() else _distance(wide, read)
    newer = encodings[f"{state.files.prefix}.2.0.0.encodings"].get(name)
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
    if not bool(two.any()) and bool(one.any()):
        return "one is zero"
    if not bool(one.any()) and bool(two.any()):
        return "one is zero"
    return f"they differ by {float((one - two).abs().max()):.3g}"
