"""Torch and ONNX layer by layer, where all layers before a layer are alike on both sides."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from methods import Effort, Stack, apply_stack
from onnx_models import module_name
from torch import Tensor

from aimet_ext.core.affine import fake_quantize
from aimet_ext.techniques.layerwise import loop as layerwise

__all__ = ["alike"]


def alike(
    sims: tuple[Any, Any],
    batches: tuple[Sequence[Any], Sequence[Any]],
    stack: Stack,
    effort: Effort,
) -> tuple[float, float]:
    """Share of rows decided alike, and the largest relative gap in loss of the others.

    Each side gathers evidence for itself. What the first one decided for a layer takes the place
    of what the second one did, once the two have been compared.

    :param sims: of torch and of ONNX, untouched; both are changed.
    """
    pairs = _Pairs()
    for side, sim, data in zip((pairs.note, pairs.compare), sims, batches, strict=True):
        torch.manual_seed(0)
        with mock.patch.object(layerwise, "deploy", side):
            apply_stack(sim, data, stack, effort)
    return pairs.equal / pairs.rows, pairs.gap


class _Decided(NamedTuple):
    """One layer of the first simulation, after a technique."""

    weight: Tensor
    scale: Tensor
    offset: Tensor | None
    values: Tensor  # [out, in], what the simulation computes with


class _Pairs:
    """Stands in for ``deploy``, for one simulation after the other."""

    def __init__(self) -> None:
        self.deploy = layerwise.deploy
        self.decided: dict[str, list[_Decided]] = {}  # by module; one for each technique
        self.rows = self.equal = 0
        self.gap = 0.0

    def note(self, problem: Any, quantizer: Any, decide: Any) -> Any:
        outcome = self.deploy(problem, quantizer, decide)
        offset = None if quantizer.layout.symmetric else quantizer.grid().offset
        weight = quantizer.weight.detach().clone()
        found = _Decided(weight, quantizer.free_grid().scale, offset, _values(quantizer))
        self.decided.setdefault(problem.name, []).append(found)
        return outcome

    def compare(self, problem: Any, quantizer: Any, decide: Any) -> Any:
        problem = dataclasses.replace(problem, weight=problem.weight.clone())
        outcome = self.deploy(problem, quantizer, decide)
        first = self.decided[module_name(problem.name)].pop(0)
        values = _values(quantizer)
        same = (values - first.values).abs().amax(1) <= 1e-6 * first.values.abs().amax(1)
        self.rows += len(same)
        self.equal += int(same.sum())
        if not same.all():
            losses = torch.stack([problem.errors(each) for each in (values, first.values)])
            gap = (losses[0] - losses[1]).abs() / losses.abs().amax(0)
            self.gap = max(self.gap, float(gap[~same].max()))
            quantizer.set_scale(first.scale, first.offset)
            quantizer.set_weight(first.weight)
        return outcome


def _values(quantizer: Any) -> Tensor:
    return fake_quantize(quantizer.weight.detach(), quantizer.grid()).flatten(1)
