"""Checks that an adapter can be folded and belongs to the model; every fault is named."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from torch import Tensor

from aimet_ext.core.factors import width_of
from aimet_ext.files.factors import NORM_GAIN
from aimet_ext.files.scales import ModuleScales, Scales
from aimet_ext.lora.adapter import SIDES, Adapter
from aimet_ext.lora.checkpoint import Checkpoint, Target

# Fields of the config that make an adapter something else than W + s B A, and the reason.
_VARIANTS = {
    "use_qalora": "QA-LoRA averages groups of inputs, which scales tell apart",
    "use_bdlora": "block-diagonal LoRA has matrices in blocks",
    "arrow_config": "Arrow chooses among adapters by the base's inputs",
    "kasa_config": "KaSA changes the base's weights by their singular values",
    "monteclora_config": "MonteCLoRA draws its matrices at random",
    "velora_config": "VeLoRA compresses what it trains on",
    "target_parameters": "its matrices belong to parameters and not to modules",
    "layer_replication": "its layers are not the base's own",
}
# Initialisations with which loading an adapter changes the base's weights.
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_variant(adapter: Adapter) -> None:
    """Refuse an adapter as a whole.

    :raises ValueError: it was folded before, or is of a variant that scales do not carry over to.
    """
    who = f"adapter {adapter.name!r}"
    if adapter.folded is not None:
        raise ValueError(
            f"{who}: an adapter of the original model is required, but this one was folded already "
            f"({', '.join(adapter.folded.get('techniques') or ['no technique'])}); fold the "
            "original one, with the scales that hold all techniques"
        )
    for key, what in _VARIANTS.items():
        if adapter.config.get(key):
            raise ValueError(
                f"{who}: LoRA, rsLoRA or DoRA is required, got {key} ({what}); convert it to LoRA, "
                "or merge it into the model before that is quantized"
            )
    start = str(adapter.config.get("init_lora_weights", True)).lower()
    if start.startswith(_RESIDUAL):
        raise ValueError(
            f"{who}: an adapter of the original weights is required, but loading one with "
            f"init_lora_weights={start!r} changes them; convert it to LoRA with save_pretrained("
            "folder, path_initial_model_for_weight_conversion=…)"
        )


def named_like(scales: Scales, names: Collection[str]) -> Scales:
    """Return scales under the names of a checkpoint, without a wrapper's prefix."""
    inner = {name.partition(".")[2]: value for name, value in scales.items()}
    if scales.keys() & set(names) or not inner.keys() & set(names):
        return scales
    return replace(scales, modules=inner)


def without_gain(scales: Scales) -> set[str]:
    """Return norms whose gains were folded, under their names with and without a wrapper's."""
    names = [pair["source"] for pair in scales.pairs if pair.get("kind") == NORM_GAIN]
    return {*names, *(name.partition(".")[2] for name in names)}


def check_fit(
    adapter: Adapter, scales: Scales, target: Target, original: Checkpoint | None
) -> dict[str, str]:
    """Return the reasons why modules of a padded adapter do not fit; by module.

    :param original: Weights that are not padded; compared where the target's are not known.
    :raises ValueError: the scales belong to another model altogether.
    """
    known = target.checkpoint or original
    modules = adapter.modules
    existing = set(modules) if known is None else known.modules()
    if known is None:
        _check_names(adapter, scales)
    elif not scales.keys() <= existing:
        raise ValueError(
            f"scales of the modules of {known.source} are required, got some of "
            f"{min(scales.keys() - existing)}; fold with the scales of the adapter's own model"
        )
    problems = {}
    for module, kinds in modules.items():
        reason = None
        shape = None if known is None else known.shapes.get(f"{module}.weight")
        if known is not None and module not in existing:
            reason = f"is no module of {known.source}"
        elif shape is not None:
            reason = _misfit(adapter, kinds, shape)
        reason = reason or _scaled_misfit(adapter, kinds, scales.get(module), module)
        if reason is not None:
            problems[module] = reason
    return {**problems, **_tied(adapter, scales)}


def refuse(adapter: Adapter, problems: Mapping[str, str]) -> NoReturn:
    """Raise one error for all modules.

    :raises ValueError: always.
    """
    listed = "; ".join(f"{module}: {reason}" for module, reason in sorted(problems.items()))
    raise ValueError(f"adapter {adapter.name!r} cannot be folded: {listed}")


def _check_names(adapter: Adapter, scales: Scales) -> None:
    """Refuse an adapter that has no module in common with the scales.

    :raises ValueError: no module of the adapter is one of the scales'.
    """
    modules = adapter.modules
    if scales and modules and not scales.keys() & modules.keys():
        raise ValueError(
            f"adapter {adapter.name!r}: modules of the model that the scales belong to are "
            f"required, such as {next(iter(scales))}, got {next(iter(modules))}; fold with the "
            "scales of the adapter's own model, or, if its layers are none that were scaled, pass "
            "base= that model"
        )


def _misfit(adapter: Adapter, kinds: Mapping[str, Tensor], shape: tuple[int, ...]) -> str | None:
    """Return the reason why tensors do not fit a weight, or None."""
    whole = kinds.get("weight")
    if whole is not None and tuple(whole.shape) != shape:
        return f"its weight must have the base's shape {list(shape)}, got {list(whole.shape)}"
    if len(shape) < 2:
        return None
    outs, ins = shape[:2]
    if adapter.config.get("fan_in_fan_out") and "A" in kinds:
        outs, ins = ins, outs
    sizes = {"input": ins, "output": outs}
    for kind, (dim, side) in SIDES.items():
        if kind in kinds and kinds[kind].shape[dim] != sizes[side]:
            got = f"got {list(kinds[kind].shape)}"
            return f"{kind} must have {sizes[side]} at dimension {dim}, as the base's weight, {got}"
    return None


def _scaled_misfit(
    adapter: Adapter, kinds: Mapping[str, Any], scales: ModuleScales | None, module: str
) -> str | None:
    """Return the reason why scales do not fit the tensors of a module, or None."""
    if scales is None:
        return None
    weight = kinds.get("weight")
    if weight is not None and weight.dim() == 2 and adapter.config.get("fan_in_fan_out"):
        return "a whole weight cannot be folded with fan_in_fan_out, which may hold for it or not"
    if scales.output is not None and "tokens" in kinds:
        return "rows of a table whose rows are scaled cannot be folded"
    for kind, (dim, side) in SIDES.items():
        factor = getattr(scales, side)
        if factor is None or kind not in kinds:
            continue
        if kinds[kind].shape[dim] != (width := width_of(factor)):
            return (
                f"its scales have width {width}, {kind} has {kinds[kind].shape[dim]}; if the "
                "base was padded, fold with the folder of its export, which says so"
            )
    return None


def _tied(adapter: Adapter, scales: Scales) -> dict[str, str]:
    """Return the modules that share one adapter, but not one transform."""
    if not adapter.config.get("ensure_weight_tying"):
        return {}
    tied = [name for name in adapter.modules if name.endswith(("embed_tokens", "lm_head"))]
    if not any(name in scales for name in tied):
        return {}
    reason = "is tied to another module (ensure_weight_tying), and the scales of both may differ"
    return dict.fromkeys(tied, reason)
