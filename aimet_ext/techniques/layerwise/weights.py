"""The loop of techniques that decide from weights alone: that over layers, without data.

For lack of moments every input counts alike and by itself: ``H`` is the identity, and the error of
an output row is that of its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from aimet_ext.config import WeightParams
from aimet_ext.core.affine import fake_quantize
from aimet_ext.core.objective import SecondMoment
from aimet_ext.sim.protocol import WeightQuantizer
from aimet_ext.techniques.call import Call
from aimet_ext.techniques.layer_report import WeightReport, WeightsReport
from aimet_ext.techniques.layerwise.deploy import Decision, Outcome, Problem
from aimet_ext.techniques.layerwise.evidence import Seen
from aimet_ext.techniques.layerwise.loop import LayerwiseRun, Solver, run_on_layers
from aimet_ext.techniques.report import UnitReport
from aimet_ext.walk.walk import Stage

P = TypeVar("P", bound=WeightParams)


def run_on_weights(
    call: Call[P], solver_class: type[Solver[P]], *, objective: str = "none"
) -> WeightsReport:
    """Apply a technique that needs no data to a simulation, or leave it as it was.

    :param objective: Quantity that is minimised, in words.
    """

    def report(layers: list[Any], *, cost: Any, **common: Any) -> WeightsReport:
        return WeightsReport(layers=tuple(layers), objective=objective, **common)

    return run_on_layers(call, solver_class, WeightRun, report)


class WeightRun(LayerwiseRun):
    """The run over a simulation's layers, one by one in the model's order."""

    report_class: ClassVar[type[UnitReport]] = WeightReport

    _steps: dict[str, float]  # of the grids of inputs, by layer; biases have to fit int32

    def _input_steps(self) -> int:
        return 1  # the moment's peak is that of the input's grid

    def _batches(self, dataloader: Any) -> Sequence[Any]:
        return ()

    def _data(self, batches: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def _walk(self, batches: Sequence[Any]) -> Any:
        # Read now: later on the quantizers are off.
        layers = self.adaptor.lint_facts().layers if self.adaptor.activation_bits() else ()
        self._steps = {each.name: each.reads.step for each in layers if each.reads is not None}
        return _Layers(list(self.quantizers))

    def _gather(self, stage: Stage) -> Seen:
        (layer,) = stage.layers
        weight = self.quantizers[layer].weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        device = self.options.device or weight.device
        alike = torch.ones(weight[0].numel(), dtype=dtype, device=device)
        return Seen(SecondMoment(alike, None, 0, self._steps.get(layer, 0.0)))

    def _without_tokens(self, problem: Problem) -> Decision:
        decision: Decision = self.solver.decide(problem)
        return decision

    def _report(
        self, problem: Problem, quantizer: WeightQuantizer, outcome: Outcome, seen: Seen
    ) -> UnitReport:
        nearest = fake_quantize(problem.stored, problem.nearest_grid())
        deployed = quantizer.weight.detach().flatten(1).to(nearest.device)
        return WeightReport(
            name=problem.name,
            spec=str(quantizer.spec().granularity),
            bitwidth=quantizer.bitwidth,
            loss_nearest=outcome.nearest,
            loss_after=outcome.after,
            signal=outcome.signal,
            noise_nearest=float(problem.errors(nearest)[0].sum(dtype=torch.float64)),
            noise=float(problem.errors(deployed)[0].sum(dtype=torch.float64)),
            rows_nearest=outcome.rows_nearest,
            rows=len(problem.weight),
            seconds=0.0,
        )


class _Layers:
    """A walk that brings nothing to the layers: each is a stage."""

    cost: ClassVar[dict[str, Any]] = {}

    def __init__(self, layers: Sequence[str]) -> None:
        self._layers = layers

    def stages(self) -> Iterator[Stage]:
        for layer in self._layers:
            yield Stage((layer,), {}, lambda: iter(()))

    def hold(self, layer: str) -> None:
        pass

    def decide(self, layer: str, weight: Tensor) -> None:
        pass

    def close(self) -> None:
        pass
