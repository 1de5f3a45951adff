"""A quantization simulation of a base with room for LoRA adapters, which can be switched."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from aimet_ext.artifact.export import load
from aimet_ext.errors import require, some
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.manifest import MANIFEST, hash_file
from aimet_ext.files.scales import load_scales
from aimet_ext.files.tensors import hash_tensors
from aimet_ext.lora.adapter import Adapter, LoraLayer, read_adapters
from aimet_ext.lora.fold import fold_adapter, fold_adapters, scales_digest
from aimet_ext.models.huggingface import causal_lm, checkpoint_prefix, context_length
from aimet_ext.sim.protocol import adapt
from aimet_ext.sim.torch.lora import Content, LoraSlot, base_state, build_lora_sim, renamed, slots

if TYPE_CHECKING:
    from aimet_torch import QuantizationSimModel

_STATE = "aimet_ext_lora"
_CONFIG = "htp_v79"
# Parts of an adapter that would change the base for all adapters, and what they are called.
_REFUSED = {
    "magnitude": "a magnitude vector (DoRA)",
    "tokens": "trained token rows",
    "weight": "a whole weight (modules_to_save)",
    "bias": 'a trained bias of the base (bias="all" or "lora_only")',
}


@dataclass(eq=False)
class LoraState:
    """The adapters of a simulation. It is an attribute of the simulation and is copied with it.

    :param base: Folder of the base's export.
    :param base_manifest: Hash of its manifest.
    :param slots: Original name of the module by name of the slot in the sim's model.
    :param adapters: Content of each slot by adapter.
    :param empty: Content of each slot without an adapter.
    :param sources: Adapters as they were given, folded.
    :param active: Name of the adapter that is in the slots, None for the base alone.
    """

    base: Path
    base_manifest: str
    slots: dict[str, str]
    adapters: dict[str, dict[str, Content]] = field(default_factory=dict)
    empty: dict[str, Content] = field(default_factory=dict)
    sources: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None


def create_sim(
    peft_model: Any, base_export: str | Path, *, base_sim: Any = None
) -> QuantizationSimModel:
    """Return a simulation of a PEFT model on the base that was exported, its quantizers untouched.

    The base's weights and ranges are those of the export, bit by bit, and frozen; of the PEFT
    model only the adapters are read, and folded so that they fit the base's transformed weights
    (:func:`fold_adapter`). The layers that an adapter changes are called as PEFT calls them:
    ``q_proj`` becomes ``q_proj.base_layer`` with ``q_proj.lora_A`` and ``q_proj.lora_B`` beside
    it, and ``q_proj.add``. Adapters are float until :func:`quantize`. All of them are in the
    simulation, one at a time in its model: see :func:`switch`.

    :param peft_model: ``PeftModel`` with one or more LoRA adapters, a folder of them as PEFT
        writes it, an :class:`Adapter`, or a mapping of names to any of these with one adapter.
    :param base_export: Folder that :func:`aimet_ext.export` wrote of a torch simulation.
    :param base_sim: Simulation of a base that was built by hand: see :func:`aimet_ext.load`.
    :returns: an ``aimet_torch.QuantizationSimModel`` in evaluation mode, with the PEFT model's
        active adapter, or the first one, in its layers.
    :raises ValueError: an adapter does not fit the base or would change its weights; each module
        is named.
    :raises CorruptFileError: the export was changed.
    :raises MissingExtraError: aimet-torch is not installed.

    >>> sim = aimet_ext.lora.create_sim(peft_model, "llama-w4")
    >>> report = aimet_ext.lora.quantize(sim, None, batches)
    >>> aimet_ext.lora.switch(sim, "poems")
    """
    require("aimet_torch", "torch")
    base = load(base_export, sim=base_sim)
    if adapt(base).framework != "torch":
        raise ValueError(
            f"{base_export}: an export of a torch simulation is required, got one of ONNX; "
            "adapters of ONNX graphs are inputs of the graph, see aimet_ext.lora.export"
        )
    adapters = fit_adapters(peft_model, base_export)
    sim = sim_with_slots(base, base_export, _places(base, adapters))
    add_adapters(sim, adapters)
    switch(sim, _first_active(peft_model, adapters))
    return sim


def sim_with_slots(base: Any, folder: str | Path, places: Mapping[str, bool]) -> Any:
    """Return a simulation of a base with empty slots and no adapters.

    :param base: Simulation, left as it is.
    :param folder: Export of it.
    :param places: True by original name of module if its slot takes a bias.
    """
    prefix = checkpoint_prefix(base.model)
    sim = _build(base, {prefix + module: bias for module, bias in places.items()})
    state = LoraState(
        base=Path(folder),
        base_manifest=hash_file(Path(folder) / MANIFEST),
        slots={prefix + module: module for module in places},
    )
    state.empty = {name: slot.empty_content() for name, slot in slots(sim).items()}
    setattr(sim, _STATE, state)
    switch(sim, None)
    return sim


def fit_adapters(source: Any, base_export: str | Path) -> dict[str, Adapter]:
    """Return the adapters that fit an export's weights, by name.

    :param source: Adapters, see :func:`create_sim`.
    """
    if isinstance(source, Mapping):
        found = {}
        for name, one in source.items():
            fitting = fit_adapters(one, base_export)
            if len(fitting) != 1:
                raise ValueError(f"one adapter is required for {name!r}, got {sorted(fitting)}")
            found[name] = next(iter(fitting.values()))
        return found
    read = read_adapters(source)
    if not read:
        raise ValueError("at least one adapter is required, got none")
    folded = {name: adapter for name, adapter in read.items() if adapter.folded is not None}
    if not folded:
        return fold_adapters(source, base_export)
    digest = scales_digest(load_scales(base_export))
    others = [name for name, one in folded.items() if (one.folded or {}).get("scales") != digest]
    if others:
        raise ValueError(
            f"adapters that were folded with the scales of {base_export} are required, but "
            f"{some(others)} was folded with others; give the adapter as it was trained"
        )
    return {
        name: folded[name] if name in folded else fold_adapter(adapter, base_export)
        for name, adapter in read.items()
    }


def add_adapters(sim: Any, adapters: Mapping[str, Adapter]) -> None:
    """Put further adapters, float, into a simulation that has slots for their layers.

    :param adapters: Folded adapters by name; one of a name that is known takes its place.
    :raises ValueError: one does not fit; each module is named and nothing is changed.
    """
    state, places = lora_state(sim), slots(sim)
    names = {original: slot for slot, original in state.slots.items()}
    made = {}
    for name, adapter in adapters.items():
        _check_parts(name, adapter)
        layers = adapter.layers
        faults, contents = [], {}
        for module, layer in layers.items():
            slot = places.get(names.get(module, ""))
            fault = "no slot" if slot is None else _misfit(slot, layer)
            if slot is None or fault:
                faults.append(f"{module} ({fault})")
            else:
                contents[names[module]] = slot.float_content(*_scaled(layer))
        if faults:
            raise ValueError(
                f"adapter {name!r} must fit the simulation's slots, but these modules do not: "
                f"{some(faults)}; create the simulation with all adapters that it is to hold, "
                "each trained on the base's own checkpoint"
            )
        made[name] = {slot: contents.get(slot, state.empty[slot]) for slot in state.slots}
    active = state.active
    state.adapters.update(made)
    state.sources.update(adapters)
    if active in made:
        switch(sim, active)


def switch(sim: Any, name: str | None) -> None:
    """Make a simulation compute with another of its adapters.

    Weights and quantizers of the adapter's own layers are exchanged; no tensor and no quantizer of
    the base is written to.

    :param sim: Simulation made by :func:`create_sim` or :func:`load`.
    :param name: Name of the adapter; None for the base alone, whose logits are those of the base's
        export, bit by bit.
    :raises ValueError: there is no adapter of that name.
    """
    state = lora_state(sim)
    if name is not None and name not in state.adapters:
        raise ValueError(
            f"the name of an adapter must be one of {sorted(state.adapters)} or None, got {name!r}"
        )
    contents = state.empty if name is None else state.adapters[name]
    for place, slot in slots(sim).items():
        slot.put(contents[place])
    state.active = name


def lora_state(sim: Any) -> LoraState:
    """Return the adapters of a simulation.

    :raises TypeError: the simulation has none.
    """
    state = getattr(sim, _STATE, None)
    if not isinstance(state, LoraState):
        raise TypeError(
            "a simulation with adapters is required, as aimet_ext.lora.create_sim or "
            f"aimet_ext.lora.load makes it, got {type(sim).__name__} without"
        )
    return state


def base_hash(sim: Any) -> str:
    """Hash all weights, buffers and quantizers of the base, whatever adapter is in the slots.

    Names are those that the base has in a simulation without adapters, so that the hash is also
    that of the base's own simulation.

    :param sim: Simulation with adapters, or that of the base alone.
    :returns: SHA-256, in hexadecimal digits.
    :raises TypeError: ``sim`` is no simulation of AIMET.
    """
    floats, ranges, described = base_state(sim, adapt(sim).float_state())
    skipped = ("state", "same_as")
    grids = {
        name: {key: value for key, value in entry.items() if key not in skipped}
        for name, entry in described.items()
    }
    text = json.dumps(grids, sort_keys=True).encode()
    marks = {"quantizers": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    items = {**floats, **ranges, **marks}
    return hash_tensors((name, items[name]) for name in sorted(items))


def _places(base: Any, adapters: Mapping[str, Adapter]) -> dict[str, bool]:
    """Return where slots are needed: True by original name of module if it takes a bias."""
    prefix = checkpoint_prefix(base.model)
    biases: dict[str, bool] = {}
    for name, adapter in adapters.items():
        _check_parts(name, adapter)
        for module, layer in adapter.layers.items():
            biases[module] = biases.get(module, False) or layer.bias is not None
    modules = dict(base.model.named_modules())
    faults = []
    for module in biases:
        target = modules.get(prefix + module)
        if target is None:
            faults.append(f"{module} (absent)")
        elif not isinstance(target, nn.Linear | nn.Embedding):
            faults.append(f"{module} (a {type(target).__name__})")
    if faults:
        raise ValueError(
            "adapters of linear layers and tables of the base are required, but these modules are "
            f"none: {some(faults)}; take them out of target_modules, or give the adapter's own base"
        )
    order = [name.removeprefix(prefix) for name in modules if name.startswith(prefix)]
    return {module: biases[module] for module in order if module in biases}


def _check_parts(name: str, adapter: Adapter) -> None:
    faults = [f"{p.module} ({_REFUSED[p.kind]})" for p in adapter.parts if p.kind in _REFUSED]
    if faults:
        raise ValueError(
            f"adapter {name!r}: only low-rank changes can be switched on a frozen base, but it "
            f"brings {some(faults)}; train it without, or merge it and quantize a base of its own"
        )


def _misfit(slot: LoraSlot, layer: LoraLayer) -> str | None:
    """Return the reason why a layer's change does not fit a slot, None if it does."""
    if slot.table != layer.embedding:
        return "a change of a table" if layer.embedding else "a change of a linear layer"
    rows, columns = slot.base_layer.weight.shape
    wanted = (columns, rows) if slot.table else (rows, columns)
    if (layer.b.shape[0], layer.a.shape[1]) != wanted or layer.a.dim() != 2:
        return f"B A is {layer.b.shape[0]} by {tuple(layer.a.shape[1:])}, the layer {wanted}"
    if layer.bias is not None and not slot.takes_bias:
        return "a bias, for which the slot has no place"
    return None


def _scaled(layer: LoraLayer) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the weights of a slot: the scaling goes into B, exactly where it is a power of two."""
    a = layer.a.T if layer.embedding else layer.a
    bias = None if layer.bias is None else layer.bias.double() * layer.scaling
    return a, layer.b.double() * layer.scaling, bias


def _build(base: Any, places: Mapping[str, bool]) -> Any:
    """Return a simulation with slots, the base's quantizers in their places and frozen."""
    settings = adapt(base).settings or {}
    length = min(8, context_length(base.model) or 8)
    model = causal_lm(base.model)
    if model is None:
        raise ValueError("the base must be a causal LM of transformers, but it holds none")
    sample = torch.arange(length)[None] % model.config.get_text_config().vocab_size  # [1, length]
    sim = build_lora_sim(base, places, sample, settings.get("config_file") or _CONFIG)
    adaptor = adapt(sim)
    for parameter in adaptor.float_parameters("").values():
        parameter.requires_grad_(False)
    adaptor.ledger = _renamed_ledger(adapt(base).ledger, places)
    sim.model.eval()
    return sim


def _renamed_ledger(ledger: Ledger | None, places: Iterable[str]) -> Ledger | None:
    if ledger is None:
        return None
    tensors, fields = ledger.to_tensors()
    for entry in fields["entries"]:
        entry["sides"] = [[renamed(module, places), *rest] for module, *rest in entry["sides"]]
        entry["source"] = renamed(entry["source"], places)
    for run in fields["runs"]:
        run["modules"] = [renamed(module, places) for module in run["modules"]]
    return Ledger.from_tensors(tensors, fields)


def _first_active(peft_model: Any, adapters: Mapping[str, Adapter]) -> str:
    active = getattr(peft_model, "active_adapters", None)
    wanted = next((n for n in active if n in adapters), None) if isinstance(active, list) else None
    return wanted or next(iter(adapters))
