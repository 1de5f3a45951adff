"""AWQ's candidates and its choice among them, against loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from awq_reference import best_by_loop, candidates_by_loop, relative_by_loop
from torch import Tensor

from aimet_ext.core.awq import ScaledReader, awq_scales, best_scale
from aimet_ext.core.clipping import GridLayout

IN, ROWS = 8, 4
LAYOUTS = {
    "per_tensor": {"shape": (1, 1)},
    "per_channel": {"shape": (ROWS, 1)},
    "blockwise": {"shape": (ROWS, 2), "block_size": (1, 4)},
    "lpbq": {
        "shape": (ROWS, 2),
        "block_size": (1, 4),
        "block_grouping": (1, -1),
        "scale_bits": 3,
    },
    "asymmetric": {"shape": (ROWS, 1), "symmetric": False},
}
INDICES = {
    "alone": torch.arange(IN),
    # as the columns of an output projection whose heads share a value head
    "shared": torch.tensor([0, 1, 0, 1, 2, 3, 2, 3]),
}


@pytest.fixture
def normal() -> Callable[..., Tensor]:
    """Normal numbers of a shape, each call others."""
    generator = torch.Generator().manual_seed(3)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def reader(name: str, normal: Callable[..., Tensor]) -> ScaledReader:
    """A layer with outliers in its input columns."""
    settings = {"qmin": -4, "qmax": 3, "symmetric": True, **LAYOUTS[name]}
    if not settings["symmetric"]:
        settings.update(qmin=0, qmax=7)
    return ScaledReader(
        weight=normal(ROWS, IN) * normal(ROWS, IN).abs(),
        layout=GridLayout(**settings),
        pull=0.1 * normal(ROWS, IN),
        row_weight=normal(ROWS).exp(),
    )


@pytest.mark.parametrize("duo", [False, True])
def test_candidates_are_those_of_the_paper(normal: Callable[..., Tensor], duo: bool) -> None:
    activation, weight = normal(IN).abs(), normal(IN).abs() if duo else None
    found = torch.stack(list(awq_scales(activation, weight, 5)))
    expected = candidates_by_loop(activation.tolist(), weight.tolist() if duo else None, 5)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype))
    assert torch.equal(found[0], torch.ones_like(found[0]))
    assert bool((found[4].argsort() == activation.argsort()).all())


def test_channels_without_data_are_left_alone() -> None:
    scales = list(awq_scales(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([1.0, 0.0, 2.0]), 3))
    assert all(bool(torch.isfinite(s).all()) and bool((s[:2] == 1).all()) for s in scales)
    dead = torch.zeros(3)
    assert all(torch.equal(s, torch.ones(3)) for s in awq_scales(dead, None, 3))


@pytest.mark.parametrize("name", LAYOUTS)
def test_relative_weights_are_the_loop(normal: Callable[..., Tensor], name: str) -> None:
    layer = reader(name, normal)
    torch.testing.assert_close(layer.relative(), torch.tensor(relative_by_loop(layer)).double())


@pytest.mark.parametrize("shared", INDICES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_choice_is_the_loop(normal: Callable[..., Tensor], name: str, shared: str) -> None:
    """All readers together, on the grid that is deployed; never worse than no scaling."""
    readers = [reader(name, normal), reader("per_channel", normal)]
    index = INDICES[shared]
    inputs = normal(30, IN) * torch.tensor([9.0, 1, 1, 1, 0.2, 1, 4, 1])
    second = inputs.T @ inputs / len(inputs)
    size = torch.stack([inputs.abs().mean(0)[index == k].mean() for k in index.unique()])
    candidates = list(awq_scales(size, None, 6))
    found = best_scale(readers, second, torch.ones(IN).double(), index, iter(candidates))
    best, errors = best_by_loop(readers, second, index, [s.tolist() for s in candidates])
    assert torch.equal(found, candidates[best])
    columns = found[index]
    error = sum(float(each.error(second, columns)) for each in readers)
    assert error == pytest.approx(errors[best], rel=1e-9)
    assert error <= errors[0]


def test_some_rows_find_what_all_find(normal: Callable[..., Tensor]) -> None:
    """Of many rows, the candidate that is chosen is as good as the best one of all."""
    weight = normal(800, IN) * normal(IN).exp()
    layouts = [
        GridLayout(shape=(800, cells), qmin=-8, qmax=7, symmetric=True, block_size=size)
        for cells, size in ((1, None), (2, (1, 4)))
    ]
    ones = torch.ones(800).double()
    readers = [ScaledReader(weight, layout, None, ones) for layout in layouts]
    assert [len(each.some().weight) for each in readers] == [100, 100]
    inputs = normal(300, IN) * normal(IN).exp()
    second = inputs.T @ inputs / len(inputs)
    candidates = list(awq_scales(inputs.abs().mean(0), weight.abs().mean(0), 20))
    start, index = torch.ones(IN).double(), INDICES["alone"]
    errors = [sum(float(r.error(second, scale)) for r in readers) for scale in candidates]
    found = best_scale(readers, second, start, index, iter(candidates))
    chosen = sum(float(each.error(second, found)) for each in readers)
    assert min(errors) <= chosen <= min(1.01 * min(errors), errors[0])


def test_salient_channels_gain(normal: Callable[..., Tensor]) -> None:
    """One channel carries most of the input: its weights are rounded more finely."""
    layer = reader("per_channel", normal)
    layer = ScaledReader(layer.weight, layer.layout, None, torch.ones(ROWS).double())
    inputs = normal(200, IN) * torch.tensor([20.0, *[1] * (IN - 1)])
    second = inputs.T @ inputs / len(inputs)
    ones = torch.ones(IN).double()
    candidates = awq_scales(inputs.abs().mean(0), None, 20)
    found = best_scale([layer], second, ones, INDICES["alone"], candidates)
    assert int(found.argmax()) == 0 and float(found[0]) > 1.5
    assert float(layer.error(second, found)) < 0.5 * float(layer.error(second, ones))
