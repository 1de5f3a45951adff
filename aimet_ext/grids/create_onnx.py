"""Simulations of ONNX graphs, with the grids that :func:`aimet_ext.create_sim` gives."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from aimet_ext.errors import require
from aimet_ext.grids.blockwise import set_grids
from aimet_ext.sim.protocol import adapt
from aimet_ext.specs import QSpec

_CONFIG = "htp_v79"


def create_onnx_sim(
    model: Any,
    *,
    weights: QSpec | None,
    lm_head: QSpec | None,
    activations: QSpec | None,
    overrides: Mapping[str, QSpec | None],
    in_place: bool = False,
) -> Any:
    """Build a ``QuantizationSimModel`` of aimet_onnx; the specs are those of ``create_sim``.

    AIMET takes the table of an embedding for an activation: it is quantized as these are.

    :param model: ``onnx.ModelProto``.
    :param in_place: Make it of the model itself, which is the simulation's from then on.
    :raises ValueError: The graph has no layer, or a pattern fits none.
    :raises MissingExtraError: aimet-onnx is not installed.
    """
    require("aimet_onnx", "onnx")
    from aimet_ext.grids.onnx_layers import OnnxTable
    from aimet_ext.sim.onnx.setup import build_sim

    sim = build_sim(model, activations, _CONFIG, in_place=in_place)
    table = OnnxTable(adapt(sim))
    layers = [name for name, layer in table.found.items() if layer.kind != "embedding"]
    if not layers:
        raise ValueError("a graph with layers that have stored weights is required, got none")
    own = {
        name: lm_head if name in table.left_out else weights
        for name in layers
        if name not in overrides  # else it would take the place of the user's
    }
    with ExitStack() as undo:
        set_grids(sim, QSpec(), (), (), {**overrides, **own}, undo)
        undo.pop_all()
    return sim
