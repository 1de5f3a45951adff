"""An ONNX sim rebuilt from the folder that ``export`` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aimet_ext.artifact.onnx_export import LEDGER, LEDGER_SCHEMA, QUANTIZERS, SCHEMA
from aimet_ext.errors import require
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.sealed import read_sealed
from aimet_ext.sim.protocol import adapt

__all__ = ["load_onnx"]


def load_onnx(folder: Path, prefix: str, settings: dict[str, Any] | None, sim: Any = None) -> Any:
    """Rebuild an ONNX sim, see :func:`aimet_ext.load`.

    :param settings: what the sim carries as its settings.
    :param sim: of the same model, to be made what was exported.
    :raises ValueError: the sim that was given is one of another model.
    """
    require("aimet_onnx", "onnx")
    require("onnx", "onnx")
    from aimet_ext.onnx.values import torch_array
    from aimet_ext.sim.onnx import files as onnx_files
    from aimet_ext.sim.onnx import state as onnx_state

    tensors, fields = read_sealed(folder / QUANTIZERS, SCHEMA)
    kinds: dict[str, dict[str, Any]] = {"range": {}, "sample": {}, "float": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        kinds[kind][name] = tensor
    floats = ((name, torch_array(tensor)) for name, tensor in kinds["float"].items())
    model = onnx_files.load_with(folder / f"{prefix}.onnx", floats)
    if sim is None:
        sample = {name: tensor.numpy() for name, tensor in kinds["sample"].items()}
        sim = onnx_state.build_sim(model, json.loads(fields["sim"]), sample=sample)
    else:
        onnx_files.copy_constants(model, sim.model.model)
    onnx_state.load_quantizers(sim, kinds["range"], json.loads(fields["quantizers"]))
    tensors, fields = read_sealed(folder / LEDGER, LEDGER_SCHEMA)
    adaptor = adapt(sim)
    adaptor.ledger = Ledger.from_tensors(tensors, json.loads(fields["ledger"]))
    adaptor.settings = settings
    return sim
