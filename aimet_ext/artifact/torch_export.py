"""Files of the export of a torch sim beside scales and ledger, compared with the sim."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from aimet_ext.artifact.checkpoint import write_model, write_quantizers
from aimet_ext.artifact.torch_onnx import (
    Inputs,
    OnnxFile,
    check_output,
    float32_model,
    positional_inputs,
    run_onnx,
    write_onnx,
)
from aimet_ext.errors import MissingExtraError
from aimet_ext.files.folders import SETTINGS, write_json
from aimet_ext.models.huggingface import causal_lm, checkpoint_prefix
from aimet_ext.sim.torch.adaptor import TorchSim
from aimet_ext.sim.torch.state import quantized_parameters, unset_quantizers

CHECKPOINT = "checkpoint"


class TorchWriter:
    """Writer of the files of a torch sim, beside scales and ledger.

    :param dummy_input: input to trace the model with.
    :param rounded: True to write weights at their quantized values, for transformers, as well.
    :param options: options of the ONNX file.
    """

    def __init__(
        self,
        sim: Any,
        prefix: str,
        dummy_input: Any,
        tokenizer: Any,
        rounded: bool,
        options: Mapping[str, Any],
    ) -> None:
        self.adaptor, self.prefix, self.tokenizer = TorchSim(sim), prefix, tokenizer
        self.rounded, self.options = rounded, options
        self.without_range = unset_quantizers(sim)
        self.inputs = positional_inputs(sim.model, dummy_input)
        self.name_prefix = checkpoint_prefix(sim.model)

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the files and return fields for the manifest."""
        sim, model = self.adaptor.sim, self.adaptor.model
        model.eval()
        state = self.adaptor.float_state()
        facts = write_model(folder, model, state, self.tokenizer)
        write_quantizers(folder, self.adaptor)
        language_model = causal_lm(model)
        config = getattr(language_model, "config", None)
        settings = {
            "create_sim": self.adaptor.settings if language_model is not None else None,
            "attention": getattr(config, "_attn_implementation", None),
            "dtype": str(getattr(language_model, "dtype", "")).removeprefix("torch."),
        }
        write_json(folder / SETTINGS, settings)
        with float32_model(model):
            file = write_onnx(sim, folder, self.prefix, self.inputs, **self.options)
            checks = _check_onnx(file, self.adaptor, self.inputs)
            if self.rounded:
                rounded = {n: p.rounded() for n, p in quantized_parameters(sim).items()}
                state = {**self.adaptor.float_state(), **rounded}
                write_model(folder / CHECKPOINT, model, state, self.tokenizer)
        names = {name: place.tensor for name, place in file.names.items()}
        return {"model": facts, "checks": checks, "onnx_names": names}


@torch.no_grad()
def _check_onnx(file: OnnxFile, adaptor: TorchSim, inputs: Inputs) -> dict[str, Any]:
    """Compare the ONNX file with the float model; results for the manifest.

    :raises RuntimeError: the outputs differ.
    """
    weights = {name: w.float() for name, w in adaptor.float_state().items() if w.dim() > 1}
    checks: dict[str, Any] = {
        "quantized_parameters_equal": len(file.names),
        "weights_not_found_in_onnx": file.missing(weights),
    }
    try:
        output = run_onnx(file.path, inputs)
    except MissingExtraError:
        return {**checks, "onnxruntime": "not installed"}
    deviation = check_output(adaptor, inputs, output, f"{file.path.name} in onnxruntime")
    checks["onnxruntime"] = metadata.version("onnxruntime")
    checks["onnxruntime_relative_deviation"] = deviation
    return checks
