"""The choice of the layers that a layer-wise technique decides, with reasons for the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from aimet_ext.sim.protocol import SimAdaptor, WeightQuantizer
from aimet_ext.techniques.checks import frozen_by, is_rounded, refuse

__all__ = ["LayerChoice", "choose_layers", "module_names"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LayerChoice:
    """The quantized layers of a simulation, by full name.

    :param decided: Layers to decide.
    :param others: Quantized layers that are left as they are; they compute on their grids.
    :param skipped: Those of ``others`` that a user may expect to be decided, with the reason.
    """

    decided: Mapping[str, WeightQuantizer]
    others: Mapping[str, WeightQuantizer]
    skipped: dict[str, str]


def module_names(adaptor: SimAdaptor, modules: Iterable[str | nn.Module]) -> set[str]:
    """Return the names of modules that were given by name or as objects, as in AIMET.

    :raises ValueError: One is not in the model.
    """
    names = dict(adaptor.model.named_modules())
    by_identity = {id(module): name for name, module in names.items()}
    found, unknown = set(), []
    for module in modules:
        if isinstance(module, str):
            name = module if module in names else adaptor.full_name(module)
        else:
            name = by_identity.get(id(module), "")
        if name and name in names:
            found.add(name)
        else:
            unknown.append(repr(module) if isinstance(module, str) else type(module).__name__)
    if unknown:
        example = next((n for n, m in names.items() if isinstance(m, _LAYERS)), "")
        raise ValueError(
            "modules_to_exclude must hold modules of sim.model or their names, such as "
            f"{example!r}; not found: {', '.join(unknown)}"
        )
    return found


def choose_layers(
    adaptor: SimAdaptor,
    exclude: Sequence[str | nn.Module],
    *,
    technique: str,
    max_bitwidth: int,
    rounds: bool,
    only: Collection[str] | None = None,
) -> LayerChoice:
    """Sort the quantized layers of a simulation.

    :param exclude: Layers left float meanwhile, as in AIMET.
    :param technique: Name of the technique.
    :param max_bitwidth: Bits above which a layer is left alone.
    :param rounds: True if the technique rounds weights, on frozen ranges too; one that does not
        leaves frozen ranges alone.
    :param only: Layers to decide at most; None for all.
    :raises ValueError: An excluded module does not exist; nothing remains; the technique was
        applied before; a weight is not finite, is rounded already, or is shared by two layers.
    """
    excluded = module_names(adaptor, exclude)
    every = {n: q for n, q in adaptor.weight_quantizers().items() if n not in excluded}
    shared = adaptor.shared_weights()
    decided: dict[str, WeightQuantizer] = {}
    skipped = dict(adaptor.unsupported_layers())
    for name, quantizer in every.items():
        module = adaptor.model.get_submodule(name)
        if not isinstance(module, _LAYERS) or (only is not None and name not in only):
            continue
        twins = [twin for twin in shared.get(name, ()) if twin != name]
        if quantizer.bitwidth > max_bitwidth:
            skipped[name] = f"{quantizer.bitwidth} bits, max_bitwidth is {max_bitwidth}"
        elif quantizer.frozen and not rounds:
            skipped[name] = f"{frozen_by(adaptor, name)} froze its range"
        elif any(isinstance(adaptor.model.get_submodule(t), nn.Embedding) for t in twins):
            skipped[name] = f"shares its weight with the embedding {twins[0]}"
        elif twins:
            raise ValueError(
                f"{name} and {', '.join(twins)} share one weight, which cannot be decided twice; "
                "list all but one in modules_to_exclude"
            )
        elif not _row_wise_or_whole(quantizer):
            skipped[name] = f"its grid {quantizer.shape} has cells of several output rows"
        else:
            decided[name] = quantizer
    if adaptor.ledger is not None:  # it knows the reason for what the weights show
        adaptor.ledger.check_can_apply(technique, decided or skipped)
    _check(decided, skipped)
    others = {name: quantizer for name, quantizer in every.items() if name not in decided}
    return LayerChoice(decided, others, skipped)


def _check(decided: Mapping[str, WeightQuantizer], skipped: Mapping[str, str]) -> None:
    if not decided:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:4])
        raise ValueError(
            "at least one linear layer or convolution with a weight quantizer must remain to be "
            f"decided, none does ({reasons or 'there is none, or all are excluded'})"
        )
    refuse(
        [n for n, q in decided.items() if not bool(torch.isfinite(q.weight).all())],
        "must have a finite weight, it holds NaN or infinity; repair the checkpoint",
    )
    refuse(
        [n for n, q in decided.items() if is_rounded(q)],
        "must have a float weight, but it is rounded to a grid already; load the original weights",
    )


def _row_wise_or_whole(quantizer: WeightQuantizer) -> bool:
    shape, weight = quantizer.shape, quantizer.weight
    cells = (1,) * (weight.dim() - len(shape)) + tuple(shape)
    return cells[0] in (1, weight.shape[0]) and all(n == 1 for n in cells[2:])
