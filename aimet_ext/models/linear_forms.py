"""Linear layers of other classes than ``nn.Linear``, such as GPT-2's ``Conv1D``."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.models.proof import BOUNDS, Float64Casts

# On layers whose weight the checkpoint holds as [in, out]; a copy of the layer has it too.
_TRANSPOSED = "transposed_in_checkpoint"


def find_linears(model: nn.Module, known: Callable[[nn.Module], bool]) -> dict[str, nn.Linear]:
    """Return a linear layer for each module that computes ``x @ weight + bias``, by name.

    A module without children is taken for one if it holds a matrix and at most a bias beside it,
    and computes the same as the ``nn.Linear`` on random inputs, in float64. Its weight may be
    ``[in, out]``, as in transformers' ``Conv1D``, or ``[out, in]``.

    :param known: Returns True for a module that is to stay, as its class is quantized already.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {
        name: linear
        for name, module in model.named_modules()
        if name and not known(module) and (linear := _linear_of(module, uses)) is not None
    }


def is_transposed(module: nn.Module) -> bool:
    """Return True for a layer of :func:`find_linears` whose checkpoint has ``[in, out]``."""
    return getattr(module, _TRANSPOSED, False)


@torch.no_grad()
def _linear_of(module: nn.Module, uses: Mapping[int, int]) -> nn.Linear | None:
    """Return a linear layer that computes the same as a module, None if there is none."""
    parameters = dict(module.named_parameters())
    weight: Any = parameters.get("weight")
    bias = parameters.get("bias")
    if (
        isinstance(module, nn.Linear | nn.Embedding)
        or any(True for _ in (*module.children(), *module.buffers()))
        or weight is None
        or weight.dim() != 2
        or not weight.is_floating_point()
        or parameters.keys() - {"weight", "bias"}
        or any(uses[id(value)] > 1 for value in parameters.values())
    ):
        return None
    for transposed in (True, False):
        matrix = weight.T if transposed else weight
        if bias is not None and bias.shape != matrix.shape[:1]:
            continue
        if _computes(module, matrix, bias):
            with torch.device("meta"):
                linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias is not None)
            linear.weight = _parameter(weight, matrix)
            if bias is not None:
                linear.bias = _parameter(bias, bias)
            setattr(linear, _TRANSPOSED, transposed)
            return linear.train(module.training)
    return None


def _computes(module: nn.Module, matrix: Tensor, bias: Tensor | None) -> bool:
    """Return True if a module applies a matrix ``[out, in]`` and a bias, told from its outputs."""
    wide = copy.deepcopy(module).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, matrix.shape[1], dtype=torch.float64, generator=generator)
    x = x.to(matrix.device)
    try:
        with Float64Casts():
            output = wide(x)
    except Exception:  # noqa: BLE001  (whatever it takes, it is no input of a linear layer)
        return False
    own = None if bias is None else bias.double()
    expected = nn.functional.linear(x, matrix.double(), own)
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    bound = BOUNDS[torch.float64] * float(expected.abs().max())
    return bool((output - expected).abs().max() <= bound)


def _parameter(like: Tensor, values: Tensor) -> nn.Parameter:
    values = values.clone(memory_format=torch.contiguous_format)
    return nn.Parameter(values, requires_grad=like.requires_grad)
