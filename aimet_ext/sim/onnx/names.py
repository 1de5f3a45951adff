"""Names of the layers of an ONNX simulation: each is known by several."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from aimet_ext.sim.onnx.ranges import body_names, readers

if TYPE_CHECKING:
    from aimet_ext.sim.onnx.adaptor import OnnxSim

TYPES = ("MatMul", "Gemm", "Conv", "Gather", "ConvTranspose", "FusedMatMul", "Einsum")
"""Types of nodes that exporters put at the end of a layer's name."""

_SUFFIX = re.compile(rf"[/.]({'|'.join(TYPES)})(_\d+)?$|\.weight$")


def layer_aliases(adaptor: OnnxSim) -> dict[str, tuple[str, ...]]:
    """Return all names of each layer: its own first.

    They are those of the nodes that read its weight, before AIMET fused them too, and that of its
    weight; also without the type at the end, and with dots in place of slashes:
    ``/layers.0/up_proj/MatMul`` is ``layers.0.up_proj`` as well.
    """
    bodies, nodes, found = body_names(adaptor), readers(adaptor), {}
    for name, layer in adaptor.layers.items():
        names = [name, layer.weight]
        for use in layer.uses if not layer.directions else ():
            names += [adaptor.graph.nodes[n].name for n in (use.node, use.add) if n is not None]
        for node in nodes.get(layer.weight, ()) if not layer.directions else ():
            names += [node.name, *bodies.get(node.domain, ())]
        names += [without_type(long) for long in names]
        names += [long.strip("/").replace("/", ".") for long in names]
        found[name] = tuple(dict.fromkeys(filter(None, names)))
    return found


def without_type(name: str) -> str:
    """Return a name without the type at its end: ``/a/b`` of ``/a/b/MatMul``."""
    return _SUFFIX.sub("", name)
