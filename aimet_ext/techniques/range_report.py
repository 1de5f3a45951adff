"""Reports of ranges of activations."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from pydantic.dataclasses import dataclass

from aimet_ext.techniques.report import Report, UnitReport


@dataclass(frozen=True, kw_only=True)
class RangeReport(UnitReport):
    """The range of one tensor, or of tensors that share one.

    :param name: Module whose output it is, or tensor.
    :param places: Names of the quantizers that have it.
    :param bitwidth: Bits of a value.
    :param before: Range of the calibration.
    :param after: Range as deployed.
    :param kl_before: Divergence of the model's outputs before it was searched, in nats; of a range
        that was judged by a block's output None.
    :param kl_after: Divergence as deployed.
    :param block: Name of the block by whose output it was judged; None for the model's.
    :param loss_before: Mean squared error of the block's output before it was searched.
    :param loss_after: The same as deployed.
    :param seconds: Seconds of the search.
    :param resumed: True if it came from a checkpoint.
    """

    places: tuple[str, ...]
    bitwidth: int
    before: tuple[float, float]
    after: tuple[float, float]
    kl_before: float | None = None
    kl_after: float | None = None
    block: str | None = None
    loss_before: float | None = None
    loss_after: float | None = None

    @property
    def share(self) -> float:
        """Loss as deployed as a share of the one before."""
        before = self.kl_before if self.block is None else self.loss_before
        after = self.kl_after if self.block is None else self.loss_after
        return (after or 0.0) / before if before else 1.0


@dataclass(frozen=True, kw_only=True)
class ActivationRangesReport(Report):
    """The outcome of :func:`aimet_ext.apply_activation_ranges`; ``print`` shows a table.

    :param ranges: Entries of the tensors that were searched, in order.
    :param kl_before: Divergence of the outputs with the ranges of the calibration, mean
        KL(float || quantized) in nats.
    :param kl_after: Divergence as deployed.
    :param kept: Number of quantizers that keep the range of the calibration unsearched, as they
        hardly add to the divergence, or because their range is fixed or frozen.
    :param settings: Settings of the run.
    :param seconds: Seconds of the whole run.
    """

    ranges: tuple[RangeReport, ...]
    kl_before: float
    kl_after: float
    kept: int
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        changed = [entry for entry in self.ranges if entry.after != entry.before]
        width = max([20, *(len(entry.name) + 2 for entry in changed)])
        lines = [f"{'':<{width}}{'bits':>4}{'calibrated':>22}{'deployed':>22}{'loss':>9}"]
        lines += [
            f"{entry.name:<{width}}{entry.bitwidth:>4}{_shown(entry.before):>22}"
            f"{_shown(entry.after):>22}{entry.share:>9.1%}"
            for entry in changed
        ]
        lines.append(
            f"KL to the float model {self.kl_before:.4g} before, {self.kl_after:.4g} after; "
            f"{len(changed)} ranges changed, {len(self.ranges) - len(changed) + self.kept} kept; "
            f"{self.seconds:.1f} s in all"
        )
        return "\n".join(lines)


def _shown(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.4g} … {bounds[1]:.4g}"
