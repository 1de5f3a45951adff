"""Models as ONNX graphs with simulations of aimet_onnx whose block linears alone are quantized."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import quiet
from torch import Tensor, nn

import aimet_ext
from aimet_ext import QSpec

OPSET = 17
INPUT, OUTPUT = "input_ids", "logits"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def export_onnx(
    model: nn.Module, sample: Tensor, names: tuple[str, str], axes: Mapping[int, str]
) -> Any:
    """A torch module as ``ModelProto``, by the exporter that keeps the module's names for nodes."""
    import onnx

    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            model,
            (sample,),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=[names[0]],
            output_names=[names[1]],
            dynamic_axes={names[0]: dict(axes), names[1]: dict(axes)},
        )
        return onnx.load(path)


def export_llm(model: nn.Module, mask_value: float | None = None) -> Any:
    """``input_ids [batch, seq]`` to ``logits [batch, seq, vocab]``."""
    ids = torch.zeros(2, 16, dtype=torch.long)
    axes = {0: "batch", 1: "seq"}
    prepared = aimet_ext.prepare_model(model, mask_value=mask_value)
    return export_onnx(prepared, ids, (INPUT, OUTPUT), axes)


def export_images(model: nn.Module, image: Tensor) -> Any:
    """``images [batch, 3, 32, 32]`` to ``classes``."""
    return export_onnx(model, image, ("images", "classes"), {0: "batch"})


def as_inputs(batches: Iterable[Tensor], name: str = INPUT) -> list[dict[str, np.ndarray]]:
    """What ``session.run`` takes, one dict a batch."""
    return [{name: batch.numpy()} for batch in batches]


def module_name(node: str) -> str:
    """``"/model/layers.0/mlp/up_proj/MatMul"`` as the torch module is called.

    What stands in a ``Sequential`` is ``"/layer1/layer1.0/conv1/Conv"``.
    """
    pieces: list[str] = []
    for piece in node.strip("/").split("/")[:-1]:
        if pieces and piece.startswith(f"{pieces[-1]}."):
            pieces.pop()
        pieces.append(piece)
    return ".".join(pieces)


def weight_names(model: Any) -> dict[str, str]:
    """Weight of each linear layer and convolution by the node's name, in the graph's order.

    A weight is an initializer that a MatMul, Gemm or Conv reads as its second input.
    """
    held = {each.name for each in model.graph.initializer}
    return {
        node.name: node.input[1]
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm", "Conv") and node.input[1] in held
    }


def in_blocks(node: str) -> bool:
    """Whether a node is one of a decoder block's linear layers."""
    return any(f"/{name}/" in node for name in LINEARS)


def onnx_sim(model: Any, specs: Mapping[str, QSpec]) -> Any:
    """A simulation with these weights quantized, by node name, symmetric, and nothing else.

    The model is copied: AIMET puts its nodes into what it is given.
    """
    from aimet_onnx import QuantizationSimModel

    names = weight_names(model)
    wanted = {names[node]: spec for node, spec in specs.items()}
    with quiet():
        sim = QuantizationSimModel(
            copy.deepcopy(model),
            param_type="int8",
            config_file="htp_v81",
            session_options_kwargs={"intra_op_num_threads": torch.get_num_threads()},
        )
        for name, quantizer in sim.qc_quantize_op_dict.items():
            quantizer.enabled = name in wanted
            if name in wanted:
                quantizer.set_bitwidth(wanted[name].bitwidth)
                quantizer.use_symmetric_encodings = True
                quantizer.enable_per_channel_quantization()
        _set_grids(sim, specs)
        sim._compute_param_encodings(overwrite=True)
    return sim


def _set_grids(sim: Any, specs: Mapping[str, QSpec]) -> None:
    for node, spec in specs.items():
        kind = type(spec.granularity).__name__
        if kind == "Blockwise":
            aimet_ext.set_blockwise(sim, spec.block_size, bitwidth=spec.bitwidth, layers=(node,))
        elif kind == "LPBQ":
            aimet_ext.set_lpbq(sim, spec.block_size, bitwidth=spec.bitwidth, layers=(node,))


def llm_sim(model: Any, spec: QSpec) -> Any:
    """Block linears quantized and nothing else."""
    return onnx_sim(model, {node: spec for node in weight_names(model) if in_blocks(node)})


def run(sim_or_session: Any, inputs: Iterable[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
    """First output of each batch."""
    session = getattr(sim_or_session, "session", sim_or_session)
    return [session.run(None, dict(batch))[0] for batch in inputs]


def float_session(model: Any) -> Any:
    """An onnxruntime session of a float model, on as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def perplexity(sim_or_session: Any, windows: Tensor, batch_size: int = 20) -> float:
    """The one protocol, by onnxruntime: mean over positions 1 … of every window.

    :param windows: ``[windows, 256]``.
    """
    total = 0.0
    for batch in windows.split(batch_size):
        logits = torch.from_numpy(run(sim_or_session, as_inputs([batch]))[0])
        total += float(
            nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).double(), batch[:, 1:].flatten(), reduction="sum"
            )
        )
    return float(np.exp(total / windows[:, 1:].numel()))


def weights_of(sim: Any) -> dict[str, np.ndarray]:
    """What the simulation computes with: each quantized weight by node name, ``[out, in …]``.

    Quantized by AIMET's own operator.
    """
    from onnx import numpy_helper

    model = sim.model.model
    arrays = {each.name: each for each in model.graph.initializer}
    found = {}
    for node, quantized in weight_names_of_sim(sim).items():
        values = numpy_helper.to_array(arrays[quantized])
        quantizer = sim.qc_quantize_op_dict[quantized]
        if quantizer.enabled and quantizer.is_initialized():
            values = quantizer.quantize_dequantize(np.ascontiguousarray(values))
            transposed = _is_matmul(model, node)
            found[node] = values.T if transposed else values
    return found


def weight_names_of_sim(sim: Any) -> dict[str, str]:
    """As :func:`weight_names`, seen through AIMET's quantization nodes."""
    model = sim.model.model
    through = {
        node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QcQuantizeOp"
    }
    held = {each.name for each in model.graph.initializer}
    return {
        node.name: through.get(node.input[1], node.input[1])
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm", "Conv")
        and through.get(node.input[1], node.input[1]) in held
    }


def _is_matmul(model: Any, name: str) -> bool:
    return any(node.name == name and node.op_type == "MatMul" for node in model.graph.node)
