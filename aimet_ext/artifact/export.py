"""A sim as a folder that other tools can read, and the way back; the state of a torch sim there."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Json
from safetensors.torch import save_file
from torch import Tensor, nn

from aimet_ext.core.collector import no_collections
from aimet_ext.errors import require, some
from aimet_ext.files.folders import check_output, replace_folder, write_json
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.manifest import (
    CONFIG,
    QUANTIZERS,
    SETTINGS,
    WEIGHTS,
    read_export,
    write_manifest,
)
from aimet_ext.files.numbers import quantizer_faults, refuse_faults
from aimet_ext.files.reading import TensorFile, naming, read_json
from aimet_ext.files.scales import check_aimet_keys, write_scales
from aimet_ext.files.tensors import hash_tensors, read_sealed, write_sealed
from aimet_ext.integrity.description import write_fingerprints
from aimet_ext.progress import step, steps
from aimet_ext.sim.protocol import adapt

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


def export(
    sim: Any,
    path: str | Path,
    filename_prefix: str,
    dummy_input: Any,
    *,
    tokenizer: Any = None,
    hf_checkpoint: bool = False,
    aimet_keys: bool = False,
    opset_version: int | None = None,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    bias: Literal["float", "int32"] = "float",
    qdq: bool | None = None,
    external_data: bool | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a sim to a folder: complete, read back and compared, or not at all.

    =========================================  =====================================================
    ``{prefix}.onnx``                          the model with its float32 weights as they are now
    ``{prefix}.encodings``                     encodings 1.0.0 of the ONNX file's tensors
    ``{prefix}.2.0.0.encodings``               the same as 2.0.0
    ``model.safetensors``, ``config.json``     the same weights under their original names (float64
                                               stays so), and the config: a model that transformers
                                               loads
    tokenizer files                            where there is a tokenizer
    ``quantizers.safetensors``                 ranges and state of every quantizer
    ``quantsim.json``                          what :func:`aimet_ext.create_sim` was called with
    ``scales.safetensors``                     what the weights were multiplied by, cumulated; see
                                               :func:`aimet_ext.load_scales`
    ``ledger.safetensors``                     the same, technique by technique
    ``checkpoint/``                            if ``hf_checkpoint``: weights that *are* their
                                               quantized values, for transformers
    ``fingerprints.json``                      a hash of each tensor, encoding, quantizer and node
    ``manifest.json``                          hashes, versions, settings, results of the checks
    =========================================  =====================================================

    Before the folder is put in place, the weights of the ONNX file are quantized by each of the
    encodings files and compared with the sim bit by bit, and the ONNX file is run and compared
    with the float model, if onnxruntime is installed. The sim is left as it was.

    Of an ``aimet_onnx`` sim the folder holds ``{prefix}.onnx`` with the float weights, the two
    encodings files, ``{prefix}.qdq.onnx`` with weights as integers, and the files of scales,
    ledger, quantizers and settings. Both encodings files and the QDQ model are loaded into new
    simulations by AIMET's own readers: quantized weights must be equal bit by bit, and outputs on
    ``dummy_input`` agree; the QDQ model is run in onnxruntime too. Weights of a width that ONNX
    has no type for travel in the next wider one, 3 bits as the integers -4 … 3 of an int4, and lie
    on their grid in the ONNX file; :func:`aimet_ext.load` puts the float ones back.

    :param sim: made by ``create_sim`` or by hand, with ranges in all its quantizers.
    :param path: folder; one written by aimet_ext is replaced in one step, one with other files is
        refused.
    :param filename_prefix: name of the ONNX and encodings files.
    :param dummy_input: input to trace with: ids ``[batch, seq]``, a tuple of positional arguments
        or a mapping of keyword arguments. Its shapes are those of the ONNX file. For an ONNX sim,
        one batch of its inputs, by name or in order.
    :param tokenizer: saved with the model; by default the files of the folder the model was
        loaded from are copied.
    :param hf_checkpoint: write ``checkpoint/`` as well.
    :param aimet_keys: write AIMET's file of ``.prev`` and ``.foll`` scales as well.
    :param opset_version: opset of the ONNX file, 17 by default; for torch sims.
    :param dynamic_axes: axes that stay free, as for ``torch.onnx.export``, for example
        ``{"input_ids": {0: "batch", 1: "length"}}``; of torch sims.
    :param bias: ``"int32"`` gives each bias of a quantized layer an encoding of 32 bits, with the
        scale of the input times that of the weight, as some targets need; of ONNX sims.
    :param qdq: write the QDQ model, of ONNX sims. None, the default: unless it cannot hold the
        sim's grids or computes something else, which is logged and noted in the manifest.
    :param external_data: write weights to ``{file}.data`` beside an ONNX file; None: if they are
        larger than a file may be; of ONNX sims.
    :param progress: show a progress bar.
    :returns: the manifest.
    :raises FileExistsError: a file, or a folder not written by aimet_ext, is there.
    :raises PermissionError: nothing can be written there.
    :raises ValueError: a quantizer has no range, the prefix is no file name, an argument is for
        sims of the other kind, or what was asked for cannot be written, with the tensors' names.
    :raises RuntimeError: what was written differs from the sim; nothing is left behind.

    >>> aimet_ext.export(sim, "llama-w4", "llama", batches[0])
    """
    adaptor = adapt(sim)
    require("onnx", "onnx")
    if filename_prefix in ("", "..") or Path(filename_prefix).name != filename_prefix:
        raise ValueError(f"filename_prefix must be a plain file name, got {filename_prefix!r}")
    check_output(path)
    if adaptor.framework == "onnx":
        from aimet_ext.artifact.onnx_export import OnnxWriter

        kept = {"opset_version": opset_version, "dynamic_axes": dynamic_axes}
        _refuse("an ONNX", {"hf_checkpoint": hf_checkpoint or None, **kept})
        writer: Any = OnnxWriter(
            adaptor, filename_prefix, dummy_input, tokenizer, bias, qdq, external_data
        )
    else:
        asked = {"bias": bias if bias != "float" else None, "qdq": qdq or None}
        _refuse("a torch", {**asked, "external_data": external_data or None})
        options = {"opset_version": opset_version or 17, "dynamic_axes": dynamic_axes}
        from aimet_ext.artifact.torch_export import TorchWriter

        writer = TorchWriter(sim, filename_prefix, dummy_input, tokenizer, hf_checkpoint, options)

    if empty := writer.without_range:
        raise ValueError(
            f"every quantizer needs a range before export, but {some(empty, 3)} "
            f"{'have' if len(empty) > 1 else 'has'} none; run sim.compute_encodings first"
        )

    def rename(name: str) -> str:
        return name.removeprefix(writer.name_prefix)

    state = adaptor.float_state()
    ledger = adaptor.ledger or Ledger(hash_tensors((rename(n), state[n]) for n in sorted(state)))
    if aimet_keys:
        check_aimet_keys(ledger)
    shown = steps("export", 5, progress)
    with shown, adaptor.preserved_state(), replace_folder(path) as folder:
        fields = writer.write(folder)
        write_scales(folder, ledger, rename=rename, aimet_keys=aimet_keys)
        ledger.save(folder)
        step("hashes")
        return write_manifest(
            folder,
            "export",
            prefix=filename_prefix,
            settings=adaptor.settings,
            techniques=ledger.described_runs,
            origin=ledger.origin,
            seeds={"torch": torch.initial_seed()},
            **fields,
            **write_fingerprints(folder, filename_prefix, fields.get("onnx_names", {})),
        )


def _refuse(kind: str, options: Mapping[str, Any]) -> None:
    given = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)} cannot be used with {kind} sim; leave it out, or export a sim of "
            "the other kind"
        )


@no_collections()
def load(path: str | Path, *, sim: Any = None, progress: bool = True) -> Any:
    """Rebuild a sim from an export; its logits are those of the sim that was exported, bit by bit.

    The folder alone is enough for a sim that ``create_sim`` made of a model of transformers, and
    for an ONNX sim. Only JSON, safetensors and ONNX files are read, after every file was compared
    with its hash.

    :param path: folder that :func:`aimet_ext.export` wrote.
    :param sim: a sim of the same model, into which weights and quantizers are put; needed for one
        that was built by hand of a torch module. An ONNX sim that is rebuilt computes on the CPU,
        and of its configuration only what shapes its graph and quantizers is known.
    :param progress: show a progress bar.
    :returns: the sim, in evaluation mode, with its ledger.
    :raises FileNotFoundError: there is no export at ``path``.
    :raises CorruptFileError: a file was changed, is absent, was not written by aimet_ext, or holds
        what no sim can be made of.
    :raises ValueError: the sim was built by hand and none is given, or the one given does not fit.
    """
    with steps("load", 3, progress):
        return _load(Path(path), sim)


def _load(folder: Path, sim: Any) -> Any:
    step("hashes")
    manifest = read_export(folder)
    settings = read_json(folder / SETTINGS, _Settings)
    of_onnx = manifest.get("framework") == "onnx"
    if sim is None and not of_onnx and settings.create_sim is None:
        raise ValueError(
            f"{folder} holds a sim that was built by hand, so how to build it is not known; "
            "build it again and pass it as load(path, sim=sim)"
        )
    # A sim of the caller's may be one of another model; all else is wrong with the files.
    step("simulation")
    with naming(folder, *([] if sim is None else [ValueError])):
        if of_onnx:
            from aimet_ext.artifact.onnx_export import load_onnx

            sim = load_onnx(folder, manifest["prefix"], sim)
            adapt(sim).settings = settings.create_sim
        else:
            sim = _rebuild(folder, settings, manifest) if sim is None else sim
            step("weights and ranges")
            _load_state(folder, sim, manifest["model"]["tied"])
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
    dtype: Literal["", "float16", "bfloat16", "float32", "float64"] = ""


def _rebuild(folder: Path, settings: _Settings, manifest: dict[str, Any]) -> Any:
    """Return a sim of the same structure; its ranges are still to be loaded."""
    from aimet_ext.grids.create import arguments_from_settings, create_sim
    from aimet_ext.models.huggingface import prepare_model

    assert settings.create_sim is not None
    model = _model(folder, settings, manifest["model"]["loads_in_transformers"])
    sample = torch.arange(8)[None] % model.config.get_text_config().vocab_size  # [1, 8]
    module = prepare_model(model, mask_value=settings.create_sim.get("mask_value"))
    arguments = arguments_from_settings(settings.create_sim)
    sim = create_sim(module, sample, **arguments, in_place=True)
    adapt(sim).settings = settings.create_sim
    return sim


def _model(folder: Path, settings: _Settings, loadable: bool) -> Any:
    """Return the model of an export; without weights if its config cannot say its widths."""
    transformers = require("transformers", "torch")
    from aimet_ext.models.folders import read_causal_lm, read_config

    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype)}
    if settings.attention is not None:
        options["attn_implementation"] = settings.attention
    if loadable:
        return read_causal_lm(folder, **options)
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(read_config(folder), **options)
    return model.eval()


def write_model(
    folder: Path, model: nn.Module, state: Mapping[str, Tensor], tokenizer: Any = None
) -> dict[str, Any]:
    """Write weights and, of a causal LM of transformers, its config and tokenizer.

    Weights are in float32, or in float64 if they are so in the model.

    :param model: ``sim.model``.
    :param state: Float values by name in the model.
    :param tokenizer: written if given; else the files of the folder the model came from.
    :returns: the names that share a tensor with another one (``"tied"``), where the tokenizer
        came from, and whether transformers can load the folder.
    """
    from aimet_ext.models.hidden import packed
    from aimet_ext.models.huggingface import causal_lm, original_name

    folder.mkdir(exist_ok=True)
    named = packed(model, {original_name(name, model): value for name, value in state.items()})
    stored: dict[str, Tensor] = {}
    used: set[int] = set()
    first: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    for name, value in named.items():
        key = (value.data_ptr(), value.shape, value.stride())
        if value.numel() and first.setdefault(key, name) != name:
            tied[name] = first[key]
        else:
            if value.is_floating_point():
                value = value.to(torch.promote_types(value.dtype, torch.float32))
            flat = value.cpu().contiguous()
            memory = flat.untyped_storage().data_ptr()
            stored[name] = flat.clone() if memory in used else flat  # safetensors takes no views
            used.add(memory)
    save_file(stored, folder / WEIGHTS, {"format": "pt"})

    language_model = causal_lm(model)
    loadable = False
    if language_model is not None:
        wide = any(value.dtype is torch.float64 for value in stored.values())
        dtype = "float64" if wide else "float32"
        loadable = _write_config(folder, language_model, bool(tied), dtype)
    return {
        "tied": tied,
        "tokenizer": _write_tokenizer(folder, language_model, tokenizer),
        "loads_in_transformers": loadable,
    }


def _write_config(folder: Path, model: Any, any_tied: bool, dtype: str) -> bool:
    """Write ``config.json`` as the weights are now; False if no config can say how they are."""
    config = copy.deepcopy(model.config)
    config.save_pretrained(folder)
    plain = read_json(folder / CONFIG)
    plain.pop("torch_dtype", None)
    plain.update(
        dtype=dtype,
        architectures=plain.get("architectures") or [type(model).__name__],
        tie_word_embeddings=any_tied,
    )
    widths = {  # inner ones of the MLPs, which padding may have changed
        module.in_features
        for name, module in model.named_modules()
        if name.endswith("mlp.down_proj") and isinstance(module, nn.Linear)
    }
    if len(widths) == 1:
        plain["intermediate_size"] = widths.pop()
    write_json(folder / CONFIG, plain)
    return len(widths) == 0


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


class _Fields(BaseModel):
    """Fields of ``quantizers.safetensors``: quantizers by name, and names of buffers."""

    quantizers: Json[dict[str, dict[str, Any]]]
    buffers: Json[list[str]]


def write_quantizers(folder: Path, adaptor: Any) -> None:
    """Write ranges and state of every quantizer, and the buffers that checkpoints lack."""
    from aimet_ext.sim.torch.state import quantizers_to_tensors

    tensors, described = quantizers_to_tensors(adaptor.sim)
    buffers = adaptor.passing_buffers()
    fields = {"quantizers": described, "buffers": sorted(buffers)}
    write_sealed(folder / QUANTIZERS, _SCHEMA, {**tensors, **buffers}, fields)


def read_quantizers(folder: Path) -> tuple[dict[str, Tensor], _Fields]:
    """Read what :func:`write_quantizers` wrote.

    :raises CorruptFileError: the file was changed, cut short, or was not written by aimet_ext, or
        a range in it is none.
    """
    tensors, fields = read_sealed(folder / QUANTIZERS, _SCHEMA, _Fields)
    refuse_faults(folder / QUANTIZERS, quantizer_faults(tensors, fields.quantizers))
    return tensors, fields


def _load_state(folder: Path, sim: Any, tied: Mapping[str, str]) -> None:
    """Put weights, quantizers and buffers of an export into a sim of the same model.

    :raises ValueError: a name or a shape differs; all such are named.
    """
    from aimet_ext.sim.torch.state import load_quantizers

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
    from aimet_ext.models.hidden import Unpacked
    from aimet_ext.models.huggingface import original_name

    stored = Unpacked(sim.model, TensorFile(folder / WEIGHTS))
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
