"""GPTQ, beam search, coordinate descent and adaptive rounding, against loops and their claims."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rounding_reference import (
    anneal_by_loop,
    descend_by_loop,
    gptq_by_loop,
    soften_by_loop,
    tree_by_loop,
)
from torch import Tensor

from aimet_ext.core.adaround import (
    _anneal,
    _Relaxed,
    adaround,
    adaround_samples,
)
from aimet_ext.core.affine import Grid, dequantize, lpbq_scale, minmax_range, quantize, scale_offset
from aimet_ext.core.gptq import coordinate_descent, gptq
from aimet_ext.core.objective import row_errors

OUT, IN, BLOCK = 6, 12, 4
SHAPES = {"per_tensor": (1, 1), "per_channel": (OUT, 1), "blockwise": (OUT, IN // BLOCK)}
KINDS = [
    *((shape, kind) for shape in SHAPES for kind in ("symmetric", "asymmetric", "shifted")),
    ("blockwise", "lpbq"),
]


@dataclasses.dataclass
class Problem:
    """Inputs that hang together, and channels that differ in size."""

    weight: Tensor
    second: Tensor
    pull: Tensor
    inputs: Tensor


def problem(seed: int = 0, out: int = OUT, width: int = IN, groups: int | None = None) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    count = groups or 1
    mixing = 0.5 * normal(count, width, width) + torch.eye(width)
    inputs = normal(count, 20 * width, width) @ mixing * normal(count, 1, width).exp()
    second = inputs.mT @ inputs / inputs.shape[1]
    pull = 0.1 * normal(out, width) * second[0].diagonal()
    return Problem(normal(out, width), second if groups else second[0], pull, inputs)


def grid_of(weight: Tensor, shape: tuple[int, int], kind: str = "symmetric", bits: int = 3) -> Grid:
    symmetric = kind != "asymmetric"
    shift = 0.5 if kind == "shifted" else 0.0
    bits = 2 if shift else bits
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    block_size = (1, BLOCK) if shape == SHAPES["blockwise"] else None
    bounds = minmax_range(weight, shape, low, high, symmetric, shift)
    scale, offset = scale_offset(*bounds, low, high, symmetric)
    if kind == "lpbq":
        scale = lpbq_scale(scale, (1, -1), 2)
    return Grid(scale, offset, low, high, block_size, shift)


def per_channel(weight: Tensor, bits: int = 3) -> Grid:
    return grid_of(weight, (weight.shape[0], 1), bits=bits)


def errors(p: Problem, grid: Grid, codes: Tensor, pull: Tensor | None = None) -> Tensor:
    return row_errors(dequantize(codes, grid) - p.weight, p.second, pull)


def is_on(grid: Grid, codes: Tensor) -> bool:
    whole = torch.equal(codes, codes.round())
    return whole and bool((codes >= grid.qmin).all() and (codes <= grid.qmax).all())


@pytest.fixture(params=KINDS, ids="-".join)
def case(request) -> tuple[Problem, Grid]:
    p = problem(1)
    return p, grid_of(p.weight, SHAPES[request.param[0]], request.param[1])


# ---- against loops -------------------------------------------------------------------------------


@pytest.mark.parametrize("with_pull", [False, True])
@pytest.mark.parametrize("block", [5, 128])
def test_gptq_is_the_papers_algorithm(case, with_pull, block):
    p, grid = case
    pull = p.pull if with_pull else None
    codes = gptq(p.weight, grid, p.second, pull, damping=0.01, block=block)
    assert torch.equal(codes, gptq_by_loop(p.weight, grid, p.second, pull, 0.01))
    assert not torch.equal(codes, quantize(p.weight, grid))


def test_upstream_errors_are_compensated_as_by_least_squares():
    """Qronos's recursion on the data themselves, whose first column alone it rounds otherwise.

    ``min ‖W x − Ŵ x̂‖²``: what is rounded stays, the other columns go to their least squares, and
    the next one is rounded. So do GPTQ's columns with the whole of ``C`` in the pull.
    """
    p = problem(out=40)
    grid = per_channel(p.weight)
    seen = p.inputs[0]  # [tokens, in]
    lost = 0.3 * torch.randn(seen.shape, generator=torch.Generator().manual_seed(5)).double()
    targets = (seen + lost * seen.std(0)) @ p.weight.T  # [tokens, out]
    found = {}
    for first in ("held", "free"):
        values = p.weight.clone()
        for column in range(IN):
            rest = seen[:, column:]
            if column or first == "free":
                known = targets - seen[:, :column] @ values[:, :column].T
                values[:, column:] = torch.linalg.lstsq(rest, known).solution.T
            else:  # the others stay at the float weight
                known = targets - seen[:, 1:] @ values[:, 1:].T
                values[:, :1] = torch.linalg.lstsq(seen[:, :1], known).solution.T
            values[:, column] = dequantize(quantize(values, grid), grid)[:, column]
        found[first] = values
    pull = p.weight @ (lost * seen.std(0)).T @ seen / len(seen)
    codes = gptq(p.weight, grid, p.second, pull, damping=1e-12)
    assert torch.equal(dequantize(codes, grid), found["free"])
    same = found["held"][:, 0] == found["free"][:, 0]
    assert 0 < same.sum() < len(same)
    assert torch.equal(found["held"][same], found["free"][same])
    # Nothing of it is left for plain GPTQ once the weight is where least squares has it.
    moved = p.weight + torch.linalg.solve(p.second, pull.T).T
    assert torch.equal(gptq(moved, grid, p.second, damping=1e-12), codes)


def test_act_order_is_gptq_on_sorted_columns():
    p = problem(2)
    grid = per_channel(p.weight)
    order = p.second.diagonal().argsort(descending=True)
    codes = gptq(p.weight, grid, p.second, p.pull, act_order=True)
    expected = gptq_by_loop(
        p.weight[:, order], grid, p.second[order][:, order], p.pull[:, order], 0.01
    )
    assert torch.equal(codes[:, order], expected)


def test_act_order_takes_the_scales_of_blocks_along():
    p = problem(3)
    grid = grid_of(p.weight, SHAPES["blockwise"])
    every = dataclasses.replace(
        grid,
        scale=grid.scale.repeat_interleave(BLOCK, 1),
        offset=grid.offset.repeat_interleave(BLOCK, 1),
    )
    order = p.second.diagonal().argsort(descending=True)
    every = dataclasses.replace(every, scale=every.scale[:, order], offset=every.offset[:, order])
    codes = gptq(p.weight, grid, p.second, act_order=True)
    expected = gptq_by_loop(p.weight[:, order], every, p.second[order][:, order], None, 0.01)
    assert torch.equal(codes[:, order], expected)


@pytest.mark.parametrize("beams", [4, 64])
@pytest.mark.parametrize("with_pull", [False, True])
def test_enough_beams_find_the_best_leaf(beams, with_pull):
    """64 beams are all leaves of six columns with two branches each; 4 may miss the best one."""
    p = problem(4, out=3, width=6)
    grid = per_channel(p.weight)
    pull = p.pull if with_pull else None
    best = tree_by_loop(p.weight, grid, p.second, pull)
    codes = gptq(p.weight, grid, p.second, pull, damping=0.0, beams=beams)
    if beams == 64:
        assert torch.equal(codes, best)
    else:
        found, optimum = (errors(p, grid, c, pull) for c in (codes, best))
        assert (found >= optimum - 1e-12).all()


@pytest.mark.parametrize("with_pull", [False, True])
@pytest.mark.parametrize("block", [5, 128])
def test_a_sweep_moves_every_code_to_its_minimiser(case, with_pull, block):
    p, grid = case
    pull = p.pull if with_pull else None
    start = quantize(p.weight, grid)
    codes = coordinate_descent(p.weight, start, grid, p.second, pull, sweeps=1, block=block)
    assert torch.equal(codes, descend_by_loop(p.weight, grid, p.second, pull, start))
    assert not torch.equal(codes, start)


def test_soft_descent_moves_by_the_stated_rules(case):
    p, grid = case
    codes = adaround(p.weight, grid, p.second, p.pull, num_iterations=12, momentum=0.6)
    expected = soften_by_loop(p.weight, grid, p.second, p.pull, 12, 0.6)
    near = quantize(p.weight, grid)
    better = errors(p, grid, expected, p.pull) < errors(p, grid, near, p.pull)
    assert torch.equal(codes, torch.where(better[:, None], expected, near))
    assert better.sum() > OUT / 2


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_relaxed_codes_move_by_the_stated_rules(momentum):
    p = problem(5, out=1)
    strengths = [(k + 1) / 40 for k in range(40)]
    ideal = 2 * p.weight
    start = ideal.clone()
    start[0, :4] = start[0, :4].round()
    scaled = p.second / p.second.diagonal()[:, None]

    def gradient(codes: Tensor) -> Tensor:
        return scaled @ (codes - ideal.T)

    relaxed = _Relaxed(start.T[None].clone(), -3, 3)
    for strength in strengths:
        relaxed.step(
            gradient(relaxed.codes), strength, torch.tensor(0.2, dtype=torch.float64), momentum
        )
    expected = anneal_by_loop(
        ideal[0].tolist(), p.second, start[0].tolist(), (-3, 3), strengths, 0.2, momentum
    )
    torch.testing.assert_close(relaxed.codes[0, :, 0].tolist(), expected, rtol=1e-9, atol=1e-9)
    assert any(code == round(code) for code in expected)
    assert any(code != round(code) for code in expected)


# ---- what each method promises -------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_loses_on_weights_and_wins_on_outputs(bits):
    p = problem(6, out=64, width=48)
    grid = per_channel(p.weight, bits)
    near, codes = quantize(p.weight, grid), gptq(p.weight, grid, p.second)
    moved = [(dequantize(c, grid) - p.weight).square().sum() for c in (near, codes)]
    assert moved[1] > moved[0]
    assert errors(p, grid, codes).sum() < 0.7 * errors(p, grid, near).sum()


def test_each_method_improves_on_the_one_before():
    p = problem(7, out=64, width=48)
    grid = per_channel(p.weight)
    greedy = gptq(p.weight, grid, p.second, act_order=True)
    refined = coordinate_descent(p.weight, greedy, grid, p.second)
    beams = gptq(p.weight, grid, p.second, act_order=True, beams=8)
    annealed = adaround(p.weight, grid, p.second, num_iterations=200, start=beams)
    sums = [
        float(errors(p, grid, c).sum())
        for c in (quantize(p.weight, grid), greedy, refined, beams, annealed)
    ]
    assert sums == sorted(sums, reverse=True)
    assert sums[3] < 0.95 * sums[2]
    assert sums[4] < 0.99 * sums[3]


@pytest.mark.parametrize("with_pull", [False, True])
def test_no_sweep_makes_any_row_worse(case, with_pull):
    p, grid = case
    pull = p.pull if with_pull else None
    codes = quantize(p.weight, grid)
    for _ in range(6):
        after = coordinate_descent(p.weight, codes, grid, p.second, pull, sweeps=1)
        worse = errors(p, grid, after, pull) - errors(p, grid, codes, pull)
        assert (worse <= 1e-12).all()
        codes = after
    assert is_on(grid, codes)
    settled = coordinate_descent(p.weight, codes, grid, p.second, pull, sweeps=100)
    again = coordinate_descent(p.weight, settled, grid, p.second, pull, sweeps=1)
    assert torch.equal(settled, again)


def test_descent_in_float32_stays_monotone():
    p = problem(8, out=64, width=96)
    grid = per_channel(p.weight.float())
    codes = quantize(p.weight.float(), grid)
    for _ in range(5):
        after = coordinate_descent(p.weight.float(), codes, grid, p.second.float(), sweeps=1)
        before, now = errors(p, grid, codes.double()), errors(p, grid, after.double())
        assert (now <= before * (1 + 1e-6)).all()
        codes = after


@pytest.mark.parametrize("with_pull", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_adaround_is_never_worse_than_what_it_knows(case, with_pull, started):
    p, grid = case
    pull = p.pull if with_pull else None
    start = gptq(p.weight, grid, p.second, pull) if started else None
    codes = adaround(p.weight, grid, p.second, pull, num_iterations=60, start=start)
    assert is_on(grid, codes)
    known = [quantize(p.weight, grid)] + ([start] if started else [])
    lowest = torch.stack([errors(p, grid, c, pull) for c in known]).amin(0)
    assert (errors(p, grid, codes, pull) <= lowest + 1e-12).all()


@pytest.mark.parametrize("shape", list(SHAPES))
def test_adaround_from_the_weight_alone_beats_rounding_by_far(shape):
    p = problem(9)
    grid = grid_of(p.weight, SHAPES[shape], bits=4)
    codes = adaround(p.weight, grid, p.second, num_iterations=300)
    assert errors(p, grid, codes).sum() < 0.75 * errors(p, grid, quantize(p.weight, grid)).sum()


def test_adaround_stops_when_nothing_moves():
    p = problem(10, out=1)
    grid = per_channel(p.weight)
    calls = []

    def counted(codes: Tensor) -> Tensor:
        calls.append(1)
        return codes - p.weight.T

    relaxed = _Relaxed(p.weight.T[None].round(), grid.qmin, grid.qmax)
    codes = _anneal(relaxed, counted, [1.0] * 1000, torch.tensor(1.0), 0.9)
    assert len(calls) < 700
    assert torch.equal(codes, relaxed.codes)


def test_blocks_change_the_time_alone():
    p = problem(11, out=20, width=40)
    grid = per_channel(p.weight)
    reference = gptq(p.weight, grid, p.second, p.pull, block=1)
    for block in (7, 40, 1000):
        codes = gptq(p.weight, grid, p.second, p.pull, block=block)
        assert torch.equal(codes, reference)


def test_methods_are_deterministic_and_leave_their_arguments_alone():
    p = problem(12)
    grid = per_channel(p.weight)
    start = gptq(p.weight, grid, p.second, p.pull)
    kept = [tensor.clone() for tensor in (p.weight, p.second, p.pull, start, grid.scale)]

    def run() -> list[Tensor]:
        return [
            gptq(p.weight, grid, p.second, p.pull, act_order=True, beams=3),
            coordinate_descent(p.weight, start, grid, p.second, p.pull),
            adaround(p.weight, grid, p.second, p.pull, num_iterations=30, start=start),
        ]

    assert all(map(torch.equal, run(), run()))
    assert all(map(torch.equal, kept, (p.weight, p.second, p.pull, start, grid.scale)))


# ---- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_groups_are_separate_problems(rows):
    groups = 4
    p = problem(13, out=groups * rows, groups=groups)
    grid = per_channel(p.weight)
    start = quantize(p.weight, grid)
    parts = [slice(g * rows, (g + 1) * rows) for g in range(groups)]

    def on_each(method) -> Tensor:
        return torch.cat(
            [
                method(
                    p.weight[at],
                    dataclasses.replace(grid, scale=grid.scale[at], offset=grid.offset[at]),
                    p.second[g],
                    p.pull[at],
                    start[at],
                )
                for g, at in enumerate(parts)
            ]
        )

    for method in (
        lambda w, grid, h, pull, _: gptq(w, grid, h, pull),
        lambda w, grid, h, pull, _: gptq(w, grid, h, pull, act_order=True),
        lambda w, grid, h, pull, _: gptq(w, grid, h, pull, beams=4, act_order=True),
        lambda w, grid, h, pull, start: coordinate_descent(w, start, grid, h, pull),
        # Without the second half, in which one group that moves keeps the others moving.
        lambda w, grid, h, pull, _: adaround(w, grid, h, pull, num_iterations=1),
    ):
        codes = method(p.weight, grid, p.second, p.pull, start)
        assert torch.equal(codes, on_each(method))


def test_a_per_tensor_grid_serves_all_groups():
    p = problem(14, out=6, groups=3)
    grid = grid_of(p.weight, (1, 1))
    expected = gptq_by_loop(p.weight, grid, p.second, p.pull, 0.01)
    assert torch.equal(gptq(p.weight, grid, p.second, p.pull), expected)


# ---- inputs that say little ----------------------------------------------------------------------


def methods(p: Problem, grid: Grid) -> dict[str, Tensor]:
    start = quantize(p.weight, grid)
    return {
        "gptq": gptq(p.weight, grid, p.second, p.pull),
        "act_order": gptq(p.weight, grid, p.second, p.pull, act_order=True),
        "beams": gptq(p.weight, grid, p.second, p.pull, beams=4),
        "descent": coordinate_descent(p.weight, start, grid, p.second, p.pull),
        "adaround": adaround(p.weight, grid, p.second, p.pull, num_iterations=50),
    }


def test_channels_without_input_are_rounded_to_nearest(case):
    p, grid = case
    dead = torch.tensor([0, 5, 11])
    p.second[dead] = 0
    p.second[:, dead] = 0
    for name, codes in methods(p, grid).items():
        assert torch.equal(codes[:, dead], quantize(p.weight, grid)[:, dead]), name
        assert is_on(grid, codes), name


def test_no_input_at_all_is_plain_rounding():
    p = problem(15)
    p.second.zero_()
    grid = per_channel(p.weight)
    for name, codes in methods(p, grid).items():
        assert torch.equal(codes, quantize(p.weight, grid)), name


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_singular_moment_is_no_error(damping):
    """Three samples of twelve channels."""
    p = problem(16)
    inputs = p.inputs[0, :3]
    p.second = inputs.T @ inputs / 3
    grid = per_channel(p.weight)
    near = errors(p, grid, quantize(p.weight, grid)).sum()
    for beams in (1, 4):
        codes = gptq(p.weight, grid, p.second, damping=damping, beams=beams)
        assert is_on(grid, codes)
        assert errors(p, grid, codes).sum() < 0.5 * near


def test_unfit_arguments_are_named():
    p = problem(17)
    grid = per_channel(p.weight)
    with pytest.raises(ValueError, match=r"second moments \[in, in\].*got \(11, 11\)"):
        gptq(p.weight, grid, p.second[:11, :11])
    with pytest.raises(ValueError, match=r"required, got \(5, 12, 12\)"):
        gptq(p.weight, grid, p.second.expand(5, IN, IN))
    with pytest.raises(ValueError, match="beams: at least 1"):
        gptq(p.weight, grid, p.second, beams=0)
    with pytest.raises(ValueError, match="num_iterations: at least 1"):
        adaround(p.weight, grid, p.second, num_iterations=0)


# ---- behind an activation ------------------------------------------------------------------------


def behind(p: Problem, bias: Tensor, weight: Tensor, activation) -> Tensor:
    grouped = weight.view(p.inputs.shape[0], -1, weight.shape[1])
    return activation((p.inputs @ grouped.mT).transpose(0, 1).flatten(1) + bias)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("activation", [torch.relu, torch.nn.functional.gelu])
def test_the_error_behind_the_activation_is_what_counts(groups, activation):
    """Behind it better than what is best without the activation, and worse without it."""
    p = problem(30, out=32, width=16, groups=groups)
    grid = per_channel(p.weight)
    linear = behind(p, torch.zeros(32), p.weight, torch.nn.Identity())
    bias = -1.5 * linear.std(0)  # one output in fifteen is positive
    target = linear + bias
    moments = gptq(p.weight, grid, p.second, act_order=True, damping=1e-4, beams=64)
    moments = adaround(p.weight, grid, p.second, num_iterations=300, start=moments)
    samples = adaround_samples(
        p.weight,
        bias,
        grid,
        p.inputs,
        target,
        activation,
        num_iterations=200,
        batch=100,
        start=moments,
    )
    assert is_on(grid, samples)

    def error(codes: Tensor) -> Tensor:
        output = behind(p, bias, dequantize(codes, grid), activation)
        return (output - activation(target)).square().mean(0)

    assert error(samples).sum() < 0.8 * error(moments).sum()
    assert (error(samples) <= error(quantize(p.weight, grid)) + 1e-12).all()
    assert errors(p, grid, samples).sum() > 1.2 * errors(p, grid, moments).sum()


def test_samples_without_activation_come_near_the_moments():
    p = problem(19, out=32, width=16, groups=1)
    grid = per_channel(p.weight)
    target = behind(p, torch.zeros(32), p.weight, torch.nn.Identity())
    found = [
        adaround(p.weight, grid, p.second, num_iterations=300),
        adaround_samples(
            p.weight, None, grid, p.inputs, target, torch.nn.Identity(), num_iterations=300
        ),
    ]
    by_moments, by_samples = (errors(p, grid, codes).sum() for codes in found)
    torch.testing.assert_close(by_samples, by_moments, rtol=0.05, atol=0)


def test_the_generator_decides_the_minibatches():
    p = problem(20, groups=1)
    grid = per_channel(p.weight)
    target = behind(p, torch.zeros(OUT), p.weight, torch.nn.Identity())

    def run(generator: torch.Generator | None) -> Tensor:
        return adaround_samples(
            p.weight,
            None,
            grid,
            p.inputs,
            target,
            torch.relu,
            num_iterations=20,
            batch=16,
            generator=generator,
        )

    assert torch.equal(run(None), run(None))
    assert torch.equal(run(torch.Generator().manual_seed(3)), run(torch.Generator().manual_seed(3)))


def test_rows_that_the_activation_always_silences_keep_plain_rounding():
    p = problem(21, groups=1)
    grid = per_channel(p.weight)
    bias = torch.full((OUT,), -1e6, dtype=torch.float64)
    target = behind(p, bias, p.weight, torch.nn.Identity())
    codes = adaround_samples(p.weight, bias, grid, p.inputs, target, torch.relu, num_iterations=20)
    assert torch.equal(codes, quantize(p.weight, grid))
