"""A torch sim as two ONNX graphs with a cache, for prompts and for one token, of one encoding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aimet_ext.artifact.export import export, load
from aimet_ext.artifact.inputs import Inputs
from aimet_ext.artifact.kv.check import check_float, check_quantized
from aimet_ext.artifact.kv.run import KIND, QDQ, CacheFiles, share_weights
from aimet_ext.artifact.torch_export import float32_model, write_onnx
from aimet_ext.data.batches import iterate_batches, token_ids
from aimet_ext.files.folders import replace_folder
from aimet_ext.files.manifest import write_manifest
from aimet_ext.files.scratch import temporary
from aimet_ext.models.kv_cache import CachedCausalLM
from aimet_ext.sim.protocol import adapt

if TYPE_CHECKING:
    from aimet_ext.artifact.kv.quantize import Reference

PREFILL, DECODE, WEIGHTS = "prefill", "decode", "weights.data"
_MASK, _LOWEST_MASK = -100.0, -1e4
_CONFIG = "htp_v79"
_OPSET = 17


def export_with_cache(
    sim: Any,
    path: str | Path,
    *,
    prefill_length: int,
    context_length: int,
    dataloader: Any = None,
    kv_bitwidth: int | None = None,
    opset_version: int = _OPSET,
) -> dict[str, Any]:
    """Write a torch sim as two graphs that take a cache: one for prompts, one for a token.

    ====================================  ==========================================================
    ``prefill.onnx``, ``decode.onnx``     ``prefill_length`` tokens a call, and one
    ``*.encodings``                       encodings 1.0.0 of their tensors
    ``*.2.0.0.encodings``                 the same as 2.0.0
    ``*.qdq.onnx``                        with ``dataloader``: what an NPU's compiler takes
    ``weights.data``                      the weights of all ONNX files, equal ones once
    ``manifest.json``                     hashes, shapes of the cache, results of the checks
    ====================================  ==========================================================

    Both graphs have static shapes and share the cache, see :mod:`aimet_ext.models.kv_cache`:

    ==========================================  ====================================================
    ``input_ids``, ``position_ids``             ``[1, n]``
    ``attention_mask``                          ``[1, 1, n, context]``, added to the scores
    ``past_key_{i}``, ``past_value_{i}``        ``[1, heads, context - n, width]``
    ``logits``                                  ``[1, n, vocab]``
    ``present_key_{i}``, ``present_value_{i}``  ``[1, heads, n, width]``, of the new tokens alone
    ==========================================  ====================================================

    Weights and encodings of both are those of the sim's quantizers, which is checked bit by bit as
    in :func:`aimet_ext.export`; where onnxruntime is installed, a text is run through both, a part
    as a prompt and the rest token by token, and compared with the float model.

    :param sim: Simulation of a causal LM of transformers, made by ``create_sim`` or by hand around
        ``prepare_model``, with ranges in all its quantizers; or the folder of its export.
    :param path: Folder; an earlier export is replaced in one step, other files are refused.
    :param prefill_length: Tokens that the graph for prompts takes at once, at least 2.
    :param context_length: Tokens that a query sees at most, those of its own call included.
    :param dataloader: Batches of ids ``[batch, seq]``, all of one length, which calibrate what the
        sim leaves float and an NPU does not: scores, rotary embeddings, sums. That is done once, on
        the graph without a cache (see :func:`aimet_ext.artifact.hand_off.hand_off`), from which
        both graphs get their ranges tensor by tensor; a cache that comes in has the range of the
        keys and values that go out. Needs aimet-onnx.
    :param kv_bitwidth: Bits of the cache in the quantized graphs, 8 or 16; None: those of the keys
        and values.
    :param opset_version: Opset of the ONNX files.
    :returns: the manifest.
    :raises ValueError: lengths that do not fit the model, or layers that look back less far.
    :raises TypeError: no torch sim of a causal LM.
    :raises RuntimeError: what was written is not what the sim computes.
    """
    source = Path(sim) if isinstance(sim, str | Path) else None
    sim = sim if source is None else load(source)
    lengths = {PREFILL: prefill_length, DECODE: 1}
    _check_arguments(sim, prefill_length, context_length, dataloader, kv_bitwidth)
    with replace_folder(path) as folder:
        reference = None if dataloader is None else _hand_off(sim, source, dataloader)
        with _with_cache(sim, context_length) as model:
            files = CacheFiles(folder, lengths, model.shape, model.mask_value or _MASK)
            for name, length in lengths.items():
                _write_graph(sim, files, name, length, opset_version)
            if reference is not None:
                _write_quantized(sim, files, reference, kv_bitwidth)
            share_weights(sorted(folder.glob("*.onnx")), WEIGHTS)
            checks = check_float(files, model, sim)
        if reference is not None:
            checks |= check_quantized(files, reference.hand_off, kv_bitwidth)
        return write_manifest(
            folder,
            KIND,
            cache=files.shape.to_dict(),
            graphs=lengths,
            mask_value=files.mask_value,
            qdq=reference is not None,
            kv_bitwidth=kv_bitwidth,
            checks=checks,
        )


def _check_arguments(
    sim: Any, prefill_length: int, context_length: int, dataloader: Any, kv_bitwidth: int | None
) -> None:
    if adapt(sim).framework != "torch":
        raise TypeError(
            "graphs with a cache are traced from torch sims, got an ONNX sim; export the torch sim "
            "that its model was made of"
        )
    if not 2 <= prefill_length <= context_length:
        raise ValueError(
            f"prefill_length must be in 2 ... {context_length} (context_length), got "
            f"{prefill_length}"
        )
    if kv_bitwidth not in (None, 8, 16):
        raise ValueError(f"kv_bitwidth must be 8, 16 or None, got {kv_bitwidth!r}")
    if dataloader is None:
        if kv_bitwidth is not None:
            raise ValueError(
                "kv_bitwidth is for the quantized graphs, which need a dataloader; give both"
            )
        return
    mask_value = getattr(adapt(sim).model, "mask_value", None)
    if mask_value is not None and mask_value < _LOWEST_MASK:
        raise ValueError(
            "a model whose mask fits on a grid of 16 bits is required, but its mask_value is "
            f"{mask_value}; build the sim from prepare_model(model, mask_value=-100)"
        )


def _hand_off(sim: Any, source: Path | None, dataloader: Any) -> Reference:
    """Build the simulation without a cache, as an NPU computes it."""
    from aimet_ext.artifact.hand_off import hand_off
    from aimet_ext.artifact.kv.quantize import Reference

    if source is not None:
        return Reference.of(hand_off(source, dataloader, sim=sim))
    batches = list(iterate_batches(dataloader))
    ids = token_ids(batches[0])
    if ids is None:
        raise ValueError(f"batches of ids [batch, seq] are required, got {type(batches[0])}")
    with temporary() as place:
        folder = place / "plain"
        export(sim, folder, "plain", ids[:1])
        return Reference.of(hand_off(folder, batches, sim=sim))


@contextlib.contextmanager
def _with_cache(sim: Any, context_length: int) -> Iterator[CachedCausalLM]:
    """Open a context in which a sim's model, in float32, takes and returns a cache."""
    own = sim.model
    with float32_model(own), torch.no_grad():
        model = CachedCausalLM(own, context_length).train(own.training)
        sim.model = model
        try:
            yield model
        finally:
            sim.model = own


def _write_graph(sim: Any, files: CacheFiles, name: str, length: int, opset_version: int) -> None:
    device = next(sim.model.parameters()).device
    arguments = tuple(value.to(device) for value in files.feed(length).values())
    write_onnx(
        sim,
        files.folder,
        name,
        Inputs(arguments, files.shape.input_names(length)),
        opset_version=opset_version,
        dynamic_axes=None,
        output_names=files.shape.output_names(),
    )


def _write_quantized(
    sim: Any, files: CacheFiles, reference: Reference, kv_bitwidth: int | None
) -> None:
    from aimet_ext.artifact.hand_off import write_qdq
    from aimet_ext.artifact.kv.quantize import quantized_graph

    config = (adapt(sim).settings or {}).get("config_file") or _CONFIG
    for name in files.lengths:
        built = quantized_graph(files, name, reference, config_file=config, kv_bitwidth=kv_bitwidth)
        write_qdq(built, files.path(name, QDQ))
