r"""The cost of each quantizer, by gradients of all at once and by runs of the worst ones.

Let a quantizer ``i`` add :math:`\epsilon_i \delta_i` to its tensor, where :math:`\delta_i` is its
own error. The divergence of the outputs is :math:`\frac12 \epsilon^T H \epsilon` to second order,
with :math:`H_{ij} = E[(g \cdot \delta_i)(g \cdot \delta_j)]`, where :math:`g` is the gradient of
the log-likelihood of outcomes drawn from the float model (Fisher information). So a few backward
passes of the float model give every quantizer's divergence alone, :math:`\frac12 H_{ii}`. One of
the simulation's divergence gives :math:`(H \epsilon)_i`; without quantizer ``i`` the divergence
falls by :math:`(H \epsilon)_i - \frac12 H_{ii}`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aimet_ext.analysis.divergence import Reference
from aimet_ext.analysis.report import AnalysisReport, QuantizerReport
from aimet_ext.core.objective import sqnr_db
from aimet_ext.data.batches import ForwardFn, as_tensors, tensors_in
from aimet_ext.errors import TransformRefused, some
from aimet_ext.progress import bar as progress_bar
from aimet_ext.sim.points import Point
from aimet_ext.sim.protocol import SimAdaptor, adapt

_DRAWS = 8  # of outcomes for each batch


def analyze(
    sim: Any,
    dataloader: Any,
    *,
    top_k: int = 8,
    forward_fn: ForwardFn | None = None,
    progress: bool = True,
) -> AnalysisReport:
    """Find how much each quantizer moves the model's outputs.

    Source: of this project, :doc:`/analyze`.

    The measure is the mean divergence KL(float || quantized) of the outputs in nats, over all
    rows that the attention mask does not hide. It is estimated to second order for every quantizer
    from a few gradients, and measured for the worst ones: with one alone, and with all others. An
    ONNX graph is computed by PyTorch for the gradients and by onnxruntime for what is measured; of
    a graph with operators that have no gradient here, everything is measured.

    :param sim: ``QuantizationSimModel`` of aimet_torch or aimet_onnx, with ranges in all its
        quantizers. It is left as it is.
    :param dataloader: Batches as for the techniques; a few suffice, such as 16 windows of text.
        Each row of a batch is one sample of the estimate.
    :param top_k: Number of quantizers that are measured, two runs over the data each.
    :param forward_fn: Function called as ``forward_fn(model, batch)`` in place of ``model(batch)``.
    :param progress: Show a progress bar.
    :returns: The divergence of all quantizers together and of each one, sorted.
    :raises ValueError: A quantizer has no range, outputs are no logits, or the data are unusable.
    :raises TypeError: ``sim`` is no simulation, or a batch is of no known form.

    >>> report = aimet_ext.analyze(sim, batches)
    >>> print(report)
    """
    if top_k < 0:
        raise ValueError(f"top_k must be 0 or more, got {top_k}")
    adaptor = adapt(sim)
    started = time.perf_counter()
    batches = adaptor.batches(dataloader, opaque=forward_fn is not None)
    with adaptor.preserved_state():
        adaptor.model.eval().requires_grad_(False)
        return _Analysis(adaptor, batches, forward_fn, progress).run(top_k, started)


@dataclass
class _Sums:
    """Sums over the data for one quantizer."""

    signal: float = 0.0
    noise: float = 0.0
    squares: float = 0.0  # of g · δ
    slope: float = 0.0  # of the simulation's divergence in ε


@dataclass
class _Errors:
    """The errors that the quantizers add in one pass, each with a factor to differentiate by.

    :param start: Value of the factors, 0 for the float model and 1 for the simulation.
    """

    start: float
    sums: dict[str, _Sums]
    factors: dict[str, Tensor] = field(default_factory=dict)
    batch: int | None = None

    def look(self, name: str, tensor: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        """Add a quantizer's error, times its factor for each sample, to a tensor."""
        if not tensor.numel() or not tensor.is_floating_point():
            return tensor
        with torch.no_grad():
            plain = tensor.detach().as_subclass(Tensor)
            error = quantize(plain).as_subclass(Tensor) - plain
            own = self.sums.setdefault(name, _Sums())
            if self.start == 0:
                own.signal += float(plain.double().square().sum())
                own.noise += float(error.double().square().sum())
        if name not in self.factors:
            samples = tensor.dim() > 1 and len(tensor) == self.batch
            shape = (len(tensor) if samples else 1,)
            self.factors[name] = torch.full(
                shape, self.start, dtype=error.dtype, device=error.device, requires_grad=True
            )
        factor = self.factors[name]
        if tensor.dim() < 2 or len(factor) != len(tensor):  # it may be used on another shape too
            return tensor + factor.mean() * error
        return tensor + factor.reshape(-1, *[1] * (tensor.dim() - 1)) * error


class _Analysis:
    def __init__(
        self,
        adaptor: SimAdaptor,
        batches: Sequence[Any],
        forward_fn: ForwardFn | None,
        progress: bool,
    ) -> None:
        self.adaptor, self.batches, self.forward_fn = adaptor, batches, forward_fn
        self.progress = progress
        self.points = adaptor.points()
        unset = [point.name for point in self.points.values() if point.low is None]
        if unset or not self.points:
            raise ValueError(
                f"quantizers with ranges are required, {some(unset, 3) or 'the simulation'} "
                f"{'have none' if len(unset) > 1 else 'has none'}; run sim.compute_encodings first"
            )
        with adaptor.running((), forward_fn) as run:
            model = adaptor.model if adaptor.framework == "torch" and not forward_fn else None
            self.reference = Reference(run, batches, model)

    def run(self, top_k: int, started: float) -> AnalysisReport:
        """Return the report."""
        together = self._measured(self.points)
        try:
            sums = self._sums()
        except TransformRefused:
            sums, top_k = {}, len(self.points)
        count = max(self.reference.count, 1)
        rows = {
            name: self._row(point, sums.get(name), count) for name, point in self.points.items()
        }
        worst = sorted(rows, key=lambda name: -max(rows[name].kl_alone, rows[name].kl_removed))
        for name in progress_bar(worst[:top_k], "measure", shown=self.progress):
            others = [other for other in self.points if other != name]
            rows[name] = rows[name].measured(
                self._measured([name]), together - self._measured(others)
            )
        ordered = sorted(rows.values(), key=lambda row: -row.kl_alone)
        return AnalysisReport(
            quantizers=tuple(ordered),
            kl=together,
            rows=self.reference.count,
            settings={"top_k": top_k},
            seconds=time.perf_counter() - started,
        )

    def _measured(self, names: Collection[str]) -> float:
        with self.adaptor.running(names, self.forward_fn) as run:
            return self.reference.divergence(run)

    def _row(self, point: Point, sums: _Sums | None, count: int) -> QuantizerReport:
        known = sums or _Sums()
        alone = known.squares / 2 / count
        return QuantizerReport(
            name=point.name,
            kind=point.kind,
            bitwidth=point.bitwidth,
            symmetric=point.symmetric,
            low=point.low or 0.0,
            high=point.high or 0.0,
            sqnr_db=sqnr_db(known.signal, known.noise) if known.noise else None,
            kl_alone=alone,
            kl_removed=known.slope / count - alone,
        )

    def _sums(self) -> dict[str, _Sums]:
        sums: dict[str, _Sums] = {}
        generator = torch.Generator().manual_seed(0)
        bar = progress_bar(total=2 * len(self.batches), desc="gradients", shown=self.progress)
        with bar, torch.enable_grad():
            for start in (0.0, 1.0):
                errors = _Errors(start, sums)
                with self.adaptor.looking(errors.look, self.forward_fn) as run:
                    for number, batch in enumerate(self.batches):
                        errors.factors.clear()
                        errors.batch = _samples(batch)
                        logits = run(batch)
                        if start:
                            _add_slopes(self.reference, number, logits, errors)
                        else:
                            self._add_squares(number, logits, errors, generator)
                        bar.update()
        return sums

    def _add_squares(
        self, number: int, logits: Tensor, errors: _Errors, generator: torch.Generator
    ) -> None:
        """Add squares of ``g · δ`` of each sample, the mean over some draws of outcomes."""
        found = self.reference.rows(number, logits).log_softmax(-1)
        chances = self.reference.log_probabilities(number).exp().cpu()
        for draw in range(_DRAWS):
            chosen = torch.multinomial(chances, 1, generator=generator).to(found.device)
            likelihood = found.gather(1, chosen).sum()
            keep = draw + 1 < _DRAWS
            for name, gradient in _gradients(likelihood, errors.factors, keep).items():
                errors.sums[name].squares += float(gradient.double().square().sum()) / _DRAWS


def error_slopes(
    adaptor: SimAdaptor, reference: Reference, forward_fn: ForwardFn | None = None
) -> dict[str, float]:
    """Return the derivative of the divergence by the size of each quantizer's error, by name.

    :raises TransformRefused: An ONNX graph has operators that PyTorch cannot compute.
    """
    sums: dict[str, _Sums] = {}
    errors = _Errors(1.0, sums)
    with torch.enable_grad(), adaptor.looking(errors.look, forward_fn) as run:
        for number, batch in enumerate(reference.batches):
            errors.factors.clear()
            errors.batch = _samples(batch)
            _add_slopes(reference, number, run(batch), errors)
    return {name: own.slope / max(reference.count, 1) for name, own in sums.items()}


def _add_slopes(reference: Reference, number: int, logits: Tensor, errors: _Errors) -> None:
    loss = reference.loss(number, logits)
    for name, gradient in _gradients(loss, errors.factors).items():
        errors.sums[name].slope += float(gradient.double().sum())


def _gradients(loss: Tensor, factors: dict[str, Tensor], keep: bool = False) -> dict[str, Tensor]:
    """Return the gradient by each factor; a factor that the loss does not hang on has none."""
    found = torch.autograd.grad(loss, list(factors.values()), retain_graph=keep, allow_unused=True)
    return {n: g for n, g in zip(factors, found, strict=True) if g is not None}


def _samples(batch: Any) -> int | None:
    """Return the number of samples in a batch, None where it does not tell."""
    sizes = {len(tensor) for tensor in tensors_in(as_tensors(batch)) if tensor.dim()}
    return sizes.pop() if len(sizes) == 1 else None
