"""Why a layer computes something else on HTP, as far as that is known."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aimet_ext.core.objective import sqnr_db
from aimet_ext.verification.layers import LayerFacts

__all__ = ["Cause", "array_sqnr", "culprit", "dropped_bias", "known_cause", "pattern_cause"]

# Blocks of as many input channels as this, or of a multiple of it, are computed right; the smaller
# one where it divides the layer's width by an even number.
_BLOCK, _SMALL_BLOCK = 32, 16
_WIDTHS = (4, 8, 16)
# A dropped bias explains a difference where adding it brings the output this much nearer (dB),
# and the factor that brings it nearest is about 1.
_GAIN, _FACTOR = 6.0, (0.7, 1.3)
# Nothing is said about how much is lost above this (dB): rounding in another order does that.
_SOUND = 60.0


@dataclass(frozen=True)
class Cause:
    """Why a layer diverges or is refused.

    :param message: in a few words.
    :param remedy: what to do.
    """

    message: str
    remedy: str


def array_sqnr(value: Any, target: Any) -> float:
    """Signal to noise ratio in dB of an array or a list of arrays, against the same of a target."""
    values, targets = ([a] if isinstance(a, np.ndarray) else list(a) for a in (value, target))
    signal = noise = 0.0
    for one, two in zip(values, targets, strict=True):
        wide = two.astype(np.float64)
        signal += float(np.square(wide).sum())
        noise += float(np.square(one.astype(np.float64) - wide).sum())
    return -np.inf if np.isnan(noise) else sqnr_db(signal, noise)


def culprit(layers: Sequence[LayerFacts], ratios: Sequence[float], failing: int) -> int:
    """Where most is lost on the way to an operator that diverges: the largest drop in dB.

    A sum with something large, such as a mask, hides an error that shows again further down; so
    the first operator below a threshold need not be the one that is wrong.

    :param layers: in the order of computation.
    :param ratios: signal to noise ratio of each on the device, in dB.
    :param failing: index of the one that diverges.
    :returns: index of it or of one that it depends on.
    """
    place = {layer.tensor: index for index, layer in enumerate(layers)}
    upstream, queue = {failing}, [failing]
    while queue:
        parents = {place[name] for name in layers[queue.pop()].parents} - upstream
        upstream |= parents
        queue += parents

    def drop(index: int) -> float:
        given = [ratios[place[name]] for name in layers[index].parents]
        return min([_SOUND, *given]) - ratios[index]

    return max(sorted(upstream), key=drop)


def known_cause(
    layer: LayerFacts,
    device: np.ndarray[Any, Any],
    sim: np.ndarray[Any, Any],
    fallbacks: Collection[str] = (),
) -> Cause | None:
    """Why a layer's output differs from the sim's, None if that is not known.

    :param device: the layer's output on the device.
    :param sim: the same of the ONNX sim.
    :param fallbacks: operators that the device did not take.
    """
    if not set(fallbacks).isdisjoint(layer.nodes):
        return Cause(
            "it runs on the CPU, as HTP did not take it",
            "quantize all of its inputs and its output to integers",
        )
    return dropped_bias(layer, device, sim) or pattern_cause(layer)


def dropped_bias(
    layer: LayerFacts, device: np.ndarray[Any, Any], sim: np.ndarray[Any, Any]
) -> Cause | None:
    """The cause, if the sim's output is the device's and the bias.

    The factor ``c`` of ``device + c · bias`` that comes nearest to the sim's output is
    ``⟨sim − device, bias⟩ / ⟨bias, bias⟩``: about 1 where the bias was left out, 0 where it is in.
    """
    if layer.bias is None or not np.any(layer.bias):
        return None
    bias = _along_channels(layer, device.shape)
    if bias is None:
        return None
    difference = sim.astype(np.float64) - device
    spread = np.broadcast_to(bias, device.shape)
    factor = float((difference * spread).sum() / np.square(spread).sum())
    gain = array_sqnr(device + spread, sim) - array_sqnr(device, sim)
    if not (gain >= _GAIN and _FACTOR[0] <= factor <= _FACTOR[1]):
        return None
    apart = "keep MatMul and Add apart, each with its own quantizers"
    return Cause(
        f"its bias ({layer.bias_type}) is dropped: with the bias added, the device's output is "
        f"{gain:.0f} dB nearer to the sim's",
        apart if layer.lpbq else f"{apart}, or store the bias as int32",
    )


def _along_channels(layer: LayerFacts, shape: Sequence[int]) -> np.ndarray[Any, Any] | None:
    """A bias in a shape that is added to an output: channels are last, or second for Conv."""
    assert layer.bias is not None
    axis = 1 if layer.op_type.startswith("Conv") else len(shape) - 1
    if layer.bias.size != shape[axis]:
        return None
    return layer.bias.reshape([-1 if d == axis else 1 for d in range(len(shape))])


def _takes_block(size: int | None) -> bool:
    return size == _SMALL_BLOCK or (size is not None and size % _BLOCK == 0)


def _is_blockwise(layer: LayerFacts) -> bool:
    return layer.block_size is not None


def _kind(layer: LayerFacts) -> str:
    return "LPBQ" if layer.lpbq else "blockwise"


# What HTP refuses or gets wrong: whether a layer is such a one, what to say, what to do.
_Pattern = tuple[Callable[[LayerFacts], bool], Callable[[LayerFacts], Cause]]
_PATTERNS: tuple[_Pattern, ...] = (
    (
        lambda layer: layer.factor_type == "uint16",
        lambda _: Cause(
            "it is a product of two activations whose second one is uint16, which HTP multiplies "
            "with some 8 bits only",
            "have the second input quantized symmetrically and stored as int16 with zero point 0",
        ),
    ),
    (
        lambda layer: layer.bits is not None and layer.bits not in _WIDTHS,
        lambda layer: Cause(
            f"its weight has {layer.bits} bits, and HTP takes 4, 8 and 16",
            "quantize the weight to one of these widths",
        ),
    ),
    (
        lambda layer: _is_blockwise(layer) and not _takes_block(layer.block_size),
        lambda layer: Cause(
            f"its block size {layer.block_size} is none that HTP is known to take",
            f"choose {_SMALL_BLOCK} or a multiple of {_BLOCK}",
        ),
    ),
    (
        lambda layer: _is_blockwise(layer) and any(size > 1 for size in layer.kernel),
        lambda layer: Cause(
            f"{_kind(layer)} weights of a {'x'.join(map(str, layer.kernel))} convolution are none "
            "that HTP is known to take",
            "quantize this layer per channel",
        ),
    ),
    (
        lambda layer: layer.lpbq and layer.op_type.startswith("Conv"),
        lambda _: Cause(
            "its blocks have integer scales (LPBQ), which HTP takes for no convolution",
            "store the product of integer and channel scales as the blocks' float scales",
        ),
    ),
    (
        lambda layer: layer.lpbq and (layer.op_type == "Gemm" or layer.fused),
        lambda layer: Cause(
            f"it is one operator with LPBQ weights and {layer.bias_type or 'no'} bias, which HTP "
            "refuses or computes without the bias",
            "write it as a MatMul and an Add, each with its own quantizers",
        ),
    ),
    (
        lambda layer: (
            _is_blockwise(layer)
            and (layer.op_type != "MatMul+Add" or layer.fused)
            and layer.bias_type is not None
            and layer.bias_type != "int32"
        ),
        lambda layer: Cause(
            f"its bias is {layer.bias_type}, which HTP gets wrong with {_kind(layer)} weights",
            "store the bias as int32 with the scale of the input times that of the weight",
        ),
    ),
)


def pattern_cause(layer: LayerFacts) -> Cause | None:
    """Why HTP may refuse a layer or get it wrong, by how the layer is stored."""
    return next((cause(layer) for fits, cause in _PATTERNS if fits(layer)), None)
