"""The quantizers of a whole ONNX simulation as tensors and JSON values, and the way back."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "build_sim",
    "describe_sim",
    "disabled_quantizers",
    "enabled_quantizers",
    "load_quantizers",
    "quantizers_to_tensors",
]

# Supergroups that AIMET fuses into functions: operator of the function -> name of the fusion.
_FUSIONS = {
    "Gemm": "MatmulAdd",
    "LayerNormalization": "LayerNormalization",
    "MaskedSoftmax": "MaskedSoftmax",
    "RMSNormalization": "RMSNormalization",
}
_DOMAIN = "aimet.supergroup"


def enabled_quantizers(sim: Any) -> dict[str, Any]:
    """Quantizers in use, by the name of their tensor; a shared one under all its names."""
    return {name: q for name, q in sim.qc_quantize_op_dict.items() if q.enabled}


@contextlib.contextmanager
def disabled_quantizers(sim: Any) -> Iterator[None]:
    """Context in which a simulation computes in float."""
    found = list(enabled_quantizers(sim).values())
    try:
        for quantizer in found:
            quantizer.enabled = False
        yield
    finally:
        for quantizer in found:
            quantizer.enabled = True


def describe_sim(sim: Any) -> dict[str, Any]:
    """What :func:`build_sim` needs to build a simulation of the same structure, as JSON values.

    AIMET keeps no configuration: what of it shapes the graph is told from the graph, and the rest
    is in the quantizers.
    """
    nodes = sim.model.model.graph.node
    fused = {node.op_type for node in nodes if node.domain.startswith(_DOMAIN)}
    return {
        "fusions": sorted(_FUSIONS.get(op_type, op_type) for op_type in fused),
        "param_type": repr(sim._param_type),
        "activation_type": repr(sim._activation_type),
        "quant_scheme": sim._quant_scheme.name,
        "quantize_subgraphs": bool(sim._quantize_subgraphs),
        "quantizer_args": sim.quant_args,
        "hw_version": sim._hw_version,
    }


def build_sim(
    model: Any,
    described: Mapping[str, Any],
    *,
    sample: Mapping[str, Any] | None = None,
    qdq: bool = False,
) -> Any:
    """An ``aimet_onnx.QuantizationSimModel`` of the structure that was described.

    :param model: the float ModelProto.
    :param described: see :func:`describe_sim`.
    :param sample: inputs as arrays, which AIMET runs the model on where it cannot infer types:
        those of onnxruntime's own operators.
    :param qdq: the model has QuantizeLinear and DequantizeLinear nodes, whose ranges are taken.
    """
    from aimet_onnx import QuantizationSimModel, quantsim
    from aimet_onnx.common.defs import QTYPE_ALIASES, QuantScheme

    source = resources.files("aimet_onnx") / "common/quantsim_config/default_config.json"
    config = json.loads(source.read_text(encoding="utf-8"))
    config["supergroup_pass_list"] = list(described["fusions"])
    types = {
        key: described[key] if described[key] in QTYPE_ALIASES else "int8"
        for key in ("param_type", "activation_type")
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        with quantsim._quantize_subgraphs_enabled(described["quantize_subgraphs"]):
            options = {
                "config_file": str(path),
                "quant_scheme": QuantScheme[described["quant_scheme"]],
                "dummy_input": None if sample is None else dict(sample),
                **types,
            }
            if qdq:
                sim = QuantizationSimModel.from_onnx_qdq(model, strict=True, **options)
            else:
                sim = QuantizationSimModel(model, **options)
    sim.quant_args = dict(described["quantizer_args"])
    sim._hw_version = described["hw_version"]
    return sim


def quantizers_to_tensors(sim: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All quantizers of a simulation, those not in use too, by the names of their tensors.

    :returns: ranges as ``[cells, 4]`` of delta, offset, min and max, and for each quantizer its
        grid and state, or of which other one it is the same object.
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
        described[name] = {"param": name in params, **_describe(quantizer)}
        encodings = quantizer.get_encodings()
        if encodings is not None:
            rows = [(e.delta, e.offset, e.min, e.max) for e in encodings]
            tensors[name] = torch.tensor(rows, dtype=torch.float64)
    return tensors, described


def load_quantizers(
    sim: Any, tensors: Mapping[str, Tensor], described: Mapping[str, Mapping[str, Any]]
) -> None:
    """Make a simulation's quantizers what :func:`quantizers_to_tensors` described.

    Quantizers that are not described are put out of use.

    :raises ValueError: the model has no tensor of a name; all such are named and nothing changes.
    """
    products = sim.connected_graph.get_all_products()
    absent = [
        name for name in described if name not in sim.qc_quantize_op_dict and name not in products
    ]
    if absent:
        raise ValueError(
            "a simulation of the model that was exported is required, but it has no tensor named "
            f"{', '.join(absent[:5])}"
        )
    for name, description in described.items():
        if name not in sim.qc_quantize_op_dict:
            sim._insert_quantizer(name, is_param=description["param"])
            (sim.param_names if description["param"] else sim.activation_names).append(name)
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
            _restore(own[name], description, tensors.get(name))
    sim._set_quantizers(own, rebuild_session=False)
    sim._rebuild_session()


def _describe(quantizer: Any) -> dict[str, Any]:
    info, params = quantizer.quant_info, quantizer.tensor_quantizer_params
    scale = quantizer._scale_quantizer
    precision = quantizer.precision()
    fields = ("exponent_bits", "mantissa_bits", "finite", "unsigned_zero")
    fixed = quantizer._encoding_min_max_fixed_vals
    return {
        "dtype": quantizer.data_type.name,
        "bitwidth": quantizer.bitwidth,
        "format": (
            None
            if quantizer.data_type.name == "int"
            else {field: getattr(precision, field) for field in fields}
        ),
        "symmetric": quantizer.use_symmetric_encodings,
        "strict_symmetric": quantizer.use_strict_symmetric,
        "unsigned_symmetric": quantizer.use_unsigned_symmetric,
        "zero_point_shift": quantizer.get_zero_point_shift(),
        "per_channel": info.usePerChannelMode,
        "channel_axis": info.channelAxis,
        "block_axis": info.blockAxis,
        "block_size": info.blockSize,
        "scale_bits": None if scale is None else scale.scale_bits,
        "layout": None
        if params is None
        else {
            "tensor_shape": [int(size) for size in params.tensor_shape],
            "channel_axis": params.channel_axis,
            "block_axis": params.block_axis,
        },
        "quant_scheme": quantizer.quant_scheme.name,
        "op_mode": quantizer.op_mode.name,
        "fixed_range": None if fixed is None else list(fixed),
        "state": {
            "enabled": quantizer.enabled,
            "frozen": quantizer.is_encoding_frozen(),
            "initialized": quantizer.is_initialized(),
        },
    }


def _restore(quantizer: Any, description: Mapping[str, Any], rows: Tensor | None) -> None:
    """Make one quantizer what was described, whatever it was."""
    from aimet_onnx.common.defs import QuantizationDataType, QuantScheme, qtype
    from aimet_onnx.qc_quantize_op import LPBQScaleQuantizer, OpMode, TensorQuantizerParams

    quantizer._is_encoding_frozen = False
    layout = description["layout"]
    quantizer.tensor_quantizer_params = None if layout is None else TensorQuantizerParams(**layout)
    info = quantizer.quant_info
    info.usePerChannelMode = description["per_channel"]
    info.channelAxis, info.blockAxis = description["channel_axis"], description["block_axis"]
    info.blockSize = description["block_size"]
    quantizer.data_type = QuantizationDataType[description["dtype"]]
    quantizer.quant_scheme = QuantScheme[description["quant_scheme"]]
    quantizer.use_symmetric_encodings = description["symmetric"]
    form = description["format"]
    precision = qtype.float(**form) if form else qtype.int(description["bitwidth"])
    inner = quantizer._build_tensor_quantizer(precision)
    inner.setStrictSymmetric(description["strict_symmetric"])
    inner.setUnsignedSymmetric(description["unsigned_symmetric"])
    inner.setZeroPointShift(description["zero_point_shift"])
    quantizer._tensor_quantizer = inner
    bits = description["scale_bits"]
    quantizer._scale_quantizer = None if bits is None else LPBQScaleQuantizer(bits)
    fixed = description["fixed_range"]
    quantizer._encoding_min_max_fixed_vals = None if fixed is None else tuple(fixed)
    if rows is not None:
        # As they are: AIMET's own setter would compress LPBQ's scales once more.
        inner.setEncodings([_encoding(row, description["bitwidth"]) for row in rows.tolist()])
    quantizer.op_mode = OpMode.__members__[description["op_mode"]]
    state = description["state"]
    quantizer.enabled = state["enabled"]
    quantizer._is_encoding_frozen = state["frozen"]


def _encoding(row: list[float], bitwidth: int) -> Any:
    from aimet_onnx.common import libpymo

    encoding = libpymo.TfEncoding()
    encoding.delta, encoding.offset, encoding.min, encoding.max = row
    encoding.bw = bitwidth
    return encoding
