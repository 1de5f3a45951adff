"""The export of a sim: a folder from which it can be rebuilt, and which other tools can read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from aimet_ext.errors import require, some
from aimet_ext.files.folders import (
    check_output,
    replace_folder,
    write_manifest,
)
from aimet_ext.files.ledger import Ledger, write_scales
from aimet_ext.files.tensors import hash_tensors
from aimet_ext.integrity.description import write_fingerprints
from aimet_ext.sim.protocol import adapt


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
) -> dict[str, Any]:
    """Write a sim to a folder: complete, read back and compared, or not at all.

    =========================================  =====================================================
    ``{prefix}.onnx``                          the model with its float32 weights as they are now
    ``{prefix}.encodings``                     encodings 1.0.0 of the ONNX file's tensors
    ``{prefix}.2.0.0.encodings``               the same as 2.0.0
    ``model.safetensors``, ``config.json``     the same weights under their original names, and the
                                               config: a model that transformers loads
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
    :param qdq: write the QDQ model; of ONNX sims, and done by default.
    :param external_data: write weights to ``{file}.data`` beside an ONNX file; None: if they are
        larger than a file may be; of ONNX sims.
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
            adaptor, filename_prefix, dummy_input, tokenizer, bias, qdq is not False, external_data
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
    with adaptor.preserved_state(), replace_folder(path) as folder:
        fields = writer.write(folder)
        write_scales(folder, ledger, rename=rename, aimet_keys=aimet_keys)
        ledger.save(folder)
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
