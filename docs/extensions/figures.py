"""Drawings of the page of concepts, as SVG files that can be read on light and on dark pages.

    python docs/extensions/figures.py docs/static/concepts

All of them show numbers that are computed here; they need matplotlib and numpy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

GREY, BLUE, ORANGE, GREEN = "#777777", "#3f86c6", "#d57a1f", "#3d9a5f"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "aimet_ext",
    "font.size": 11,
    "font.family": "sans-serif",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), GREY),
    **dict.fromkeys(("axes.titlecolor", "xtick.color", "ytick.color"), GREY),
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def grid(figure: Figure) -> None:
    """Draw one tensor on a symmetric and on an asymmetric grid of 3 bits."""
    values = np.array([-0.35, -0.2, 0.05, 0.3, 0.62, 0.9, 1.15, 1.4])
    grids = {
        "symmetric: zero is code 0": 1.4 / 3 * np.arange(-4, 4),
        "asymmetric: offset −2": 1.75 / 7 * np.arange(-2, 6) * 1.12,
    }
    for axes, (title, points) in zip(
        figure.subplots(2, 1, sharex=True), grids.items(), strict=True
    ):
        axes.set_title(title, loc="left")
        axes.hlines(0, points[0], points[-1], color=GREY, lw=1)
        axes.plot(points, 0 * points, "|", color=BLUE, ms=16, mew=2)
        axes.plot(values, 0 * values + 1, "o", color=ORANGE, ms=5)
        for value in values:
            nearest = points[np.abs(points - value).argmin()]
            axes.plot([value, nearest], [1, 0], color=ORANGE, lw=1)
        axes.set_ylim(-0.6, 1.3)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)


def clipping(figure: Figure) -> None:
    """Draw the squared error of 4-bit weights by the share of the full range that is kept."""
    weights = np.random.RandomState(0).laplace(size=4096)
    shares = np.linspace(0.2, 1, 81)
    step = np.abs(weights).max() * shares[:, None] / 7
    codes = np.clip(np.round(weights / step), -8, 7)
    clipped = np.abs(weights) > 7.5 * step
    errors = (codes * step - weights) ** 2
    total, clip = errors.mean(1), (errors * clipped).mean(1)
    axes = figure.subplots()
    axes.plot(shares, total, color=BLUE, lw=2, label="all")
    axes.plot(shares, clip, color=ORANGE, ls="--", label="of clipped weights")
    axes.plot(shares, total - clip, color=GREEN, ls=":", lw=2, label="of rounded weights")
    axes.plot(shares[total.argmin()], total.min(), "o", color=BLUE)
    axes.set_xlabel("share of the full range")
    axes.set_ylabel("mean squared error")
    axes.set_ylim(0, 3 * total.min())
    axes.legend(loc="upper center")


def granularity(figure: Figure) -> None:
    """Draw which weights of a matrix share a range: one colour, one range."""
    rows, columns = np.indices((6, 12))
    shared = {
        "per tensor: 1": 0 * rows,
        "per channel: 6": rows,
        "blocks of 4: 18": rows * 3 + columns // 4,
        "blocks of 2: 36": rows * 6 + columns // 2,
    }
    for axes, (title, ranges) in zip(figure.subplots(2, 2).flat, shared.items(), strict=True):
        shades = np.random.RandomState(3).permutation(ranges.max() + 1)[ranges]
        axes.imshow(shades, cmap="viridis", alpha=0.75, vmin=-1, vmax=max(ranges.max(), 1))
        axes.set_title(title)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    figure.supxlabel("input channels", color=GREY, fontsize=11)
    figure.supylabel("output channels", color=GREY, fontsize=11)


def lpbq(figure: Figure) -> None:
    """Draw float scales of the blocks of one channel, and the integers that stand for them."""
    scales = np.array([0.31, 0.22, 0.9, 0.42, 1.0, 0.13, 0.55, 0.37])
    unit = scales.max() / 16
    integers = np.clip(np.round(scales / unit), 1, 16)
    axes = figure.subplots()
    places = np.arange(len(scales))
    axes.bar(places - 0.2, scales, 0.38, color=GREY, alpha=0.6, label="float scale")
    axes.bar(places + 0.2, integers * unit, 0.38, color=BLUE, label="integer × scale of channel")
    for place, integer in zip(places, integers, strict=True):
        axes.text(place + 0.2, integer * unit + 0.02, f"{integer:.0f}", ha="center", color=BLUE)
    axes.set_xlabel("block of the channel")
    axes.set_xticks(places)
    axes.set_yticks([0, 1], ["0", "max"])
    axes.set_ylim(0, 1.5)
    axes.legend(loc="upper left")


def moments(figure: Figure) -> None:
    """Draw lines of equal output error of two weights with correlated inputs."""
    second = np.array([[1.0, 0.85], [0.85, 1.0]])
    weight = np.array([0.42, 0.45])
    axes = figure.subplots()
    x, y = np.meshgrid(np.linspace(-0.7, 1.7, 121), np.linspace(-0.7, 1.7, 121))
    error = np.stack([x - weight[0], y - weight[1]])
    level = np.einsum("iab,ij,jab->ab", error, second, error)
    axes.contour(x, y, level, levels=[0.02, 0.1, 0.3, 0.7, 1.4], colors=GREY, linewidths=0.8)
    points = np.array([(a, b) for a in (0, 1) for b in (0, 1)])
    losses = np.einsum("pi,ij,pj->p", points - weight, second, points - weight)
    nearest, best = points[0], points[losses.argmin()]
    axes.plot(*points.T, "s", color=GREY, ms=6)
    axes.plot(*weight, "o", color=ORANGE)
    axes.text(0.5, 0.5, "float", color=ORANGE)
    axes.plot(*nearest, "s", color=BLUE, ms=9)
    axes.text(-0.55, -0.25, "nearest", color=BLUE)
    axes.plot(*best, "s", color=GREEN, ms=9)
    axes.text(best[0] - 0.5, best[1] + 0.12, "least output error", color=GREEN)
    axes.set_xlabel("first weight, in steps")
    axes.set_ylabel("second weight")
    axes.set_xticks([0, 1])
    axes.set_yticks([0, 1])
    axes.set_aspect("equal")


def smoothing(figure: Figure) -> None:
    """Draw the largest values by channel before and behind a scale of each channel."""
    inputs = np.array([1.0, 1.4, 14.0, 0.8, 2.0, 1.1, 7.0, 0.9])
    weights = np.array([0.5, 0.4, 0.45, 0.6, 0.5, 0.35, 0.4, 0.55])
    scales = np.sqrt(inputs / weights)
    pairs = {"before": (inputs, weights), "after": (inputs / scales, weights * scales)}
    both = figure.subplots(1, 2)
    for axes, (title, (left, right)) in zip(both, pairs.items(), strict=True):
        places = np.arange(len(left))
        axes.bar(places - 0.2, left, 0.38, color=ORANGE, label="inputs")
        axes.bar(places + 0.2, right, 0.38, color=BLUE, label="weights")
        axes.set_title(title)
        axes.set_xlabel("channel")
        axes.set_xticks([])
    both[0].set_ylim(0, 20)
    both[0].legend(loc="upper right")


def rotation(figure: Figure) -> None:
    """Draw a hidden state with an outlier before and behind a Hadamard matrix."""
    size = 32
    state = np.random.RandomState(1).normal(size=size)
    state[5] = 12
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.sqrt(2)
    both = {"hidden state": state, "rotated": state @ matrix}
    for axes, (title, values) in zip(figure.subplots(1, 2, sharey=True), both.items(), strict=True):
        axes.bar(range(size), values, color=BLUE)
        axes.axhline(0, color=GREY, lw=0.8)
        axes.set_title(title)
        axes.set_xlabel("channel")
        axes.set_xticks([])


FIGURES: dict[str, tuple[Callable[[Figure], None], float]] = {
    "grid": (grid, 2.4),
    "clipping": (clipping, 3.0),
    "granularity": (granularity, 3.2),
    "lpbq": (lpbq, 2.8),
    "moments": (moments, 3.6),
    "smoothing": (smoothing, 2.6),
    "rotation": (rotation, 2.6),
}


def draw(folder: str | Path) -> list[Path]:
    """Write all drawings to a folder, and return their paths."""
    written = []
    for name, (fill, height) in FIGURES.items():
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(4.4, height), layout="constrained")
            fill(figure)
            metadata: dict[str, Any] = {"Date": None}
            path = Path(folder) / f"{name}.svg"
            figure.savefig(path, transparent=True, metadata=metadata)
            written.append(path)
    return written


if __name__ == "__main__":
    draw(sys.argv[1])
