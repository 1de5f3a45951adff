"""Scales of fixed integers: what is learnt, what stays, and what is written."""

from __future__ import annotations

import pytest
import torch

from aimet_ext.core.affine import dequantize, fake_quantize, integer_scale, quantize
from aimet_ext.core.clipping import GridLayout
from aimet_ext.core.polish import RoundedWeight

LAYOUTS = {
    "per tensor": GridLayout(shape=(1, 1), qmin=-8, qmax=7, symmetric=True),
    "per channel": GridLayout(shape=(6, 1), qmin=-4, qmax=3, symmetric=True),
    "asymmetric": GridLayout(shape=(6, 1), qmin=0, qmax=15, symmetric=False),
    "8 bits": GridLayout(shape=(6, 1), qmin=-128, qmax=127, symmetric=True),
    "shifted": GridLayout(shape=(6, 1), qmin=-2, qmax=1, symmetric=True, zero_point_shift=0.5),
    "blockwise": GridLayout(shape=(6, 4), qmin=0, qmax=15, symmetric=False, block_size=(1, 8)),
    "LPBQ": GridLayout(
        shape=(6, 4), qmin=-8, qmax=7, symmetric=True, block_size=(1, 8),
        block_grouping=(1, -1), scale_bits=4,
    ),
}  # fmt: skip


def rounded(layout: GridLayout, dtype: torch.dtype) -> tuple[torch.Tensor, RoundedWeight]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 32, generator=generator) * torch.logspace(-2, 1, 6)[:, None]
    weight = weight.to(dtype)
    grid = layout.with_scale(*layout.raw(*layout.bounds(weight.float())))
    weight = fake_quantize(weight, grid)
    return weight, RoundedWeight(weight, grid, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_integers_stay_whatever_the_scales(layout: GridLayout, dtype: torch.dtype) -> None:
    weight, codes = rounded(layout, dtype)
    before = quantize(weight, codes.grid)
    torch.testing.assert_close(codes.weight(codes.start()).to(dtype), weight, rtol=1e-2, atol=0)
    log = 0.1 * torch.randn(codes.groups, generator=torch.Generator().manual_seed(1))
    grid = layout.with_scale(codes.scale(log), codes.grid.offset)
    values = codes.written(grid, dtype)
    assert values is not None and values.dtype == dtype
    assert torch.equal(quantize(values, grid), before)
    torch.testing.assert_close(codes.weight(log), dequantize(before.float(), grid))


def test_integers_between_the_blocks_of_a_group_stay() -> None:
    layout = LAYOUTS["LPBQ"]
    _, codes = rounded(layout, torch.float32)
    assert codes.groups == (6, 1)
    log = torch.linspace(-0.2, 0.2, 6)[:, None]
    scales = codes.grid.scale, codes.scale(log)
    found = [integer_scale(scale, (1, -1), 4) for scale in scales]
    assert torch.equal(*found)
    ratio = (scales[1] / scales[0]).log()
    torch.testing.assert_close(ratio, log.expand(6, 4), rtol=1e-4, atol=1e-6)


def test_other_integers_are_told() -> None:
    layout = LAYOUTS["per channel"]
    _, codes = rounded(layout, torch.float32)
    codes.codes[0, 0] = 100  # beyond the grid
    assert codes.written(codes.grid, torch.float32) is None


@pytest.mark.parametrize("name", ["per channel", "blockwise", "LPBQ"])
def test_the_gradient_reaches_every_scale(name: str) -> None:
    _, codes = rounded(LAYOUTS[name], torch.float32)
    log = codes.start().requires_grad_()
    target = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    (codes.weight(log) * target).sum().backward()
    step = 1e-3 * torch.randn(codes.groups, generator=torch.Generator().manual_seed(3))
    both = [(codes.weight(sign * step).double() * target).sum() for sign in (1, -1)]
    slope = (log.grad.double() * step).sum() * 2
    torch.testing.assert_close(both[0] - both[1], slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_moves_turn_integers_and_gradients_pass_them(layout: GridLayout) -> None:
    """Against a loop over weights: an integer turns behind half a step and stays on the grid."""
    weight, codes = rounded(layout, torch.float32)
    before = quantize(weight, codes.grid)
    moves = torch.empty_like(weight).uniform_(-1.4, 1.4, generator=torch.Generator().manual_seed(2))
    log = 0.1 * torch.randn(codes.groups, generator=torch.Generator().manual_seed(1))
    grid = layout.with_scale(codes.scale(log), codes.grid.offset)
    turned = before.clone()
    for place, move in zip(turned.view(-1), moves.view(-1), strict=True):
        place.fill_(min(max(round(float(place + move)), layout.qmin), layout.qmax))
    assert not torch.equal(turned, before)
    values = codes.written(grid, torch.float32, moves)
    assert values is not None and torch.equal(quantize(values, grid), turned)
    leaf = moves.clone().requires_grad_()
    found = codes.weight(log, leaf)
    torch.testing.assert_close(found.detach(), dequantize(turned, grid))
    found.sum().backward()
    assert leaf.grad is not None
    on_grid = ((before + moves).round() - turned).abs() < 0.5
    steps = fake_quantize(weight, grid) * 0 + (dequantize(turned + 1, grid) - found.detach())
    torch.testing.assert_close(leaf.grad, steps * on_grid, rtol=1e-4, atol=1e-6)
