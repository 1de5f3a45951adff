"""SmoothQuant's formula and the search for column multipliers, against a loop."""

from __future__ import annotations

import itertools

import pytest
import torch
from search_reference import objective_by_loop, reader_error_by_loop, search_smoothing_by_loop
from torch import Tensor

from aimet_ext.core import equivalence
from aimet_ext.core.clipping import GridLayout
from aimet_ext.core.equivalence import (
    Reader,
    candidate_multipliers,
    search_smoothing,
    smoothquant_scale,
)

IN = 8
LAYOUTS = {
    "per_tensor": {"shape": (1, 1)},
    "per_channel": {"shape": (4, 1)},
    "blockwise": {"shape": (4, 2), "block_size": (1, 4)},
    "lpbq": {
        "shape": (4, 2),
        "block_size": (1, 4),
        "block_grouping": (1, -1),
        "scale_bits": 3,
    },
    "asymmetric": {"shape": (4, 1), "symmetric": False},
    "shifted": {"shape": (4, 1), "zero_point_shift": 0.5},
}
GROUPS = {
    "alone": [torch.tensor([j]) for j in range(IN)],
    # as the columns of an output projection whose heads share a value head
    "shared": [torch.tensor([j, j + 2]) + 2 * (j >= 2) for j in range(IN // 2)],
}


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def reader(name: str, generator: torch.Generator, *, pull: bool = True) -> Reader:
    settings = {"qmin": -4, "qmax": 3, "symmetric": True, **LAYOUTS[name]}
    if not settings["symmetric"]:
        settings.update(qmin=0, qmax=7)
    layout = GridLayout(**settings)
    weight = normal(generator, 4, IN) * normal(generator, 4, IN).abs()
    scale, offset = layout.raw(*layout.bounds(weight))
    return Reader(
        weight=weight,
        grid=layout.with_scale(0.8 * scale, offset),
        pull=0.1 * normal(generator, 4, IN) if pull else None,
        row_weight=normal(generator, 4).exp(),
    )


def moment(generator: torch.Generator) -> Tensor:
    inputs = normal(generator, 30, IN) @ (0.5 * normal(generator, IN, IN) + torch.eye(IN))
    return inputs.T @ inputs / len(inputs)


def objective(readers, second, smooth) -> float:
    return sum(
        objective_by_loop(
            reader_error_by_loop(r.weight, r.grid, smooth), second, r.pull, r.row_weight
        )
        for r in readers
    )


@pytest.mark.parametrize("groups", list(GROUPS))
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_search_is_the_loop(name, groups):
    """The rank-one updates of the gradient give what recomputing the objective gives."""
    generator = torch.Generator().manual_seed(1)
    readers = [reader(name, generator), reader("per_channel", generator)]
    second, smooth = moment(generator), normal(generator, IN).mul(0.2).exp()
    multipliers = candidate_multipliers(smooth, 6, 1.5)
    expected = search_smoothing_by_loop(
        readers, second, smooth, GROUPS[groups], multipliers.tolist()
    )
    before = smooth.clone()
    found = search_smoothing(readers, second, smooth, GROUPS[groups], multipliers)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert torch.equal(smooth, before)
    assert not torch.allclose(found, smooth)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_gradient_carries_over_from_one_block_of_columns_to_the_next(monkeypatch, size):
    """However many columns are updated between two refreshes, the result is the same."""
    generator = torch.Generator().manual_seed(2)
    readers = [reader("per_channel", generator, pull=False)]
    second, smooth = moment(generator), torch.ones(IN, dtype=torch.float64)
    multipliers = candidate_multipliers(smooth, 6, 1.5)
    expected = search_smoothing(readers, second, smooth, GROUPS["shared"], multipliers)
    monkeypatch.setattr(equivalence, "_BLOCK", size)
    found = search_smoothing(readers, second, smooth, GROUPS["shared"], multipliers)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_objective_never_rises(name):
    generator = torch.Generator().manual_seed(3)
    readers = [reader(name, generator), reader(name, generator)]
    second, smooth = moment(generator), torch.ones(IN, dtype=torch.float64)
    multipliers = candidate_multipliers(smooth, 8, 1.5)
    costs = [objective(readers, second, smooth)]
    for _ in range(3):
        smooth = search_smoothing(readers, second, smooth, GROUPS["alone"], multipliers)
        costs.append(objective(readers, second, smooth))
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(costs))
    assert costs[1] < costs[0] - 1e-6


def test_columns_of_a_group_keep_their_ratio():
    generator = torch.Generator().manual_seed(4)
    readers = [reader("per_channel", generator)]
    smooth = normal(generator, IN).exp()
    found = search_smoothing(
        readers, moment(generator), smooth, GROUPS["shared"], candidate_multipliers(smooth, 8, 2)
    )
    factors = found / smooth
    for group in GROUPS["shared"]:
        torch.testing.assert_close(factors[group[0]], factors[group[1]], rtol=1e-12, atol=0)


def test_candidates_are_symmetric_in_their_logarithm():
    multipliers = candidate_multipliers(torch.zeros(1, dtype=torch.float64), 5, 2.0)
    expected = torch.tensor([0.5, 0.5**0.5, 1, 2**0.5, 2], dtype=torch.float64)
    torch.testing.assert_close(multipliers, expected)


# ---- SmoothQuant's formula -----------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_formula(alpha):
    """``s_j = a_j^α / w_j^(1−α)``, divided by the geometric mean of all ``s``."""
    activation = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    weight = torch.tensor([2.0, 0.5, 3.0], dtype=torch.float64)
    plain = [a**alpha / w ** (1 - alpha) for a, w in zip(activation, weight, strict=True)]
    mean = float(torch.stack(plain).prod()) ** (1 / 3)
    expected = torch.stack(plain) / mean
    found = smoothquant_scale(activation, weight, alpha)
    torch.testing.assert_close(found, expected)
    assert float(found.prod()) == pytest.approx(1)


def test_half_way_it_evens_out_activation_and_weight():
    """At α = 1/2 the largest weight of a column after smoothing is that of its activation."""
    activation = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    weight = torch.tensor([2.0, 0.5, 3.0], dtype=torch.float64)
    scale = smoothquant_scale(activation, weight)
    ratio = (activation / scale) / (weight * scale)
    torch.testing.assert_close(ratio, ratio.mean().expand(3))


def test_dead_channels_get_one_and_count_nowhere():
    activation = torch.tensor([0.0, 4.0, 9.0, 2.0])
    weight = torch.tensor([2.0, 0.5, 3.0, 0.0])
    scale = smoothquant_scale(activation, weight)
    assert scale[0] == 1 and scale[3] == 1
    torch.testing.assert_close(scale[1:3], smoothquant_scale(activation[1:3], weight[1:3]))


def test_all_channels_dead():
    scale = smoothquant_scale(torch.zeros(3), torch.ones(3))
    assert torch.equal(scale, torch.ones(3))
