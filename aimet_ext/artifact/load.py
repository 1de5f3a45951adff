"""A sim rebuilt from the folder that ``export`` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from aimet_ext.artifact.checkpoint import load_weights
from aimet_ext.errors import CorruptFileError, require
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.manifest import read_manifest
from aimet_ext.files.names import LEDGER, LEDGER_SCHEMA, QUANTIZERS, QUANTIZERS_SCHEMA, SETTINGS
from aimet_ext.files.sealed import read_sealed
from aimet_ext.models.huggingface import prepare_model
from aimet_ext.sim.protocol import adapt
from aimet_ext.sim.torch.state import load_quantizers

__all__ = ["load"]


def load(path: str | Path, *, sim: Any = None) -> Any:
    """Rebuild a sim from an export; its logits are those of the sim that was exported, bit by bit.

    The folder alone is enough for a sim that ``create_sim`` made of a model of transformers, and
    for an ONNX sim. Only JSON, safetensors and ONNX files are read, after every file was compared
    with its hash.

    :param path: folder that :func:`aimet_ext.export` wrote.
    :param sim: a sim of the same model, into which weights and quantizers are put; needed for one
        that was built by hand of a torch module. An ONNX sim that is rebuilt computes on the CPU,
        and of its configuration only what shapes its graph and quantizers is known.
    :returns: the sim, in evaluation mode, with its ledger.
    :raises FileNotFoundError: there is no export at ``path``.
    :raises CorruptFileError: a file was changed, is absent, or is not ours.
    :raises ValueError: the sim was built by hand and none is given, or the one given does not fit.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if manifest["kind"] != "export":
        raise CorruptFileError(f"{folder}: an export is required, got {manifest['kind']!r}")
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    if manifest.get("framework") == "onnx":
        from aimet_ext.artifact.onnx_export import load_onnx

        return load_onnx(folder, manifest["prefix"], settings["create_sim"], sim)
    if sim is None:
        sim = _rebuild(folder, settings, manifest)

    tensors, fields = read_sealed(folder / QUANTIZERS, QUANTIZERS_SCHEMA)
    described = json.loads(fields["quantizers"])
    load_weights(folder, sim, manifest["model"]["tied"])
    load_quantizers(sim, tensors, described)
    buffers = dict(sim.model.named_buffers())
    for name in json.loads(fields["buffers"]):
        if name in buffers:
            buffers[name].data = tensors[name].to(buffers[name].device)
    tensors, fields = read_sealed(folder / LEDGER, LEDGER_SCHEMA)
    adaptor = adapt(sim)
    adaptor.ledger = Ledger.from_tensors(tensors, json.loads(fields["ledger"]))
    adaptor.model.eval()
    return sim


def _rebuild(folder: Path, settings: dict[str, Any], manifest: dict[str, Any]) -> Any:
    """A sim of the same structure; its ranges are still to be loaded."""
    from aimet_ext.grids.create import arguments_from_settings, create_sim

    if settings["create_sim"] is None:
        raise ValueError(
            f"{folder} holds a sim that was built by hand, so how to build it is not known; "
            "build it again and pass it as load(path, sim=sim)"
        )
    loadable = manifest["model"]["loads_in_transformers"]
    model = _model(folder, settings["dtype"], settings["attention"], loadable)
    sample = torch.arange(8)[None] % model.config.get_text_config().vocab_size  # [1, 8]
    module = prepare_model(model, mask_value=settings["create_sim"].get("mask_value"))
    sim = create_sim(module, sample, **arguments_from_settings(settings["create_sim"]))
    adapt(sim).settings = settings["create_sim"]
    return sim


def _model(folder: Path, dtype: str, attention: str | None, loadable: bool) -> Any:
    """The model of an export; where its config cannot say its widths, without its weights."""
    transformers = require("transformers", "torch")
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if attention is not None:
        options["attn_implementation"] = attention
    auto = transformers.AutoModelForCausalLM
    if loadable:
        return auto.from_pretrained(folder, local_files_only=True, **options).eval()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.random.fork_rng(devices=[]):
        return auto.from_config(config, **options).eval()
