"""Facts of a simulation that a lint judges, the same for either framework."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aimet_ext.sim.protocol import WeightQuantizer

__all__ = ["FIXED_RANGES", "Activation", "LintLayer", "SimFacts"]

Kind = Literal["linear", "conv", "embedding"]

#: Smallest and largest value that these operators make, whatever they read.
FIXED_RANGES: dict[str, tuple[float, float]] = {
    "Cos": (-1.0, 1.0),
    "Sigmoid": (0.0, 1.0),
    "Sin": (-1.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
}


@dataclass(frozen=True, kw_only=True)
class Activation:
    """An integer quantizer of an activation that is in use.

    :param name: the quantizer's, or the tensor's.
    :param bitwidth: bits of a value.
    :param low: smallest value, None while there is no range.
    :param high: largest value.
    """

    name: str
    bitwidth: int
    low: float | None = None
    high: float | None = None

    @property
    def has_range(self) -> bool:
        """Whether it is calibrated."""
        return self.low is not None

    @property
    def step(self) -> float:
        """Between two neighbouring values; 0 without a range."""
        if self.low is None or self.high is None:
            return 0.0
        return (self.high - self.low) / ((1 << self.bitwidth) - 1)

    def grid(self) -> tuple[int, float | None, float | None]:
        """What two quantizers have in common that quantize alike."""
        return (self.bitwidth, self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class LintLayer:
    """A layer with a weight.

    :param name: in the simulation.
    :param kind: what it computes.
    :param width: input channels that one output channel reads.
    :param kernel: of a convolution.
    :param weight: its quantizer, None where the weight is float.
    :param tied: the weight is another layer's too.
    :param fused: the operator within which the graph adds a float bias: ``"Gemm"`` (also without
        one), ``"MatMul+Add"`` or ``"Conv"``.
    :param reads: quantizer of what it reads, None where there is none or it is not known.
    :param makes: quantizer of what it makes, likewise.
    :param floats: ``"input"`` and ``"output"``, where that is known to be float.
    """

    name: str
    kind: Kind
    width: int
    kernel: tuple[int, ...] = ()
    weight: WeightQuantizer | None = None
    tied: bool = False
    fused: str | None = None
    reads: Activation | None = None
    makes: Activation | None = None
    floats: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SimFacts:
    """A simulation.

    :param layers: with a weight, by which an NPU is chosen; gains of norms are none.
    :param activations: all integer ones.
    :param unset: parameters whose quantizers have no range.
    :param fixed: outputs of operators that have the same range always, by the operator.
    :param masked: what holds scores with the mask added to them, or the mask.
    :param mask: the number that the model itself adds to masked scores, None if not known.
    :param operands: second operands of products of two activations.
    :param tied: pairs that have to quantize alike, as the second becomes the first at the next
        call.
    :param conversions: a tensor's quantizer, and one that quantizes it once more.
    """

    layers: tuple[LintLayer, ...]
    activations: tuple[Activation, ...]
    unset: tuple[str, ...] = ()
    fixed: tuple[tuple[str, Activation], ...] = ()
    masked: tuple[Activation, ...] = ()
    mask: float | None = None
    operands: tuple[Activation, ...] = ()
    tied: tuple[tuple[Activation | None, Activation | None, str, str], ...] = ()
    conversions: tuple[tuple[Activation, Activation], ...] = ()
