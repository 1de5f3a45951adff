"""Matrices stacked in one parameter that a module multiplies by itself, as linear layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.data.batches import call_model, tensors_in
from aimet_ext.models.experts import BOUNDS
from aimet_ext.walk.hooks import evaluating, first_call
from aimet_ext.walk.routing import StackedLayers


def stacks(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters that may be stacks of matrices."""
    own = module.named_parameters(recurse=False)
    return [n for n, p in own if p.dim() == 3 and p.is_floating_point() and min(p.shape[1:]) > 1]


@torch.no_grad()
def show_stacks(model: nn.Module, names: list[str], dummy_input: Any) -> None:
    """Put linear layers in the places of stacks, where modules compute the same with them.

    A gate of RecurrentGemma is one: a matrix for each head, multiplied by ``torch.baddbmm``.

    :param model: Model, changed in place.
    :param names: Names of modules with :func:`stacks`.
    :param dummy_input: Input of the model, of which the modules' inputs come.
    """
    for name in names:
        module = model.get_submodule(name)
        with evaluating(model):
            call = first_call([module], partial(call_model, model, dummy_input))
        if call is None:
            continue
        with_layers = copy.deepcopy(module)
        for key in stacks(module):
            trial = copy.deepcopy(with_layers)
            _show(trial, key)
            if _alike(module, trial, *call):
                with_layers = trial
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, with_layers)


def _show(module: nn.Module, key: str) -> None:
    """Put layers in the place of a stack of a module."""
    matrices = module.get_parameter(key)
    layers = []
    for matrix in matrices.detach():
        width, outputs = matrix.shape
        layer = nn.Linear(width, outputs, bias=False, device="meta")
        layer.weight = nn.Parameter(matrix.T.contiguous(), matrices.requires_grad)
        layers.append(layer.train(module.training))
    delattr(module, key)
    setattr(module, key, StackedLayers(layers))


def _alike(module: nn.Module, trial: nn.Module, args: Any, kwargs: Any) -> bool:
    """Return True if a module computes on an input what another one does."""
    outputs: list[list[Tensor]] = []
    for each in (module, trial):
        run: Callable[..., Any] = copy.deepcopy(each)  # one may keep a state
        try:
            outputs.append(tensors_in(run(*args, **kwargs)))
        except Exception:  # noqa: BLE001  (whatever other code does with the parameter)
            return False
    return all(
        bool((one - two).abs().max() <= BOUNDS.get(one.dtype, 0.0) * one.abs().max())
        for one, two in zip(*outputs, strict=True)
    )
