"""A simulation with adapters as a folder, and the way back."""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, Json
from torch import Tensor

from aimet_ext.artifact.export import load as load_base
from aimet_ext.artifact.export import read_quantizers
from aimet_ext.artifact.inputs import positional_inputs
from aimet_ext.errors import CorruptFileError, require
from aimet_ext.files.folders import check_output, replace_folder
from aimet_ext.files.manifest import MANIFEST, WEIGHTS, hash_file, read_manifest, write_manifest
from aimet_ext.files.numbers import quantizer_faults, refuse_faults
from aimet_ext.files.reading import TensorFile, naming
from aimet_ext.files.tensors import read_sealed, write_sealed
from aimet_ext.lora.adapter import read_adapter
from aimet_ext.lora.baked import open_folder
from aimet_ext.lora.onnx_inputs import write_adapter_graph
from aimet_ext.lora.sim import LoraState, lora_state, sim_with_slots, switch
from aimet_ext.models.huggingface import original_name
from aimet_ext.sim.protocol import adapt
from aimet_ext.sim.torch.lora import Content, base_state, slots

if TYPE_CHECKING:
    from aimet_torch import QuantizationSimModel

BASE, ADAPTERS, STATE = "base", "adapters", "lora.safetensors"
_SCHEMA = "aimet_ext.lora/1"
_NAME = re.compile(r"[\w][\w.\- ]*")


def export(
    sim: Any,
    path: str | Path,
    filename_prefix: str,
    dummy_input: Any,
    *,
    opset_version: int = 17,
) -> dict[str, Any]:
    """Write a simulation with its adapters to a folder: complete and checked, or not at all.

    =========================================  =====================================================
    ``base/``                                  the base's export, as it is
    ``adapters/{name}/``                       each adapter, folded, as PEFT reads it
    ``{prefix}.onnx``                          the base's float graph with room for one adapter,
                                               whose weights are inputs; left out, they are zeros
                                               and the graph computes what the base does
    ``{prefix}.encodings``, ``….2.0.0.…``      encodings of the base's tensors
    ``{name}.safetensors``                     an adapter as the graph's inputs take it
    ``{prefix}_{name}.encodings``              encodings 1.0.0 of the adapter's weights, of the
                                               tensors between them and of the sums
    ``lora_names.json``                        names of all these tensors, for the functions of
                                               ``aimet_onnx.experimental.lora``
    ``lora_weight_list.txt``,                  the same for Qualcomm's converter and importer
    ``lora_config.yaml``,
    ``lora_adaptor_list.yaml``
    ``lora.safetensors``                       weights and quantizers of all adapters, exactly
    ``manifest.json``                          hashes, versions, results of the checks
    =========================================  =====================================================

    One graph serves adapters of several ranks: the inputs have the largest one, and the files hold
    zeros beyond an adapter's own. The scaling ``alpha / rank`` is part of ``B``.

    :param sim: Simulation made by :func:`create_sim` or :func:`load`.
    :param path: Folder; one of this package is replaced in one step, one with other files is
        refused.
    :param filename_prefix: Name of the ONNX and encodings files.
    :param dummy_input: Input to trace with, see :func:`aimet_ext.export`.
    :param opset_version: Opset of the ONNX file.
    :returns: the manifest.
    :raises ValueError: an adapter has no file name for a name, or a quantizer no range; or the
        base is no longer that of its export.
    :raises CorruptFileError: the base's export was changed since the simulation was made.
    :raises FileExistsError: a file, or a folder of another program, is there.
    :raises RuntimeError: what was written differs from the simulation; nothing is left behind.
    """
    state = lora_state(sim)
    require("onnx", "onnx")
    target = check_output(path)
    _check_names(state, filename_prefix)
    _check_ranges(state)
    if target == state.base.resolve():
        raise ValueError(f"{target} is the base's own export; choose another folder")
    _check_base(sim, state)
    inputs = positional_inputs(sim.model, dummy_input)
    with replace_folder(path) as folder:
        shutil.copytree(state.base, folder / BASE)
        for name, adapter in state.sources.items():
            adapter.save(folder / ADAPTERS / name)
        _write_state(folder, sim, state)
        checks = write_adapter_graph(
            sim, folder, filename_prefix, inputs, opset_version=opset_version
        )
        return write_manifest(
            folder,
            "lora",
            prefix=filename_prefix,
            adapters=list(state.adapters),
            active=state.active,
            checks=checks,
        )


def load(path: str | Path, *, base_sim: Any = None) -> QuantizationSimModel:
    """Rebuild a simulation with adapters from its folder; all logits are the same, bit by bit.

    :param path: Folder that :func:`export` wrote.
    :param base_sim: Simulation of a base that was built by hand: see :func:`aimet_ext.load`.
    :returns: the simulation in evaluation mode, with the adapter that was active in its layers.
    :raises FileNotFoundError: there is no such folder.
    :raises CorruptFileError: a file was changed, is absent, or is another program's.
    """
    folder, manifest = open_folder(path)
    with naming(folder, *([] if base_sim is None else [ValueError])):
        tensors, fields = read_sealed(folder / STATE, _SCHEMA, _Fields)
        sim = sim_with_slots(load_base(folder / BASE, sim=base_sim), folder / BASE, fields.places)
        state = lora_state(sim)
        own: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in tensors.items():
            name, slot, part = key.split("/", 2)
            own[name, slot][part] = tensor
        for name, contents in fields.adapters.items():
            for slot, described in contents.items():
                faults = quantizer_faults(own[name, slot], described["quantizers"], form="{}/{}")
                refuse_faults(folder / STATE, ((f"{name}/{slot}/{key}", f) for key, f in faults))
            state.adapters[name] = {
                slot: Content.unpack(own[name, slot], described["quantizers"], state.empty[slot])
                for slot, described in contents.items()
            }
            state.sources[name] = read_adapter(folder / ADAPTERS / name)
        switch(sim, manifest["active"])
    return sim


class _Fields(BaseModel):
    """Fields of ``lora.safetensors``.

    :param places: True for each layer with an adapter whose sum has a bias.
    :param adapters: content of each slot of each adapter.
    """

    places: Json[dict[str, bool]]
    adapters: Json[dict[str, dict[str, Any]]]


def _check_names(state: LoraState, prefix: str) -> None:
    taken = {prefix, BASE, ADAPTERS, STATE.partition(".")[0]}
    names = [*state.adapters, prefix]
    wrong = [n for n in names if not _NAME.fullmatch(n)] + sorted(taken & set(state.adapters))
    if wrong or not state.adapters:
        raise ValueError(
            "adapters whose names can name files (letters, digits, '_', '-', '.'), none of them "
            f"{sorted(taken)}, are required, got {wrong or 'no adapter'}"
        )


def _check_ranges(state: LoraState) -> None:
    empty = [
        f"{name}: {state.slots[slot]} ({key})"
        for name, contents in state.adapters.items()
        for slot, content in contents.items()
        for key in content.unset()
    ]
    if empty:
        raise ValueError(
            f"every quantizer needs a range before export, but {len(empty)} have none, the first "
            f"is {empty[0]}; run aimet_ext.lora.quantize first"
        )


def _check_base(sim: Any, state: LoraState) -> None:
    """Compare the base in the simulation with its export.

    :raises CorruptFileError: the export was changed.
    :raises ValueError: the simulation's base was changed.
    """
    manifest = read_manifest(state.base)
    if hash_file(state.base / MANIFEST) != state.base_manifest:
        raise CorruptFileError(
            f"{state.base} was written again since this simulation was made from it; make it again"
        )
    weights, (ranges, _) = TensorFile(state.base / WEIGHTS), read_quantizers(state.base)
    tied = manifest["model"]["tied"]
    floats, present, _ = base_state(sim, adapt(sim).float_state())
    changed = []
    for name, value in floats.items():
        original = original_name(name, sim.model)
        stored = weights[tied.get(original, original)]
        if not torch.equal(value.cpu().to(stored.dtype), stored):
            changed.append(original)
    for name, value in present.items():
        if name not in ranges or not torch.equal(ranges[name], value.cpu()):
            changed.append(name)
    if changed:
        raise ValueError(
            f"the base must be as {state.base} holds it, but {len(changed)} of its tensors were "
            f"changed, the first is {changed[0]}; make the simulation again"
        )


def _write_state(folder: Path, sim: Any, state: LoraState) -> None:
    tensors: dict[str, Tensor] = {}
    adapters: dict[str, dict[str, Any]] = {}
    for name, contents in state.adapters.items():
        adapters[name] = {}
        for slot, content in contents.items():
            empty = content.a is state.empty[slot].a
            values, described = content.pack()
            adapters[name][slot] = {"empty": empty, "quantizers": described}
            for key, value in values.items():
                if not (empty and key in ("a", "b", "bias")):
                    tensors[f"{name}/{slot}/{key}"] = value
    found = slots(sim)
    places = {module: found[slot].takes_bias for slot, module in state.slots.items()}
    write_sealed(folder / STATE, _SCHEMA, tensors, {"places": places, "adapters": adapters})
