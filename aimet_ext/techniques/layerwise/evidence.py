"""The evidence that layers are decided by: moments of what flows into them, with less noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.core.objective import POOLED_AN_INPUT, SecondMoment
from aimet_ext.data.moments import is_narrow, sum_moments
from aimet_ext.sim.protocol import WeightQuantizer
from aimet_ext.techniques.layerwise.deploy import SampleSum, UpstreamError
from aimet_ext.techniques.layerwise.token_weights import TokenWeights
from aimet_ext.techniques.pooled import pooled_moment
from aimet_ext.techniques.session import RunOptions
from aimet_ext.walk.experts import Pool
from aimet_ext.walk.order import Activation, uncalled
from aimet_ext.walk.walk import Stage


@dataclass(frozen=True, eq=False)
class Seen:
    """Evidence of a stage's input.

    :param moment: Second moment.
    :param storage: Place of it while it was summed, see
        :class:`~aimet_ext.techniques.layer_report.LayerReport`; empty without data.
    :param samples: Inputs of layers that a ReLU follows, where the technique asks for them.
    :param upstream: Mean cost of upstream errors by layer, for those that compensate them.
    :param expert: Number of the expert that the layers are of, None if they are of none.
    """

    moment: SecondMoment
    storage: str = ""
    samples: Mapping[str, SampleSum] = field(default_factory=dict)
    upstream: Mapping[str, float] = field(default_factory=dict)
    expert: int | None = None


@dataclass(kw_only=True, eq=False)
class Evidence:
    """The evidence of all stages, one after another.

    :param model: Model that the layers are in.
    :param quantizers: Weight quantizers of the layers, by full name.
    :param params: Settings of the technique.
    :param samples: Function from the ReLU behind a layer to a collector of its input, or to None.
    :param wide: True for moments in float64 on processors.
    :param believes: True to believe every token: nothing is shrunk, no expert leans on others.
    :param options: Options of the run.
    :param token_weights: Weights of the tokens, None if all count alike.
    """

    model: nn.Module
    quantizers: Mapping[str, WeightQuantizer]
    params: Any
    samples: Callable[[Activation], SampleSum | None]
    wide: bool
    believes: bool
    options: RunOptions
    token_weights: TokenWeights | None
    # The last one, by its name.
    _pools: dict[str, tuple[SecondMoment | None, int]] = field(default_factory=dict)

    def gather(self, stage: Stage) -> Seen:
        """Return the evidence of a stage.

        :raises ValueError: No token reaches its layers, and they are no expert's; or an input holds
            NaN or infinity.
        """
        layer: Any = self.model.get_submodule(stage.layers[0])
        dtype = self._dtype(layer.weight)
        samples = {
            name: kept
            for name, activation in stage.activations.items()
            if (kept := self.samples(activation)) is not None
        }
        upstream, through = self._upstream(stage), None
        if len(stage.layers) == 1 and stage.pool is None and not self.believes:
            alone = self.quantizers[stage.layers[0]].weight.detach().flatten(1)
            through = alone if is_narrow(alone) else None
        try:
            total = sum_moments(
                stage.batches(),
                layer,
                dtype=torch.promote_types(layer.weight.dtype, torch.float32),
                mapped_dir=self.options.cache_dir,
                through=through,
                also=[*(s.add for s in samples.values()), *(u.add for u in upstream.values())],
                weights=None if self.token_weights is None else self.token_weights.of(stage.layers),
            )
            costs = {name: each.mean for name, each in upstream.items()}
            if stage.pool is not None:
                if total is None or not total.tokens:
                    own = SecondMoment.of_none(layer.weight.shape[1], dtype, layer.weight)
                else:
                    own = total.result(dtype)
                moment, costs = self._lean(stage, stage.pool, own, costs)
                samples = {} if moment.leaned else samples
            elif total is None:
                raise uncalled(stage.layers)
            else:
                moment = total.result(dtype)
        except ValueError as error:
            raise ValueError(f"{', '.join(stage.layers)}: {error}") from error
        if not self.believes and moment.is_known:
            moment = moment.shrunk(self.params.asym_strength)
        storage = "memory" if total is None else total.storage
        expert = None if stage.pool is None else stage.pool.expert
        return Seen(moment, storage, samples, costs, expert)

    def _upstream(self, stage: Stage) -> dict[str, UpstreamError]:
        """Return collectors of the errors before layers, if these compensate them."""
        if self.params.inp_symmetry != "asym":
            return {}
        weights = {name: self.quantizers[name].weight.detach() for name in stage.layers}
        return {name: UpstreamError(each.flatten(1)) for name, each in weights.items()}

    def _lean(
        self, stage: Stage, pool: Pool, own: SecondMoment, costs: dict[str, float]
    ) -> tuple[SecondMoment, dict[str, float]]:
        """Have the tokens of all experts decide for one, as far as its own are too few.

        :param own: Moment of its own tokens.
        :param costs: Mean cost of upstream errors by layer.
        :returns: the moment to decide by, and the costs on the same tokens.
        """
        if self.believes or not own.is_noisy:
            return own, costs
        layer: Any = self.model.get_submodule(stage.layers[0])
        upstream = self._upstream(stage)
        known = None if pool.shared is None else self._pools.get(pool.shared)
        if known is None:
            known = pooled_moment(
                pool,
                layer,
                dtype=own.second.dtype,
                mapped_dir=self.options.cache_dir,
                also=[each.add for each in upstream.values()],
            )
            if pool.shared is not None:
                self._pools = {pool.shared: known}
        elif upstream:
            _, inputs = pool.inputs(POOLED_AN_INPUT * layer.weight.shape[1])
            for quantized, original, _ in inputs:
                if quantized is not None and original is not None:
                    for each in upstream.values():
                        each.add(quantized[None], original[None])
        every, among = known
        if every is None:
            return own, costs
        moment = own.leaning(every, among)
        kept, leaned = 1 - moment.leaned, moment.leaned
        return moment, {n: kept * costs[n] + leaned * each.mean for n, each in upstream.items()}

    def _dtype(self, weight: Tensor) -> torch.dtype:
        """Return the dtype of moments and roundings.

        A rounding is a chain of choices, and one that goes the other way moves all after it. In
        float64 the moments of one model run by two frameworks are near enough to each other that
        the choices are the same. Other devices than processors are slow at it, or lack it.
        """
        device = self.options.device or weight.device
        wide = self.wide and torch.device(device).type == "cpu"
        return torch.float64 if wide else torch.promote_types(weight.dtype, torch.float32)
