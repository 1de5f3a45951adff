r"""The divergence that errors of weights cost, of many errors by the same gradients.

An error :math:`\Delta` of a layer's weight costs :math:`\frac12 E[(G \cdot \Delta)^2]` to second
order, with :math:`G = \sum_t g_t x_t^T` the gradient of the log-likelihood of outcomes drawn from
the float model, of one sample (Fisher information): its inputs :math:`x_t` and the gradients
:math:`g_t` at its outputs of all tokens. One backward pass has :math:`G` of every layer, whose
product with the error of every choice is all that a choice needs; tokens that act on each other's
outputs are in the sum. Errors of different layers are taken as independent, so that costs add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from aimet_ext.analysis.divergence import Reference, counted_rows, row_mask
from aimet_ext.data.batches import as_tensors, tensors_in
from aimet_ext.sim.points import Run
from aimet_ext.walk.hooks import layer_input

_DRAWS = 8  # of outcomes for each batch
_CLASSES = 256  # of a row that are compared one by one


@dataclass(eq=False)
class Unit:
    """A weight, and the layers that have it.

    :param names: Names of the layers in the checkpoint.
    :param bits: Bits at each choice, scales included.
    :param quantizers: AIMET's quantizer of each choice.
    """

    names: list[str]
    layers: list[nn.Linear]
    bits: list[int]
    quantizers: list[Any]
    reached: bool = False
    dots: list[Tensor] = field(default_factory=list)
    squares: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The weight, shape [out, in]."""
        return self.layers[0].weight.detach()

    @property
    def count(self) -> int:
        """Numbers in the weight."""
        return self.weight.numel()

    @torch.no_grad()
    def error(self, number: int) -> Tensor:
        """Return what a choice adds to the weight, shape [out, in]."""
        quantized: Tensor = self.quantizers[number](self.weight)
        return quantized.as_subclass(Tensor) - self.weight

    @torch.no_grad()
    def meet(self, x: Tensor, gradient: Tensor, apart: bool) -> None:
        """Add the products of a call's gradient with the error of each choice.

        :param x: Input, shape [..., in].
        :param gradient: Gradient at the output, shape [..., out].
        :param apart: True if the first dimension is that of the samples, False for one sample.
        """
        count = len(x) if apart else 1
        x, gradient = (
            x.reshape(count, -1, x.shape[-1]),
            gradient.reshape(count, -1, gradient.shape[-1]),
        )
        errors = [self.error(number) for number in range(len(self.quantizers))]
        found = []
        for own, slope in zip(x, gradient, strict=True):
            whole = slope.T @ own  # [out, in]
            found.append(
                torch.stack([(whole * error).sum(dtype=torch.float64) for error in errors])
            )
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


class Fisher:
    """Backward passes of the likelihood of outcomes that are drawn from the float model."""

    def __init__(self, units: Sequence[Unit], batches: Sequence[Any], run: Run, model: Any) -> None:
        self.units, self.batches, self.forward, self.model = units, batches, run, model
        self.samples: int | None = None  # in a batch, None if it does not tell
        self.dims = 0  # of the outputs
        self.root = torch.zeros((), requires_grad=True)

    def run(self, progress: bool) -> int:
        """Sum up the squares of all units; return the number of rows."""
        generator = torch.Generator().manual_seed(0)
        rows = 0
        with ExitStack() as hooks, torch.enable_grad():
            for unit in self.units:
                hook = self._hook(unit)
                for layer in unit.layers:
                    hooks.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
            for batch in tqdm(self.batches, "gradients", disable=not progress):
                sizes = {len(t) for t in tensors_in(as_tensors(batch)) if t.dim()}
                self.samples = sizes.pop() if len(sizes) == 1 else None
                rows += self._add(batch, generator)
        return rows

    def _hook(self, unit: Unit) -> Callable[..., Tensor]:
        def after(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
            x = layer_input(args, kwargs).detach().as_subclass(Tensor)
            unit.reached = unit.reached or x.numel() > 0
            version = x._version
            # A new tensor, which what follows may change in place; and one with a gradient in the
            # first layers too.
            moved: Tensor = output.as_subclass(Tensor) + self.root.to(output)

            def meet(slope: Tensor) -> None:
                if x._version != version:
                    raise ValueError(
                        f"{unit.names[0]}: an input that stays as it is is required, but what "
                        "follows the layer changes it in place; compute out of place there"
                    )
                # Tokens of several samples may stand in one dimension, as before experts.
                apart = x.dim() >= self.dims and len(x) == self.samples
                unit.meet(x, slope, apart)

            moved.register_hook(meet)
            return moved

        return after

    def _add(self, batch: Any, generator: torch.Generator) -> int:
        logits = self.forward(batch)
        self.dims = logits.dim()
        found = counted_rows(logits, row_mask(batch, logits, self.model)).log_softmax(-1)
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
    batches: Sequence[Any],
    run: Run,
    model: Any,
    progress: bool,
) -> list[float]:
    """Measure the mean divergence of the outputs in nats with weights rounded to nearest.

    :param together: Weights in groups.
    :param choices: Numbers of the groups' choices, each of which is measured.
    :param model: Torch module that takes positional arguments, to tell which one is the mask.
    """
    found = []
    with torch.no_grad():
        reference = Reference(run, batches, model, top_k=_CLASSES)
        for numbers in tqdm(choices, "measure", disable=not progress):
            with ExitStack() as hooks:
                for group, number in zip(together, numbers, strict=True):
                    for unit in group:
                        added = _adding(unit.error(number))
                        for layer in unit.layers:
                            handle = layer.register_forward_hook(added, with_kwargs=True)
                            hooks.callback(handle.remove)
                found.append(reference.divergence(run))
    return found


def _adding(error: Tensor) -> Callable[..., Tensor]:
    """Return a hook that adds the output of a weight's error."""

    def after(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
        moved: Tensor = output.as_subclass(Tensor)
        return moved + functional.linear(layer_input(args, kwargs), error)

    return after
