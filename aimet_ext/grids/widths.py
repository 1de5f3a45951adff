"""Grids by name for the layers of a simulation that exists already, as they were assigned."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from aimet_ext.files.reading import read_json
from aimet_ext.grids.blockwise import GridReport, set_grids
from aimet_ext.sim.protocol import adapt
from aimet_ext.specs import LPBQ, Blockwise, Granularity, OnIndivisible, QSpec


def set_widths(
    sim: Any,
    widths: Any,
    *,
    modules_to_exclude: str | nn.Module | Iterable[str | nn.Module] = (),
) -> GridReport:
    """Give layers of a simulation grids of their own, such as :func:`assign_widths` chose.

    All other layers keep theirs. Ranges are set at once from the weights; everything is checked
    before anything changes, as in :func:`set_lpbq`.

    Layers of an ONNX simulation go by the names of their nodes, as in :func:`set_lpbq`, and by
    those that they had in the PyTorch model which was exported, so that widths assigned to that
    fit: ``"model.layers.0.mlp.up_proj"`` is ``"/model/model/layers.0/mlp/up_proj/MatMul"``.

    :param sim: ``QuantizationSimModel`` of aimet_torch or aimet_onnx.
    :param widths: Specs by name or pattern, each a ``QSpec``, text as for the ``choices`` of
        :func:`assign_widths`, or None for a float weight; of several that fit, the first one
        counts. Or the report of :func:`assign_widths`, or the path of a JSON file that its
        ``save`` wrote.
    :param modules_to_exclude: Names, patterns or modules to leave as they are, with all in them.
    :returns: what was done. ``sim.aimet_ext_settings``, if there, is brought up to date.
    :raises TypeError: no simulation of AIMET, or widths of another form.
    :raises ValueError: a pattern that fits nothing, a block size that does not divide, a frozen
        quantizer, a rounded weight, or two specs for a shared weight.

    >>> report = aimet_ext.assign_widths(model, batches, 4.5)
    >>> aimet_ext.set_widths(onnx_sim, report)
    """
    overrides = read_widths(widths)
    adaptor = adapt(sim)
    if adaptor.framework == "onnx":
        overrides = _names_in_graph(adaptor, overrides)
    with ExitStack() as undo:
        report = set_grids(sim, QSpec(), (), modules_to_exclude, overrides, undo)
        undo.pop_all()  # all went well
    return report


def read_widths(widths: Any) -> dict[str, QSpec | None]:
    """Return specs by pattern from what :func:`set_widths` takes.

    :raises TypeError: it is of another form.
    :raises ValueError: a file that no report of :func:`assign_widths` wrote, or a text that is no
        width.
    """
    if isinstance(widths, str | PathLike):
        content = read_json(Path(widths))
        try:
            specs = {name: QSpec.from_dict(plain) for name, plain in content["specs"].items()}
            layers = [(layer["names"], specs[layer["choice"]]) for layer in content["layers"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{widths}: a file that the report of assign_widths saved is required, with specs "
                f"and layers, got none ({type(error).__name__}: {error})"
            ) from error
        return {name: spec for names, spec in layers for name in names}
    found = getattr(widths, "overrides", widths)
    if not isinstance(found, Mapping):
        raise TypeError(
            "widths must be a mapping from names to specs, the report of assign_widths or the path "
            f"of a file that it saved, got {type(widths).__name__}"
        )
    return {name: parse_choice(s) if isinstance(s, str) else s for name, s in found.items()}


def parse_choice(text: str, on_indivisible: OnIndivisible = "error") -> QSpec:
    """Read ``"int4"``, ``"uint4"``, ``"int4:64"`` (blockwise) or ``"int4:lpbq64"``.

    :raises ValueError: the text is not of that form.
    """
    width, colon, block = text.partition(":")
    if not colon:
        return QSpec.parse(text, on_indivisible=on_indivisible)
    found = re.fullmatch(r"(lpbq)?(\d+)", block)
    if found is None:
        raise ValueError(
            f'a choice such as "int4", "int4:64" or "int4:lpbq64" is required, got {text!r}'
        )
    size = int(found[2])
    shape: Granularity = LPBQ(block_size=size) if found[1] else Blockwise(size)
    return QSpec.parse(width, granularity=shape, on_indivisible=on_indivisible)


def _names_in_graph(adaptor: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Replace names of the PyTorch model that was exported by those of the graph's layers.

    An exported module may have been in another one, or be a part of it: a name fits one that
    is longer, or shorter, by whole parts at its start. What fits none stays, and is refused later.
    """
    from aimet_ext.grids.onnx_layers import OnnxTable

    table = OnnxTable(adaptor)
    found: dict[str, Any] = {}
    for pattern, spec in overrides.items():
        names = [pattern]
        if isinstance(pattern, str) and not table.matching(pattern):
            fitting = [n for n, own in table.aliases.items() if any(_ends(a, pattern) for a in own)]
            names = fitting if len(fitting) == 1 else names
        found.update((name, spec) for name in names if name not in found)
    return found


def _ends(one: str, other: str) -> bool:
    long, short = sorted((one, other), key=len, reverse=True)
    return "." in short and long.endswith(f".{short}")
