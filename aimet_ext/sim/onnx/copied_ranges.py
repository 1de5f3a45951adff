"""Ranges of a simulation taken from another one of the same model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import aimet_onnx
import numpy as np

from aimet_ext.sim.onnx.quantizer_state import (
    calibrate_on,
    quantizer_state,
    restore_quantizer,
    uninitialize,
)
from aimet_ext.sim.protocol import adapt

__all__ = ["insert_quantizers", "take_ranges"]

Range = tuple[float, float]


def take_ranges(
    sim: Any,
    reference: Any,
    same: Mapping[str, str],
    fixed: Mapping[str, Range],
    *,
    bitwidths: Mapping[str, int],
) -> None:
    """Give quantizers of activations ranges, and freeze them. Those that were shared no longer are.

    :param sim: simulation to change.
    :param reference: simulation with all ranges.
    :param same: tensor of ``reference`` whose range each tensor gets.
    :param fixed: ``(min, max)`` of further tensors.
    :param bitwidths: of tensors that get another width than they have.
    """
    names = [*same, *fixed]
    own = {name: sim.qc_quantize_op_dict[name]._copy() for name in names}
    sim._set_quantizers(own, rebuild_session=False)
    for name, source in same.items():
        quantizer = sim.qc_quantize_op_dict[name]
        restore_quantizer(quantizer, *quantizer_state(reference.qc_quantize_op_dict[source]))
        quantizer.enabled = True
    for name, (low, high) in fixed.items():
        _put_range(sim.qc_quantize_op_dict[name], low, high)
    for name, bits in bitwidths.items():
        quantizer = sim.qc_quantize_op_dict[name]
        (encoding,) = quantizer.get_encodings()
        uninitialize(quantizer, parameter=False)  # a frozen one keeps its width
        quantizer.set_precision(aimet_onnx.qtype.int(bits))
        _put_range(quantizer, encoding.min, encoding.max)
    for name in names:
        sim.qc_quantize_op_dict[name].freeze_encodings()
    adaptor: Any = adapt(sim)
    adaptor.touch()
    adaptor.refresh()


def insert_quantizers(sim: Any, names: Collection[str]) -> None:
    """Have these activations be quantized; they need ranges next."""
    for name in names:
        if name not in sim.qc_quantize_op_dict:
            sim._insert_quantizer(name, is_param=False)
            sim.activation_names.append(name)
        sim.qc_quantize_op_dict[name].enabled = True


def _put_range(quantizer: Any, low: float, high: float) -> None:
    uninitialize(quantizer, parameter=False)
    quantizer.enabled = True
    calibrate_on(quantizer, np.array([low, high], dtype=np.float32))
