"""Integer block scales: AIMET's grouped-block quantizer to the last bit."""

from __future__ import annotations

import pytest
import torch

from aimet_ext.core.affine import (
    Grid,
    channel_scale,
    fake_quantize,
    integer_scale,
    lpbq_scale,
    minmax_range,
    scale_offset,
)

affine = pytest.importorskip("aimet_torch.quantization.affine")

GROUPINGS = {"linear": (1, -1), "pairs": (1, 2), "all": (-1, -1), "blockwise": (1, 1)}


def raw_scales(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    scales = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) + 1e-3
    scales[1] = 1e-6
    scales[2, 0] = 100.0
    return scales.to(dtype)


@pytest.mark.parametrize("grouping", list(GROUPINGS.values()), ids=list(GROUPINGS))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scale_bits", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_and_values_are_aimets(grouping, bits, scale_bits, dtype):
    block_size = (1, 4)
    quantizer = affine.GroupedBlockQuantizeDequantize(
        (6, 8), bits, True, bits + scale_bits, block_size=block_size, block_grouping=grouping
    )
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    with quantizer.compute_encodings():
        quantizer(weight)
    qmin, qmax = quantizer.qmin, quantizer.qmax
    low, high = minmax_range(weight, (6, 8), qmin, qmax, symmetric=True)
    raw, offset = scale_offset(low.float(), high.float(), qmin, qmax, symmetric=True)
    scale = lpbq_scale(raw, grouping, scale_bits)
    assert torch.equal(scale, quantizer.get_scale())
    assert torch.equal(channel_scale(raw, grouping, scale_bits), quantizer.get_per_channel_scale())
    grid = Grid(scale, offset, qmin, qmax, block_size)
    with torch.no_grad():
        aimet = quantizer(weight).as_subclass(torch.Tensor)
    assert torch.equal(fake_quantize(weight, grid), aimet)


@pytest.mark.parametrize("grouping", [(1, -1), (1, 2)])
def test_gradient_is_aimets(grouping):
    quantizer = affine.GroupedBlockQuantizeDequantize(
        (6, 8), 4, True, 8, block_size=(1, 4), block_grouping=grouping
    )
    raw = raw_scales().requires_grad_()
    quantizer.min, quantizer.max = torch.nn.Parameter(-8 * raw), torch.nn.Parameter(7 * raw)
    weights_of_sum = torch.arange(48.0).reshape(6, 8)
    (quantizer.get_scale() * weights_of_sum).sum().backward()
    ours = ((quantizer.max.detach() - quantizer.min.detach()) / 15).requires_grad_()
    (lpbq_scale(ours, grouping, 4) * weights_of_sum).sum().backward()
    torch.testing.assert_close(ours.grad / 15, quantizer.max.grad)


def test_integers_are_bounded_and_one_of_a_group_is_the_top():
    integers = integer_scale(raw_scales(torch.float64), (1, -1), 4)
    assert integers.min() >= 1 and integers.max() == 16
    assert torch.equal(integers, integers.round())
    assert (integers.amax(1) == 16).all()


def test_lpbq_of_lpbq_is_itself():
    once = lpbq_scale(raw_scales(torch.float64), (1, -1), 4)
    torch.testing.assert_close(lpbq_scale(once, (1, -1), 4), once, rtol=1e-14, atol=0)
