"""Facts of a simulation that a lint judges, the same for either framework."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from aimet_ext.sim.protocol import WeightQuantizer

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

    :param name: Name of the quantizer or of the tensor.
    :param bitwidth: Bits of a value.
    :param low: Smallest value, None while there is no range.
    :param high: Largest value.
    """

    name: str
    bitwidth: int
    low: float | None = None
    high: float | None = None

    @property
    def step(self) -> float:
        """Difference of two neighbouring values; 0 without a range."""
        if self.low is None or self.high is None:
            return 0.0
        return (self.high - self.low) / ((1 << self.bitwidth) - 1)

    def grid(self) -> tuple[int, float | None, float | None]:
        """Return the properties that are equal in quantizers which quantize alike."""
        return (self.bitwidth, self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class LintLayer:
    """A layer with a weight.

    :param name: Name in the simulation.
    :param kind: Kind of its operator.
    :param width: Input channels that one output channel reads.
    :param kernel: Kernel of a convolution.
    :param weight: Quantizer of the weight, None where the weight is float.
    :param tied: True if another layer has the same weight.
    :param fused: Operator within which the graph adds a float bias: ``"Gemm"`` (also without
        one), ``"MatMul+Add"`` or ``"Conv"``.
    :param bias: Its bias ``[out]``, or None.
    :param reads: Quantizer of its input, None where there is none or it is not known.
    :param makes: Quantizer of its output, likewise.
    :param floats: ``"input"`` and ``"output"``, where that is known to be float.
    """

    name: str
    kind: Kind
    width: int
    kernel: tuple[int, ...] = ()
    weight: WeightQuantizer | None = None
    tied: bool = False
    fused: str | None = None
    bias: Tensor | None = None
    reads: Activation | None = None
    makes: Activation | None = None
    floats: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class NormFacts:
    """An RMS norm with a quantized gain.

    :param name: Name of the gain in the simulation.
    :param bitwidth: Bits of the gain.
    :param signed: True if its integers are signed.
    :param reads: Quantizer of the norm's input, None where there is none or it is not known.
    :param makes: Quantizer of its output, likewise.
    """

    name: str
    bitwidth: int
    signed: bool
    reads: Activation | None
    makes: Activation | None

    def types(self) -> tuple[str | None, str, str | None]:
        """Return the types of input, gain and output as integers; unknown inputs as the output."""
        makes = None if self.makes is None else f"uint{self.makes.bitwidth}"
        reads = makes if self.reads is None else f"uint{self.reads.bitwidth}"
        return reads, f"{'' if self.signed else 'u'}int{self.bitwidth}", makes


@dataclass(frozen=True, kw_only=True)
class SimFacts:
    """Everything that a lint judges of a simulation.

    :param layers: Layers with a weight, by which an NPU is chosen; gains of norms are none.
    :param activations: All integer quantizers of activations.
    :param norms: RMS norms.
    :param unset: Parameters whose quantizers have no range.
    :param fixed: Outputs of operators whose range is always the same, with the operator.
    :param masked: Tensors that hold the mask, or scores to which it was added.
    :param angles: Angles in radians, of which cosine or sine is taken.
    :param mask: Number that the model itself adds to masked scores, None if not known.
    :param operands: Second operands of products of two activations.
    :param tied: Pairs that have to quantize alike, as the second becomes the first at the next
        call.
    :param conversions: Pairs of a tensor's quantizer and one that quantizes it once more.
    """

    layers: tuple[LintLayer, ...]
    activations: tuple[Activation, ...]
    norms: tuple[NormFacts, ...] = ()
    unset: tuple[str, ...] = ()
    fixed: tuple[tuple[str, Activation], ...] = ()
    masked: tuple[Activation, ...] = ()
    angles: tuple[Activation, ...] = ()
    mask: float | None = None
    operands: tuple[Activation, ...] = ()
    tied: tuple[tuple[Activation | None, Activation | None, str, str], ...] = ()
    conversions: tuple[tuple[Activation, Activation], ...] = ()
