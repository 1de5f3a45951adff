"""Names of the files of an export that do not depend on its prefix, and their schemas."""

from __future__ import annotations

__all__ = [
    "CONFIG",
    "FINGERPRINTS",
    "LEDGER",
    "LEDGER_SCHEMA",
    "ONNX_SCHEMA",
    "QUANTIZERS",
    "QUANTIZERS_SCHEMA",
    "SETTINGS",
    "WEIGHTS",
]

CONFIG = "config.json"
FINGERPRINTS = "fingerprints.json"
LEDGER = "ledger.safetensors"
QUANTIZERS = "quantizers.safetensors"
SETTINGS = "quantsim.json"
WEIGHTS = "model.safetensors"

LEDGER_SCHEMA = "aimet_ext.ledger/1"
#: Of the quantizers of a torch sim, and of an ONNX sim.
QUANTIZERS_SCHEMA = "aimet_ext.quantizers/1"
ONNX_SCHEMA = "aimet_ext.onnx_quantizers/1"
