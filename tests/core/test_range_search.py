"""Ranges from second moments: AIMET's own choice, and one that is never worse."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from range_search_reference import (
    Problem,
    compatible_by_loop,
    layout_of,
    losses_by_loop,
    problem,
)
from torch.nn import functional

from aimet_ext.core.affine import fake_quantize, integer_scale, lpbq_scale
from aimet_ext.core.clipping import GridLayout, free_layout, search_ranges
from aimet_ext.core.objective import row_errors
from aimet_ext.core.range_search import best_ranges, compatible_ranges
from aimet_ext.data.geometry import Geometry
from aimet_ext.data.moments import MomentSum

KINDS = [
    (kind, symmetric)
    for kind in ("per_tensor", "per_channel", "blockwise")
    for symmetric in (True, False)
] + [("lpbq", True)]


def compatible(p: Problem, layout: GridLayout, count: int = 20, *, both: bool = False):
    return compatible_ranges(p.weight, layout, p.second, p.cross if both else None, count)


def compatible_scale(p: Problem, layout: GridLayout, count: int = 20):
    return layout.raw(*compatible(p, layout, count))


# ---- AIMET's choice ------------------------------------------------------------------------------


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("kind", "symmetric"), KINDS)
def test_compatible_is_the_loop_over_tokens(kind, symmetric, groups, both):
    """``‖x̂ ŵ − x w‖²`` summed over tokens, and ``E H Eᵀ − 2 E C Wᵀ``: the same winners."""
    for seed in range(2):
        p = problem(seed, groups=groups)
        layout = layout_of(kind, *p.weight.shape, bits=3, symmetric=symmetric)
        expected = compatible_by_loop(p, free_layout(layout), 10, both=both)
        found = compatible(p, layout, 10, both=both)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        full = free_layout(layout).bounds(p.weight)
        if kind != "per_tensor":
            assert (found[1] < 0.95 * full[1]).any()  # there was something to choose


def test_a_shared_range_is_the_widest_choice_of_all_rows():
    p = problem(3)
    layout = layout_of("per_tensor", *p.weight.shape, bits=3)
    p.weight[0] *= 5
    losses, ranges = losses_by_loop(p, layout, 10, both=False)
    winner = torch.stack(losses).min(0).indices.amax()
    assert torch.equal(compatible(p, layout, 10)[1], ranges[winner][1])


def test_the_first_of_equal_candidates_wins():
    """No input: all candidates are as good, the narrowest is taken."""
    p = problem(0)
    layout = layout_of("per_channel", *p.weight.shape)
    low, high = compatible_ranges(p.weight, layout, torch.zeros_like(p.second), None, 8)
    torch.testing.assert_close((8 * low, 8 * high), layout.bounds(p.weight))


aimet = pytest.mark.parametrize("both", [False, True], ids=["symqt", "asym"])


def aimet_winners(module, originals, rows, count=20):
    """Ranges and scale that AIMET's search leaves in a quantized module's quantizer."""
    seq_mse = pytest.importorskip("aimet_torch.seq_mse")
    module._compute_param_encodings(overwrite=True)
    quantizer = module.param_quantizers["weight"]
    grouping = getattr(quantizer, "block_grouping", None)
    if grouping is not None:  # AIMET searches LPBQ with each block on its own
        quantizer.block_grouping = (1,) * len(grouping)
    params = seq_mse.SeqMseParams(num_batches=None, num_candidates=count)
    seq_mse.optimize_module(module, originals, rows, params)
    scale, offset = quantizer.get_scale(), quantizer.get_offset()
    if grouping is not None:
        quantizer.block_grouping = grouping
    return scale.detach(), offset.detach()


def aimet_quantizer(layout: GridLayout, dims: int, bits: int):
    affine = pytest.importorskip("aimet_torch.quantization.affine")
    ones = (1,) * (dims - 2)
    shape = (*layout.shape, *ones) if layout.shape != (1, 1) else ()
    block = None if layout.block_size is None else (*layout.block_size, *(-1,) * (dims - 2))
    if layout.scale_bits is None:
        return affine.QuantizeDequantize(
            shape, bitwidth=bits, symmetric=layout.symmetric, block_size=block
        )
    return affine.GroupedBlockQuantizeDequantize(
        shape,
        bitwidth=bits,
        symmetric=True,
        decompressed_bw=bits + layout.scale_bits,
        block_size=block,
        block_grouping=(*layout.block_grouping, *ones),
    )


def compare(found, expected, losses):
    """Share of cells with another winner; those must tie.

    :param losses: from scale and offset to the loss of every row and block, by tokens.
    """
    shape = found[0].shape
    scale, offset = (tensor.reshape(shape) for tensor in expected)
    other = ~torch.isclose(found[0], scale, rtol=1e-5) | (found[1] != offset)
    if bool(other.any()):
        mine, theirs = losses(*found), losses(scale, offset)
        gap = ((mine - theirs) / theirs).abs()
        assert (gap[other.expand_as(gap)] <= 1e-5).all()
    return float(other.double().mean())


@aimet
@pytest.mark.parametrize(("kind", "symmetric"), KINDS)
def test_linear_layers_get_the_ranges_of_aimet(kind, symmetric, both):
    """Of 2048 rows (or more blocks) at least 99.9 % the same, the others equal in loss."""
    nn = pytest.importorskip("aimet_torch.nn")
    out, width, bits = 2048, 32, 4
    p = problem(1, out, width, tokens=256, dtype=torch.float32)
    layout = layout_of(kind, out, width, bits=bits, symmetric=symmetric, block=8)
    module = nn.QuantizedLinear(width, out, bias=False)
    module.weight.data.copy_(p.weight)
    module.param_quantizers["weight"] = aimet_quantizer(layout, 2, bits)
    rows = p.rows[0].split(100)
    originals = p.originals[0].split(100) if both else rows
    expected = aimet_winners(module, originals, rows)
    moments = MomentSum(width, device="cpu", cross=both)
    moments.add(p.rows, p.originals if both else None)
    moment = moments.result(torch.float32)
    chosen = compatible_ranges(p.weight, layout, moment.second, moment.cross, 20)
    free = free_layout(layout)

    def losses(scale, offset):
        weight = p.weight.double()
        values = quantized(free, p, scale, offset).double()
        blocks = (-1, layout.shape[1], width // layout.shape[1])
        rows, target = p.rows[0].double(), (p.originals if both else p.rows)[0].double()
        gap = torch.einsum("tbi,obi->tob", rows.view(blocks), values.view(blocks))
        gap -= torch.einsum("tbi,obi->tob", target.view(blocks), weight.view(blocks))
        return gap.square().sum(0)

    assert compare(free.raw(*chosen), expected, losses) <= 1e-3


def quantized(layout, p, scale, offset):
    return fake_quantize(p.weight, layout.with_scale(scale, offset))


CONVOLUTIONS = {
    "plain": ("per_channel", {"padding": 1}),
    "strided": ("per_channel", {"stride": 2, "dilation": 2}),
    "groups": ("per_channel", {"groups": 4, "padding": 1}),
    "groups_per_tensor": ("per_tensor", {"groups": 2}),
    "blockwise": ("blockwise", {"padding": 1}),
    "lpbq": ("lpbq", {}),
}


@aimet
@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_convolutions_get_the_ranges_of_aimet(name, both):
    nn = pytest.importorskip("aimet_torch.nn")
    kind, settings = CONVOLUTIONS[name]
    channels, out, size, bits = 16, 512, 3, 4
    module = nn.QuantizedConv2d(channels, out, size, bias=False, **settings)
    inside = channels // module.groups
    width = inside * size**2
    p = problem(2, out, width, tokens=1, dtype=torch.float32)
    module.weight.data.copy_(p.weight.view_as(module.weight))
    layout = layout_of(kind, out, inside, bits=bits, block=4)
    module.param_quantizers["weight"] = aimet_quantizer(layout, 4, bits)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, channels, 8, 8, generator=generator) for _ in range(2)]
    noise = [0.1 * torch.randn(x.shape, generator=generator) for x in rows]
    originals = [x + e for x, e in zip(rows, noise, strict=True)] if both else rows
    expected = aimet_winners(module, originals, rows)
    geometry = Geometry.of(module)
    moments = MomentSum(width, module.groups, device="cpu", cross=both)
    for x, original in zip(rows, originals, strict=True):
        moments.add(geometry.rows(x), geometry.rows(original) if both else None)
    moment = moments.result(torch.float32)
    chosen = compatible_ranges(p.weight, layout, moment.second, moment.cross, 20)
    free = free_layout(layout)

    def losses(scale, offset):
        values = quantized(free, p, scale, offset).view_as(module.weight).double()
        weight = module.weight.detach().double()
        block = inside // layout.shape[1]
        found = []
        for at in range(0, inside, block):
            part = slice(at, at + block)
            where = slice(None) if module.groups > 1 else part
            gap = 0.0
            for x, original in zip(rows, originals, strict=True):
                options = (None, module.stride, module.padding, module.dilation, module.groups)
                output = functional.conv2d(x[:, where].double(), values[:, part], *options)
                target = functional.conv2d(original[:, where].double(), weight[:, part], *options)
                gap += (output - target).square().sum((0, 2, 3))
            found.append(gap)
        return torch.stack(found, 1)

    assert compare(free.raw(*chosen), expected, losses) <= 1e-3


# ---- a better one --------------------------------------------------------------------------------


def best(p: Problem, layout: GridLayout, pull=None, **settings):
    return best_ranges(p.weight, layout, p.second, pull, **settings)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_best_is_never_above_compatible_per_channel(seed, bits):
    """Row by row: its first sweep tries AIMET's candidates, and no later one makes it worse."""
    p = problem(seed, 64, 24)
    layout = layout_of("per_channel", 64, 24, bits=bits)
    found = p.errors(layout, *best(p, layout))
    theirs = p.errors(layout, *compatible_scale(p, layout))
    assert (found <= theirs * (1 + 1e-9)).all()
    assert found.sum() < theirs.sum()


@pytest.mark.parametrize("pulled", [False, True])
@pytest.mark.parametrize(("kind", "symmetric"), KINDS)
def test_each_sweep_lowers_the_objective(kind, symmetric, pulled):
    """Of each row where rows share no cell, on the grid that is deployed and the whole ``H``."""
    p = problem(5, 32, 24)
    pull = p.pull if pulled else None
    layout = layout_of(kind, 32, 24, bits=3, symmetric=symmetric)
    errors = [
        p.errors(layout, *best(p, layout, pull, sweeps=sweeps), pull) for sweeps in (1, 2, 3, 6)
    ]
    if kind in ("per_tensor", "lpbq"):  # LPBQ's also start from a better search without integers
        errors = [error.sum() for error in errors]
    for earlier, later in itertools.pairwise(errors):
        assert (later <= earlier + 1e-9 * errors[0].abs()).all()
    if kind != "per_tensor":
        assert errors[1].sum() < errors[0].sum()


@pytest.mark.parametrize(("kind", "symmetric"), KINDS)
def test_best_beats_compatible_on_what_is_deployed(kind, symmetric):
    """LPBQ included: AIMET's search does not know of the integers."""
    ratios = []
    for seed in range(4):
        p = problem(seed, 32, 24)
        layout = layout_of(kind, 32, 24, bits=3, symmetric=symmetric)
        found = p.errors(layout, *best(p, layout)).sum()
        ratios.append(float(found / p.errors(layout, *compatible_scale(p, layout)).sum()))
    assert max(ratios) < 1
    if kind in ("blockwise", "lpbq"):  # AIMET's judges each block by itself
        assert max(ratios) < 0.9


def test_two_sides_help_where_weights_are_lopsided():
    """A range cut on one side alone: below anything that a common share reaches."""
    p = problem(6, 64, 24)
    p.weight[:, 0] = p.weight.amax(1) * 4  # one outlier on one side, of little consequence
    p.rows[..., 0] *= 0.01
    layout = layout_of("per_channel", 64, 24, bits=3, symmetric=False)
    low, high = layout.bounds(p.weight)
    shares = torch.linspace(0.005, 1, 400, dtype=torch.float64).tolist()
    common = torch.stack([p.errors(layout, *layout.raw(low * s, high * s)) for s in shares]).amin(0)
    found = p.errors(layout, *best(p, layout))
    assert found.sum() < 0.8 * common.sum()


def test_a_pull_moves_the_ranges():
    """Towards what undoes the errors of earlier layers."""
    p = problem(7, 32, 24)
    for kind, symmetric in KINDS[2:]:
        layout = layout_of(kind, 32, 24, bits=3, symmetric=symmetric)
        without, with_pull = best(p, layout), best(p, layout, p.pull)
        assert not torch.equal(without[0], with_pull[0])
        mine, theirs = (p.errors(layout, *state, p.pull).sum() for state in (with_pull, without))
        assert mine < theirs
        assert p.errors(layout, *with_pull).sum() > p.errors(layout, *without).sum()


@pytest.mark.parametrize("seed", range(4))
def test_lpbq_ranges_are_what_aimet_derives_from_them(seed):
    """The top integer is present in each row, and writing the scales changes nothing."""
    p = problem(seed, 64, 32)
    layout = layout_of("lpbq", 64, 32)
    scale, _ = best(p, layout)
    integers = integer_scale(scale, layout.block_grouping, layout.scale_bits)
    assert (integers.amax(1) == 16).all()
    deployed = lpbq_scale(scale, layout.block_grouping, layout.scale_bits)
    torch.testing.assert_close(deployed, scale, rtol=1e-12, atol=0)
    quantizer = aimet_quantizer(layout, 2, 4)
    steps = layout.qmax - layout.qmin
    low = (deployed * layout.qmin).float()
    quantizer.set_range(low, low + steps * deployed.float())
    torch.testing.assert_close(quantizer.get_scale(), deployed.float(), rtol=1e-6, atol=0)


def test_lpbq_improves_on_its_best_float_scales_rounded():
    """Choosing integers by the error beats rounding the free scales to them."""
    p = problem(8, 64, 32)
    layout = layout_of("lpbq", 64, 32, bits=3)
    free = best(p, free_layout(layout))
    rounded = p.errors(layout, *free)
    found = p.errors(layout, *best(p, layout))
    assert (found <= rounded * (1 + 1e-9)).all()
    assert found.sum() < 0.98 * rounded.sum()


@pytest.mark.parametrize("name", ["best", "compatible"])
def test_groups_are_searched_as_layers_of_their_own(name):
    p = problem(9, 16, 12, groups=4)
    for kind, symmetric in KINDS[2:]:
        layout = layout_of(kind, 16, 12, bits=3, symmetric=symmetric)
        part = replace(layout, shape=(4, layout.shape[1]))

        def search(weight, layout, second, cross, pull):
            if name == "best":
                return best_ranges(weight, layout, second, pull)
            return compatible_ranges(weight, layout, second, cross, 20)

        together = search(p.weight, layout, p.second, p.cross, p.pull)
        for group in range(4):
            rows = slice(4 * group, 4 * group + 4)
            alone = search(p.weight[rows], part, p.second[group], p.cross[group], p.pull[rows])
            for whole, mine in zip(together, alone, strict=True):
                torch.testing.assert_close(whole[rows], mine, rtol=1e-9, atol=1e-12)


def test_blocks_are_judged_together():
    """Coordinate descent on the whole ``H`` sees what other blocks got wrong; AIMET's does not."""
    p = problem(10, 32, 24)
    layout = layout_of("blockwise", 32, 24, bits=3)
    columns = torch.arange(24) // 4
    own = p.second * (columns[:, None] == columns)
    alone = best_ranges(p.weight, layout, own)
    together = best(p, layout)
    assert p.errors(layout, *together).sum() < 0.95 * p.errors(layout, *alone).sum()
    error = quantized(layout, p, *alone) - p.weight
    others = quantized(layout, p, *together) - p.weight
    assert row_errors(error, own, None).sum() < row_errors(others, own, None).sum()


def test_one_candidate_is_the_full_range():
    p = problem(11, 32, 24)
    layout = layout_of("per_channel", 32, 24)
    full = layout.bounds(p.weight)
    torch.testing.assert_close(compatible(p, layout, 1), full)
    found = best(p, layout, num_candidates=1, sweeps=1)
    torch.testing.assert_close(found, layout.raw(*full), rtol=0, atol=0)


def test_best_starts_where_a_single_search_ends():
    p = problem(12, 32, 24)
    layout = layout_of("blockwise", 32, 24, symmetric=False)
    shares = torch.arange(20, 0, -1, dtype=torch.float64) / 20
    expected = search_ranges(p.weight, layout, p.second, shares=shares)
    torch.testing.assert_close(best(p, layout, sweeps=1), expected, rtol=0, atol=0)


def test_rows_and_channels_of_zeros_do_no_harm():
    """A dead channel has no second moment, a dead row no range."""
    p = problem(13)
    p.weight[2] = 0
    p.rows[..., 5] = 0
    for kind, symmetric in KINDS:
        layout = layout_of(kind, *p.weight.shape, symmetric=symmetric)
        for scale, offset in (best(p, layout), compatible_scale(p, layout)):
            assert torch.isfinite(scale).all() and (scale > 0).all()
            assert torch.isfinite(p.errors(layout, scale, offset)).all()
            assert (quantized(layout, p, scale, offset)[2] == 0).all()
