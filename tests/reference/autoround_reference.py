"""Training of a block's roundings, with every gradient and every step written out."""

from __future__ import annotations

from functools import partial

import torch
from torch.func import functional_call

BETAS, EPSILON = (0.9, 0.99), 1e-20


class Adam:
    """Adam's step (arXiv 1412.6980) for one tensor."""

    def __init__(self, values):
        self.values, self.steps = values, 0
        self.mean, self.square = torch.zeros_like(values), torch.zeros_like(values)

    def step(self, gradient, rate):
        self.steps += 1
        self.mean = BETAS[0] * self.mean + (1 - BETAS[0]) * gradient
        self.square = BETAS[1] * self.square + (1 - BETAS[1]) * gradient**2
        mean = self.mean / (1 - BETAS[0] ** self.steps)
        square = self.square / (1 - BETAS[1] ** self.steps)
        self.values -= rate * mean / (square.sqrt() + EPSILON)


class Rounding:
    """Offsets and scales of one layer. Scales are kept for each weight, one ``γ`` for each unit."""

    def __init__(self, block, layer, start):
        self.weight = block.weight(layer).double()
        self.layout = block.layout(layer)
        grid = self.layout.with_scale(*start.grids[layer])
        out, width = self.weight.shape
        rows, cells = grid.scale.shape
        self.scale = torch.empty_like(self.weight)
        self.zero = torch.empty_like(self.weight)
        self.unit = torch.empty(out, width, dtype=torch.long)  # which γ a weight has
        for i in range(out):
            for j in range(width):
                row, cell = i * rows // out, j * cells // width
                self.scale[i, j] = grid.scale[row, cell]
                self.zero[i, j] = grid.offset[row, cell] + grid.zero_point_shift
                self.unit[i, j] = row if self.layout.scale_bits else row * cells + cell
        ideal = self.weight / self.scale - self.zero
        codes = start.codes[layer].double()
        offsets = torch.empty_like(ideal)
        for i in range(out):
            for j in range(width):
                nearest = min(max(ideal[i, j], codes[i, j] - 0.45), codes[i, j] + 0.45)
                offsets[i, j] = nearest - ideal[i, j]
        self.offsets = Adam(offsets)
        self.stretch = Adam(torch.zeros(int(self.unit.max()) + 1, dtype=torch.float64))

    def values(self):
        """The quantized weight, kept with what its gradients need."""
        self.step = self.scale * self.stretch.values.exp()[self.unit]
        real = (self.weight / self.step - self.zero + self.offsets.values).round()
        self.inside = (real >= self.layout.qmin) & (real <= self.layout.qmax)
        self.steps = real.clamp(self.layout.qmin, self.layout.qmax) + self.zero
        return self.steps * self.step

    def update(self, gradient, rates):
        """Step by the gradient in the values: of ``(W / s + v) s`` inside, of ``q s`` outside."""
        own = self.steps * self.step - self.inside * self.weight
        stretch = torch.zeros_like(self.stretch.values)
        stretch.index_add_(0, self.unit.flatten(), (gradient * own).flatten())
        self.offsets.step(gradient * self.step * self.inside, rates[0])
        self.stretch.step(stretch, rates[1])


def _run(module, weights, *args, **kwargs):
    return functional_call(module, weights, args, kwargs)


def losses_of(block, start, params, steps):
    """Losses of all steps, each before its update.

    :param steps: batches and their sequences for each step.
    """
    roundings = {layer: Rounding(block, layer, start) for layer in block.layers}
    rates = params.learning_rate, params.scale_lr
    found = []
    for number in range(params.num_iterations):
        leaves = {name: each.values().requires_grad_() for name, each in roundings.items()}
        weights = {name: tensor.double() for name, tensor in block.params.items()}
        for name, leaf in leaves.items():
            weights[f"{name}.weight"] = leaf
        total, pieces = 0.0, next(steps)
        with block.adaptor.disabled_quantizers(block.name):
            for index, rows in pieces:
                call = block.quantized_stream.select(index, rows).to(torch.float64)
                target = block.targets.read(index, "cpu")
                target = (target if rows is None else target[rows])[call.mask].double()
                output = call(partial(_run, block.module, weights))
                squares = (output[call.mask] - target).square().flatten()
                kept = squares.sort().values[: len(squares) - int(params.trim * len(squares))]
                total = total + kept.sum() / len(squares) / len(pieces)
        gradients = torch.autograd.grad(total, list(leaves.values()))
        found.append(float(total.detach()))
        share = (1 - number / params.num_iterations) ** 3
        for rounding, gradient in zip(roundings.values(), gradients, strict=True):
            rounding.update(gradient, [rate * share for rate in rates])
    return found
