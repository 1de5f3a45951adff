"""Methods of other libraries on a Hugging Face model, each called as its documentation says.

They are no dependencies: ``pip install llmcompressor datasets`` beside this package.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from common import quiet
from torch import Tensor, nn

from aimet_ext import Blockwise, QSpec


def llm_compressor(method: str, model: nn.Module, windows: Tensor, spec: QSpec) -> nn.Module:
    """Return a copy of a model quantized by llm-compressor, its weights as they are computed with.

    :param method: ``"gptq"`` or ``"awq"``.
    :param windows: token ids ``[windows, length]``.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier

    group: dict[str, Any] = {"strategy": "channel"}
    if isinstance(spec.granularity, Blockwise):
        group = {"strategy": "group", "group_size": spec.granularity.block_size}
    weights = QuantizationArgs(num_bits=spec.bitwidth, symmetric=spec.symmetric, **group)
    modifier = {"gptq": GPTQModifier, "awq": AWQModifier}[method](
        ignore=["lm_head"],
        config_groups={"linears": QuantizationScheme(targets=["Linear"], weights=weights)},
    )
    data = {
        "input_ids": windows.tolist(),
        "attention_mask": torch.ones_like(windows).tolist(),
    }
    own, pinned = copy.deepcopy(model), torch.Tensor.pin_memory
    try:
        if not torch.cuda.is_available():  # it pins memory, which needs a driver
            torch.Tensor.pin_memory = lambda tensor, *_, **__: tensor  # type: ignore[assignment]
        with quiet():
            oneshot(
                model=own,
                dataset=Dataset.from_dict(data),
                recipe=[modifier],
                max_seq_length=windows.shape[1],
                num_calibration_samples=len(windows),
                shuffle_calibration_samples=False,
            )
    finally:
        torch.Tensor.pin_memory = pinned  # type: ignore[method-assign]
    return own
