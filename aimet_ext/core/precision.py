"""The precision in which a gradient is computed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

# Instructions of x86 that multiply bfloat16, without which it is slower than float32.
_FAST = ("avx512_bf16", "amx_bf16")


def training_precision(
    device: torch.device, autocast: bool | None = None
) -> AbstractContextManager[object]:
    """Return a context for a forward pass whose gradients are wanted.

    Parameters stay in float32, and so do the losses that choose among them, which belong outside.

    :param autocast: Compute products in bfloat16; None for that where the device does it faster.
    """
    wanted = is_faster_in_bfloat16(device) if autocast is None else autocast
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def is_faster_in_bfloat16(device: torch.device) -> bool:
    """Return true if the device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older versions of torch do not tell.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(capabilities.get(name) for name in _FAST)
