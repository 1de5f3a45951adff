"""Grids, ranges and fake quantization: the formulas, and AIMET's arithmetic to the last bit."""

from __future__ import annotations

import pytest
import torch

from aimet_ext.core.affine import (
    Grid,
    dequantize,
    fake_quantize,
    from_blocks,
    minmax_range,
    quantize,
    scale_offset,
    short_scale,
    to_blocks,
)

affine = pytest.importorskip("aimet_torch.quantization.affine")

OUT, IN, BLOCK = 12, 32, 8
SHAPES = {
    "per_tensor": ((1,), None),
    "per_channel": ((OUT, 1), None),
    "blockwise": ((OUT, IN // BLOCK), (1, BLOCK)),
}


def int_range(bitwidth: int, symmetric: bool) -> tuple[int, int]:
    if symmetric:
        return -(2 ** (bitwidth - 1)), 2 ** (bitwidth - 1) - 1
    return 0, 2**bitwidth - 1


def weights(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of different size and sign, with zeros and values that tie between two integers."""
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))
    weight *= torch.logspace(-3, 2, OUT)[:, None]
    weight[1] = 0
    weight[2] = weight[2].abs()
    weight[3] = torch.arange(IN) / 2 - 7.5
    weight[4] = 1e-9
    return weight.to(dtype)


def loop_fake_quantize(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The formula of the class docstring, element by element."""
    result = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            i = row * grid.shape[0] // weight.shape[0]
            j = column * grid.shape[1] // weight.shape[1]
            scale, offset = float(grid.scale[i, j]), float(grid.offset[i, j])
            q = round(float(weight[row, column]) / scale - grid.zero_point_shift) - offset
            q = min(max(q, grid.qmin), grid.qmax)
            result[row, column] = (q + offset + grid.zero_point_shift) * scale
    return result


def grid_of(quantizer) -> Grid:
    return Grid(
        quantizer.get_scale().detach(),
        quantizer.get_offset().detach(),
        quantizer.qmin,
        quantizer.qmax,
        quantizer.block_size,
        quantizer.zero_point_shift,
    )


CASES = [
    (name, bits, symmetric, shift)
    for name in SHAPES
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for shift in ((0.0, 0.5) if bits == 2 and symmetric else (0.0,))
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
class TestAgainstAimet:
    def test_range_scale_and_values_are_the_same_bits(self, case, dtype):
        name, bits, symmetric, shift = case
        shape, block_size = SHAPES[name]
        qmin, qmax = int_range(bits, symmetric)
        quantizer = affine.QuantizeDequantize(
            shape, bits, symmetric, block_size=block_size, zero_point_shift=shift
        )
        quantizer.to(dtype)
        weight = weights(dtype)
        with quantizer.compute_encodings():
            quantizer(weight)

        low, high = minmax_range(weight, shape, qmin, qmax, symmetric, shift)
        assert torch.equal(low, quantizer.min) and torch.equal(high, quantizer.max)
        scale, offset = scale_offset(low.float(), high.float(), qmin, qmax, symmetric)
        assert torch.equal(scale, quantizer.get_scale())
        assert torch.equal(offset, quantizer.get_offset())

        with torch.no_grad():
            aimet = quantizer(weight).as_subclass(torch.Tensor)
        assert torch.equal(fake_quantize(weight, grid_of(quantizer)), aimet)

    def test_values_and_gradients_of_a_trained_range_are_the_same_bits(self, case, dtype):
        name, bits, symmetric, shift = case
        shape, block_size = SHAPES[name]
        quantizer = affine.QuantizeDequantize(
            shape, bits, symmetric, block_size=block_size, zero_point_shift=shift
        )
        weight = weights(dtype)
        low, high = minmax_range(weight, shape, quantizer.qmin, quantizer.qmax, symmetric, shift)
        quantizer.set_range(0.7 * low.float(), 0.7 * high.float())
        theirs, ours = weight.clone().requires_grad_(), weight.clone().requires_grad_()
        aimet = quantizer(theirs).as_subclass(torch.Tensor)
        aimet.sum().backward()

        scale, offset = quantizer.get_scale(), quantizer.get_offset()
        grid = Grid(scale, offset, quantizer.qmin, quantizer.qmax, block_size, shift)
        values = fake_quantize(ours, grid)
        values.sum().backward()
        assert torch.equal(values, aimet)
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (4, 2), (2, 4)])
def test_fake_quantize_follows_the_formula(shape, shift, symmetric):
    weight = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    qmin, qmax = int_range(3, symmetric)
    low, high = minmax_range(weight, shape, qmin, qmax, symmetric)
    grid = Grid(*scale_offset(low, high, qmin, qmax, symmetric), qmin, qmax, None, shift)
    expected = loop_fake_quantize(weight, grid)
    torch.testing.assert_close(fake_quantize(weight, grid), expected, rtol=1e-14, atol=1e-15)


def test_dequantize_of_quantize_is_fake_quantize(case):
    name, bits, symmetric, shift = case
    shape, block_size = SHAPES[name]
    qmin, qmax = int_range(bits, symmetric)
    weight = weights(torch.float32)
    low, high = minmax_range(weight, shape, qmin, qmax, symmetric, shift)
    grid = Grid(*scale_offset(low, high, qmin, qmax, symmetric), qmin, qmax, block_size, shift)
    q = quantize(weight, grid)
    assert torch.equal(q, q.round()) and q.min() >= qmin and q.max() <= qmax
    assert torch.equal(dequantize(q, grid), fake_quantize(weight, grid))
    assert torch.equal(
        fake_quantize(fake_quantize(weight, grid), grid), fake_quantize(weight, grid)
    )


def test_error_is_at_most_half_a_step_inside_the_range():
    weight = torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    low, high = minmax_range(weight, (8, 2), 0, 15, symmetric=False)
    scale, offset = scale_offset(low, high, 0, 15, symmetric=False)
    error = to_blocks(fake_quantize(weight, Grid(scale, offset, 0, 15)) - weight, (8, 2))
    assert (error.abs().amax((1, 3)) <= scale * (1 + 1e-12)).all()


def test_gradient_reaches_weight_and_scale():
    """d x̂/dw is 1 inside and 0 outside; d x̂/d scale is x̂/scale outside."""
    weight = torch.tensor([[0.3, 9.0]], dtype=torch.float64, requires_grad=True)
    scale = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    fake_quantize(weight, Grid(scale, torch.zeros_like(scale), -4, 3)).sum().backward()
    assert weight.grad.tolist() == [[1.0, 0.0]]
    assert scale.grad.item() == pytest.approx(-0.3 + 3)


def test_range_is_differentiable_in_the_weight():
    weight = torch.tensor([[-1.0, 0.5, 3.0]], dtype=torch.float64, requires_grad=True)
    low, high = minmax_range(weight, (1, 1), 0, 15, symmetric=False)
    scale, _ = scale_offset(low, high, 0, 15, symmetric=False)
    scale.sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[-1.0, 0, 1]], dtype=torch.float64) / 15)


def test_blocks_round_trip():
    tensor = torch.arange(24.0).reshape(4, 6)
    blocks = to_blocks(tensor, (2, 3))
    assert blocks.shape == (2, 2, 3, 2)
    assert torch.equal(blocks[1, :, 2, :], tensor[2:, 4:])
    assert torch.equal(from_blocks(blocks), tensor)
    assert to_blocks(tensor, (1,)).shape == (1, 4, 1, 6)


@pytest.mark.parametrize("shape", [(4, 4), (1, 1, 1)])
def test_a_grid_that_does_not_divide_is_named(shape):
    with pytest.raises(ValueError, match=r"divides the tensor's shape \(4, 6\).*got"):
        to_blocks(torch.zeros(4, 6), shape)


def test_halves_go_up_where_the_grid_says_so():
    """aimet_onnx's arithmetic: counted from the smallest value, so below zero they go up too."""
    weight = torch.tensor([[-1.5, -0.5, 0.5, 1.5, 2.5, 9.0, -9.0]]) / 4
    scale = torch.full((1, 1), 0.25)
    grid = Grid(scale, torch.zeros(1, 1), -4, 3, half_up=True)
    assert quantize(weight, grid).tolist() == [[-1, 0, 1, 2, 3, 3, -4]]
    even = Grid(scale, torch.zeros(1, 1), -4, 3)
    assert quantize(weight, even).tolist() == [[-2, 0, 0, 2, 2, 3, -4]]
    just_below = torch.nextafter(torch.tensor([[0.125]]), torch.tensor(0.0))
    assert quantize(just_below, Grid(scale, scale * 0, 0, 7, half_up=True)).tolist() == [[0]]


def test_gradients_pass_where_halves_go_up():
    weight = torch.tensor([[0.3, 0.6, 5.0]], requires_grad=True)
    scale = torch.full((1, 1), 0.25, requires_grad=True)
    fake_quantize(weight, Grid(scale, torch.zeros(1, 1), -4, 3, half_up=True)).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [[1, 1, 0]]
    # d(q s)/ds: q - w/s inside the range, q beyond it
    expected = (1 - 0.3 / 0.25) + (2 - 0.6 / 0.25) + 3
    assert scale.grad is not None and abs(float(scale.grad) - expected) < 1e-5


@pytest.mark.parametrize("bitwidth", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_short_scale_survives_being_made_a_range(bitwidth, symmetric):
    """To the last bit, for every offset, in float32; it is near the scale that was wanted."""
    qmin, qmax = int_range(bitwidth, symmetric)
    wanted = torch.logspace(-9, 9, 500) * (1 + torch.rand(500))
    scale = short_scale(wanted)
    assert scale.dtype == torch.float32
    assert ((scale - wanted).abs() <= 1.6e-5 * wanted).all() and (scale != wanted).any()
    assert torch.equal(short_scale(scale), scale)
    for offset in [0] if symmetric else range(-qmax, 1, 5):
        low, high = scale * (offset + qmin), scale * (offset + qmax)
        assert torch.equal((high - low) / (qmax - qmin), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_short_scale_is_one_of_16_bits(dtype):
    scale = short_scale(torch.tensor([1.0, 1 + 2**-15, 1 + 2**-16 + 2**-20, 3e-5], dtype=dtype))
    assert scale.dtype == dtype
    assert scale[:3].tolist() == [1.0, 1 + 2**-15, 1 + 2**-15]
    mantissa, _ = torch.frexp(scale)
    assert torch.equal(mantissa * 2**16, (mantissa * 2**16).round())
