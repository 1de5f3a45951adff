"""A sim rebuilt from the folder that ``export`` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from aimet_ext.errors import CorruptFileError, require
from aimet_ext.files.folders import SETTINGS, read_json, read_manifest
from aimet_ext.files.ledger import Ledger
from aimet_ext.models.huggingface import prepare_model
from aimet_ext.sim.protocol import adapt


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
    :raises CorruptFileError: a file was changed, is absent, or was not written by aimet_ext.
    :raises ValueError: the sim was built by hand and none is given, or the one given does not fit.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if manifest["kind"] != "export":
        raise CorruptFileError(f"{folder}: an export is required, got {manifest['kind']!r}")
    settings = read_json(folder / SETTINGS, _Settings)
    if manifest.get("framework") == "onnx":
        from aimet_ext.artifact.onnx_export import load_onnx

        sim = load_onnx(folder, manifest["prefix"], sim)
        adapt(sim).settings = settings.create_sim
    else:
        from aimet_ext.artifact.checkpoint import load_state

        sim = _rebuild(folder, settings, manifest) if sim is None else sim
        load_state(folder, sim, manifest["model"]["tied"])
        sim.model.eval()
    adapt(sim).ledger = Ledger.load(folder)
    return sim


class _Settings(BaseModel):
    """Content of ``quantsim.json``.

    :param create_sim: settings of ``create_sim``, None if it did not make the sim.
    :param attention: attention implementation of the model of transformers.
    :param dtype: dtype of that model.
    """

    create_sim: dict[str, Any] | None
    attention: str | None = None
    dtype: str = ""


def _rebuild(folder: Path, settings: _Settings, manifest: dict[str, Any]) -> Any:
    """Return a sim of the same structure; its ranges are still to be loaded."""
    from aimet_ext.grids.create import arguments_from_settings, create_sim

    if settings.create_sim is None:
        raise ValueError(
            f"{folder} holds a sim that was built by hand, so how to build it is not known; "
            "build it again and pass it as load(path, sim=sim)"
        )
    loadable = manifest["model"]["loads_in_transformers"]
    model = _model(folder, settings.dtype, settings.attention, loadable)
    sample = torch.arange(8)[None] % model.config.get_text_config().vocab_size  # [1, 8]
    module = prepare_model(model, mask_value=settings.create_sim.get("mask_value"))
    sim = create_sim(module, sample, **arguments_from_settings(settings.create_sim))
    adapt(sim).settings = settings.create_sim
    return sim


def _model(folder: Path, dtype: str, attention: str | None, loadable: bool) -> Any:
    """Return the model of an export; without weights if its config cannot say its widths."""
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
