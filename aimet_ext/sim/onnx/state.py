"""An ONNX simulation's quantizers as a whole; and what is run or read back, compared with it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from aimet_onnx.common.onnx._utils import to_array
from aimet_onnx.quantsim import load_encodings_to_sim
from torch import Tensor

from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.index import FLOATS, stored_values
from aimet_ext.onnx.session import open_session
from aimet_ext.onnx.values import read_array, to_torch
from aimet_ext.sim.onnx.quantizers import (
    quantizer_state,
    restore_quantizer,
    rounds_to_integers,
    switched_off,
)


def enabled_quantizers(sim: Any) -> dict[str, Any]:
    """Return quantizers in use, by the name of their tensor; a shared one under all its names."""
    return {name: q for name, q in sim.qc_quantize_op_dict.items() if q.enabled}


def uncalibrated(sim: Any) -> list[str]:
    """Return the names of quantizers in use that have no range."""
    return [name for name, q in enabled_quantizers(sim).items() if not q.is_initialized()]


@contextmanager
def only_these(sim: Any, names: Collection[str]) -> Iterator[None]:
    """Open a context in which no quantizer but these is in use."""
    every = enabled_quantizers(sim)
    kept = {id(q) for name, q in every.items() if name in names}
    with switched_off([q for q in every.values() if id(q) not in kept]):
        yield


def insert_quantizers(sim: Any, names: Iterable[str], *, param: bool = False) -> None:
    """Insert a quantizer, off and without a range, at each tensor that has none."""
    for name in names:
        if name not in sim.qc_quantize_op_dict:
            sim._insert_quantizer(name, is_param=param)
            sim.qc_quantize_op_dict[name].enabled = False
            (sim.param_names if param else sim.activation_names).append(name)


def untie(sim: Any, names: Iterable[str]) -> None:
    """Give each of these tensors a quantizer that no other one has; the others keep theirs."""
    users: dict[int, int] = {}
    for quantizer in sim.qc_quantize_op_dict.values():
        users[id(quantizer)] = users.get(id(quantizer), 0) + 1
    found = ((name, sim.qc_quantize_op_dict[name]) for name in names)
    own = {name: q._copy() for name, q in found if users[id(q)] > 1}
    if own:
        sim._set_quantizers(own, rebuild_session=False)


def layer_biases(sim: Any) -> Iterator[tuple[str, Any]]:
    """Yield the bias of each layer with a quantized weight, and the quantizer of that weight."""
    for op in sim.connected_graph.get_all_ops().values():
        if op.type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            weight, bias = sim._get_weight_and_bias(op)
            quantizer = None if weight is None else sim.qc_quantize_op_dict.get(weight.name)
            if bias is not None and quantizer is not None and quantizer.enabled:
                yield bias.name, quantizer


def sim_state(sim: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all quantizers of a simulation, those not in use too, by the names of their tensors.

    :returns: ranges as ``[cells, 4]`` of delta, offset, min and max, and for each quantizer its
        grid and state, or the name of the tensor whose quantizer is the same object.
    """
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    first: dict[int, str] = {}
    params = set(sim.param_names)
    for name, quantizer in sim.qc_quantize_op_dict.items():
        if id(quantizer) in first:
            described[name] = {"same_as": first[id(quantizer)], "param": name in params}
            continue
        first[id(quantizer)] = name
        own, meta = quantizer_state(quantizer)
        described[name] = {"param": name in params, **meta}
        if "encodings" in own:
            tensors[name] = own["encodings"]
    return tensors, described


def restore_sim(
    sim: Any, tensors: Mapping[str, Tensor], described: Mapping[str, Mapping[str, Any]]
) -> None:
    """Make a simulation's quantizers those that :func:`sim_state` described.

    Quantizers that are not described are put out of use.

    :raises ValueError: the model has no tensor of a name; all such are named and nothing changes.
    """
    absent = absent_tensors(sim, described)
    if absent:
        raise ValueError(
            "a simulation of the model that was exported is required, but it has no tensor named "
            f"{', '.join(absent[:5])}"
        )
    for name, description in described.items():
        insert_quantizers(sim, [name], param=description["param"])
    own: dict[str, Any] = {}
    seen: set[int] = set()
    for name, quantizer in sim.qc_quantize_op_dict.items():
        own[name] = quantizer._copy() if id(quantizer) in seen else quantizer
        seen.add(id(quantizer))
        if name not in described:
            own[name]._is_encoding_frozen = False
            own[name].enabled = False
    for name, description in described.items():
        if "same_as" in description:
            own[name] = own[description["same_as"]]
        else:
            found = {"encodings": tensors[name]} if name in tensors else {}
            restore_quantizer(own[name], found, description)
    sim._set_quantizers(own, rebuild_session=False)
    rebuild_session(sim)


def absent_tensors(sim: Any, names: Iterable[str]) -> list[str]:
    """Return the names that no tensor of a simulation's model has."""
    products, known = sim.connected_graph.get_all_products(), sim.qc_quantize_op_dict
    return [name for name in names if name not in products and name not in known]


def read_encodings(sim: Any, path: Path, other: Any) -> None:
    """Load an encodings file into another simulation of the model, by AIMET's own reader.

    :param sim: The first simulation, of which the casts to float16 are taken.
    :param other: A new simulation of the float model that was written.
    """
    # AIMET may tie quantizers anew that the first simulation has apart, and then loads two
    # encodings into one.
    own = {name: quantizer._copy() for name, quantizer in other.qc_quantize_op_dict.items()}
    other.set_quantizers(own)
    load_encodings_to_sim(other, str(path), strict=False)
    _match_casts(sim, other)


def read_qdq(sim: Any, other: Any) -> None:
    """Switch off quantizers that AIMET's reader of QDQ models leaves without a range.

    :param sim: The first simulation, of which the casts to float16 are taken.
    :param other: A new simulation of the QDQ model that was written.
    """
    for quantizer in enabled_quantizers(other).values():
        if not quantizer.is_initialized():
            quantizer.enabled = False
    _match_casts(sim, other)


def _match_casts(sim: Any, other: Any) -> None:
    casts = set(float_tensors(sim))
    for name, quantizer in other.qc_quantize_op_dict.items():
        if name in casts:
            quantizer.set_precision(sim.qc_quantize_op_dict[name].precision())
            quantizer.enabled = True
        elif quantizer.enabled and not rounds_to_integers(quantizer) and quantizer.bitwidth >= 16:
            quantizer.enabled = False


class OutsideError(RuntimeError):
    """A function of AIMET or onnxruntime failed, on what it was given or by a fault of its own."""


@contextmanager
def outside(who: str) -> Iterator[None]:
    """Open a context for calls of another package, which raises errors of many kinds.

    :raises OutsideError: one of them; but lack of memory, or a file that fails, is no fault of it.
    """
    try:
        yield
    except (MemoryError, OSError):
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise OutsideError(f"{who} failed with {text}") from error


def rebuild_session(sim: Any) -> None:
    """Rebuild the session from the model, whose values may have been changed in place.

    The nodes point at the quantizers' memory, so the session holds them: it may outlive the
    simulation.
    """
    sim._rebuild_session()
    sim.session.aimet_ext_quantizers = [*sim.qc_quantize_op_dict.values()]


def run(sim: Any, feed: Mapping[str, Any]) -> list[Any]:
    """Return the outputs of a simulation as arrays."""
    return list(sim.session.run(None, dict(feed)))


def run_file(path: str | Path, feed: Mapping[str, Any]) -> list[Any]:
    """Return the outputs of an ONNX file in onnxruntime on the CPU, its nodes as they are."""
    # Its optimizer would round float weights behind quantized activations, and their biases.
    session = open_session(path, optimize="none")
    return [np.asarray(output) for output in session.run(None, dict(feed))]


def deviation(outputs: Sequence[Any], expected: Sequence[Any]) -> float:
    """Return the norm of the difference of all outputs, relative to that of the expected ones.

    Infinity where all of these are zeros and something else came.
    """
    difference = norm = 0.0
    for one, two in zip(outputs, expected, strict=True):
        wide = two.astype(np.float64)
        difference += float(np.square(one.astype(np.float64) - wide).sum())
        norm += float(np.square(wide).sum())
    if not difference:
        return 0.0
    return (difference / norm) ** 0.5 if norm else math.inf


def differences(sim: Any, other: Any, *, last_bit: Collection[str] = ()) -> list[str]:
    """Return how the quantizers of a simulation that was read back differ from those of the first.

    Constants are compared by what their quantizers make of them, bit by bit, other tensors by the
    grid: width, scale as float32, and offset. AIMET's QDQ models call an integer constant's value
    ``{name}_qdq``, and one behind an Identity node after that node's output.

    :param last_bit: Constants of which one bit of float32 may differ.
    """
    mine, theirs = enabled_quantizers(sim), enabled_quantizers(other)
    found = stored_values(sim.model.model.graph)
    names = {name: [name] for name in mine if name not in found}
    for name, aliases in _aliases(sim.model.model, [n for n in mine if n in found]).items():
        names[name] = [n for alias in aliases for n in (alias, f"{alias}_qdq") if n in theirs]
    known = {other for name in mine for other in names[name]}
    faults = [f"{n} has no quantizer" for n in mine if not any(o in theirs for o in names[n])]
    faults += [f"{name} has a quantizer" for name in theirs if name not in known]
    read = stored_values(other.model.model.graph)
    pairs = [(name, twin) for name in mine for twin in names[name] if twin in theirs]
    for name, twin in pairs:
        one, two = _grid(mine[name]), _grid(theirs[twin])
        if name not in found:
            if one != two:
                faults.append(f"{name} has the grid {_shown(two)} instead of {_shown(one)}")
        elif mine[name].bitwidth >= 32:
            continue
        elif twin not in read:
            faults.append(f"{name} is no constant")
        else:
            wanted = quantize_constant(mine[name], found[name])
            values = quantize_constant(theirs[twin], read[twin])
            if wanted.shape != values.shape:
                faults.append(f"{name} has shape {values.shape} instead of {wanted.shape}")
            elif not np.array_equal(wanted, values) and not (
                name in last_bit and np.allclose(values, wanted, rtol=2**-22, atol=0)
            ):
                faults.append(f"{name} differs by {np.abs(wanted - values).max():.3g}")
    return sorted(faults)


def _aliases(model: Any, names: Collection[str]) -> dict[str, list[str]]:
    """Return each constant's own name and its names behind Identity nodes."""
    found = {name: [name] for name in names}
    origin = {name: name for name in names}
    for node in model.graph.node:
        source = origin.get(node.input[0]) if node.input else None
        if source is not None and node.op_type in ("Identity", "QcQuantizeOp"):
            origin[node.output[0]] = source
            if node.op_type == "Identity":
                found[source].append(node.output[0])
    return found


def _grid(quantizer: Any) -> tuple[Any, ...]:
    """Return the precision and the cells of a quantizer, which two of one tensor share."""
    encodings = quantizer.get_encodings()
    if encodings is None:
        return (quantizer.precision(), "no range")
    cells = tuple((float(np.float32(e.delta)), float(e.offset)) for e in encodings)
    return (quantizer.precision(), *cells)


def _shown(grid: tuple[Any, ...]) -> str:
    return f"{grid[0]}, {', '.join(map(str, grid[1:3]))}"


def tensor_values(sim: Any, feed: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return values of tensors as arrays, after their quantizers, for one batch of inputs.

    :param names: Outputs of operators; those that the simulation does not have are left out.
    """
    nodes, outputs = sim.model.model.graph.node, sim.model.model.graph.output
    quantized = {node.input[0]: node.output[0] for node in nodes if node.op_type == "QcQuantizeOp"}
    known = {name for node in nodes for name in node.output}
    found = {name: quantized.get(name, name) for name in names if name in known}
    if not found:
        return {}
    count, there = len(outputs), {value.name for value in outputs}
    try:
        for name in dict.fromkeys(found.values()):
            if name not in there:
                outputs.append(
                    onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
                )
        session = type(sim.session)(
            sim.model.model,
            sim.providers,
            session_options=sim._ort_session_options,
            path=sim._path,
            save_as_external_data=sim._use_external_data,
        )
        return dict(zip(found, session.run([*found.values()], dict(feed)), strict=True))
    finally:
        del outputs[count:]


def float_tensors(sim: Any) -> list[str]:
    """Return the tensors cast to float16, for which encodings 2.0.0 and QDQ have no entry."""
    return [
        name
        for name, quantizer in enabled_quantizers(sim).items()
        if quantizer.data_type.name == "float" and quantizer.bitwidth >= 16
    ]


def quantize_constant(quantizer: Any, proto: Any) -> Any:
    """Return a constant as a quantizer rounds it, by AIMET's own arithmetic."""
    value = to_array(proto)
    if not rounds_to_integers(quantizer) and quantizer.bitwidth == 16:
        return value.astype(np.float16).astype(value.dtype)
    return quantizer.quantize_dequantize(value)


class FloatState(Mapping[str, Tensor]):
    """Float initializers of a model as it is now, each one read when it is asked for.

    :param without: names that are left out.
    """

    def __init__(self, graph: OnnxGraph, without: Collection[str] = ()) -> None:
        self._graph = graph
        stored = graph.initializers.items()
        self._names = [n for n, t in stored if t.data_type in FLOATS and n not in without]
        self._now = {tensor.name: tensor for tensor in graph.proto.graph.initializer}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._graph.initializers:
            raise KeyError(name)
        if name not in self._now:  # inside of what AIMET fused
            return self._graph.tensor(name)
        return to_torch(read_array(self._now[name], self._graph.base_dir))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
