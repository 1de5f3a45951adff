"""Methods of other libraries on a Hugging Face model, each called as its documentation says.

All take a model, which they may change, token ids ``[windows, length]``, the grid, and steps: names
of methods in order, with the settings of each. They return what computes with quantized weights.

They are no dependencies: ``pip install llmcompressor datasets auto-round`` beside this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from common import apply_aimet_omniquant, apply_seq_mse, call, quiet
from torch import Tensor, nn

import aimet_ext
from aimet_ext import LPBQ, Blockwise, QSpec

# Methods in order, with the settings of each.
Steps: TypeAlias = Sequence[tuple[str, Mapping[str, Any]]]

AIMET_STEPS = 800  # of a block: AIMET's OmniQuant and AdaScale take 800 and 1,500


@dataclass(frozen=True)
class Peer:
    """A library.

    :param modules: To import before anything is measured.
    :param apply: Function from model, windows, grid and steps to what is quantized.
    :param simulates: True if it is given a simulation in place of the model.
    """

    modules: tuple[str, ...]
    apply: Callable[[Any, Tensor, QSpec, Steps], Any]
    simulates: bool = False


def weights_sim(model: nn.Module, sample: Tensor, spec: QSpec) -> Any:
    """Return a simulation with the linear layers of the blocks quantized, and nothing else.

    :param sample: Ids to trace with, ``[1, seq]``.
    """
    with quiet():
        return aimet_ext.create_sim(
            model, sample, weights=spec, lm_head=None, embedding=None, activations=None
        )


def llm_compressor(model: nn.Module, windows: Tensor, spec: QSpec, steps: Steps) -> nn.Module:
    """Apply ``gptq`` or ``awq`` of llm-compressor."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier

    size = _group_size(spec)
    group: dict[str, Any] = {"strategy": "channel"}
    if size is not None:
        group = {"strategy": "group", "group_size": size}
    weights = QuantizationArgs(num_bits=spec.bitwidth, symmetric=spec.symmetric, **group)
    modifiers = [
        {"gptq": GPTQModifier, "awq": AWQModifier}[name](
            ignore=["lm_head"],
            config_groups={"linears": QuantizationScheme(targets=["Linear"], weights=weights)},
            **settings,
        )
        for name, settings in steps
    ]
    data = {
        "input_ids": windows.tolist(),
        "attention_mask": torch.ones_like(windows).tolist(),
    }
    with quiet(), _no_pinned_memory():
        oneshot(
            model=model,
            dataset=Dataset.from_dict(data),
            recipe=modifiers,
            max_seq_length=windows.shape[1],
            num_calibration_samples=len(windows),
            shuffle_calibration_samples=False,
        )
    return model


def auto_round(model: nn.Module, windows: Tensor, spec: QSpec, steps: Steps) -> nn.Module:
    """Apply ``signround`` of auto-round, whose setting ``iters`` is 200 if it is not given."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    [(name, settings)] = steps
    with quiet():
        found, _ = AutoRound(
            model,
            AutoTokenizer.from_pretrained(model.name_or_path),
            alg_configs=name,
            bits=spec.bitwidth,
            group_size=_group_size(spec) or -1,
            sym=spec.symmetric,
            dataset=list(windows.split(1)),
            nsamples=len(windows),
            seqlen=windows.shape[1],
            device_map="cpu",
            **settings,
        ).quantize()
    return found.float().eval()


def aimet(model_or_sim: Any, windows: Tensor, spec: QSpec, steps: Steps) -> Any:
    """Apply methods of AIMET to a simulation: ``seqmse``, ``adascale`` or ``omniquant``.

    ``spinquant``, which must be the first, is given the model, and makes the simulation.
    """
    batches, sim = list(windows.split(1)), model_or_sim
    for name, settings in steps:
        if name == "spinquant":
            from aimet_torch.spinquant import apply_spinquant

            head = model_or_sim.get_output_embeddings()  # it refuses tied ones
            head.weight = nn.Parameter(head.weight.detach().clone())
            model_or_sim.config.tie_word_embeddings = False
            with quiet():
                apply_spinquant(model_or_sim, **{"enable_r2": True, **settings})
            sim = weights_sim(model_or_sim, windows[:1, :64], spec)
        elif name == "seqmse":
            apply_seq_mse(sim, batches, **{"candidates": 20, **settings})
        elif name == "omniquant":
            apply_aimet_omniquant(sim, windows, **{"steps": AIMET_STEPS, **settings})
        elif name == "adascale":
            from aimet_torch.adascale import apply_adascale

            with quiet():
                apply_adascale(sim, batches, call, **{"num_iterations": AIMET_STEPS, **settings})
        else:
            raise ValueError(f"spinquant, seqmse, omniquant or adascale is required, got {name}")
    return sim


PEERS = {
    "llm-compressor": Peer(("llmcompressor", "datasets"), llm_compressor),
    "auto-round": Peer(("auto_round",), auto_round),
    "aimet": Peer(("aimet_torch",), aimet, simulates=True),
}


def _group_size(spec: QSpec) -> int | None:
    """Return the inputs that share a range, None where a row does.

    :raises ValueError: the grid is one that only AIMET has.
    """
    if isinstance(spec.granularity, LPBQ):
        raise ValueError("it has no LPBQ")  # noqa: TRY004 - of a class that is right for others
    return spec.granularity.block_size if isinstance(spec.granularity, Blockwise) else None


@contextmanager
def _no_pinned_memory() -> Iterator[None]:
    """Open a context in which memory is not pinned where there is no driver for that."""
    pinned = torch.Tensor.pin_memory
    try:
        if not torch.cuda.is_available():
            torch.Tensor.pin_memory = lambda tensor, *_, **__: tensor  # type: ignore[assignment]
        yield
    finally:
        torch.Tensor.pin_memory = pinned  # type: ignore[method-assign]
