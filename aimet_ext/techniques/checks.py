"""Checks before a technique starts; each error names the layer and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aimet_ext.core.affine import fake_quantize, to_blocks
from aimet_ext.models.topology import BlockTopology
from aimet_ext.sim.protocol import SimAdaptor, SimHandle, WeightQuantizer

__all__ = ["frozen_by", "is_rounded", "layers_to_quantize", "refuse"]


def layers_to_quantize(
    adaptor: SimAdaptor, blocks: Sequence[BlockTopology], exclude: Sequence[str]
) -> dict[str, WeightQuantizer]:
    """Return the weight quantizers of the layers to decide, by their full names, checked.

    :param exclude: Full names of layers to leave alone.
    :raises ValueError: An excluded layer does not exist; a layer has no weight quantizer, a frozen
        one, one of too many bits; a weight is not finite or rounded already.
    """
    names = [f"{block.name}.{layer}" for block in blocks for layer in block.linears]
    aliases = {
        alias: f"{block.name}.{layer}" for block in blocks for layer, alias in block.aliases.items()
    }
    exclude = [aliases.get(name, name) for name in exclude]
    unknown = sorted(set(exclude) - set(names))
    if unknown:
        raise ValueError(
            f"modules_to_exclude must name layers of the blocks, such as {names[0]!r}; "
            f"not found: {', '.join(unknown)}"
        )
    found = {name: adaptor.weight_quantizer(name) for name in names if name not in set(exclude)}
    refuse(
        [name for name, quantizer in found.items() if quantizer is None],
        "must have a weight quantizer and has none; give it one, or list it in modules_to_exclude",
    )
    quantizers = {name: quantizer for name, quantizer in found.items() if quantizer is not None}
    frozen = [name for name, quantizer in quantizers.items() if quantizer.frozen]
    by = {name: frozen_by(adaptor, quantizers[name].name) for name in frozen}
    for technique in sorted(set(by.values())):
        refuse(
            [name for name in frozen if by[name] == technique],
            f"must have a weight quantizer that may change, but {technique} froze its range, which "
            "rescaling would make wrong; start from a new sim, or list it in modules_to_exclude",
        )
    refuse(
        [
            f"{block.name}.{name}"
            for block in blocks
            for name, parameter in adaptor.float_parameters(block.name).items()
            if not bool(torch.isfinite(parameter).all())
        ],
        "must be finite, it holds NaN or infinity; repair the checkpoint",
    )
    refuse(
        [name for name, quantizer in quantizers.items() if is_rounded(quantizer)],
        "must have a float weight, but it is rounded to a grid already; load the original weights",
    )
    if not quantizers:
        raise ValueError("at least one layer must remain, modules_to_exclude names all of them")
    return quantizers


def frozen_by(adaptor: SimHandle, layer: str) -> str:
    """Return the technique that froze the range of a layer, as far as the ledger knows."""
    runs = adaptor.ledger.runs if adaptor.ledger is not None else ()
    return next((r.technique for r in reversed(runs) if layer in r.modules), "an earlier technique")


def refuse(names: Sequence[str], problem: str) -> None:
    """Raise an error that names some layers and the problem of each, if there are any.

    :raises ValueError: There are.
    """
    if names:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise ValueError(f"{shown}: each {problem}")


@torch.no_grad()
def is_rounded(quantizer: WeightQuantizer) -> bool:
    """Return true if a weight has no more distinct values than its grid, in each cell tried."""
    weight = quantizer.weight.detach()
    if quantizer.initialized:
        return bool(torch.equal(fake_quantize(weight, quantizer.grid()), weight))
    layout = quantizer.layout
    levels = layout.qmax - layout.qmin + 1
    blocks = (
        to_blocks(weight.flatten(1), layout.shape).transpose(1, 2).flatten(2).flatten(0, 1)
    )  # [cells, elements]
    if blocks.shape[1] < 4 * levels:
        return False
    return all(_distinct(row) <= levels for row in blocks[:8])


def _distinct(values: Tensor) -> int:
    return int(values.unique().numel())
