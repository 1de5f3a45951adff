"""LoRA adapters that fit a model whose weights were transformed and quantized."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aimet_ext.lora.adapter import Adapter, attach_adapter, read_adapter, read_adapters
    from aimet_ext.lora.baked import bake_adapter, shared_graph
    from aimet_ext.lora.calibrate import LoraReport, quantize
    from aimet_ext.lora.files import export, load
    from aimet_ext.lora.fold import fold_adapter, fold_adapters
    from aimet_ext.lora.sim import base_hash, create_sim, switch

_HOMES = {
    "Adapter": "aimet_ext.lora.adapter",
    "LoraReport": "aimet_ext.lora.calibrate",
    "attach_adapter": "aimet_ext.lora.adapter",
    "bake_adapter": "aimet_ext.lora.baked",
    "base_hash": "aimet_ext.lora.sim",
    "create_sim": "aimet_ext.lora.sim",
    "export": "aimet_ext.lora.files",
    "fold_adapter": "aimet_ext.lora.fold",
    "fold_adapters": "aimet_ext.lora.fold",
    "load": "aimet_ext.lora.files",
    "quantize": "aimet_ext.lora.calibrate",
    "read_adapter": "aimet_ext.lora.adapter",
    "read_adapters": "aimet_ext.lora.adapter",
    "shared_graph": "aimet_ext.lora.baked",
    "switch": "aimet_ext.lora.sim",
}

__all__ = [
    "Adapter",
    "LoraReport",
    "attach_adapter",
    "bake_adapter",
    "base_hash",
    "create_sim",
    "export",
    "fold_adapter",
    "fold_adapters",
    "load",
    "quantize",
    "read_adapter",
    "read_adapters",
    "shared_graph",
    "switch",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module, once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted(set(globals()) | set(__all__))
