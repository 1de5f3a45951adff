r"""The divergence that errors of weights cost, of many errors by the same gradients.

An error :math:`\Delta` of a layer's weight costs :math:`\frac12 E[(G \cdot \Delta)^2]` to second
order, with :math:`G = \sum_t g_t x_t^T` the gradient of the log-likelihood of outcomes drawn from
the float model, of one sample (Fisher information): its inputs :math:`x_t` and the gradients
:math:`g_t` at its outputs of all tokens. One backward pass has :math:`G` of every layer, whose
product with the error of every choice is all that a choice needs; tokens that act on each other's
outputs are in the sum. Errors of different layers are taken as independent, so that costs add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from aimet_ext.analysis.divergence import Reference, counted_rows, row_mask
from aimet_ext.data.batches import as_tensors, tensors_in
from aimet_ext.progress import bar as progress_bar
from aimet_ext.sim.points import Run
from aimet_ext.specs import LPBQ, QSpec

_DRAWS = 8  # of outcomes for each batch
_CLASSES = 256  # of a row that are compared one by one
_SCALE_BITS = 16  # of a float scale, as it is stored for a device


@dataclass(eq=False)
class Unit:
    """A weight, and the layers that have it.

    :param names: Names of the layers in the checkpoint, or of an ONNX graph's.
    :param layers: Modules of these layers.
    :param bits: Bits at each choice, scales included.
    :param quantizers: What rounds the weight at each choice.
    """

    names: list[str]
    layers: list[Any]
    bits: list[int]
    quantizers: list[Callable[[Tensor], Tensor]]
    reached: bool = False
    dots: list[Tensor] = field(default_factory=list)
    squares: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The weight, shape [out, in]."""
        found: Tensor = self.layers[0].weight.detach()
        return found

    @property
    def count(self) -> int:
        """Numbers in the weight."""
        return self.weight.numel()

    @torch.no_grad()
    def error(self, number: int) -> Tensor:
        """Return what a choice adds to the weight, shape [out, in]."""
        quantized = self.quantizers[number](self.weight)
        return quantized.as_subclass(Tensor) - self.weight

    @torch.no_grad()
    def meet(self, gradients: Iterable[Tensor]) -> None:
        """Add the products of a call's gradients with the error of each choice.

        :param gradients: That of each sample, or their sum, in the weight, shape [out, in] each.
        """
        errors = [self.error(number) for number in range(len(self.quantizers))]
        found = [
            torch.stack([(own * error).sum(dtype=torch.float64) for error in errors])
            for own in gradients
        ]
        self.dots.append(torch.stack(found))  # [samples, choices]

    def close(self) -> None:
        """Square the sums over the calls of one backward pass."""
        if not self.dots:
            return
        alike = len({len(each) for each in self.dots}) == 1
        parts = self.dots if alike else [each.sum(0, keepdim=True) for each in self.dots]
        found = torch.stack(parts).sum(0).square().sum(0) / _DRAWS
        self.squares = found if self.squares is None else self.squares + found
        self.dots.clear()

    def costs(self, rows: int) -> list[float]:
        """Return the divergence of each choice alone, in nats."""
        if self.squares is None:
            return [0.0] * len(self.bits)
        return [float(each) / 2 / max(rows, 1) for each in self.squares]


class Subject(Protocol):
    """A float model whose weights get widths."""

    @property
    def batches(self) -> Sequence[Any]:
        """Batches that it is run on."""

    @property
    def mask_model(self) -> Any:
        """Torch module that takes positional arguments, to tell which one is the mask."""

    def units(
        self, specs: Sequence[QSpec], left_out: Callable[[Sequence[str]], set[str]]
    ) -> list[Unit]:
        """Return the weights that get one of these specs.

        :param left_out: Takes the names of all linear layers, returns those that stay out.
        """

    def watched(self, fisher: Fisher) -> AbstractContextManager[Run]:
        """Open a context with a run whose gradients meet the units of a :class:`Fisher`."""

    def changed(self, numbers: Numbers) -> AbstractContextManager[Run]:
        """Open a context with a run of the model with some weights rounded by their choices."""


#: Weights with the number of a choice for each.
Numbers: TypeAlias = Sequence[tuple[Unit, int]]


def stored_bits(spec: QSpec, weight: Tensor, cells: int) -> int:
    """Return the bits of a weight ``[out, in]`` with its scales and offsets.

    :param cells: Ranges of the grid.
    """
    scales = cells * _SCALE_BITS
    if isinstance(spec.granularity, LPBQ):
        scales = cells * spec.granularity.scale_bits + len(weight) * _SCALE_BITS
    offsets = 0 if spec.symmetric else cells * spec.bitwidth
    return weight.numel() * spec.bitwidth + scales + offsets


class Fisher:
    """Backward passes of the likelihood of outcomes that are drawn from the float model.

    :param root: Scalar 0 on which everything that is to have a gradient hangs.
    :param samples: Samples in the batch of now, None if it does not tell.
    :param dims: Dimensions of the outputs.
    """

    def __init__(self, units: Sequence[Unit], subject: Subject) -> None:
        self.units, self.subject = units, subject
        self.samples: int | None = None
        self.dims = 0
        self.root = torch.zeros((), requires_grad=True)

    def run(self, progress: bool) -> int:
        """Sum up the squares of all units; return the number of rows."""
        generator = torch.Generator().manual_seed(0)
        rows = 0
        with self.subject.watched(self) as forward, torch.enable_grad():
            for batch in progress_bar(self.subject.batches, "gradients", shown=progress):
                sizes = {len(t) for t in tensors_in(as_tensors(batch)) if t.dim()}
                self.samples = sizes.pop() if len(sizes) == 1 else None
                rows += self._add(forward, batch, generator)
        return rows

    def _add(self, forward: Run, batch: Any, generator: torch.Generator) -> int:
        logits = forward(batch)
        self.dims = logits.dim()
        mask = row_mask(batch, logits, self.subject.mask_model)
        found = counted_rows(logits, mask).log_softmax(-1)
        chances = found.detach().exp().cpu()
        if not found.requires_grad or not len(found):
            return len(found)
        for draw in range(_DRAWS):
            drawn = torch.multinomial(chances, 1, generator=generator).to(found.device)
            likelihood = found.gather(1, drawn).sum()
            torch.autograd.grad(likelihood, self.root, retain_graph=draw + 1 < _DRAWS)
            for unit in self.units:
                unit.close()
        return len(found)


def divergences(
    together: Sequence[Sequence[Unit]],
    choices: Sequence[Sequence[int]],
    subject: Subject,
    progress: bool,
) -> list[float]:
    """Measure the mean divergence of the outputs in nats with weights rounded to nearest.

    :param together: Weights in groups.
    :param choices: Numbers of the groups' choices, each of which is measured.
    """
    found = []
    with torch.no_grad():
        with subject.changed(()) as run:
            reference = Reference(run, subject.batches, subject.mask_model, top_k=_CLASSES)
        for numbers in progress_bar(choices, "measure", shown=progress):
            pairs = zip(together, numbers, strict=True)
            with subject.changed([(u, number) for group, number in pairs for u in group]) as run:
                found.append(reference.divergence(run))
    return found
