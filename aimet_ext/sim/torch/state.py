"""The quantizers of a whole sim as tensors and JSON values, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from aimet_ext.sim.torch.quantizers import quantizer_state, restore_quantizer

__all__ = [
    "describe_quantizer",
    "load_quantizers",
    "make_quantizer",
    "named_quantizers",
    "quantizers_to_tensors",
]

_STATIC = (
    "shape",
    "qmin",
    "qmax",
    "symmetric",
    "block_size",
    "block_grouping",
    "decompressed_bw",
    "zero_point_shift",
    "exponent_bits",
    "mantissa_bits",
)


def named_quantizers(sim: Any) -> list[tuple[str, Any]]:
    """Every quantizer of a sim by its name in ``sim.model``; a shared one under all its names."""
    known = {id(quantizer) for _, quantizer in sim.named_quantizers()}
    every = sim.model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in every if id(module) in known]


def quantizers_to_tensors(sim: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All quantizers of a sim by their names in ``sim.model``.

    :returns: their parameters as ``{quantizer}.{parameter}``, and for each quantizer its class and
        grid, whether it is initialized and frozen, or of which other one it is the same object.
    """
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    first: dict[int, str] = {}
    for name, quantizer in named_quantizers(sim):
        if id(quantizer) in first:
            described[name] = {"same_as": first[id(quantizer)]}
            continue
        first[id(quantizer)] = name
        state, meta = quantizer_state(quantizer)
        tensors.update({f"{name}.{key}": value for key, value in state.items()})
        described[name] = {**describe_quantizer(quantizer), "state": meta}
    return tensors, described


def load_quantizers(
    sim: Any, tensors: Mapping[str, Tensor], described: Mapping[str, Mapping[str, Any]]
) -> None:
    """Make a sim's quantizers what :func:`quantizers_to_tensors` described.

    Quantizers that fit keep their object; others are made anew, and those not described go.

    :raises ValueError: the sim lacks a place for a quantizer, or one is of a class that cannot be
        made anew; all such are named and nothing is changed.
    """
    existing = dict(named_quantizers(sim))
    made: dict[str, Any] = {}
    faults = []
    for name, description in described.items():
        if "same_as" in description:
            continue
        static = {key: value for key, value in description.items() if key != "state"}
        if name in existing and describe_quantizer(existing[name]) == static:
            made[name] = existing[name]
        elif _container(sim, name) is None:
            faults.append(f"{name} (the model has no such place)")
        elif static["class"] not in ("QuantizeDequantize", "GroupedBlockQuantizeDequantize"):
            faults.append(f"{name} (a {static['class']} must be set in the sim before)")
        else:
            made[name] = make_quantizer(static)
    if faults:
        raise ValueError(
            "a sim of the model that was exported is required, but these quantizers do not fit: "
            + ", ".join(faults)
        )
    for name in existing:
        if name not in described:
            _put(sim, name, None)
    for name, description in described.items():
        if "same_as" in description:
            _put(sim, name, made[description["same_as"]])
            continue
        quantizer = made[name]
        if existing.get(name) is not quantizer:
            _put(sim, name, quantizer)
        keys = [key for key, _ in quantizer.named_parameters(recurse=False)]
        device = next((t.device for t in sim.model.parameters()), None)
        quantizer.to(device)
        state = {key: tensors[f"{name}.{key}"] for key in keys}
        restore_quantizer(quantizer, state, dict(description["state"]))


def describe_quantizer(quantizer: Any) -> dict[str, Any]:
    """What of a quantizer does not change when it is calibrated, as JSON values."""
    found = {key: getattr(quantizer, key) for key in _STATIC if hasattr(quantizer, key)}
    plain = {key: _plain(value) for key, value in found.items()}
    keys = sorted(key for key, _ in quantizer.named_parameters(recurse=False))
    return {"class": type(quantizer).__name__, "parameters": keys, **plain}


def _plain(value: Any) -> Any:
    """JSON values; a copy made by ``copy.deepcopy`` has tensors in its block size."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, Tensor) else value


def make_quantizer(static: Mapping[str, Any]) -> Any:
    """A new quantizer, without a range, of what :func:`describe_quantizer` returned."""
    from aimet_torch.quantization import affine

    def tuple_of(key: str) -> tuple[int, ...] | None:
        return None if static[key] is None else tuple(static[key])

    shape, block_size = tuple(static["shape"]), tuple_of("block_size")
    if static["class"] == "GroupedBlockQuantizeDequantize":
        quantizer = affine.GroupedBlockQuantizeDequantize(
            shape,
            (static["qmax"] - static["qmin"]).bit_length(),
            static["symmetric"],
            static["decompressed_bw"],
            block_size=block_size,
            block_grouping=tuple_of("block_grouping"),
        )
        quantizer.qmin, quantizer.qmax = static["qmin"], static["qmax"]
        return quantizer
    return affine.QuantizeDequantize(
        shape,
        static["qmin"],
        static["qmax"],
        static["symmetric"],
        block_size=block_size,
        zero_point_shift=static["zero_point_shift"],
    )


def _container(sim: Any, name: str) -> Any:
    """The list or dict of a layer where a quantizer of that name stands, None if there is none."""
    parent, _, key = name.rpartition(".")
    try:
        container = sim.model.get_submodule(parent)
    except AttributeError:
        return None
    fits = int(key) < len(container) if key.isdigit() else key in container
    return container if fits else None


def _put(sim: Any, name: str, quantizer: Any) -> None:
    key = name.rpartition(".")[2]
    container = _container(sim, name)
    container[int(key) if key.isdigit() else key] = quantizer
