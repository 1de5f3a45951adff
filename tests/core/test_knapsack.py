"""The knapsack finds what trying every choice finds, and its curve is below all of them."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from aimet_ext.core import knapsack


def every_choice(items: list) -> list[tuple[int, float]]:
    """Size and cost of all choices, by trying each."""
    return [
        (sum(size for size, _ in each), math.fsum(cost for _, cost in each))
        for each in itertools.product(*items)
    ]


def instance(seed: int) -> list:
    draw = random.Random(seed)
    return [
        [(draw.randint(1, 40), draw.random() ** 3) for _ in range(draw.randint(1, 4))]
        for _ in range(draw.randint(1, 6))
    ]


@pytest.mark.parametrize("seed", range(60))
def test_it_is_the_best_of_all_choices(seed: int) -> None:
    items = instance(seed)
    choices = every_choice(items)
    least, most = (end(size for size, _ in choices) for end in (min, max))
    for capacity in {least, (3 * least + most) // 4, (least + most) // 2, most, most + 1}:
        numbers = knapsack.cheapest(items, capacity)
        found = [options[n] for options, n in zip(items, numbers, strict=True)]
        assert sum(size for size, _ in found) <= capacity
        best = min(cost for size, cost in choices if size <= capacity)
        assert math.fsum(cost for _, cost in found) == pytest.approx(best, rel=1e-12)
    with pytest.raises(ValueError, match=f"at least {least} is required, got {least - 1}"):
        knapsack.cheapest(items, least - 1)


@pytest.mark.parametrize("seed", range(20))
def test_points_of_the_curve_are_the_best_of_their_size(seed: int) -> None:
    items = instance(seed)
    choices = every_choice(items)
    points = knapsack.hull_curve(items)
    assert points[0][0] == min(size for size, _ in choices)
    assert points[-1][1] == pytest.approx(min(cost for _, cost in choices))
    for size, cost in points:
        assert cost == pytest.approx(min(c for s, c in choices if s <= size), rel=1e-9, abs=1e-12)


def test_steps_alone_would_not_do() -> None:
    """An option inside the hull, which no step reaches, is the best here."""
    items = [[(0, 10.0), (5, 6.0), (10, 0.0)]]
    assert knapsack.cheapest(items, 9) == [1]
    assert knapsack._greedy(items, 9)[0] == [0]
