"""Output errors from second moments, against sums over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from search_reference import objective_by_loop

from aimet_ext.core.objective import (
    Noise,
    SecondMoment,
    quadratic,
    row_errors,
    sqnr_db,
    squared_error,
    trimmed,
)

OUT, IN, TOKENS = 3, 5, 50


@pytest.fixture
def data():
    """Weights, quantized weights, inputs of the quantized and of the float stream."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = normal(OUT, IN)
    seen = normal(TOKENS, IN) @ normal(IN, IN)
    return weight, weight + 0.1 * normal(OUT, IN), seen, seen + 0.2 * normal(TOKENS, IN)


def moment_of(seen, original=None) -> SecondMoment:
    cross = None if original is None else seen.T @ (original - seen) / len(seen)
    return SecondMoment(seen.T @ seen / len(seen), cross, len(seen))


def test_without_upstream_error_it_is_the_mean_squared_output_error(data):
    """``Σ ‖E x̂‖² = tr(E H Eᵀ)``."""
    weight, quantized, seen, _ = data
    moment = moment_of(seen)
    assert moment.pull(weight) is None
    rows = row_errors(quantized - weight, moment.second, None)
    expected = torch.zeros(OUT, dtype=torch.float64)
    for token in seen:
        expected += ((quantized - weight) @ token).square() / TOKENS
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=0)


def test_difference_form_is_exact(data):
    """``Σ ‖W x − Ŵ x̂‖² = tr(E H Eᵀ) − 2 tr(E C Wᵀ) + Σ ‖W e‖²``, token by token."""
    weight, quantized, seen, original = data
    moment = moment_of(seen, original)
    rows = row_errors(quantized - weight, moment.second, moment.pull(weight))
    expected = torch.zeros(OUT, dtype=torch.float64)
    for token, before in zip(seen, original, strict=True):
        output = (weight @ before - quantized @ token).square()
        expected += (output - (weight @ (before - token)).square()) / TOKENS
    torch.testing.assert_close(rows, expected, rtol=1e-11, atol=1e-13)


def test_cross_term_counts(data):
    """Without it the weight that makes up for upstream errors would look worse, not better."""
    weight, _, seen, original = data
    moment = moment_of(seen, original)
    best = weight + moment.pull(weight) @ torch.linalg.inv(moment.second)  # of least squares
    with_cross = row_errors(best - weight, moment.second, moment.pull(weight))
    without = row_errors(best - weight, moment.second, None)
    assert (with_cross < -1e-4).all() and (without > 1e-4).all()
    gradient = 2 * ((best - weight) @ moment.second - moment.pull(weight))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_row_errors_are_the_loop(data):
    weight, quantized, seen, original = data
    moment = moment_of(seen, original)
    error, pull = quantized - weight, moment.pull(weight)
    rows = row_errors(error, moment.second, pull)
    for row in range(OUT):
        part = slice(row, row + 1)
        expected = objective_by_loop(error[part], moment.second, pull[part], None)
        assert float(rows[row]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("width", [1, 127, 128, 129, 300])
def test_quadratic_forms_tile_by_tile(width):
    """Half the products, the same numbers; groups have a moment each."""
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(2, 3, width, generator=generator, dtype=torch.float64)
    seen = torch.randn(2, 40, width, generator=generator, dtype=torch.float64)
    moment = seen.mT @ seen
    expected = (seen @ rows.mT).square().sum(-2)
    torch.testing.assert_close(quadratic(rows, moment), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        row_errors(rows.flatten(0, 1), moment, None), expected.flatten(), rtol=1e-10, atol=0
    )


def test_sqnr():
    assert sqnr_db(100.0, 1.0) == pytest.approx(20)
    assert sqnr_db(1.0, 1.0) == 0
    assert sqnr_db(1.0, 0.0) == math.inf
    assert sqnr_db(0.0, 1.0) == -math.inf


def test_squared_error_counts_real_tokens_alone():
    output, target = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    assert squared_error(output, target) == (24.0, 24)
    target[0, 2] = math.nan  # of padding: it must not get in
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert squared_error(output, target, mask) == (12.0, 12)


def noise_by_definition(rows, tokens):
    """Shares of noise, from the variance of each product over rows."""
    products = rows[:, :, None] * rows[:, None]  # [tokens, in, in]
    mean = products.mean(0)
    variance = (products - mean).square().mean(0) / (tokens - 1)
    own = torch.eye(rows.shape[1], dtype=torch.bool)
    diagonal = mean[own]
    shares = (
        variance[~own].sum() / mean[~own].square().sum(),
        variance[own].sum() / (diagonal - diagonal.mean()).square().sum(),
    )
    return tuple(float(share**2 * 1.05 / (share + 0.05)) for share in shares)


def powers_of(rows):
    squares = rows.square()
    return torch.stack([squares.sum(1).square().mean(), squares.square().sum(1).mean()])


def test_shares_of_noise_are_those_of_the_definition():
    rows = torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    rows *= torch.arange(1, 7)
    second = rows.T @ rows / 50
    for tokens in (25, 50):
        noise = Noise.of(second, tokens, powers_of(rows))
        assert (float(noise.products), float(noise.squares)) == pytest.approx(
            noise_by_definition(rows, tokens), rel=1e-9
        )


def test_noise_is_bounded_whatever_came():
    one = torch.randn(1, 4, dtype=torch.float64)
    for rows in (one, torch.zeros(3, 4), torch.eye(4), one * 1e30):
        second = rows.T @ rows / len(rows)
        noise = Noise.of(second, len(rows), powers_of(rows.double()))
        assert 0 <= float(noise.products) < 1 and 0 <= float(noise.squares) < 1


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_errors_on_rows_as_they_came_survive_the_shrinking(groups, strength):
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    rows, off = normal(groups, 20, 5), normal(groups, 20, 5) / 10
    rows *= torch.tensor([5.0, 3, 2, 1, 0])
    rows[..., 1] += rows[..., 0]
    second, cross = rows.mT @ rows / 20, rows.mT @ off / 20
    powers = torch.stack([powers_of(each) for each in rows], 1)
    weight, error = normal(6, 5), normal(6, 5) / 10
    if groups == 1:
        second, cross, powers = second[0], cross[0], powers[:, 0]
    noise = Noise.of(second, 20, powers)
    moment = SecondMoment(second.clone(), cross.clone(), 20, noise=noise)
    expected = row_errors(error, second, moment.pull(weight))
    found = moment.shrunk(strength)
    pull = found.pull(weight)
    torch.testing.assert_close(found.errors(error, pull)[1], expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(row_errors(error, found.second, pull), expected, rtol=1e-3)
    diagonal = found.second.diagonal(dim1=-2, dim2=-1)
    assert bool((diagonal[..., 4] == 0).all()) and bool((diagonal[..., :4] > 0).all())
    assert bool((torch.linalg.eigvalsh(found.second) > -1e-12).all())


def test_the_largest_deviations_are_left_out() -> None:
    """As many as the share says, of the value and of the gradient; the mean is over all."""
    output = torch.tensor([[0.1, -3.0, 0.2], [0.0, 0.5, 2.0]], requires_grad=True)
    found = trimmed(output.square(), 0.34)  # 2 of 6
    torch.testing.assert_close(found.sum(), torch.tensor(0.01 + 0.04 + 0.25))
    found.sum().backward()
    assert torch.equal(output.grad == 0, torch.tensor([[False, True, False], [True, False, True]]))
    plain = squared_error(output.detach(), torch.zeros(2, 3))
    assert squared_error(output.detach(), torch.zeros(2, 3), trim=0.1) == plain
    assert squared_error(output.detach(), torch.zeros(2, 3), trim=0.34) == (pytest.approx(0.3), 6)
