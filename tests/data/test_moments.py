"""Rows of linear layers and convolutions, and sums of their products."""

from __future__ import annotations

import math

import pytest
import torch
from moments_reference import conv_rows_by_loop, moments_by_loop, transposed_rows_by_columns
from torch import nn

from aimet_ext.core.objective import row_errors
from aimet_ext.core.transposed import as_convolution
from aimet_ext.data import geometry as rows_of_layers
from aimet_ext.data import moments
from aimet_ext.data.geometry import Geometry
from aimet_ext.data.moments import MomentSum

CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "pointwise": {"kernel_size": 1},
    "stride": {"kernel_size": 3, "stride": (2, 3), "padding": 1},
    "dilation": {"kernel_size": (2, 3), "dilation": (3, 2), "padding": (2, 1)},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4, "stride": 2},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "same": {"kernel_size": (3, 5), "padding": "same", "dilation": (1, 2)},
    "same, odd": {"kernel_size": (4, 2), "padding": "same", "dilation": (2, 2)},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 2, "padding_mode": "replicate", "groups": 2},
    "circular": {"kernel_size": 3, "padding": (1, 3), "padding_mode": "circular", "stride": 2},
    "reflect, same": {"kernel_size": 4, "padding": "same", "padding_mode": "reflect"},
}
TRANSPOSED = {
    "plain": {"kernel_size": 3},
    "stride": {"kernel_size": (4, 2), "stride": (2, 3), "padding": (1, 0)},
    "output padding": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "dilation": {"kernel_size": 3, "dilation": (2, 1), "stride": (3, 2), "padding": 2},
    "padding beyond the kernel": {"kernel_size": 1, "stride": 2, "padding": 1},
    "groups": {"kernel_size": 3, "stride": 2, "groups": 2},
}
IMAGES, CHANNELS, OUT = 2, 4, 8


@pytest.fixture
def normal():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float64):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return draw


def convolution(settings) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(CHANNELS, OUT, bias=False, **settings).double().requires_grad_(False)


@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_rows_are_those_of_the_definition(settings, normal):
    module, x = convolution(settings), normal(IMAGES, CHANNELS, 7, 8)
    rows = Geometry.of(module).rows(x)
    assert rows.shape[0] == module.groups
    assert torch.equal(rows, conv_rows_by_loop(module, x))


@pytest.mark.parametrize("settings", TRANSPOSED.values(), ids=TRANSPOSED)
def test_a_transposed_convolution_is_a_product_with_its_rows(settings, normal):
    """Rows are what unit weights give, and rows times the weight is the layer's output."""
    module = nn.ConvTranspose2d(CHANNELS, OUT, bias=False, **settings).double()
    module.requires_grad_(False)
    x = normal(IMAGES, CHANNELS, 4, 3)
    rows = Geometry.of(module).rows(x)  # [groups, tokens, in]
    assert torch.equal(rows, transposed_rows_by_columns(module, x))
    matrix = as_convolution(module.weight, module.groups).flatten(1)  # [out, in]
    product = rows @ matrix.view(module.groups, -1, matrix.shape[1]).mT
    grouped = module(x).unflatten(1, (module.groups, -1)).movedim(2, -1).movedim(1, 0)
    expected = grouped.flatten(1, -2)
    torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(as_convolution(as_convolution(module.weight, 2), 2), module.weight)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_output_error_from_moments(settings, normal):
    """``Σ ‖conv(x, Ŵ) − conv(x, W)‖² = tokens · tr(E H Eᵀ)``, row by row."""
    module, x = convolution(settings), normal(IMAGES, CHANNELS, 7, 8)
    before = module(x)
    error = 0.1 * normal(*module.weight.shape)
    module.weight += error
    expected = (module(x) - before).square().sum((0, 2, 3))

    geometry = Geometry.of(module)
    total = MomentSum(error[0].numel(), geometry.groups, dtype=torch.float64)
    for chunk in geometry.chunks(x):
        total.add(chunk)
    moment = total.result(torch.float64)
    rows = row_errors(error.flatten(1), moment.second, None) * moment.tokens
    torch.testing.assert_close(rows, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_float_target_against_quantized_input(groups, normal):
    """``Σ ‖W x − Ŵ x̂‖² = tr(E H Eᵀ) − 2 tr(E C Wᵀ) + Σ ‖W e‖²`` for a convolution."""
    module = convolution({"kernel_size": 3, "padding": 1, "groups": groups})
    x = normal(IMAGES, CHANNELS, 7, 8)
    seen = x + 0.2 * normal(*x.shape)
    weight = module.weight.clone()
    target, upstream = module(x), module(x - seen)
    error = 0.1 * normal(*weight.shape)
    module.weight += error
    expected = ((module(seen) - target).square() - upstream.square()).sum((0, 2, 3))

    geometry = Geometry.of(module)
    total = MomentSum(weight[0].numel(), groups, cross=True, dtype=torch.float64)
    for pair in zip(geometry.chunks(seen), geometry.chunks(x), strict=True):
        total.add(*pair)
    moment = total.result(torch.float64)
    rows = row_errors(error.flatten(1), moment.second, moment.pull(weight.flatten(1)))
    torch.testing.assert_close(rows * moment.tokens, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=2, padding_mode="circular", groups=2), (2, 4, 9)),
        (nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 1), dilation=(1, 1, 2)), (2, 4, 3, 5, 6)),
        (nn.Conv2d(4, 6, 3), (4, 6, 7)),
    ],
    ids=["Conv1d", "Conv3d", "a single image"],
)
@torch.no_grad()
def test_rows_times_weight_is_the_output(module, shape, normal):
    module, x = module.double(), normal(*shape)
    weight = module.weight.flatten(1).unflatten(0, (module.groups, -1))  # [groups, out, in]
    products = Geometry.of(module).rows(x) @ weight.mT  # [groups, tokens, out]
    output = products.permute(1, 0, 2).flatten(1) + module.bias
    expected = module(x)
    expected = expected if x.dim() == module.weight.dim() else expected.unsqueeze(0)
    torch.testing.assert_close(output, expected.movedim(1, -1).flatten(0, -2))


def test_linear_rows_and_masks(normal):
    x, geometry = normal(2, 3, 5), Geometry.of(nn.Linear(5, 4))
    assert torch.equal(geometry.rows(x), x.reshape(1, 6, 5))
    assert torch.equal(geometry.rows(x[0, 0]), x[:1, :1, :].reshape(1, 1, 5))
    tokens = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.equal(geometry.rows(x, tokens)[0], torch.stack([x[0, 0], x[0, 2], x[1, 2]]))
    assert torch.equal(geometry.rows(x, torch.tensor([False, True]))[0], x[1])
    assert geometry.rows(x, torch.zeros(2, 3, dtype=torch.bool)).shape == (1, 0, 5)


def test_mask_of_a_convolution_selects_images(normal):
    x, geometry = normal(3, 4, 5, 5), Geometry.of(nn.Conv2d(4, 4, 3, groups=2))
    mask = torch.tensor([True, False, True])
    assert torch.equal(geometry.rows(x, mask), geometry.rows(x[mask]))
    assert geometry.rows(x, ~(mask | True)).shape == (2, 0, 18)


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 3), torch.ones(3, 2) > 0, torch.ones(2, 3, 5) > 0, torch.tensor(True)]
)
def test_unfit_mask(mask, normal):
    with pytest.raises(ValueError, match=r"mask must be bool, of the first dimensions \(at most 2"):
        Geometry.of(nn.Linear(5, 4)).rows(normal(2, 3, 5), mask)


@pytest.mark.parametrize("limit", [1, 200, 460, 10**6])
@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_chunks_are_the_rows_in_order_and_small(settings, limit, normal, monkeypatch):
    geometry, x = Geometry.of(convolution(settings)), normal(3, CHANNELS, 7, 8)
    rows = geometry.rows(x)
    monkeypatch.setattr(rows_of_layers, "_CHUNK", limit)
    chunks = list(geometry.chunks(x))
    assert torch.equal(torch.cat(chunks, 1), rows)
    line = max(rows.shape[0] * rows.shape[2] * 10, limit)  # no output here is wider than 10
    assert all(chunk.numel() <= line for chunk in chunks)
    assert (len(chunks) == 1) == (limit == 10**6)


def test_linear_chunks(normal, monkeypatch):
    monkeypatch.setattr(rows_of_layers, "_CHUNK", 12)
    geometry, x = Geometry.of(nn.Linear(5, 4)), normal(2, 3, 5)
    assert [list(chunk.shape) for chunk in geometry.chunks(x)] == [[1, 2, 5]] * 3
    assert torch.equal(geometry.rows(x)[0], x.flatten(0, 1))


def test_equal_geometries_are_one_key():
    padded = Geometry.of(nn.Conv2d(4, 8, 3, padding="same", padding_mode="reflect"))
    assert padded == Geometry.of(nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"))
    assert len({padded, Geometry.of(nn.Conv2d(4, 2, 3, padding=1))}) == 2
    assert Geometry.of(nn.Conv2d(4, 8, 1, dilation=3, padding_mode="circular")) == Geometry.of(
        nn.Conv2d(4, 4, 1)
    )
    assert Geometry.of(nn.Linear(4, 5)) == Geometry.of(nn.Linear(4, 6)) == Geometry()
    different = [{}, {"stride": 2}, {"dilation": 2}, {"groups": 2}, {"padding": 1}]
    assert len({Geometry.of(nn.Conv2d(4, 4, 3, **settings)) for settings in different}) == 5


@pytest.mark.parametrize("module", [nn.LSTM(4, 4), nn.Embedding(3, 4), nn.ReLU()])
def test_other_modules_have_no_geometry(module):
    with pytest.raises(TypeError, match=f"got {type(module).__name__}; leave it out"):
        Geometry.of(module)


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5, 5), (1, 2, 4, 5, 5)])
def test_input_that_is_no_image(shape):
    with pytest.raises(ValueError, match="2 groups and a kernel of \\(3, 3\\) must be"):
        Geometry.of(nn.Conv2d(4, 4, 3, groups=2)).rows(torch.zeros(shape))


@pytest.fixture
def small(monkeypatch):
    """Blocks and strips so small that a few rows fill several."""
    monkeypatch.setattr(moments, "_BLOCK", 8)
    monkeypatch.setattr(moments, "_STRIP", 3)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("width", [1, 3, 7])
def test_sums_against_the_loop(groups, width, normal):
    seen, original = normal(groups, 29, width), normal(groups, 29, width)
    total = MomentSum(width, groups, cross=True, dtype=torch.float64)
    total.add(seen[:, :12], original[:, :12])
    total.add(seen[:, 12:], original[:, 12:])
    moment = total.result(torch.float64)
    expected = [moments_by_loop(*pair) for pair in zip(seen, original, strict=True)]
    second, cross = (torch.stack(kind) for kind in zip(*expected, strict=True))
    leading = (groups,) if groups > 1 else ()
    assert moment.second.shape == moment.cross.shape == (*leading, width, width)
    torch.testing.assert_close(moment.second.view_as(second), second, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(moment.cross.view_as(cross), cross, rtol=1e-12, atol=1e-13)
    assert moment.tokens == total.tokens == 29
    assert torch.equal(total.peak.view(groups, width), seen.abs().amax(1))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_through_a_weight_pull_as_those_of_all_products_do(weighted, normal):
    """In float64 to its rounding, and however the rows are cut, bit for bit."""
    seen, original, weight = normal(1, 29, 7), normal(1, 29, 7), normal(2, 7)
    counts = normal(1, 29).square() if weighted else None
    found = []
    for through, cuts in ((None, [29]), (weight, [29]), (weight, [3, 17, 9])):
        total = MomentSum(7, cross=True, through=through, dtype=torch.float64)
        shares = [None] * len(cuts) if counts is None else counts.split(cuts, 1)
        for part in zip(seen.split(cuts, 1), original.split(cuts, 1), shares, strict=True):
            total.add(*part)
        found.append(total.result(torch.float64))
    plain, narrow, pieces = found
    assert narrow.cross.shape == (7, 2)
    torch.testing.assert_close(narrow.pull(weight), plain.pull(weight), rtol=1e-12, atol=1e-13)
    if not weighted:  # sums of weights are rounded by batch
        assert torch.equal(narrow.cross, pieces.cross)
        assert torch.equal(narrow.second, plain.second)
    with pytest.raises(ValueError, match="single group"):
        MomentSum(7, 3, cross=True, through=weight)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("groups", [1, 3])
def test_weighted_sums_against_the_loop(groups, normal):
    seen, original = normal(groups, 29, 7), normal(groups, 29, 7)
    weights = normal(groups, 29).square()
    total = MomentSum(7, groups, cross=True, dtype=torch.float64)
    for part in (slice(0, 12), slice(12, None)):
        total.add(seen[:, part], original[:, part], weights[:, part])
    moment = total.result(torch.float64)
    expected = [moments_by_loop(*each) for each in zip(seen, original, weights, strict=True)]
    second, cross = (torch.stack(kind) for kind in zip(*expected, strict=True))
    torch.testing.assert_close(moment.second.view_as(second), second, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(moment.cross.view_as(cross), cross, rtol=1e-12, atol=1e-13)
    worth = (weights.sum(1).square() / weights.square().sum(1)).min()
    assert moment.tokens == 29 and moment.effective_tokens == pytest.approx(float(worth))
    assert torch.equal(total.peak.view(groups, 7), seen.abs().amax(1))  # as they came


@pytest.mark.usefixtures("small")
def test_rows_that_count_alike_or_not_at_all(normal):
    """All 1: the same bits. 0: as if the row had not come, in the shares of noise too."""
    seen = (normal(1, 40, 7) + 2 * normal(1, 40, 1)) * torch.linspace(0.5, 3, 7)
    original = seen + 0.1 * normal(1, 40, 7)

    def moment(rows, floats, weights):
        total = MomentSum(7, cross=True, dtype=torch.float64)
        total.add(rows, floats, weights)
        return total.result(torch.float64)

    plain, alike = (moment(seen, original, s) for s in (None, torch.ones(1, 40)))
    assert torch.equal(plain.second, alike.second) and torch.equal(plain.cross, alike.cross)
    assert torch.equal(plain.noise.products, alike.noise.products)
    assert plain.effective_tokens == alike.effective_tokens == 40
    odd = torch.arange(40)[None] % 2
    half, alone = moment(seen, original, 2 * odd), moment(seen[:, 1::2], original[:, 1::2], None)
    assert half.tokens == 40 and half.effective_tokens == alone.effective_tokens == 20
    torch.testing.assert_close(half.second, alone.second, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(half.cross, alone.cross, rtol=1e-12, atol=1e-13)
    for kind in ("products", "squares"):
        own, other = (getattr(each.noise, kind) for each in (half, alone))
        torch.testing.assert_close(own, other, rtol=1e-9, atol=0)
        assert own > getattr(plain.noise, kind)


@pytest.mark.usefixtures("small")
def test_batches_make_no_difference(normal):
    """The same rows in other batches: the same bits, also when the result was asked before."""
    rows = normal(1, 40, 7, dtype=torch.float32)
    results = []
    for sizes in ([40], [1] * 40, [3, 0, 20, 8, 9]):
        total = MomentSum(7)
        for part in rows.split(sizes, 1):
            total.add(part)
        results.append(total.result())
    assert all(torch.equal(result.second, results[0].second) for result in results)
    assert torch.equal(total.result().second, results[0].second)
    total.add(rows)
    assert total.result().tokens == 80
    torch.testing.assert_close(total.result().second, results[0].second)


@pytest.mark.usefixtures("small")
def test_second_moment_is_symmetric_bit_for_bit(normal):
    total = MomentSum(17)
    total.add(normal(1, 100, 17, dtype=torch.float32))
    second = total.result().second
    assert second.dtype == torch.float32
    assert torch.equal(second, second.mT)


@pytest.mark.usefixtures("small")
def test_sums_are_in_float64():
    """Many equal contributions: a float32 sum stands still where one more no longer counts."""
    first = torch.zeros(1, 8, 2)
    first[0, 0] = 2.0**14  # its square is 2^28, where float32 counts by 32
    total = MomentSum(2)
    for block in (first, *[torch.ones(1, 8, 2)] * 10):
        total.add(block)
    assert torch.all(total.result(torch.float64).second == (2.0**28 + 80) / 88)


def test_small_difference_of_wide_streams():
    """``e`` is subtracted before it is rounded: 1e-9 of a float64 input does not vanish."""
    seen = torch.ones(1, 3, 2, dtype=torch.float64)
    total = MomentSum(2, cross=True)
    total.add(seen, seen + 1e-9)
    cross = total.result().cross
    torch.testing.assert_close(cross, torch.full((2, 2), 1e-9), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_multiplied_in_float32(dtype, normal):
    rows = normal(1, 50, 6).to(dtype)
    total = MomentSum(6)
    total.add(rows)
    expected = (rows[0].double().T @ rows[0].double() / 50).float()
    torch.testing.assert_close(total.result().second, expected, rtol=1e-5, atol=1e-6)


def test_precision_of_products_is_not_the_callers(normal):
    """Settings for speed neither hold inside nor are they lost afterwards."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch before 2.9 does not say what holds")

    def precision():
        return [
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.mkldnn.matmul.fp32_precision,
        ]

    seen = []

    class Watching(MomentSum):
        def _home(self, product):
            seen.append(precision())
            return super()._home(product)

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        total = Watching(6)
        total.add(normal(1, 50, 6))
        total.result()
        assert precision() == ["tf32", "bf16"]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [["ieee", "ieee"]]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("groups", [1, 2])
def test_mapped_is_memory_bit_for_bit(groups, normal, tmp_path):
    seen, original = normal(groups, 50, 7), normal(groups, 50, 7)
    results = []
    size = 8 * groups * (3 * 7 + 3 * 4 + 1 + 7 * 7)  # three strips of H, and C
    for limit, storage in ((size, "memory"), (size - 1, "mapped")):
        total = MomentSum(7, groups, cross=True, mapped_dir=tmp_path / "new", max_bytes=limit)
        assert total.storage == storage
        total.add(seen, original)
        results.append(total.result())
        assert list(tmp_path.rglob("mapped-*")) == []
    del total
    memory, mapped = results
    assert torch.equal(memory.second, mapped.second)
    assert torch.equal(memory.cross, mapped.cross)
    assert torch.equal(mapped.second, mapped.second.mT)


def test_half_of_the_memory_is_the_default(monkeypatch, tmp_path):
    for available, storage in (
        (2 * 8 * 64, "memory"),
        (2 * 8 * 64 - 1, "mapped"),
        (None, "memory"),
    ):
        monkeypatch.setattr(moments, "available_bytes", lambda device, size=available: size)
        assert MomentSum(8, mapped_dir=tmp_path).storage == storage


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_must_be_finite(value):
    rows = torch.ones(1, 4, 6)
    rows[0, 2, 3] = rows[0, 1, 5] = value
    problem = r"must be finite, got NaN or infinity in 2 of 6 elements, the first of them number 3"
    with pytest.raises(ValueError, match=f"inputs {problem}"):
        MomentSum(6).add(rows)
    with pytest.raises(ValueError, match=f"inputs of the float stream {problem}"):
        MomentSum(6, cross=True).add(torch.ones(1, 4, 6), rows)


def test_values_too_large_to_be_squared():
    total = MomentSum(3)
    total.add(torch.full((1, 2, 3), 1e30))
    with pytest.raises(ValueError, match=r"squared in torch\.float32, got values up to 1e\+30"):
        total.result()
    with pytest.raises(ValueError, match="inputs must be finite"):
        total.add(torch.full((1, 2, 3), 1e300, dtype=torch.float64))


def test_nothing_that_counts():
    total = MomentSum(3)
    total.add(torch.ones(1, 0, 3))
    with pytest.raises(ValueError, match="need at least one token that counts, got none"):
        total.result()


def test_rows_of_another_shape():
    with pytest.raises(ValueError, match=r"must be \[1, tokens, 3\], .*, got \[1, 5, 4\]"):
        MomentSum(3).add(torch.ones(1, 5, 4))
    with pytest.raises(ValueError, match=r"got \[1, 4, 3\]"):
        MomentSum(3, cross=True).add(torch.ones(1, 5, 3), torch.ones(1, 4, 3))
    with pytest.raises(ValueError, match="got None"):
        MomentSum(3, cross=True).add(torch.ones(1, 5, 3))
    with pytest.raises(ValueError, match="cross=True, got them without"):
        MomentSum(3).add(torch.ones(1, 5, 3), torch.ones(1, 5, 3))
    with pytest.raises(ValueError, match=r"weights must be \[1, 5\].*got \[5\]"):
        MomentSum(3).add(torch.ones(1, 5, 3), None, torch.ones(5))


def test_later_changes_of_the_rows_do_not_count():
    rows = torch.ones(1, 5, 3, requires_grad=True)
    total = MomentSum(3)
    total.add(rows)
    with torch.no_grad():
        rows.zero_()
    assert torch.all(total.result().second == 1)
