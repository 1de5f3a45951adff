"""Quantization of the adapters in a simulation; the base stays as it is."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from aimet_ext.core.objective import outputs_sqnr, sqnr_db
from aimet_ext.data.batches import call_model, iterate_batches
from aimet_ext.lora.sim import add_adapters, fit_adapters, lora_state, switch
from aimet_ext.sim.torch.lora import calibrating, share_ranges, slots
from aimet_ext.specs import PerTensor, QSpec, check_widths

_W8 = QSpec(bitwidth=8)
_SCORED = 4  # batches whose logits are compared


@dataclass(frozen=True)
class AdapterReport:
    """Error of a quantized adapter against the float one, on the quantized base.

    :param name: Name of the adapter.
    :param ranks: Rank by module, as the original checkpoint names it.
    :param change_sqnr_db: Signal to noise of the change ``B A`` of each module's weight.
    :param logits_sqnr_db: Signal to noise of the logits on the first calibration batches.
    :param seconds: Wall-clock time.
    """

    name: str
    ranks: Mapping[str, int]
    change_sqnr_db: Mapping[str, float]
    logits_sqnr_db: float
    seconds: float


@dataclass(frozen=True)
class LoraReport:
    """Result of :func:`quantize`.

    :param adapters: One entry for each adapter.
    :param weights: Spec of the weights ``A`` and ``B``, None for float.
    :param activations: Spec of the outputs of ``A`` and ``B``, None for float.
    """

    adapters: tuple[AdapterReport, ...]
    weights: QSpec | None
    activations: QSpec | None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "adapters": [asdict(adapter) for adapter in self.adapters],
            "weights": None if self.weights is None else self.weights.to_dict(),
            "activations": None if self.activations is None else self.activations.to_dict(),
        }

    def __str__(self) -> str:
        lines = [f"{'adapter':<24}{'layers':>7}{'weakest change':>28}{'logits':>10}{'s':>8}"]
        for adapter in self.adapters:
            weakest = min(adapter.change_sqnr_db.values(), default=float("inf"))
            lines.append(
                f"{adapter.name:<24}{len(adapter.ranks):>7}{weakest:>25.1f} dB"
                f"{adapter.logits_sqnr_db:>7.1f} dB{adapter.seconds:>8.1f}"
            )
        return "\n".join(lines)


def quantize(
    sim: Any,
    adapters: Iterable[str] | Mapping[str, Any] | str | None,
    dataloader: Iterable[Any],
    *,
    weights: QSpec | None = _W8,
    activations: int | QSpec | Literal["auto"] | None = "auto",
    sums: Literal["adapter", "base"] = "adapter",
    shared: bool = False,
) -> LoraReport:
    """Give adapters weight and activation encodings of their own; the base's stay as they are.

    For each adapter: ``A`` and ``B`` (with the adapter's scaling in it) get the ranges of plain
    rounding, and the tensors between are calibrated on the batches, with the base quantized. All
    ranges of the adapter are frozen afterwards. The adapter that was active is active again.

    :param sim: Simulation made by :func:`create_sim` or :func:`load`.
    :param adapters: Names of adapters in the simulation, None for all of them; or a mapping of
        names to further adapters, in any form that :func:`create_sim` takes, for layers that have
        a slot.
    :param dataloader: Batches as :func:`aimet_ext.calibration_batches` makes them.
    :param weights: Spec, per tensor or per channel; None leaves the weights float. HTP takes
        weights that are inputs of a graph per tensor only, and constants per channel too.
    :param activations: Bits (asymmetric) or spec of the outputs of ``A`` and ``B``. ``"auto"``: as
        the base's activations are; None leaves them float.
    :param sums: Range of ``base + change``: ``"adapter"`` calibrates it for each adapter;
        ``"base"`` keeps that of the base's layer, for runtimes that exchange the encodings of an
        adapter's own branch alone. What the adapter adds beyond it is then cut off.
    :param shared: True to give all these adapters the same encodings, each range as wide as the
        widest needs, so that one quantized graph serves them all with their weights as inputs: see
        :func:`shared_graph`.
    :returns: how much was lost, by adapter and layer.
    :raises ValueError: an adapter is unknown or does not fit; or weights in blocks are asked for,
        or shared ones by channel.
    """
    state = lora_state(sim)
    _check_weights(weights, shared)
    active, before, sources = state.active, dict(state.adapters), dict(state.sources)
    try:
        if isinstance(adapters, Mapping):
            add_adapters(sim, fit_adapters(adapters, state.base))
        names = _names(adapters, state.adapters)
        spec = _activations(sim, activations)
        batches = list(iterate_batches(dataloader))
        done = {name: _calibrate(sim, name, batches, weights, spec, sums) for name in names}
        if shared:
            for slot in state.slots:
                share_ranges(state.adapters[name][slot] for name in names)
        reports = tuple(_measure(sim, batches, name, *found) for name, found in done.items())
    except BaseException:
        state.adapters, state.sources = before, sources
        raise
    finally:
        switch(sim, active)
    return LoraReport(reports, weights, spec)


def _check_weights(weights: QSpec | None, shared: bool) -> None:
    if weights is None:
        return
    check_widths("weights", {"weights": weights})
    if weights.block_size is not None:
        raise ValueError(
            "weights of adapters take PerTensor or PerChannel, got "
            f"{type(weights.granularity).__name__}: their inner width is the rank, which is "
            "different for each adapter"
        )
    if shared and not isinstance(weights.granularity, PerTensor):
        raise ValueError(
            "weights=QSpec(granularity=PerTensor()) is required with shared=True, got "
            f"{type(weights.granularity).__name__}: channels of one adapter are not those of "
            "another"
        )


def _names(adapters: Iterable[str] | str | None, known: Mapping[str, Any]) -> list[str]:
    if adapters is None:
        return list(known)
    names = [adapters] if isinstance(adapters, str) else list(adapters)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"names of adapters in the simulation are required, of {sorted(known)}, got "
            f"{unknown or names}; give a mapping of names to adapters to add some"
        )
    return names


def _activations(sim: Any, asked: int | QSpec | str | None) -> QSpec | None:
    if isinstance(asked, int):
        asked = QSpec(bitwidth=asked, symmetric=False)
    if asked is None or isinstance(asked, QSpec):
        check_widths("activations", {"activations": asked})
        return asked
    return next((spec for slot in slots(sim).values() if (spec := slot.output_spec)), None)


@torch.no_grad()
def _calibrate(
    sim: Any,
    name: str,
    batches: list[Any],
    weights: QSpec | None,
    activations: QSpec | None,
    sums: Literal["adapter", "base"],
) -> tuple[list[Tensor], float]:
    """Give an adapter its ranges; return its logits while it was float, and the seconds it took."""
    started = time.perf_counter()
    state, places = lora_state(sim), slots(sim)
    floats = {slot: content.without_quantizers() for slot, content in state.adapters[name].items()}
    state.adapters[name] = floats
    switch(sim, name)
    expected = _logits(sim, batches[:_SCORED])
    state.adapters[name] = {
        slot: places[slot].quantized_content(
            content,
            weights,
            activations,
            new_sum=sums == "adapter" and content.a is not state.empty[slot].a,
        )
        for slot, content in floats.items()
    }
    switch(sim, name)
    with calibrating(places.values()):
        for batch in batches:
            call_model(sim.model, batch)
    for content in state.adapters[name].values():
        content.freeze()
    return expected, time.perf_counter() - started


@torch.no_grad()
def _measure(
    sim: Any, batches: list[Any], name: str, expected: list[Tensor], seconds: float
) -> AdapterReport:
    state = lora_state(sim)
    switch(sim, name)
    return AdapterReport(
        name=name,
        ranks={
            state.slots[slot]: content.b.shape[1]
            for slot, content in state.adapters[name].items()
            if content.a is not state.empty[slot].a
        },
        change_sqnr_db=_changes(sim, name),
        logits_sqnr_db=outputs_sqnr(_logits(sim, batches[:_SCORED]), expected),
        seconds=seconds,
    )


def _changes(sim: Any, name: str) -> dict[str, float]:
    """Return the signal to noise of ``B A`` by original name of module."""
    state, places = lora_state(sim), slots(sim)
    found = {}
    for slot, content in state.adapters[name].items():
        a, a_rounded = content.a.double(), content.rounded("a").double()
        b, b_rounded = content.b.double(), content.rounded("b").double()
        if places[slot].table:
            a, a_rounded = a.T, a_rounded.T
        change = b @ a  # [out, in]
        noise = (b_rounded @ a_rounded - change).square().sum()
        if change.any():
            found[state.slots[slot]] = sqnr_db(float(change.square().sum()), float(noise))
    return found


def _logits(sim: Any, batches: list[Any]) -> list[Tensor]:
    return [call_model(sim.model, batch).as_subclass(Tensor).cpu() for batch in batches]
