"""Learnable clipping and the search for ranges, against loops that recompute everything."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from search_reference import (
    objective_by_loop,
    quantized_by_loop,
    search_integers_by_loop,
    search_ranges_by_loop,
)
from torch import Tensor

from aimet_ext.core.affine import channel_scale, fake_quantize, integer_scale, lpbq_scale
from aimet_ext.core.clipping import GridLayout, LearnableClipping, default_shares, search_ranges
from aimet_ext.core.objective import row_errors

OUT, IN, BLOCK = 4, 12, 4
SHAPES = {
    "per_tensor": ((1, 1), None),
    "per_channel": ((OUT, 1), None),
    "blockwise": ((OUT, IN // BLOCK), (1, BLOCK)),
}


def layout_of(kind: str, *, symmetric: bool = True, bits: int = 3, shift: float = 0.0):
    shape, block_size = SHAPES[kind]
    return GridLayout(
        shape=shape,
        qmin=-(2 ** (bits - 1)) if symmetric else 0,
        qmax=2 ** (bits - 1) - 1 if symmetric else 2**bits - 1,
        symmetric=symmetric,
        zero_point_shift=shift,
        block_size=block_size,
    )


def lpbq_layout(bits: int = 3, scale_bits: int = 2, out: int = OUT, blocks: int = IN // BLOCK):
    return GridLayout(
        shape=(out, blocks),
        qmin=-(2 ** (bits - 1)),
        qmax=2 ** (bits - 1) - 1,
        symmetric=True,
        block_size=(1, BLOCK),
        block_grouping=(1, -1),
        scale_bits=scale_bits,
    )


LAYOUTS = {
    **{kind: layout_of(kind) for kind in SHAPES},
    **{f"{kind}_asymmetric": layout_of(kind, symmetric=False) for kind in SHAPES},
    **{f"{kind}_shifted": layout_of(kind, bits=2, shift=0.5) for kind in SHAPES},
    "lpbq": lpbq_layout(),
}


@pytest.fixture(params=list(LAYOUTS))
def layout(request) -> GridLayout:
    return LAYOUTS[request.param]


@dataclasses.dataclass
class Problem:
    """Heavy-tailed weights and inputs whose channels differ in size and hang together."""

    weight: Tensor
    second: Tensor
    pull: Tensor
    smooth: Tensor
    row_weight: Tensor


def problem(seed: int = 0, out: int = OUT, width: int = IN) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = normal(out, width) * normal(out, width).abs() + 0.1
    inputs = normal(40, width) @ (normal(width, width) * 0.4 + torch.eye(width))
    second = inputs.T @ inputs / len(inputs)
    return Problem(
        weight=weight,
        second=second,
        pull=0.1 * normal(out, width),
        smooth=normal(width).mul(0.3).exp(),
        row_weight=normal(out).exp(),
    )


def total(p: Problem, layout: GridLayout, scale: Tensor, offset: Tensor) -> Tensor:
    """Objective of every output row, of the grid as it is deployed."""
    grid = layout.with_scale(scale, offset)
    error = fake_quantize(p.weight * p.smooth, grid) / p.smooth - p.weight
    rows = row_errors(error, p.second, p.pull)
    return rows if layout.is_row_wise(p.weight) else (rows * p.row_weight).sum()


def search(p: Problem, layout: GridLayout, **kwargs):
    kwargs = {"smooth": p.smooth, "row_weight": p.row_weight, **kwargs}
    return search_ranges(p.weight, layout, p.second, p.pull, **kwargs)


# ---- the search against a loop -------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "lpbq"])
@pytest.mark.parametrize("seed", [0, 1])
def test_search_is_the_loop(name, seed):
    """The rank-k update of a cell's error gives what recomputing the whole objective gives."""
    p, layout = problem(seed), LAYOUTS[name]
    shares = torch.linspace(1, 0.4, 7, dtype=torch.float64)
    start = layout.raw(*layout.bounds(p.weight * p.smooth))
    expected = search_ranges_by_loop(
        p.weight,
        layout,
        p.second,
        p.pull,
        p.smooth,
        p.row_weight,
        shares.tolist(),
        start,
    )
    found = search(p, layout, shares=shares)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert not torch.allclose(found[0], start[0], rtol=1e-3)  # there was something to find


def test_search_without_options_is_the_loop_without_them():
    p, layout = problem(2), LAYOUTS["blockwise"]
    ones = torch.ones(IN, dtype=torch.float64)
    shares = torch.linspace(1, 0.4, 7, dtype=torch.float64)
    start = layout.raw(*layout.bounds(p.weight))
    expected = search_ranges_by_loop(
        p.weight, layout, p.second, None, ones, None, shares.tolist(), start
    )
    found = search_ranges(p.weight, layout, p.second, shares=shares)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_search_goes_on_from_a_start():
    """A start is improved, not replaced: with no candidates it comes back."""
    p, layout = problem(3), LAYOUTS["blockwise"]
    full = layout.raw(*layout.bounds(p.weight * p.smooth))
    start = (0.7 * full[0], full[1])
    none = torch.ones(0, dtype=torch.float64)
    torch.testing.assert_close(search(p, layout, shares=none, start=start), start, rtol=0, atol=0)
    shares = torch.linspace(1, 0.4, 5, dtype=torch.float64)
    expected = search_ranges_by_loop(
        p.weight, layout, p.second, p.pull, p.smooth, None, shares.tolist(), start
    )
    found = search(p, layout, shares=shares, start=start)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert torch.equal(start[0], 0.7 * full[0])


@pytest.mark.parametrize("seed", range(4))
def test_lpbq_search_is_the_loop_over_integers(seed):
    p, layout = problem(seed), LAYOUTS["lpbq"]
    raw, offset = layout.raw(*layout.bounds(p.weight * p.smooth))
    grouping, bits = layout.block_grouping, layout.scale_bits
    unit, integers = channel_scale(raw, grouping, bits), integer_scale(raw, grouping, bits)
    expected = search_integers_by_loop(p.weight, layout, p.second, p.pull, p.smooth, unit, integers)
    scale, _ = search(p, layout, start=(raw, offset))
    torch.testing.assert_close(scale, unit * expected, rtol=1e-12, atol=0)


def test_a_cell_shared_by_all_rows_weighs_them():
    """Per tensor, a row that counts a thousand times as much decides."""
    p, layout = problem(4), LAYOUTS["per_tensor"]
    p.weight[0] *= 0.2  # its own best range is far below the others'
    p.pull.zero_()
    scales = []
    for counts in (1.0, 1e3):
        p.row_weight = torch.tensor([counts, 1, 1, 1], dtype=torch.float64)
        scales.append(float(search(p, layout)[0]))
    assert scales[1] < 0.7 * scales[0]


# ---- what the search promises --------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_objective_never_rises(layout, seed):
    p = problem(seed)
    scale, offset = layout.raw(*layout.bounds(p.weight * p.smooth))
    if layout.scale_bits is not None:
        scale = lpbq_scale(scale, layout.block_grouping, layout.scale_bits)
    cost = first = total(p, layout, scale, offset)
    for _ in range(3):
        scale, offset = search(p, layout, start=(scale, offset))
        new = total(p, layout, scale, offset)
        assert (new <= cost + 1e-12 * first.abs()).all()
        cost = new
    assert (cost < first).any()


@pytest.mark.parametrize("seed", range(8))
def test_lpbq_keeps_a_top_integer_and_aimet_finds_the_same_scales(seed):
    """Scales that were found are what deriving LPBQ's scales from them gives, bit for bit."""
    p = problem(seed, out=16, width=24)
    layout = lpbq_layout(scale_bits=3, out=16, blocks=6)
    scale, offset = search(p, layout)
    deployed = lpbq_scale(scale, layout.block_grouping, layout.scale_bits)
    assert torch.equal(deployed, scale)
    integers = integer_scale(scale, layout.block_grouping, layout.scale_bits)
    assert (integers.amax(1) == 8).all()
    again, _ = search(p, layout, start=(scale, offset))
    assert torch.equal(lpbq_scale(again, layout.block_grouping, layout.scale_bits), again)


def test_lpbq_starts_whose_blocks_share_the_top_integer_stay_consistent():
    """Two blocks round to the top integer; whichever moves, the channel's scale is the same."""
    layout = lpbq_layout(scale_bits=2, out=1, blocks=2)
    for seed in range(40):
        p = problem(seed, out=1, width=2 * BLOCK)
        full, offset = layout.raw(*layout.bounds(p.weight * p.smooth))
        raw = full.amax() * torch.tensor([[1.0, 0.93]], dtype=torch.float64)  # 4 and round(3.72)
        before = total(p, layout, raw, offset)
        scale, offset = search(p, layout, start=(raw, offset))
        unit = channel_scale(raw, layout.block_grouping, 2)
        assert torch.equal(channel_scale(scale, layout.block_grouping, 2), unit)
        assert total(p, layout, scale, offset) <= before + 1e-12 * before.abs()


def test_clipping_loses_on_the_weight_and_wins_on_the_output():
    """The claim of clipping, in both directions: largest weight error up, output error down."""
    p = problem(5, out=32, width=48)
    layout = dataclasses.replace(layout_of("per_channel"), shape=(32, 1))
    full = layout.raw(*layout.bounds(p.weight))
    found = search_ranges(p.weight, layout, p.second)
    plain = fake_quantize(p.weight, layout.with_scale(*full)) - p.weight
    clipped = fake_quantize(p.weight, layout.with_scale(*found)) - p.weight
    assert clipped.abs().max() > 1.5 * plain.abs().max()
    assert row_errors(clipped, p.second, None).sum() < 0.8 * row_errors(plain, p.second, None).sum()


def test_a_row_of_zeros_stays_zero(layout):
    p = problem(6)
    p.weight[1] = 0
    scale, offset = search(p, layout)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    values = fake_quantize(p.weight * p.smooth, layout.with_scale(scale, offset))
    if layout.zero_point_shift == 0:
        assert (values[1] == 0).all()


def test_reference_quantizes_as_the_core_does(layout):
    p = problem(7)
    raw = layout.raw(*layout.bounds(p.weight))
    grid = layout.with_scale(*raw)
    expected = quantized_by_loop(
        p.weight, grid.scale, grid.offset, layout.qmin, layout.qmax, layout.zero_point_shift
    )
    torch.testing.assert_close(fake_quantize(p.weight, grid), expected, rtol=1e-13, atol=1e-15)
    error = expected - p.weight
    rows = row_errors(error, p.second, p.pull)
    assert float(rows.sum()) == pytest.approx(objective_by_loop(error, p.second, p.pull, None))


def test_default_shares_start_at_the_full_range():
    shares = default_shares(torch.zeros(1, dtype=torch.float64), count=8, lowest=0.3)
    assert shares.dtype is torch.float64
    assert shares[0] == 1 and shares[-1] == pytest.approx(0.3)
    assert (shares.diff() < 0).all()


# ---- learnable clipping --------------------------------------------------------------------------


def shares_of(layout: GridLayout, value: float) -> Tensor:
    return torch.full(layout.shape, value, dtype=torch.float64)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_gradients_are_finite_and_reach_weights_and_shares(layout, share):
    """Also at the ends, where the logit is infinite and its gradient 0."""
    weight = problem(0).weight.requires_grad_()
    clipping = LearnableClipping(layout, shares_of(layout, share), shares_of(layout, share))
    target = torch.linspace(-1, 1, weight.numel(), dtype=torch.float64).view_as(weight)
    (clipping(weight) * target).sum().backward()
    assert torch.isfinite(weight.grad).all() and (weight.grad != 0).any()
    assert len(list(clipping.parameters())) == (1 if layout.symmetric else 2)
    moved = torch.zeros(())
    for parameter in clipping.parameters():
        assert torch.isfinite(parameter).all()
        assert torch.isfinite(parameter.grad).all()
        moved = moved + parameter.grad.abs().sum()
    assert moved > 0


def test_gradient_descent_opens_ranges_that_are_too_small(layout):
    p = problem(1)
    clipping = LearnableClipping(layout, shares_of(layout, 0.25), shares_of(layout, 0.25))
    optimizer = torch.optim.Adam(clipping.parameters(), lr=0.1)
    losses = []
    for _ in range(15):
        loss = row_errors(clipping(p.weight) - p.weight, p.second, None).sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_ranges_are_sigmoid_shares_of_the_current_range(layout):
    p = problem(2)
    clipping = LearnableClipping(layout, shares_of(layout, 0.8), shares_of(layout, 0.6))
    low, high = layout.bounds(p.weight)
    got_low, got_high = clipping.ranges(p.weight)
    upper = 0.8 if layout.symmetric else 0.6
    torch.testing.assert_close(got_low, 0.8 * low, rtol=1e-12, atol=0)
    torch.testing.assert_close(got_high, upper * high, rtol=1e-12, atol=0)


def test_rescaling_the_weight_rescales_the_range(layout):
    """The range of ``a W`` is ``a`` times that of ``W``: a share means the same after LET."""
    p = problem(3)
    clipping = LearnableClipping(layout, shares_of(layout, 0.7), shares_of(layout, 0.9))
    for factor in (1e-2, 1e2):
        torch.testing.assert_close(
            clipping.ranges(factor * p.weight),
            tuple(factor * bound for bound in clipping.ranges(p.weight)),
            rtol=1e-12,
            atol=0,
        )
        torch.testing.assert_close(
            clipping(factor * p.weight), factor * clipping(p.weight), rtol=1e-12, atol=0
        )


def test_from_scale_reproduces_scales_that_are_inside(layout):
    p = problem(4)
    low, high = layout.bounds(p.weight)
    scale, offset = layout.raw(0.6 * low, (0.6 if layout.symmetric else 0.8) * high)
    clipping = LearnableClipping.from_scale(layout, p.weight, scale, offset)
    learnt = layout.raw(*clipping.ranges(p.weight))
    if not layout.symmetric:  # an end that whole offsets put at 0 can have a share near 0 only
        torch.testing.assert_close(learnt, (scale, offset), rtol=1e-3, atol=0)
        return
    torch.testing.assert_close(learnt, (scale, offset), rtol=1e-12, atol=0)
    expected = fake_quantize(p.weight, layout.with_scale(scale, offset))
    torch.testing.assert_close(clipping(p.weight), expected, rtol=1e-12, atol=1e-15)


def test_from_scale_of_the_full_range_stays_just_inside(layout):
    """A share of 1 becomes 0.995: near enough, and it can be trained."""
    p = problem(5)
    scale, offset = layout.raw(*layout.bounds(p.weight))
    clipping = LearnableClipping.from_scale(layout, p.weight, scale, offset)
    learnt = layout.raw(*clipping.ranges(p.weight))[0]
    assert torch.isfinite(clipping.low).all()
    assert ((learnt / scale - 1).abs() < 0.006).all() and not torch.equal(learnt, scale)


def test_from_scale_survives_a_row_of_zeros(layout):
    p = problem(6)
    p.weight[1] = 0
    scale, offset = layout.raw(*layout.bounds(p.weight))
    clipping = LearnableClipping.from_scale(layout, p.weight, scale, offset)
    weight = p.weight.requires_grad_()
    clipping(weight).square().sum().backward()
    assert torch.isfinite(weight.grad).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in clipping.parameters())


def test_lpbq_clipping_quantizes_on_integer_scales():
    """The integers are in the loop: what is trained is what LPBQ will represent."""
    p, layout = problem(7), LAYOUTS["lpbq"]
    clipping = LearnableClipping(layout, shares_of(layout, 0.8))
    with torch.no_grad():
        raw, offset = layout.raw(*clipping.ranges(p.weight))
    integers = integer_scale(raw, layout.block_grouping, layout.scale_bits)
    deployed = integers * channel_scale(raw, layout.block_grouping, layout.scale_bits)
    assert not torch.allclose(deployed, raw, rtol=1e-3)
    expected = quantized_by_loop(p.weight, deployed, offset, layout.qmin, layout.qmax, 0.0)
    torch.testing.assert_close(clipping(p.weight), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("share", [1.0, 0.9999, 0.5, 0.05, 1e-6])
def test_every_start_has_a_gradient(layout, share):
    """A share of 1 has an infinite logit, which would never move: no start is one."""
    p = problem(8)
    low, high = layout.bounds(p.weight)
    scale, offset = layout.raw(share * low, share * high)
    clipping = LearnableClipping.from_scale(layout, p.weight, scale, offset)
    target = p.weight + 0.1 * problem(9).weight
    (clipping(p.weight) - target).square().sum().backward()
    for logit, end in ((clipping.low, low), (clipping.high, high)):
        if logit is not None:
            assert bool(torch.isfinite(logit).all()) and bool(torch.isfinite(logit.grad).all())
            assert bool((logit.grad != 0)[end != 0].all())  # a cell of one sign has one end
