"""Layers that a technique is to leave alone, named by its user."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from aimet_ext.data.geometry import TRANSPOSED
from aimet_ext.models.topology import BlockTopology
from aimet_ext.patterns import fits, near, scopes
from aimet_ext.sim.protocol import SimAdaptor

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
"""Types of layers that are decided."""


def excluded_names(
    adaptor: SimAdaptor,
    entries: Iterable[str | nn.Module],
    blocks: Sequence[BlockTopology] = (),
) -> set[str]:
    """Return the names in the model of layers given by name, by pattern, or as modules.

    What is inside a module that is named is left out with it.

    :param blocks: Decoder blocks, whose layers have names of their own.
    :raises ValueError: One is not in the model; near names are in the message.
    """
    modules = dict(adaptor.model.named_modules())
    by_identity = {id(module): name for name, module in modules.items()}
    aliases = adaptor.aliases()
    known = {**aliases, **{name: name for name in modules if name}}
    for block in blocks:
        own = {f"{block.name}.{layer}": f"{block.name}.{layer}" for layer in block.linears}
        renamed = {alias: f"{block.name}.{layer}" for layer, alias in block.aliases.items()}
        known |= {n: renamed[name] for n, name in known.items() if name in renamed} | own | renamed
    found: set[str] = set()
    unknown: list[str | nn.Module] = []
    for entry in entries:
        pattern = entry if isinstance(entry, str) else by_identity.get(id(entry), "")
        fitting = {
            name for any_name, name in known.items() if pattern and fits(pattern, *scopes(any_name))
        }
        found |= fitting
        unknown += [] if fitting else [entry]
    if unknown:
        example = next((n for n, m in modules.items() if isinstance(m, LAYERS)), "")
        shown = [repr(each) if isinstance(each, str) else type(each).__name__ for each in unknown]
        patterns = [each for each in unknown if isinstance(each, str)]
        raise ValueError(
            "modules_to_exclude must hold modules of sim.model, their names or patterns of these, "
            f"such as {example!r}; not found: {', '.join(shown)}{near(patterns, known)}"
        )
    return found
