"""An ONNX simulation built from a model: as described, for a target, or with AIMET's settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import onnx
from aimet_onnx import QuantizationSimModel, quantsim
from aimet_onnx.common.defs import QTYPE_ALIASES, QuantScheme
from aimet_onnx.common.quantsim_config.quantsim_config import _get_config_file

from aimet_ext.files.scratch import temporary

# Supergroups that AIMET fuses into functions: operator of the function -> name of the fusion.
_FUSIONS = {
    "Gemm": "MatmulAdd",
    "LayerNormalization": "LayerNormalization",
    "MaskedSoftmax": "MaskedSoftmax",
    "RMSNormalization": "RMSNormalization",
}
_DOMAIN = "aimet.supergroup"
# AIMET's names of architectures without MatMuls of 16 by 16 bits.
_EARLY = ("V66", "V68", "V69")


def multiplies_16_by_16(sim: Any) -> bool:
    """Return True for a simulation of hardware that multiplies 16-bit activations."""
    return sim._hw_version not in _EARLY


def describe_sim(sim: Any) -> dict[str, Any]:
    """Describe a simulation's structure as JSON values, for :func:`build_described`.

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


def build_described(
    model: onnx.ModelProto,
    described: Mapping[str, Any],
    *,
    sample: Mapping[str, Any] | None = None,
    qdq: bool = False,
) -> QuantizationSimModel:
    """Build a simulation of the structure that was described.

    :param model: Float model.
    :param described: Result of :func:`describe_sim`.
    :param sample: Inputs as arrays, which AIMET runs the model on where it cannot infer types:
        those of onnxruntime's own operators.
    :param qdq: True if the model has QuantizeLinear and DequantizeLinear nodes, whose ranges are
        taken.
    """
    source = resources.files("aimet_onnx") / "common/quantsim_config/default_config.json"
    config = json.loads(source.read_text(encoding="utf-8"))
    config["supergroup_pass_list"] = list(described["fusions"])
    types = {
        key: described[key] if described[key] in QTYPE_ALIASES else "int8"
        for key in ("param_type", "activation_type")
    }
    with quantsim._quantize_subgraphs_enabled(described["quantize_subgraphs"]):
        sim = _build(
            QuantizationSimModel.from_onnx_qdq if qdq else QuantizationSimModel,
            model,
            config,
            sample,
            quant_scheme=QuantScheme[described["quant_scheme"]],
            **types,
            **({"strict": True} if qdq else {}),
        )
    sim.quant_args = dict(described["quantizer_args"])
    sim._hw_version = described["hw_version"]
    return sim


def build_target(
    model: onnx.ModelProto,
    config: str | Mapping[str, Any],
    *,
    activation_bits: int = 16,
    sample: Mapping[str, Any] | None = None,
) -> QuantizationSimModel:
    """Build a simulation with quantizers wherever a target has them; ranges are still to be set.

    MatMul and the Add of a bias stay apart: HTP drops the float bias of an LPBQ layer that AIMET
    took for one operator.

    :param model: Float model; it becomes part of the simulation.
    :param config: AIMET's alias or the content of a configuration.
    :param sample: Inputs as arrays, to find types with.
    """
    content: Mapping[str, Any] = (
        json.loads(Path(_get_config_file(config)).read_text("utf-8"))
        if isinstance(config, str)
        else config
    )
    fusions = [each for each in content.get("supergroup_pass_list", ()) if each != "MatmulAdd"]
    return _build(
        QuantizationSimModel,
        model,
        {**content, "supergroup_pass_list": fusions},
        sample,
        param_type="int8",
        activation_type=f"int{activation_bits}",
        providers=["CPUExecutionProvider"],
    )


def build_with(
    model: onnx.ModelProto, sample: Mapping[str, Any], **settings: Any
) -> QuantizationSimModel:
    """Build a simulation with AIMET's own settings; ranges of a QDQ model are taken.

    :param model: Model, float or with QuantizeLinear and DequantizeLinear nodes.
    :param sample: Inputs as arrays, run where the types of tensors cannot be inferred, behind
        onnxruntime's operators.
    :param settings: Arguments of AIMET's constructor.
    """
    build = QuantizationSimModel
    if any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        build = QuantizationSimModel._from_onnx_qdq
    sim = build(model, dummy_input=sample, **settings)
    for weight in model.graph.initializer:  # which AIMET leaves out where it ran the batch
        dtype = onnx.helper.tensor_dtype_to_np_dtype(weight.data_type)
        sim.activation_dtypes.setdefault(weight.name, dtype)
    return sim


def _build(
    build: Any,
    model: onnx.ModelProto,
    config: Mapping[str, Any],
    sample: Mapping[str, Any] | None,
    **settings: Any,
) -> QuantizationSimModel:
    """Build a simulation with the content of a configuration, which AIMET reads from a file."""
    with temporary() as folder:
        path = folder / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        sample = None if sample is None else dict(sample)
        return build(model, config_file=str(path), dummy_input=sample, **settings)
