"""One layer decided: what is written, what plain rounding keeps, and what samples are drawn."""

from __future__ import annotations

import pytest
import torch
from range_search_reference import problem

from aimet_ext.core.affine import dequantize, fake_quantize, quantize, short_scale
from aimet_ext.core.objective import SecondMoment
from aimet_ext.techniques.layerwise.deploy import (
    Decision,
    Problem,
    SampleSum,
    UpstreamError,
    deploy,
)

OUT, IN, BITS = 16, 24, 3


@pytest.fixture
def layer():
    """``layer(shape)``: a quantizer with a full range, and the problem of its layer."""
    nn = pytest.importorskip("aimet_torch.nn")
    from aimet_torch.quantization.affine import QuantizeDequantize

    from aimet_ext.sim.torch.quantizers import TorchWeightQuantizer

    def make(shape=(OUT, 1), *, symmetric=True, seed=0, bits=BITS, dtype=torch.float32):
        p = problem(seed, OUT, IN, dtype=torch.float32)
        module = nn.QuantizedLinear(IN, OUT, dtype=dtype)
        module.weight.data.copy_(p.weight)
        block = (1, IN // shape[1]) if len(shape) > 1 and shape[1] > 1 else None
        module.param_quantizers["weight"] = QuantizeDequantize(
            shape, bits, symmetric, block_size=block
        )
        module._compute_param_encodings(overwrite=True)
        quantizer = TorchWeightQuantizer("fc", module)
        moment = SecondMoment(p.second, None, p.rows.shape[1])

        def current():
            return Problem.of("fc", quantizer, module.bias, moment, None)

        return quantizer, current

    return make


def shrunk(share):
    """A decision for a part of the range of plain rounding, and no rounding."""

    def decide(problem):
        plain = problem.nearest_grid()
        return Decision(scale=plain.scale * share, offset=plain.offset)

    return decide


def errors_of(problem, quantizer, grid=None):
    """Objective of each row as the quantizer rounds the weight."""
    grid = quantizer.grid() if grid is None else grid
    return problem.errors(fake_quantize(quantizer.weight.detach(), grid))[0]


@pytest.mark.parametrize("shape", [(OUT, 1), (OUT, 4)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_row_keeps_the_better_of_two(layer, shape, symmetric):
    quantizer, current = layer(shape, symmetric=symmetric)
    share = 0.7 if symmetric else 0.9
    problem, weight = current(), quantizer.weight.detach().clone()
    plain = problem.nearest_grid()
    nearest = errors_of(problem, quantizer, plain)
    grid = problem.layout.with_scale(short_scale(plain.scale * share), plain.offset)
    wanted = errors_of(problem, quantizer, grid)
    assert (wanted < nearest).any() and (wanted > nearest).any()
    outcome = deploy(problem, quantizer, shrunk(share))
    found = errors_of(problem, quantizer)
    torch.testing.assert_close(found, torch.minimum(nearest, wanted), rtol=1e-5, atol=1e-6)
    assert outcome.rows_nearest == int((wanted > nearest).sum())
    assert outcome.nearest == pytest.approx(float(nearest.sum()), rel=1e-5)
    assert outcome.after == pytest.approx(float(found.sum()), rel=1e-5)
    assert outcome.after < outcome.nearest < outcome.signal
    kept = (wanted > nearest)[:, None]
    expected = torch.where(kept, plain.scale, short_scale(plain.scale * share))
    torch.testing.assert_close(quantizer.grid().scale, expected, rtol=1e-6, atol=0)
    assert quantizer.frozen and torch.equal(quantizer.weight, weight)


def test_rounded_rows_are_given_back_too(layer):
    """Garbage in some rows: they are rounded to nearest, and all weights are on the grid."""
    quantizer, current = layer()
    problem, weight = current(), quantizer.weight.detach().clone()
    bad = torch.arange(OUT) % 3 == 0

    def decide(problem):
        def codes(grid):
            return torch.where(bad[:, None], 0.0, quantize(weight, grid))

        return Decision(codes=codes)

    outcome = deploy(problem, quantizer, decide)
    grid = quantizer.grid()
    assert outcome.rows_nearest == int(bad.sum())
    assert torch.equal(quantizer.weight, fake_quantize(weight, grid))
    assert torch.equal(fake_quantize(quantizer.weight, grid), quantizer.weight)
    assert outcome.after == pytest.approx(outcome.nearest)
    worse = layer()[1]()
    for compare, rows in ((True, OUT), (False, 0)):
        quantizer, current = layer()
        zeros = Decision(codes=lambda grid: torch.zeros(OUT, IN), compare=compare)
        assert deploy(current(), quantizer, lambda _, d=zeros: d).rows_nearest == rows
        assert bool((quantizer.weight == 0).all()) != compare
    assert torch.equal(worse.weight, weight)


def test_rounding_that_cannot_be_judged_is_given_back(layer):
    """An objective of NaN is no improvement."""
    quantizer, current = layer()
    problem = current()
    grid = problem.nearest_grid()

    def judge(values):
        return problem.errors(values)[0] * torch.where(values == 0, torch.nan, 1.0).sum(1)

    zeros = Decision(codes=lambda grid: torch.zeros(OUT, IN), judge=judge)
    assert deploy(problem, quantizer, lambda _: zeros).rows_nearest == OUT
    assert torch.equal(quantizer.weight, fake_quantize(problem.stored, grid))


@pytest.mark.parametrize("taken", [True, False])
def test_rows_that_share_a_range_stay_together(layer, taken):
    """All or none, by the sum over rows: a row alone cannot have its range back."""
    quantizer, current = layer(())
    problem = current()
    plain = problem.nearest_grid()
    nearest = errors_of(problem, quantizer, plain)
    for share in torch.linspace(0.95, 0.2, 30).tolist():  # some rows gain, some lose
        grid = problem.layout.with_scale(short_scale(plain.scale * share), plain.offset)
        wanted = errors_of(problem, quantizer, grid)
        mixed = bool((wanted > nearest).any() and (wanted < nearest).any())
        if mixed and bool(wanted.sum() <= nearest.sum()) == taken:
            break
    else:
        pytest.fail("no such share")
    outcome = deploy(problem, quantizer, shrunk(share))
    assert outcome.rows_nearest == (0 if taken else OUT)
    expected = short_scale(plain.scale * share) if taken else plain.scale
    torch.testing.assert_close(quantizer.grid().scale.reshape(1, 1), expected)
    assert outcome.after == pytest.approx(float((wanted if taken else nearest).sum()), rel=1e-5)


@pytest.mark.parametrize("shape", [(), (OUT, 1), (OUT, 4)])
def test_a_frozen_grid_stays_and_rows_are_compared_on_it(layer, shape):
    """Whatever its shape, since only the rounding of a row is given back, not its range."""
    quantizer, current = layer(shape, symmetric=False)
    quantizer.freeze()
    before, problem = quantizer.grid(), current()
    assert problem.frozen is not None
    bad = torch.arange(OUT) < 5

    def decide(problem):
        def codes(grid):
            return quantize(torch.where(bad[:, None], 0.0, problem.weight), grid)

        return Decision(codes=codes)

    outcome = deploy(problem, quantizer, decide)
    after = quantizer.grid()
    assert torch.equal(after.scale, before.scale) and torch.equal(after.offset, before.offset)
    assert outcome.rows_nearest == int(bad.sum())
    assert torch.equal(quantizer.weight, fake_quantize(problem.stored, before))


def test_nothing_is_compared_where_that_is_not_wanted(layer):
    """The range of a technique that promises a given choice, good or bad."""
    quantizer, current = layer()
    problem = current()
    low, high = problem.layout.bounds(problem.weight)
    outcome = deploy(
        problem, quantizer, lambda _: Decision(range=(low * 0.2, high * 0.2), compare=False)
    )
    assert outcome.rows_nearest == 0 and outcome.after > outcome.nearest
    full, _ = problem.layout.raw(low, high)
    torch.testing.assert_close(quantizer.grid().scale, full * 0.2, rtol=1e-6, atol=0)


def test_a_technique_may_judge_by_itself(layer):
    """Its objective decides what is given back, and is what is reported."""
    quantizer, current = layer()
    problem = current()

    def judge(values):
        return (values - problem.weight).abs().amax(1)

    def decide(problem):
        decision = shrunk(0.7)(problem)
        return Decision(scale=decision.scale, offset=decision.offset, judge=judge)

    outcome = deploy(problem, quantizer, decide)  # clipping never lowers the largest error
    plain = problem.nearest_grid()
    nearest = judge(fake_quantize(problem.stored, plain))
    grid = problem.layout.with_scale(short_scale(plain.scale * 0.7), plain.offset)
    clipped = judge(fake_quantize(problem.stored, grid))
    assert outcome.rows_nearest == int((clipped > nearest).sum()) > OUT // 2
    assert outcome.nearest == pytest.approx(float(nearest.sum()))
    assert outcome.after == pytest.approx(float(torch.minimum(nearest, clipped).sum()), rel=1e-5)


def test_without_a_decision_the_full_range_is_written(layer):
    """Also over a range that was there before and was not frozen."""
    quantizer, current = layer()
    full = quantizer.grid()
    quantizer.set_scale(full.scale * 0.3)
    outcome = deploy(current(), quantizer, lambda _: Decision())
    torch.testing.assert_close(quantizer.grid().scale, short_scale(full.scale), rtol=1e-6, atol=0)
    assert outcome.after == pytest.approx(outcome.nearest) and outcome.rows_nearest == 0


def test_codes_are_of_the_grid_as_it_is_read_back(layer):
    """A technique rounds on what the simulation made of its range."""
    quantizer, current = layer(symmetric=False)
    grids = []

    def decide(problem):
        plain = problem.nearest_grid()

        def codes(grid):
            grids.append(grid)
            return quantize(problem.weight, grid)

        return Decision(scale=plain.scale * 0.9, offset=plain.offset, codes=codes, compare=False)

    problem = current()
    deploy(problem, quantizer, decide)
    (grid,) = grids
    found = quantizer.grid()
    assert torch.equal(grid.scale, found.scale) and torch.equal(grid.offset, found.offset)
    values = dequantize(quantize(problem.stored, found), found)
    assert torch.equal(quantizer.weight, values)


# ---- samples -------------------------------------------------------------------------------------


def rows_of(count, groups=2, width=3):
    """Row ``n`` holds its number, and its group's."""
    number = torch.arange(count, dtype=torch.float32)[None, :, None].expand(groups, count, width)
    return number + torch.arange(groups)[:, None, None] * 1000


def drawn(rows, count, cuts, *, originals=None, seed=0):
    samples = SampleSum(count, torch.relu, seed)
    parts = rows.split(cuts, 1)
    others = parts if originals is None else originals.split(cuts, 1)
    for part, other in zip(parts, others, strict=True):
        samples.add(part, other)
    return samples


@pytest.mark.parametrize("count", [1, 7, 40, 99, 100, 200])
def test_the_draw_does_not_depend_on_how_rows_are_cut(count):
    rows = rows_of(100)
    whole = drawn(rows, count, 100).inputs
    assert whole.shape == (2, min(count, 100), 3)
    for cuts in (1, 7, 16, 50, [3, 0, 60, 37]):
        assert torch.equal(drawn(rows, count, cuts).inputs, whole)
    chosen = whole[0, :, 0]
    assert len(chosen.unique()) == len(chosen) and (chosen.diff() > 0).all()
    assert torch.equal(whole[1], whole[0] + 1000)  # the same rows in every group
    assert not torch.equal(drawn(rows, 7, 10, seed=1).inputs, drawn(rows, 7, 10).inputs)


def test_every_row_is_as_likely():
    """First, middle and last, whenever its batch comes: 2000 draws of 5 out of 20."""
    rows = rows_of(20, groups=1)
    counts = torch.zeros(20)
    for seed in range(2000):
        counts[drawn(rows, 5, 3, seed=seed).inputs[0, :, 0].long()] += 1
    deviation = (2000 * 0.25 * 0.75) ** 0.5
    assert ((counts - 500).abs() < 4.5 * deviation).all()


def test_both_streams_keep_the_same_rows():
    rows = rows_of(60)
    samples = drawn(rows, 11, 9, originals=rows + 0.5)
    assert torch.equal(samples.originals, samples.inputs + 0.5)
    one = drawn(rows, 11, 9)
    assert one.originals is one.inputs
    assert torch.equal(one.inputs, samples.inputs)


def test_what_is_kept_is_a_copy():
    """A model may change its activations in place afterwards."""
    rows = rows_of(10)
    samples = SampleSum(20, torch.relu)
    samples.add(rows, rows)
    expected = samples.inputs.clone()
    rows.zero_()
    assert torch.equal(samples.inputs, expected)


def test_a_value_that_rounds_across_a_power_of_two(layer):
    """1.0025 = 214 steps is 1 in bfloat16, to which 213 steps are nearer: 0.9979, another value."""
    quantizer, current = layer((OUT, 4), symmetric=False, bits=8, dtype=torch.bfloat16)
    seen = {}

    def decide(problem):
        scale = torch.full_like(problem.nearest_grid().scale, 0.99785 / 213)

        def codes(grid):
            wanted = torch.arange(OUT * IN).view(OUT, IN) % 256
            raw = dequantize(wanted.float(), grid).bfloat16()
            seen["moved"] = wanted[fake_quantize(raw, grid) != raw].unique().tolist()
            return wanted.float()

        return Decision(scale=scale, offset=torch.zeros_like(scale), codes=codes, compare=False)

    problem = current()
    outcome = deploy(problem, quantizer, decide)
    assert seen["moved"] == [214]  # else this test says nothing
    written = quantizer.weight.detach()
    assert torch.equal(fake_quantize(written, quantizer.grid()), written)
    assert outcome.after == pytest.approx(float(problem.errors(written)[0].sum()), rel=1e-5)


def test_the_upstream_error_is_no_more_than_what_all_rows_have() -> None:
    """Most of it is in the first row of each sequence, as in a language model."""
    torch.manual_seed(0)
    weight, total, count = torch.randn(3, 8), 0.0, 0
    error = UpstreamError(weight)
    for _ in range(96):
        rows = torch.randn(1, 64, 8)
        lost = torch.randn(1, 64, 8)
        lost[:, 0] *= 100
        error.add(rows, rows + lost)
        total, count = total + float((lost @ weight.T).square().sum()), count + 64
    assert error.mean == pytest.approx(total / count, rel=0.4)
