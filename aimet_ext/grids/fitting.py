"""A grid for every layer, and what happens where a block size does not divide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from aimet_ext.config import PerChannel, QSpec

#: Layers whose weight ``[out, in, …]`` can be cut into blocks along dimension 1.
LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class WeightPlan:
    """A grid for every layer.

    :param specs: Specs by name of module, None for a weight that stays float.
    :param per_channel_instead: Layers whose width their block size does not divide, and which are
        quantized per channel instead.
    :param pad: Layers whose width must be padded first.
    """

    specs: dict[str, QSpec | None]
    per_channel_instead: tuple[str, ...]
    pad: tuple[str, ...]


def fit_blocks(layers: Mapping[str, Any], specs: Mapping[str, QSpec | None]) -> WeightPlan:
    """Decide what becomes of layers whose width a block size does not divide.

    :param layers: Layers by name, each with a ``weight`` ``[out, in, …]``.
    :raises ValueError: there are such layers, and their spec says ``on_indivisible="error"``.
    """
    fitted, instead, pad, problems = dict(specs), [], [], []
    for name, spec in specs.items():
        width = layers[name].weight.shape[1]
        if spec is None or spec.block_size is None or width % spec.block_size == 0:
            continue
        if spec.on_indivisible == "per_channel":
            fitted[name] = replace(spec, granularity=PerChannel())
            instead.append(name)
        elif spec.on_indivisible == "pad":
            pad.append(name)
        else:
            groups = getattr(layers[name], "groups", 1)
            grouped = f" in each of {groups} groups" if groups > 1 else ""
            problems.append(f"{name} (width {width}{grouped}, block size {spec.block_size})")
    if problems:
        raise ValueError(
            f"a block size that divides the input width is required, got {', '.join(problems)}; "
            'choose another, or on_indivisible="per_channel" or "pad"'
        )
    return WeightPlan(fitted, tuple(instead), tuple(pad))
