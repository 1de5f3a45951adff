"""Scale pairs proved on the model at hand: multiplied in, they must leave the output alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from aimet_ext.core.equivalence import ScalePair, transform
from aimet_ext.errors import TransformRefused
from aimet_ext.models.probe import BlockFn

__all__ = [
    "BOUNDS",
    "Float64Casts",
    "PairFailure",
    "failing_pairs",
    "prove_pairs",
    "random_scale",
]

#: Largest allowed max|change| / max|output|. float64 proves the algebra, float32 the use.
BOUNDS: Mapping[torch.dtype, float] = {torch.float64: 1e-10, torch.float32: 1e-5}


class Float64Casts(TorchFunctionMode):
    """Turns a module's own casts to float32 into casts to float64.

    ``.float()``, ``.to(float32)``, ``softmax(dtype=float32)``: whatever names float32 in a call.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` with float64 in place of float32."""
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        named = {name: _widen(value) for name, value in (kwargs or {}).items()}
        return func(*map(_widen, args), **named)


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@dataclass(frozen=True)
class PairFailure:
    """A pair that changed the output.

    :param deviation: max|change| / max|output| in ``dtype``, where at most ``bound`` is allowed.
    """

    pair: ScalePair
    deviation: float
    bound: float
    dtype: torch.dtype

    def __str__(self) -> str:
        return (
            f"{self.pair.name} ({self.pair.kind}): max|change| / max|output| = "
            f"{self.deviation:.1e} in {str(self.dtype).rpartition('.')[2]}, "
            f"at most {self.bound:.0e} allowed"
        )


def random_scale(size: int, seed: int) -> Tensor:
    """Log-uniform in [1/4, 4], distinct per channel: float64 ``[size]``."""
    uniform = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.exp((2 * uniform - 1) * math.log(4.0))


def failing_pairs(
    block_fn: BlockFn, params: Mapping[str, Tensor], pairs: Sequence[ScalePair], *, seed: int = 0
) -> list[PairFailure]:
    """The pairs that do not leave the output alone, each multiplied in by itself.

    Random scales, first in float64 under :class:`Float64Casts`, then in float32 as it is.

    :param block_fn: output for a fixed input and the given parameters, computed in their dtype;
        :func:`aimet_ext.models.probe.probe` makes one from a module.
    :param params: floating point parameters of the block, named relative to it. Never changed.
    :raises ValueError: the output is not finite or does not depend on ``params``.
    """
    failures: dict[int, PairFailure] = {}
    for dtype, bound in BOUNDS.items():
        casts = Float64Casts() if dtype is torch.float64 else nullcontext()
        values = {name: value.detach().to(dtype) for name, value in params.items()}
        with torch.no_grad(), casts:
            reference = _reference(block_fn, values)
            for number, pair in enumerate(pairs):
                if number in failures:
                    continue
                device = next(iter(values.values())).device
                scale = random_scale(pair.size, seed + number).to(device, dtype)
                output = block_fn({**values, **transform(values, [(pair, scale)])})
                deviation = ((output - reference).abs().max() / reference.abs().max()).item()
                if not deviation <= bound:  # NaN fails
                    failures[number] = PairFailure(pair, deviation, bound, dtype)
    return [failures[number] for number in sorted(failures)]


def prove_pairs(
    block_fn: BlockFn,
    params: Mapping[str, Tensor],
    pairs: Sequence[ScalePair],
    *,
    where: str = "the block",
    seed: int = 0,
) -> None:
    """Refuse pairs that change the output of a block; see :func:`failing_pairs`.

    :param where: name of the block, for the error.
    :raises TransformRefused: a pair does not hold; all that do not are named.
    """
    failures = failing_pairs(block_fn, params, pairs, seed=seed)
    if failures:
        raise TransformRefused(
            f"{where}: a scale pair must leave the float function unchanged; "
            f"{'; '.join(map(str, failures))}. "
            "Leave these kinds out, or pass a TopologyDescription that fits the model"
        )


def _reference(block_fn: BlockFn, values: Mapping[str, Tensor]) -> Tensor:
    """The output to compare with, if a comparison can tell anything."""
    reference = block_fn(values)
    if not torch.isfinite(reference).all():
        raise ValueError(
            "a block must give finite outputs in a proof, got NaN or infinity; "
            "check its weights and inputs"
        )
    if torch.equal(reference, block_fn({name: value * 1.5 for name, value in values.items()})):
        raise ValueError(
            "block_fn must compute its output from params, got the same output for other params"
        )
    return reference
