r"""The multiple-choice knapsack: one option for each item, the least cost within a capacity.

Lagrange: with a price :math:`\lambda` for a unit of size, every item on its own takes the option
of least :math:`c + \lambda s`, and

.. math::
    L = \sum_i \min_o (c_{io} + \lambda s_{io}) - \lambda S \;\le\; \min \sum_i c_i

for every choice within the capacity :math:`S`. At the price of the first step along the items'
convex hulls that does not fit, :math:`L` is the largest (that of the linear relaxation), and the
steps that do fit are a choice of cost :math:`U`. What an option costs beyond the minimum of its
item, at that price, adds up over the items; a choice beyond :math:`U - L` cannot be better, so few
are left for the search (Dyer, Kayal and Walker 1984; Pisinger 1995).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

#: Size, a whole number, and cost.
Option: TypeAlias = tuple[int, float]
Items: TypeAlias = Sequence[Sequence[Option]]

_MOST = 10_000  # partial choices that are kept of an item


@dataclass(frozen=True)
class _Step:
    """A step of an item from one corner of its convex hull to the next.

    :param gain: Fall of the cost for each unit of size.
    """

    gain: float
    item: int
    before: int
    after: int


def cheapest(items: Items, capacity: int) -> list[int]:
    """Choose one option of each item, of the least sum of costs that fits.

    Exact, unless more than 10,000 partial choices are open at a time: then the best of those.

    :param items: Options of each item, at least one.
    :param capacity: Largest sum of sizes.
    :returns: number of each item's option.
    :raises ValueError: the smallest options do not fit.
    """
    least = sum(min(size for size, _ in options) for options in items)
    if least > capacity:
        raise ValueError(f"a capacity of at least {least} is required, got {capacity}")
    chosen, price = _greedy(items, capacity)
    return chosen if price is None else _search(items, capacity, chosen, price)


def hull_curve(items: Items) -> list[Option]:
    """Return the sums of size and cost along the items' convex hulls, from the smallest on.

    Each is the least cost of all choices of its size or less.
    """
    first = [_hull(options)[0] for options in items]
    size = sum(options[own][0] for options, own in zip(items, first, strict=True))
    cost = math.fsum(options[own][1] for options, own in zip(items, first, strict=True))
    points = [(size, cost)]
    for step in _steps(items):
        (small, dear), (large, cheap) = (items[step.item][at] for at in (step.before, step.after))
        size, cost = size + large - small, cost + cheap - dear
        points.append((size, cost))
    return points


def _hull(options: Sequence[Option]) -> list[int]:
    """Return the corners of the lower convex hull, with falling costs, by rising size."""
    corners: list[int] = []
    for at in sorted(range(len(options)), key=lambda number: options[number]):
        if corners and options[at][1] >= options[corners[-1]][1]:
            continue
        while len(corners) > 1 and _gain(options, corners[-2], corners[-1]) <= _gain(
            options, corners[-1], at
        ):
            corners.pop()
        corners.append(at)
    return corners


def _gain(options: Sequence[Option], before: int, after: int) -> float:
    (small, dear), (large, cheap) = options[before], options[after]
    return (dear - cheap) / (large - small)


def _steps(items: Items) -> list[_Step]:
    """Return the steps of all items, the largest gain first, those of an item in their order."""
    found = []
    for item, options in enumerate(items):
        corners = _hull(options)
        for before, after in itertools.pairwise(corners):
            found.append(_Step(_gain(options, before, after), item, before, after))
    return sorted(found, key=lambda step: -step.gain)


def _greedy(items: Items, capacity: int) -> tuple[list[int], float | None]:
    """Take each step that fits; return the choice and the price of the first that did not."""
    chosen = [_hull(options)[0] for options in items]
    room = capacity - sum(options[own][0] for options, own in zip(items, chosen, strict=True))
    price = None
    for step in _steps(items):
        options = items[step.item]
        size = options[step.after][0] - options[step.before][0]
        if chosen[step.item] != step.before:
            continue  # an earlier step did not fit
        if size > room:
            price = step.gain if price is None else price
        else:
            chosen[step.item], room = step.after, room - size
    return chosen, price


def _search(items: Items, capacity: int, chosen: list[int], price: float) -> list[int]:
    """Return the best choice of all that the price does not rule out."""
    highest = math.fsum(options[own][1] for options, own in zip(items, chosen, strict=True))
    priced = [[cost + price * size for size, cost in options] for options in items]
    lowest = [min(each) for each in priced]
    gap = highest - (math.fsum(lowest) - price * capacity)
    gap += 1e-9 * (abs(highest) + abs(price * capacity))
    rest = sum(min(size for size, _ in options) for options in items)
    # Size, cost, excess over the minima, and the numbers chosen as a chain from the last one.
    open_choices: list[tuple[int, float, float, tuple]] = [(0, 0.0, 0.0, ())]
    for options, prices, minimum in zip(items, priced, lowest, strict=True):
        rest -= min(size for size, _ in options)
        grown = [
            (size + own, spent + cost, excess + prices[number] - minimum, (chain, number))
            for size, spent, excess, chain in open_choices
            for number, (own, cost) in enumerate(options)
            if size + own + rest <= capacity and excess + prices[number] - minimum <= gap
        ]
        open_choices = _undominated(grown)
    best = min(open_choices, key=lambda choice: choice[1], default=None)
    if best is None or best[1] >= highest:
        return chosen
    found, chain = [], best[3]
    while chain:
        chain, number = chain
        found.append(number)
    return found[::-1]


def _undominated(choices: list[tuple[int, float, float, tuple]]) -> list:
    """Return the choices than which no other one is both smaller and cheaper."""
    choices.sort(key=lambda choice: choice[:2])
    kept: list[tuple[int, float, float, tuple]] = []
    for choice in choices:
        if not kept or choice[1] < kept[-1][1]:
            kept.append(choice)
    if len(kept) > _MOST:
        kept = sorted(kept, key=lambda choice: choice[2])[:_MOST]
    return kept
