"""The quantizers of a whole ONNX simulation: those in use, inserted ones, and all as tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from aimet_ext.sim.onnx.quantizer_state import (
    quantizer_state,
    restore_quantizer,
    switched_off,
)

__all__ = [
    "absent_tensors",
    "enabled_quantizers",
    "insert_quantizers",
    "layer_biases",
    "only_these",
    "restore_sim",
    "sim_state",
    "uncalibrated",
    "untie",
]


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
    sim._rebuild_session()


def absent_tensors(sim: Any, names: Iterable[str]) -> list[str]:
    """Return the names that no tensor of a simulation's model has."""
    products, known = sim.connected_graph.get_all_products(), sim.qc_quantize_op_dict
    return [name for name in names if name not in products and name not in known]
