"""HQQ's ranges against its formulas, and what they are for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hqq_reference import hqq_by_loop
from torch import Tensor

from aimet_ext.core.affine import fake_quantize, short_scale
from aimet_ext.core.clipping import GridLayout
from aimet_ext.core.hqq import hqq_ranges, lp_rows

SETTINGS = {"num_iterations": 12, "lp_norm": 0.7, "beta": 2.0, "kappa": 1.1}
SHAPES = {"tensor": (1, 1), "channel": (6, 1), "blocks": (6, 4), "LPBQ": (6, 4)}


def layout(kind: str, bits: int, symmetric: bool = True) -> GridLayout:
    signed = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    low, high = signed if symmetric else (0, 2**bits - 1)
    blocks = SHAPES[kind][1] > 1
    return GridLayout(
        shape=SHAPES[kind],
        qmin=low,
        qmax=high,
        symmetric=symmetric,
        zero_point_shift=0.5 if symmetric and bits == 2 and not blocks else 0.0,
        block_size=(1, 8) if blocks else None,
        block_grouping=(1, -1) if kind == "LPBQ" else None,
        scale_bits=4 if kind == "LPBQ" else None,
    )


def weights(seed: int = 0) -> Tensor:
    """Weights with some outliers; one row is 0."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 32, generator=generator, dtype=torch.float64) * 0.02
    weight[torch.rand(6, 32, generator=generator) < 0.05] *= 5
    weight[4] = 0
    return weight


def losses(weight: Tensor, grid: GridLayout, scale: Tensor, offset: Tensor, p: float) -> Tensor:
    return lp_rows(fake_quantize(weight, grid.with_scale(scale, offset)) - weight, p)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", SHAPES)
def test_ranges_are_those_of_the_formulas(kind: str, bits: int, symmetric: bool) -> None:
    if kind == "LPBQ" and not symmetric:
        return
    weight, grid = weights(), layout(kind, bits, symmetric)
    scale, offset = hqq_ranges(weight, grid, **SETTINGS)
    expected = hqq_by_loop(weight, grid, **SETTINGS)
    deployed = grid.with_scale(short_scale(scale), offset)
    torch.testing.assert_close(deployed.scale.float(), expected[0], rtol=2e-7, atol=0)
    assert torch.equal(offset.float(), expected[1])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["channel", "blocks", "LPBQ"])
def test_the_norm_falls_and_no_cell_is_above_plain_rounding(kind: str, symmetric: bool) -> None:
    weight, p = weights(1), SETTINGS["lp_norm"]
    grid = layout(kind, 4, symmetric or kind == "LPBQ")
    plain, offset = grid.raw(*grid.bounds(weight))
    before = losses(weight, grid, short_scale(plain), offset, p)
    scale, offset = hqq_ranges(weight, grid, **SETTINGS)
    after = losses(weight, grid, short_scale(scale), offset, p)
    assert bool((after <= before).all())
    assert float(after.sum()) < float(before.sum())


def test_outliers_count_less_than_in_a_squared_error() -> None:
    """In both directions: a lower norm of the many, a larger error of the one."""
    weight = torch.linspace(-0.5, 0.5, 64, dtype=torch.float64)[None].clone()
    weight[0, 0] = 2.0
    grid = dataclasses.replace(layout("tensor", 4), shape=(1, 1))
    plain, offset = grid.raw(*grid.bounds(weight))
    scale, _ = hqq_ranges(weight, grid, num_iterations=40, beta=1.0)
    errors = [
        (fake_quantize(weight, grid.with_scale(s, offset)) - weight).abs()[0]
        for s in (plain, short_scale(scale))
    ]
    assert float(errors[1][1:].mean()) < float(errors[0][1:].mean())
    assert float(errors[1][0]) > float(errors[0][0])


def test_a_factor_of_the_weights_changes_no_integer() -> None:
    """``β`` has no unit."""
    weight, grid = weights(2), layout("channel", 3)
    one, _ = hqq_ranges(weight, grid, **SETTINGS)
    other, _ = hqq_ranges(weight * 1024, grid, **SETTINGS)
    torch.testing.assert_close(other[:4], one[:4] * 1024, rtol=1e-9, atol=0)


def test_scales_stay_above_the_smallest_allowed() -> None:
    weight, grid = weights(3), layout("channel", 4)
    plain, _ = grid.raw(*grid.bounds(weight))
    floor = plain * torch.tensor([0.0, 2.0, 0.0, 0.98, 1.0, 0.0])[:, None]
    scale, offset = hqq_ranges(weight, grid, floor, **SETTINGS)
    free, _ = hqq_ranges(weight, grid, **SETTINGS)
    assert torch.equal(scale[0], free[0])
    kept = losses(weight, grid, short_scale(torch.maximum(scale, floor)), offset, 0.7)
    none = losses(weight, grid, short_scale(torch.maximum(plain, floor)), offset, 0.7)
    assert bool((kept <= none).all())


def test_rows_are_independent_of_how_many_are_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from aimet_ext.core import hqq

    for kind in ("channel", "blocks", "LPBQ"):
        whole = hqq_ranges(weights(), layout(kind, 3), **SETTINGS)
        with monkeypatch.context() as patch:
            patch.setattr(hqq, "_IN_CACHE", 64)
            parts = hqq_ranges(weights(), layout(kind, 3), **SETTINGS)
        assert all(map(torch.equal, whole, parts))
