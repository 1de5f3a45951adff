"""Files of a torch sim's own state: weights, config and tokenizer as transformers reads them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Json
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aimet_ext.files.folders import CONFIG, QUANTIZERS, WEIGHTS, read_json, write_json
from aimet_ext.files.tensors import read_sealed, write_sealed
from aimet_ext.models.huggingface import causal_lm, original_name
from aimet_ext.sim.protocol import adapt
from aimet_ext.sim.torch.adaptor import TorchSim
from aimet_ext.sim.torch.state import load_quantizers, quantizers_to_tensors

_SCHEMA = "aimet_ext.quantizers/1"

_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def write_model(
    folder: Path, model: nn.Module, state: Mapping[str, Tensor], tokenizer: Any = None
) -> dict[str, Any]:
    """Write weights in float32 and, of a causal LM of transformers, its config and tokenizer.

    :param model: ``sim.model``.
    :param state: Float values by name in the model.
    :param tokenizer: written if given; else the files of the folder the model came from.
    :returns: the names that share a tensor with another one (``"tied"``), where the tokenizer
        came from, and whether transformers can load the folder.
    """
    folder.mkdir(exist_ok=True)
    named = {original_name(name, model): value for name, value in state.items()}
    stored: dict[str, Tensor] = {}
    first: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    for name, value in named.items():
        key = (value.data_ptr(), value.shape, value.stride())
        if value.numel() and first.setdefault(key, name) != name:
            tied[name] = first[key]
        else:
            wide = value.float() if value.is_floating_point() else value
            stored[name] = wide.cpu().contiguous()
    save_file(stored, folder / WEIGHTS, {"format": "pt"})

    language_model = causal_lm(model)
    loadable = False
    if language_model is not None:
        loadable = _write_config(folder, language_model, bool(tied))
    return {
        "tied": tied,
        "tokenizer": _write_tokenizer(folder, language_model, tokenizer),
        "loads_in_transformers": loadable,
    }


class _Fields(BaseModel):
    """Fields of ``quantizers.safetensors``: quantizers by name, and names of buffers."""

    quantizers: Json[dict[str, dict[str, Any]]]
    buffers: Json[list[str]]


def write_quantizers(folder: Path, adaptor: TorchSim) -> None:
    """Write ranges and state of every quantizer, and the buffers that checkpoints lack."""
    tensors, described = quantizers_to_tensors(adaptor.sim)
    buffers = adaptor.passing_buffers()
    fields = {"quantizers": described, "buffers": sorted(buffers)}
    write_sealed(folder / QUANTIZERS, _SCHEMA, {**tensors, **buffers}, fields)


def read_quantizers(folder: Path) -> tuple[dict[str, Tensor], _Fields]:
    """Read what :func:`write_quantizers` wrote.

    :raises CorruptFileError: the file was changed, cut short, or was not written by aimet_ext.
    """
    return read_sealed(folder / QUANTIZERS, _SCHEMA, _Fields)


def load_state(folder: Path, sim: Any, tied: Mapping[str, str]) -> None:
    """Put weights, quantizers and buffers of an export into a sim of the same model.

    :raises ValueError: a name or a shape differs; all such are named.
    """
    tensors, fields = read_quantizers(folder)
    _load_weights(folder, sim, tied)
    load_quantizers(sim, tensors, fields.quantizers)
    buffers = dict(sim.model.named_buffers())
    for name in buffers.keys() & fields.buffers:
        buffers[name].data = tensors[name].to(buffers[name].device)


def _load_weights(folder: Path, sim: Any, tied: Mapping[str, str]) -> None:
    """Copy the weights of an export into a sim of the same model, all of them and no others.

    :raises ValueError: a name or a shape differs; all such are named and nothing is copied.
    """
    stored = load_file(folder / WEIGHTS)
    state = {
        original_name(name, sim.model): value for name, value in adapt(sim).float_state().items()
    }
    sources = {name: tied.get(name, name) for name in state}
    faults = [f"{name} is missing" for name, source in sources.items() if source not in stored]
    faults += [f"{name} is not in the model" for name in stored.keys() - set(sources.values())]
    faults += [
        f"{name} has shape {tuple(stored[source].shape)} instead of {tuple(state[name].shape)}"
        for name, source in sources.items()
        if source in stored and stored[source].shape != state[name].shape
    ]
    if faults:
        raise ValueError(
            f"{folder}: weights of the sim's own model are required, but {'; '.join(faults[:5])}"
        )
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(stored[sources[name]])


def _write_config(folder: Path, model: Any, any_tied: bool) -> bool:
    """Write ``config.json`` as the weights are now; False if no config can say how they are."""
    config = copy.deepcopy(model.config)
    config.save_pretrained(folder)
    plain = read_json(folder / CONFIG)
    plain.pop("torch_dtype", None)
    plain.update(
        dtype="float32",
        architectures=plain.get("architectures") or [type(model).__name__],
        tie_word_embeddings=any_tied,
    )
    widths = _inner_widths(model)
    if len(widths) == 1:
        plain["intermediate_size"] = widths.pop()
    write_json(folder / CONFIG, plain)
    return len(widths) == 0


def _inner_widths(model: nn.Module) -> set[int]:
    """Return inner widths of the MLPs, which padding may have changed."""
    return {
        module.in_features
        for name, module in model.named_modules()
        if name.endswith("mlp.down_proj") and isinstance(module, nn.Linear)
    }


def _write_tokenizer(folder: Path, model: Any, tokenizer: Any) -> str | None:
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        return "argument"
    source = Path(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    if not source.name or not source.is_dir():
        return None
    files = [source / name for name in _TOKENIZER_FILES if (source / name).is_file()]
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return "copied" if files else None
