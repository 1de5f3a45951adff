"""Widths of weights under a budget: the choices that move the outputs least."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from torch import nn

from aimet_ext.analysis.weight_costs import Fisher, Subject, Unit, divergences
from aimet_ext.analysis.widths_report import LayerWidths, WidthsReport, label
from aimet_ext.core.knapsack import Items, Option, cheapest, hull_curve
from aimet_ext.data.batches import ForwardFn
from aimet_ext.errors import require, some
from aimet_ext.grids.widths import parse_choice
from aimet_ext.patterns import fits, near
from aimet_ext.sim.protocol import adapt
from aimet_ext.specs import OnIndivisible, QSpec, check_widths

_log = logging.getLogger(__name__)
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

    Source: of this project, :doc:`/mixed_precision`.

    The divergence KL(float || quantized) of the outputs that each choice of each layer costs is
    estimated from gradients of the float model; the choices with the least sum that fit the budget
    are found by a knapsack search. The errors are those of rounding to nearest. As costs of large
    errors are underestimated, the search is repeated without the smallest choice, without the two
    smallest and so on; the divergence of each result is measured, and the best one is kept.

    The layers are the ``nn.Linear`` of the model but the output layer and what shares a weight with
    an embedding: those that ``weights`` of :func:`create_sim` speaks of. Layers that the
    data never reach are left out, which is logged.

    :param model: Causal LM of transformers or a module that returns logits ``[..., classes]``, as
        :func:`create_sim` takes them, or a ``QuantizationSimModel`` of aimet_torch or aimet_onnx,
        whose float model is looked at. It is left as it is.
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
    :raises TypeError: Something without a model in it.
    :raises TransformRefused: An ONNX graph has operators that PyTorch cannot compute.
    :raises MissingExtraError: aimet-torch is not installed, and a torch model is given.

    >>> report = aimet_ext.assign_widths(model, batches, 4.5, ["int4", "int8"])
    >>> sim = aimet_ext.create_sim(model, batches[0], overrides=report.overrides)
    >>> aimet_ext.set_widths(onnx_sim, report)
    """
    started = time.perf_counter()
    specs = _specs(choices, on_indivisible)
    with _subject(model, dataloader, forward_fn) as subject:
        units = subject.units(list(specs.values()), partial(_left_out, modules_to_exclude))
        groups_of_units = _grouped(units, groups)
        _capacity(budget, groups_of_units)  # before any work
        units = [unit for group in groups_of_units for unit in group]
        rows = Fisher(units, subject).run(progress)
        if left := [unit.names[0] for unit in units if not unit.reached]:
            _log.warning("data never reach %s: no width is assigned", some(left))
        together = [[unit for unit in group if unit.reached] for group in groups_of_units]
        together = [group for group in together if group]
        if not together:
            raise ValueError("a linear layer that the data reach is required, got none")
        items = _items(together, rows)
        best = candidates(items, _capacity(budget, together))
        measured = divergences(together, best, subject, progress)
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


def _specs(choices: Sequence[QSpec | str], on_indivisible: OnIndivisible) -> dict[str, QSpec]:
    """Return the choices by their names."""
    if isinstance(choices, str | QSpec):
        choices = [choices]
    found: dict[str, QSpec] = {}
    for each in choices:
        spec = parse_choice(each, on_indivisible) if isinstance(each, str) else each
        if not isinstance(spec, QSpec):
            raise TypeError(f'choices must be QSpec or text such as "int4", got {each!r}')
        check_widths("weights", {"choices": spec})
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
def _subject(model: Any, dataloader: Any, forward_fn: ForwardFn | None) -> Iterator[Subject]:
    """Open a context with the float weights of what is given."""
    if isinstance(model, nn.Module):
        require("aimet_torch", "torch")
        from aimet_ext.analysis.model_weights import weights_of_module

        with weights_of_module(model, dataloader, forward_fn) as found:
            yield found
        return
    adaptor = adapt(model)
    runs = adaptor.ledger.runs if adaptor.ledger else []
    if rounded := [run for run in runs if run.rounds]:
        raise ValueError(
            f"float weights are required, but {rounded[0].technique} rounded those of this "
            "simulation; assign widths before that, or to the original model"
        )
    if adaptor.framework == "torch":
        from aimet_ext.analysis.model_weights import weights_of_sim

        with weights_of_sim(adaptor, dataloader, forward_fn) as found:
            yield found
    else:
        from aimet_ext.analysis.graph_weights import weights_of_graph

        with weights_of_graph(adaptor, dataloader, forward_fn) as in_graph:
            yield in_graph


# ---- layers -------------------------------------------------------------------------------------


def _left_out(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """Return the names that fit a pattern.

    :raises ValueError: a pattern that fits none.
    """
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        own = {name for name in names if fits(pattern, name)}
        if not own:
            raise _fits_none("modules_to_exclude", pattern, names)
        found |= own
    return found


def _grouped(units: Sequence[Unit], groups: Sequence[Group]) -> list[list[Unit]]:
    """Return the units that get one choice together.

    :raises ValueError: a group that fits no layer.
    """
    place = {id(unit): [unit] for unit in units}
    for group in groups:
        for each in _members(units, group):
            merged = list(dict.fromkeys(u for unit in each for u in place[id(unit)]))
            place.update((id(unit), merged) for unit in merged)
    return list({id(each): each for each in place.values()}.values())


def _members(units: Sequence[Unit], group: Group) -> list[list[Unit]]:
    found: dict[str, list[Unit]] = {}
    for unit in units:
        for name in unit.names:
            parent, _, last = name.rpartition(".")
            if isinstance(group, str) and fits(group, name):
                found.setdefault("", []).append(unit)
            elif not isinstance(group, str) and last in group:
                found.setdefault(parent, []).append(unit)
    if not found:
        raise _fits_none("groups", group, [name for unit in units for name in unit.names])
    return list(found.values())


def _fits_none(place: str, pattern: Any, names: Sequence[str]) -> ValueError:
    return ValueError(
        f"{place}: a pattern that fits a linear layer is required, {pattern!r} fits none; names "
        f"look like {next(iter(names), '')!r}{near(pattern, names)}"
    )
