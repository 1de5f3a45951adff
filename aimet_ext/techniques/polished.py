"""A rounded simulation whose scales, integers and norm gains are learnt, or written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aimet_ext.core.affine import short_scale
from aimet_ext.core.polish import RoundedWeight
from aimet_ext.data.batches import ForwardFn
from aimet_ext.files.ledger import Axis, Ledger
from aimet_ext.models.description import TopologyDescription
from aimet_ext.models.topology import BlockTopology
from aimet_ext.sim.points import NormGain, Run
from aimet_ext.sim.protocol import SimAdaptor, WeightQuantizer

_KINDS = ("norm_qkv", "norm_mlp")
Learnt = dict[str, Tensor]


def moves_of(layer: str) -> str:
    """Return the name of the moves of a layer's integers among what is learnt."""
    return f"integers of {layer}"


def blocks_of(
    adaptor: SimAdaptor,
    topology: TopologyDescription | None,
    run: Callable[[], object] | None = None,
) -> list[BlockTopology]:
    """Return the decoder blocks of a model, none where it has no known ones.

    :param run: Function that runs the model on a batch.
    """
    try:
        return adaptor.find_blocks(topology, run)
    except ValueError:
        if topology is not None:
            raise
        return []


def own_gains(
    adaptor: SimAdaptor, topology: TopologyDescription | None
) -> AbstractContextManager[None]:
    """Open a context in which each norm of the blocks, if there are any, has its own gains."""
    if blocks_of(adaptor, topology):
        return adaptor.own_parameters(_KINDS, topology)
    return nullcontext()


@dataclass(frozen=True, eq=False)
class LearntGain:
    """The gains of a norm as multiples ``exp(log)`` of those at the start; its bias likewise.

    :param start: Parameters at the start, by ``"weight"`` and ``"bias"``.
    """

    norm: NormGain
    start: Mapping[str, Tensor]

    def value(self, parameter: str, log: Tensor) -> Tensor:
        """Return a parameter, differentiable in ``log``."""
        start = self.start[parameter]
        offset = self.norm.offset if parameter == "weight" else 0.0
        return ((start.to(log.dtype) + offset) * log.exp() - offset).to(start.dtype)


@dataclass(frozen=True, eq=False)
class Polished:
    """The parts of a simulation that are learnt.

    Logarithms of layers are named after these, of norms after their modules, and the moves of
    integers as :func:`moves_of` says.

    :param quantizers: Weight quantizers of the layers, by name.
    """

    adaptor: SimAdaptor
    quantizers: Mapping[str, WeightQuantizer]
    codes: Mapping[str, RoundedWeight]
    gains: Mapping[str, LearntGain]

    @classmethod
    def of(
        cls,
        adaptor: SimAdaptor,
        quantizers: Mapping[str, WeightQuantizer],
        norms: Iterable[NormGain],
    ) -> Polished:
        """Read integers, scales and gains as they are."""
        gains = {}
        for norm in norms:
            start = {key: adaptor.read_gain(name).clone() for key, name in norm.names.items()}
            if bool((start["weight"] + norm.offset).any()):
                gains[norm.module] = LearntGain(norm, start)
        codes = {n: RoundedWeight(q.weight, q.grid(), q.layout) for n, q in quantizers.items()}
        return cls(adaptor, quantizers, codes, gains)

    def start(self, *, integers: bool = False) -> Learnt:
        """Return what is learnt as it is at the start, all zero.

        :param integers: Learn the integers too.
        """
        logs = {name: codes.start() for name, codes in self.codes.items()}
        if integers:
            logs |= {moves_of(name): codes.start_moves() for name, codes in self.codes.items()}
        for name, gain in self.gains.items():
            logs[name] = torch.zeros_like(gain.start["weight"], dtype=torch.float32)
        return logs

    def running(
        self, logs: Mapping[str, Tensor] | None, forward_fn: ForwardFn | None
    ) -> AbstractContextManager[Run]:
        """Open a context with a function that runs the model; differentiable in ``logs``.

        Layers that are not learnt are on their grids; activations and gains are float.

        :param logs: What is learnt, read each time; None for the simulation as it is.
        """

        def weight(name: str) -> Callable[[], Tensor]:
            assert logs is not None
            codes, quantizer = self.codes[name], self.quantizers[name]
            return lambda: quantizer.stored(codes.weight(logs[name], logs.get(moves_of(name))))

        def gain(learnt: LearntGain, parameter: str) -> Callable[[], Tensor]:
            if logs is None:
                now = self.adaptor.read_gain(learnt.norm.names[parameter])
                return lambda: now
            return lambda: learnt.value(parameter, logs[learnt.norm.module])

        weights = {} if logs is None else {name: weight(name) for name in self.codes}
        gains = {
            place: gain(learnt, parameter)
            for learnt in self.gains.values()
            for parameter, place in learnt.norm.names.items()
        }
        return self.adaptor.substituting(weights, gains, forward_fn)

    def parts(self) -> list[str]:
        """Return the names of the parts of the simulation that :meth:`deploy` changes."""
        return list(dict.fromkeys([*self.codes, *(g.norm.part for g in self.gains.values())]))

    @torch.no_grad()
    def deploy(self, logs: Mapping[str, Tensor]) -> None:
        """Write scales, the values of the integers on them, and gains.

        :raises RuntimeError: The simulation would read other integers.
        """
        for name, codes in self.codes.items():
            quantizer = self.quantizers[name]
            offset = None if quantizer.layout.symmetric else codes.grid.offset
            quantizer.set_scale(short_scale(codes.scale(logs[name])), offset)
            quantizer.freeze()
        for name, codes in self.codes.items():  # once all are written: two may share a quantizer
            quantizer = self.quantizers[name]
            moves = logs.get(moves_of(name))
            values = codes.written(quantizer.grid(), quantizer.weight.dtype, moves)
            if values is None:
                raise RuntimeError(
                    f"{name}: the integers must be those learnt on the new scales, but the "
                    "simulation reads others; leave it out with modules_to_exclude, and report this"
                )
            quantizer.set_weight(values)
        for name, gain in self.gains.items():
            for parameter, place in gain.norm.names.items():
                self.adaptor.write_gain(place, gain.value(parameter, logs[name]))

    def record(self, ledger: Ledger, technique: str, logs: Mapping[str, Tensor]) -> None:
        """Note the gains in a ledger.

        A layer that reads a norm has the integers of the original weight, and sees inputs times
        the gains' changes. An adapter at the layer is to see them as they were, so it is folded as
        if the layer's columns had been divided.
        """
        for name, gain in self.gains.items():
            factor = logs[name].detach().double().exp().float()
            if not gain.norm.readers:
                continue
            sides: list[tuple[str, Axis, Tensor]] = [(gain.norm.module, "out", factor)]
            sides += [(reader, "in", 1 / factor) for reader in gain.norm.readers]
            ledger.record(
                technique,
                gain.norm.part,
                f"{gain.norm.module} gains",
                "polish",
                sides,
                size=len(factor),
                source=gain.norm.module,
            )

    @staticmethod
    def moved(logs: Mapping[str, Tensor], names: Iterable[str]) -> float:
        """Return the mean relative change of what these logarithms scale."""
        sizes = [logs[name].detach().expm1().abs().flatten() for name in names]
        return float(torch.cat(sizes).mean()) if sizes else 0.0

    @torch.no_grad()
    def turned(self, logs: Mapping[str, Tensor]) -> float:
        """Return the share of the integers that are others than at the start."""
        found = [
            (int((codes.moved(logs.get(moves_of(name))) != codes.codes).sum()), codes.codes.numel())
            for name, codes in self.codes.items()
        ]
        return sum(turned for turned, _ in found) / sum(size for _, size in found)


@dataclass
class Progress:
    """The state of learning after some steps; all that a checkpoint holds.

    :param logs: What is learnt by name, leaves of the optimizer.
    :param best: Those of the lowest divergence on the batches held out.
    :param rate: Learning rate, before its rise and fall.
    :param began: Steps that were made before this rate.
    :param failures: Times that steps were taken back since something was gained.
    :param scores: Divergence after each evaluation, that of the start first.
    """

    logs: Learnt
    best: Learnt
    rate: float
    began: int = 0
    failures: int = 0
    scores: list[float] = field(default_factory=list)
    step: int = 0

    @property
    def best_score(self) -> float:
        """The lowest divergence so far."""
        return min(self.scores, default=math.inf)

    @torch.no_grad()
    def go_back(self, rate: float, optimizer: torch.optim.Optimizer) -> None:
        """Return to the best state, to go on from there at another rate."""
        for name, leaf in self.logs.items():
            leaf.copy_(self.best[name])
        optimizer.state.clear()
        self.rate, self.began, self.failures = rate, self.step, self.failures + 1

    def tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return logarithms, best ones and the optimizer's moments by name."""
        found = {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, leaf in self.logs.items():
            found[f"logs/{name}"] = leaf.detach()
            for key, value in optimizer.state.get(leaf, {}).items():
                found[f"{key}/{name}"] = value
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Put back what :meth:`tensors` returned."""
        optimizer.state.clear()
        for name, leaf in self.logs.items():
            leaf.copy_(tensors[f"logs/{name}"])
            self.best[name] = tensors[f"best/{name}"].to(leaf.device)
            keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in tensors]
            found = {key: tensors[f"{key}/{name}"] for key in keys}
            place = {key: "cpu" if key == "step" else leaf.device for key in keys}
            if found:  # none behind a return to the best state
                optimizer.state[leaf] = {key: t.to(place[key]) for key, t in found.items()}
