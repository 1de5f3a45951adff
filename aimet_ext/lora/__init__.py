"""LoRA adapters that fit a model whose weights were transformed and quantized."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aimet_ext.lora.adapter import Adapter as Adapter
    from aimet_ext.lora.adapter import attach_adapter as attach_adapter
    from aimet_ext.lora.adapter import read_adapter as read_adapter
    from aimet_ext.lora.adapter import read_adapters as read_adapters
    from aimet_ext.lora.baked import bake_adapter as bake_adapter
    from aimet_ext.lora.baked import shared_graph as shared_graph
    from aimet_ext.lora.calibrate import LoraReport as LoraReport
    from aimet_ext.lora.calibrate import quantize as quantize
    from aimet_ext.lora.files import export as export
    from aimet_ext.lora.files import load as load
    from aimet_ext.lora.fold import fold_adapter as fold_adapter
    from aimet_ext.lora.fold import fold_adapters as fold_adapters
    from aimet_ext.lora.sim import base_hash as base_hash
    from aimet_ext.lora.sim import create_sim as create_sim
    from aimet_ext.lora.sim import switch as switch

_HOMES = {
    "adapter": ("Adapter", "attach_adapter", "read_adapter", "read_adapters"),
    "baked": ("bake_adapter", "shared_graph"),
    "calibrate": ("LoraReport", "quantize"),
    "files": ("export", "load"),
    "fold": ("fold_adapter", "fold_adapters"),
    "sim": ("base_hash", "create_sim", "switch"),
}

__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> Any:
    """Import a public name from its module, once."""
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted(set(globals()) | set(__all__))
