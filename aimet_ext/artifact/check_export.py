"""A check that torch's exporter can write a model, made before the work of quantizing it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from aimet_ext.errors import require
from aimet_ext.models.huggingface import PreparedCausalLM, causal_lm, prepare_model

# Tokens of a sample of ids that suffice: a graph has the same operators for any length.
_TOKENS = 8


def check_export(model_or_sim: Any, dummy_input: Any, *, opset_version: int | None = None) -> None:
    """Find out in seconds whether :func:`aimet_ext.export` can write a model as ONNX.

    The float model is traced and each of its operators written, as the export does it at the end;
    nothing is written to disk and no weights are copied. Call it before techniques that take hours.

    :param model_or_sim: Causal LM of transformers, another module, or a torch simulation, whose
        quantizers may be without ranges. There is nothing to find out for an ONNX simulation.
    :param dummy_input: As for :func:`aimet_ext.export`; of ids alone, ``[batch, seq]``, a few are
        used.
    :param opset_version: Opset of the ONNX file, 17 by default.
    :raises RuntimeError: the exporter cannot write the model; the message names the operator.

    >>> aimet_ext.check_export(model, batches[0])
    """
    require("onnx", "onnx")
    if isinstance(model_or_sim, nn.Module):
        module = model_or_sim
        if hasattr(module, "get_output_embeddings"):
            module = prepare_model(module, mask_value=-100.0)
        _check(module, dummy_input, opset_version)
        return
    from aimet_ext.sim.protocol import adapt

    adaptor = adapt(model_or_sim)
    if adaptor.framework == "torch":
        with adaptor.disabled_quantizers(), adaptor.preserved_state():
            _check(adaptor.model, dummy_input, opset_version)


@contextmanager
def exporter_errors(model: nn.Module) -> Iterator[None]:
    """Say of an error of torch's exporter what it is about and what to do.

    :raises RuntimeError: in place of the exporter's own.
    """
    try:
        yield
    except (RuntimeError, AssertionError, TypeError, ValueError, IndexError, KeyError) as error:
        what = next(iter(str(error).splitlines()), type(error).__name__)
        raise RuntimeError(
            f"torch's exporter cannot write the model: {what}{_advice(model, str(error))}"
        ) from error


def _check(module: nn.Module, dummy_input: Any, opset_version: int | None) -> None:
    from aimet_ext.artifact.inputs import positional_inputs
    from aimet_ext.onnx.apart import WeightsApart
    from aimet_ext.sim.torch.graph import try_graph

    inputs = positional_inputs(module, dummy_input)
    args = inputs.args
    if isinstance(module, PreparedCausalLM):
        args = tuple(ids[:1, :_TOKENS] for ids in inputs.tensors.values())
    with exporter_errors(module):
        try_graph(module, args, WeightsApart(), opset_version or 17)


def _advice(model: nn.Module, message: str) -> str:
    """Return what to do about an error, for its message."""
    prepared = any(isinstance(m, PreparedCausalLM) for m in model.modules())
    if causal_lm(model) is not None and not prepared:
        return (
            "; for a model of transformers build the simulation with create_sim, or around "
            "prepare_model(model), which leaves out the library's own masks"
        )
    operator = re.search(r"operator '([\w:]+)'", message)
    if operator is None:
        return ""
    return (
        f"; let the model compute without {operator[1]}, by operators that ONNX has, or register a "
        "way to write it with torch.onnx.register_custom_op_symbolic"
    )
