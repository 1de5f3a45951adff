"""Graphs with a cache against the model without one, token after token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aimet_ext.artifact.kv.run import QDQ, CacheFiles
from aimet_ext.core.objective import outputs_sqnr
from aimet_ext.errors import MissingExtraError, require
from aimet_ext.models.huggingface import prepare_model
from aimet_ext.models.kv_cache import CachedCausalLM
from aimet_ext.sim.protocol import adapt

if TYPE_CHECKING:
    from aimet_ext.artifact.hand_off import HandOff

# Largest deviation of onnxruntime from the float model, relative to its largest logit.
_TOLERANCE = 1e-4
# dB; with a cache of its own width the difference is that of another quantization, and no fault.
_SAME_NUMBERS = 40.0


def check_float(files: CacheFiles, model: CachedCausalLM, sim: Any) -> dict[str, Any]:
    """Run a text through the float graphs and through the float model; results for the manifest.

    :param model: Model that the graphs were traced from, at present the model of ``sim``.
    :raises RuntimeError: they differ.
    """
    runtime: Any
    try:
        runtime = require("onnxruntime", "onnx")
    except MissingExtraError:
        return {"onnxruntime": "not installed"}
    context = files.shape.context_length
    prompt = _prompt(files)
    length = min(prompt + 4, context)
    ids = ((torch.arange(length) * 37 + 3) % model.config.get_text_config().vocab_size)[None]
    found = files.in_onnxruntime().logits(ids, prompt)
    plain = prepare_model(model.model, mask_value=files.mask_value)
    device = next(model.parameters()).device
    with adapt(sim).disabled_quantizers():
        expected: Tensor = plain(ids.to(device)).cpu()
    deviation = float((found - expected).abs().max() / expected.abs().max())
    if not deviation <= _TOLERANCE:
        raise RuntimeError(
            f"{', '.join(files.lengths)} in onnxruntime, token after token, must agree with the "
            f"float model to {_TOLERANCE} of its largest output, but deviate by {deviation:.3g}"
        )
    return {
        "onnxruntime": runtime.__version__,
        "onnxruntime_relative_deviation": deviation,
        "tokens": length,
    }


def check_quantized(
    files: CacheFiles, reference: HandOff, kv_bitwidth: int | None
) -> dict[str, Any]:
    """Run a text through the quantized graphs and the simulation without a cache, both integers.

    :raises RuntimeError: they differ, and not because the cache has a width of its own.
    """
    feed = dict(reference.sample)
    if "attention_mask" in feed:
        feed["attention_mask"] = feed["attention_mask"] * 0 + 1  # all tokens are real
    expected = torch.from_numpy(reference.sim.session.run(None, feed)[0])[:1]
    ids = torch.from_numpy(feed["input_ids"])[:1, : files.shape.context_length]
    expected = expected[:, : ids.shape[1]]
    found = files.in_onnxruntime(QDQ).logits(ids, min(_prompt(files), ids.shape[1]))
    sqnr = outputs_sqnr([found], [expected])
    if kv_bitwidth is None and not sqnr >= _SAME_NUMBERS:
        raise RuntimeError(
            f"{', '.join(files.lengths)}, quantized, must compute what the simulation without a "
            f"cache does, at least {_SAME_NUMBERS} dB, but they reach {sqnr:.1f} dB"
        )
    return {
        "quantized_sqnr_db": sqnr,
        "quantized_tokens": ids.shape[1],
        "hand_off_sqnr_db": reference.same_numbers,
    }


def _prompt(files: CacheFiles) -> int:
    """Return the length of a prompt: some calls, the last one not full where there is room."""
    longest, context = max(files.lengths.values()), files.shape.context_length
    return longest + longest // 2 if context >= 2 * longest else longest
