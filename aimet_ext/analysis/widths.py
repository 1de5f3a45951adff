"""Widths of weights under a budget: the choices that move the outputs least."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor, nn

from aimet_ext.analysis.weight_costs import Fisher, Unit, divergences
from aimet_ext.analysis.widths_report import LayerWidths, WidthsReport, label
from aimet_ext.config import LPBQ, Blockwise, Granularity, OnIndivisible, QSpec, fit_blocks
from aimet_ext.core.interrupts import uninterrupted
from aimet_ext.core.knapsack import Items, Option, cheapest, hull_curve
from aimet_ext.data.batches import ForwardFn, call_model, iterate_batches
from aimet_ext.errors import require, some
from aimet_ext.models.hidden import expose_weights
from aimet_ext.models.huggingface import causal_lm, original_name, prepare_model
from aimet_ext.sim.points import Run, first_output
from aimet_ext.sim.protocol import adapt
from aimet_ext.walk.hooks import evaluating

_log = logging.getLogger(__name__)
_SCALE_BITS = 16  # of a float scale, as it is stored for a device
_UNITS = {"bits": 0, "bytes": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}

Group = str | Sequence[str]


def assign_widths(
    model: Any,
    dataloader: Any,
    budget: float | str,
    choices: Sequence[QSpec | str] = ("int4", "int8"),
    *,
    groups: Sequence[Group] = (),
    modules_to_exclude: Sequence[str] = (),
    on_indivisible: Literal["error", "per_channel"] = "error",
    forward_fn: ForwardFn | None = None,
    progress: bool = True,
) -> WidthsReport:
    """Choose a grid for the weight of each linear layer, so that the outputs move least.

    The divergence KL(float || quantized) of the outputs that each choice of each layer costs is
    estimated from gradients of the float model; the choices with the least sum that fit the budget
    are found by a knapsack search. The errors are those of rounding to nearest. As costs of large
    errors are underestimated, the search is repeated without the smallest choice, without the two
    smallest and so on; the divergence of each result is measured, and the best one is kept.

    The layers are the ``nn.Linear`` of the model but the output layer and what shares a weight with
    an embedding: those that ``weights`` of :func:`create_sim` speaks of. Layers that the
    data never reach are left out, which is logged.

    :param model: Causal LM of transformers or a module that returns logits ``[..., classes]``, as
        :func:`create_sim` takes them, or a ``QuantizationSimModel`` of aimet_torch, whose float
        model is looked at. It is left as it is.
    :param dataloader: Batches as for the techniques; 16 windows of text are enough. Each row of a
        batch is one sample of the estimate.
    :param budget: Average bits of a weight, a number or ``"4.5 bits"``; or ``"300 MB"``, in bytes,
        kB, MB (10^6) or GB, for the weights of these layers. Scales count: 16 bits for a float
        one, ``scale_bits`` for a block of LPBQ, and an offset as many as the weight has.
    :param choices: Specs, or text such as ``"int4"``, ``"uint4"``, ``"int4:64"`` for blocks of 64
        and ``"int4:lpbq64"``.
    :param groups: Layers that get one choice together, as targets that fuse them need it: a pattern
        such as ``"model.layers.0.*"`` for all that fit it, or last parts of names such as
        ``("q_proj", "k_proj", "v_proj")`` for those of them in one module. Layers that share a
        weight are a group.
    :param modules_to_exclude: Patterns of layers that are left out, and count nowhere.
    :param on_indivisible: Treatment of a layer whose width is no multiple of the block of a choice
        that is text: ``"error"``, or ``"per_channel"`` for one range a row.
    :param forward_fn: Function called as ``forward_fn(model, batch)`` in place of ``model(batch)``.
    :param progress: Show a progress bar.
    :returns: The choices as ``overrides`` and as ``recipe``, what each would cost, and the least
        divergence at other budgets.
    :raises ValueError: A budget below the smallest choices, a choice that does not fit a layer, a
        pattern that fits none, outputs that are no logits, or unusable data.
    :raises TypeError: Something without a torch model, such as a simulation of aimet_onnx.
    :raises MissingExtraError: aimet-torch is not installed.

    >>> report = aimet_ext.assign_widths(model, batches, 4.5, ["int4", "int8"])
    >>> sim = aimet_ext.create_sim(model, batches[0], overrides=report.overrides)
    """
    require("aimet_torch", "torch")
    started = time.perf_counter()
    specs = _specs(choices, on_indivisible)
    with _float_model(model, dataloader, forward_fn) as (module, batches, run):
        groups_of_units = _grouped(_units(module, specs, modules_to_exclude), groups, module)
        _capacity(budget, groups_of_units)  # before any work
        units = [unit for group in groups_of_units for unit in group]
        model_of_masks = None if forward_fn else module
        rows = Fisher(units, batches, run, model_of_masks).run(progress)
        if left := [unit.names[0] for unit in units if not unit.reached]:
            _log.warning("data never reach %s: no width is assigned", some(left))
        together = [[unit for unit in group if unit.reached] for group in groups_of_units]
        together = [group for group in together if group]
        if not together:
            raise ValueError("a linear layer that the data reach is required, got none")
        items = _items(together, rows)
        best = candidates(items, _capacity(budget, together))
        measured = divergences(together, best, batches, run, model_of_masks, progress)
    number = min(range(len(best)), key=measured.__getitem__)
    chosen = {
        id(unit): at for group, at in zip(together, best[number], strict=True) for unit in group
    }
    units = [unit for unit in units if unit.reached]
    weights = sum(unit.count for unit in units)
    return WidthsReport(
        layers=tuple(
            LayerWidths(
                names=tuple(unit.names),
                weights=unit.count,
                choice=list(specs)[chosen[id(unit)]],
                bits=dict(zip(specs, unit.bits, strict=True)),
                kl=dict(zip(specs, unit.costs(rows), strict=True)),
            )
            for unit in units
        ),
        specs=specs,
        bits=sum(unit.bits[chosen[id(unit)]] for unit in units),
        weights=weights,
        kl=math.fsum(unit.costs(rows)[chosen[id(unit)]] for unit in units),
        measured=measured[number],
        curve=tuple((size / weights, cost) for size, cost in hull_curve(items)),
        rows=rows,
        settings={"budget": budget, "groups": [g if isinstance(g, str) else [*g] for g in groups]},
        seconds=time.perf_counter() - started,
    )


def candidates(items: Items, capacity: int) -> list[list[int]]:
    """Return the choices of least cost of all options, without the smallest one, and so on.

    Costs of large errors are underestimated, the more the larger they are together: with fewer of
    the smallest options a higher sum can be a lower divergence.
    """
    sizes = [sum(options[at][0] for options in items) for at in range(len(items[0]))]
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    found: list[list[int]] = []
    for first in range(len(order)):
        allowed = order[first:]
        some_options = [[options[at] for at in allowed] for options in items]
        if sum(min(options)[0] for options in some_options) > capacity:
            break
        chosen = [allowed[at] for at in cheapest(some_options, capacity)]
        if chosen not in found:
            found.append(chosen)
    return found


def _items(together: Sequence[Sequence[Unit]], rows: int) -> list[list[Option]]:
    """Return size and cost of each choice of each group."""
    found = []
    for group in together:
        sizes = [sum(own) for own in zip(*(unit.bits for unit in group), strict=True)]
        costs = [math.fsum(own) for own in zip(*(unit.costs(rows) for unit in group), strict=True)]
        found.append(list(zip(sizes, costs, strict=True)))
    return found


# ---- what is asked for --------------------------------------------------------------------------


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


def _specs(choices: Sequence[QSpec | str], on_indivisible: OnIndivisible) -> dict[str, QSpec]:
    """Return the choices by their names."""
    if isinstance(choices, str | QSpec):
        choices = [choices]
    found: dict[str, QSpec] = {}
    for each in choices:
        spec = parse_choice(each, on_indivisible) if isinstance(each, str) else each
        if not isinstance(spec, QSpec):
            raise TypeError(f'choices must be QSpec or text such as "int4", got {each!r}')
        if spec.on_indivisible == "pad":
            raise ValueError(
                f'choices: {label(spec)} has on_indivisible="pad", which changes what is counted; '
                'give "per_channel", or a block size that divides'
            )
        if found.setdefault(label(spec), spec) != spec:
            raise ValueError(f"choices: one spec of each kind is required, {label(spec)} is twice")
    if not found:
        raise ValueError("choices: at least one QSpec or width is required, got none")
    return found


def _capacity(budget: float | str, together: Sequence[Sequence[Unit]]) -> int:
    """Return the bits that may be used.

    :raises ValueError: the budget is no number with a unit, or below the smallest choices.
    """
    text = f"{budget} bits" if isinstance(budget, int | float) else budget
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-zA-Z]*)\s*", text)
    unit = (found[2].lower() or "bits") if found else ""
    if found is None or unit not in _UNITS:
        raise ValueError(
            'budget: average bits of a weight such as 4.5, or text such as "4.5 bits" or '
            f'"300 MB", is required, got {budget!r}'
        )
    weights = sum(unit.count for group in together for unit in group)
    each = weights if unit == "bits" else 8 * _UNITS[unit]
    capacity = math.floor(float(found[1]) * each * (1 + 1e-12))
    sizes = [[size for size, _ in options] for options in _items(together, 0)]
    least, most = (sum(map(end, sizes)) for end in (min, max))
    if capacity < least:
        raise ValueError(
            f"budget: at least {math.ceil(1e4 * least / weights) / 1e4} bits a weight "
            f"({-(-least // 8)} bytes) are required, where every layer has its smallest choice, "
            f"got {budget}; the largest choices take {most / weights:.4f} bits ({-(-most // 8)} "
            "bytes). Raise the budget, or add a smaller choice"
        )
    return capacity


@contextmanager
def _float_model(
    model: Any, dataloader: Any, forward_fn: ForwardFn | None
) -> Iterator[tuple[nn.Module, Sequence[Any], Run]]:
    """Open a context with a module that computes in float, its batches, and a run of it."""
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            from aimet_ext.sim.torch.unknown import is_registered

            given = hasattr(model, "get_output_embeddings")
            module = expose_weights(prepare_model(model) if given else model, is_registered)
            batches = list(iterate_batches(dataloader, opaque=forward_fn is not None))
            if not batches:
                raise ValueError("dataloader must give at least one batch, it gave none")
            stack.enter_context(evaluating(module))
            stack.enter_context(_without_gradients(module))
        else:
            adaptor = adapt(model)
            if adaptor.framework != "torch":
                raise TypeError(
                    "a torch model or a simulation of aimet_torch is required, got one of "
                    "aimet_onnx; assign widths to the torch model, and export to ONNX the "
                    "simulation that create_sim(overrides=report.overrides) builds"
                )
            runs = adaptor.ledger.runs if adaptor.ledger else []
            if rounded := [run for run in runs if run.rounds]:
                raise ValueError(
                    f"float weights are required, but {rounded[0].technique} rounded those of this "
                    "simulation; assign widths before that, or to the original model"
                )
            batches = adaptor.batches(dataloader, opaque=forward_fn is not None)
            stack.enter_context(adaptor.preserved_state())
            module = adaptor.model.eval().requires_grad_(False)
            stack.enter_context(adaptor.disabled_quantizers())
        yield module, batches, lambda b: first_output(call_model(module, b, forward_fn))


@contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.requires_grad_(False)
    try:
        yield
    finally:
        with uninterrupted():
            for parameter in wanted:
                parameter.requires_grad_(True)


# ---- layers -------------------------------------------------------------------------------------


def _units(module: nn.Module, specs: Mapping[str, QSpec], excluded: Sequence[str]) -> list[Unit]:
    """Return the weights that get a width.

    :raises ValueError: a pattern that fits none, or a block size that does not divide.
    """
    from aimet_ext.sim.torch.setup import minmax_quantizer_for

    layers = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    patterns = [excluded] if isinstance(excluded, str) else excluded
    for pattern in patterns:
        if not (fitting := [name for name in layers if _fits(name, pattern, module)]):
            raise _fits_none("modules_to_exclude", pattern, layers, module)
        layers = {name: layer for name, layer in layers.items() if name not in fitting}
    language_model = causal_lm(module)
    output = None if language_model is None else language_model.get_output_embeddings()
    lookups = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    layers = {
        name: layer
        for name, layer in layers.items()
        if layer is not output and id(layer.weight) not in lookups
    }
    plans = [fit_blocks(layers, dict.fromkeys(layers, spec)).specs for spec in specs.values()]
    units: dict[int, Unit] = {}
    for name, layer in layers.items():
        if (known := units.get(id(layer.weight))) is not None:
            known.names.append(original_name(name, module))
            known.layers.append(layer)
            continue
        own = [spec for plan in plans if (spec := plan[name]) is not None]
        quantizers: list[Any] = [minmax_quantizer_for(spec, layer.weight) for spec in own]
        cells = [math.prod(quantizer.shape) for quantizer in quantizers]
        units[id(layer.weight)] = Unit(
            names=[original_name(name, module)],
            layers=[layer],
            bits=[stored_bits(s, layer.weight, n) for s, n in zip(own, cells, strict=True)],
            quantizers=quantizers,
        )
    return list(units.values())


def stored_bits(spec: QSpec, weight: Tensor, cells: int) -> int:
    """Return the bits of a weight ``[out, in]`` with its scales and offsets.

    :param cells: Ranges of the grid.
    """
    scales = cells * _SCALE_BITS
    if isinstance(spec.granularity, LPBQ):
        scales = cells * spec.granularity.scale_bits + len(weight) * _SCALE_BITS
    offsets = 0 if spec.symmetric else cells * spec.bitwidth
    return weight.numel() * spec.bitwidth + scales + offsets


def _grouped(units: Sequence[Unit], groups: Sequence[Group], module: nn.Module) -> list[list[Unit]]:
    """Return the units that get one choice together.

    :raises ValueError: a group that fits no layer.
    """
    place = {id(unit): [unit] for unit in units}
    for group in groups:
        for each in _members(units, group, module):
            merged = list(dict.fromkeys(u for unit in each for u in place[id(unit)]))
            place.update((id(unit), merged) for unit in merged)
    return list({id(each): each for each in place.values()}.values())


def _members(units: Sequence[Unit], group: Group, module: nn.Module) -> list[list[Unit]]:
    found: dict[str, list[Unit]] = {}
    for unit in units:
        for name in unit.names:
            parent, _, last = name.rpartition(".")
            if isinstance(group, str) and fnmatchcase(name, group):
                found.setdefault("", []).append(unit)
            elif not isinstance(group, str) and last in group:
                found.setdefault(parent, []).append(unit)
    if not found:
        raise _fits_none("groups", group, [name for unit in units for name in unit.names], module)
    return list(found.values())


def _fits(name: str, pattern: str, module: nn.Module) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(original_name(name, module), pattern)


def _fits_none(place: str, pattern: Any, names: Any, module: nn.Module) -> ValueError:
    return ValueError(
        f"{place}: a pattern that fits a linear layer is required, {pattern!r} fits none; names "
        f"look like {original_name(next(iter(names), ''), module)!r}"
    )
