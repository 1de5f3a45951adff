"""Names of the files of an export that go by one name whatever its prefix."""

from __future__ import annotations

__all__ = ["CONFIG", "FINGERPRINTS", "LEDGER", "QUANTIZERS", "SETTINGS", "WEIGHTS"]

CONFIG = "config.json"
FINGERPRINTS = "fingerprints.json"
LEDGER = "ledger.safetensors"
QUANTIZERS = "quantizers.safetensors"
SETTINGS = "quantsim.json"
WEIGHTS = "model.safetensors"
