import pytest
import torch
from equivalence_reference import transform_by_loop

from aimet_ext.core.equivalence import ScalePair, Side, expand, stored_scales, transform

HIDDEN, HEADS, KV_HEADS, D = 8, 4, 2, 4


def parameters() -> dict[str, torch.Tensor]:
    """A norm and fused q, k, v; one output projection; weights in float64."""
    generator = torch.Generator().manual_seed(0)
    rows = (HEADS + 2 * KV_HEADS) * D
    shapes = {
        "norm.weight": (HIDDEN,),
        "norm.bias": (HIDDEN,),
        "qkv.weight": (rows, HIDDEN),
        "qkv.bias": (rows,),
        "o.weight": (HIDDEN, HEADS * D),
        "o.bias": (HIDDEN,),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def norm_pair(gain_offset: float = 0.0) -> ScalePair:
    return ScalePair(
        name="norm->qkv",
        kind="norm_qkv",
        size=HIDDEN,
        sides=(
            Side(module="norm", axis="out", power=-1, gain_offset=gain_offset),
            Side(module="qkv", axis="in", power=1),
        ),
    )


def value_pair() -> ScalePair:
    heads = torch.arange(KV_HEADS * D).view(KV_HEADS, D)
    start = (HEADS + KV_HEADS) * D
    return ScalePair(
        name="v->o",
        kind="v_o",
        size=KV_HEADS * D,
        sides=(
            Side(module="qkv", axis="out", power=-1, rows=(start, start + KV_HEADS * D)),
            Side(module="o", axis="in", power=1, index=heads.repeat_interleave(2, dim=0).flatten()),
        ),
    )


def scale(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, generator=generator, dtype=torch.float64) * 3 + 0.25


@pytest.mark.parametrize("pair", [norm_pair(), norm_pair(gain_offset=1.0), value_pair()])
def test_equals_the_loop(pair):
    params, factors = parameters(), scale(pair.size)
    expected = transform_by_loop(params, pair, factors)
    torch.testing.assert_close({**params, **transform(params, [(pair, factors)])}, expected)


def test_returns_the_changed_entries_only_and_never_mutates():
    params = parameters()
    before = {name: value.clone() for name, value in params.items()}
    changed = transform(params, [(value_pair(), scale(KV_HEADS * D))])
    assert set(changed) == {"qkv.weight", "qkv.bias", "o.weight"}
    torch.testing.assert_close(params, before, rtol=0, atol=0)


def test_slice_leaves_all_other_rows_bit_identical():
    params = parameters()
    changed = transform(params, [(value_pair(), scale(KV_HEADS * D))])
    start = (HEADS + KV_HEADS) * D
    assert torch.equal(changed["qkv.weight"][:start], params["qkv.weight"][:start])
    assert torch.equal(changed["qkv.bias"][:start], params["qkv.bias"][:start])
    assert not torch.isclose(changed["qkv.bias"][start:], params["qkv.bias"][start:]).any()


@pytest.mark.parametrize("gain_offset", [0.0, 1.0])
def test_norm_and_reader_cancel(gain_offset):
    """W diag(s) (x * (g + offset) / s) = W (x * (g + offset))."""
    params, pair = parameters(), norm_pair(gain_offset)
    changed = {**params, **transform(params, [(pair, scale(HIDDEN))])}
    x = torch.randn(3, HIDDEN, dtype=torch.float64)

    def output(values):
        normed = x * (values["norm.weight"] + gain_offset) + values["norm.bias"]
        return normed @ values["qkv.weight"].T + values["qkv.bias"]

    torch.testing.assert_close(output(changed), output(params))


def test_inverse_is_the_transform_with_the_reciprocal():
    params, factors = parameters(), scale(HIDDEN)
    there = {**params, **transform(params, [(norm_pair(1.0), factors)])}
    back = {**there, **transform(there, [(norm_pair(1.0), 1 / factors)])}
    torch.testing.assert_close(back, params)


def test_pairs_apply_in_order_on_each_others_result():
    """Both pairs change qkv: the second one must see what the first one made."""
    params = parameters()
    first, second = (norm_pair(), scale(HIDDEN)), (value_pair(), scale(KV_HEADS * D))
    step = {**params, **transform(params, [first])}
    step = {**step, **transform(step, [second])}
    torch.testing.assert_close({**params, **transform(params, [first, second])}, step)


@pytest.mark.parametrize("pair", [norm_pair(1.0), value_pair()])
def test_differentiable_in_scale_and_parameters(pair):
    names = ["norm.weight", "qkv.weight", "qkv.bias", "o.weight"]

    def flat(factors, *values):
        changed = transform(
            {**parameters(), **dict(zip(names, values, strict=True))}, [(pair, factors)]
        )
        return tuple(changed.values())

    inputs = [scale(pair.size), *(parameters()[name] for name in names)]
    torch.autograd.gradcheck(flat, [value.requires_grad_() for value in inputs])


def test_pointwise_convolution_equals_linear():
    params = parameters()
    as_conv = {
        name: value[:, :, None, None] if value.ndim == 2 else value
        for name, value in params.items()
    }
    both = [(norm_pair(), scale(HIDDEN)), (value_pair(), scale(KV_HEADS * D))]
    expected, conv = transform(params, both), transform(as_conv, both)
    assert conv["o.weight"].shape == (HIDDEN, HEADS * D, 1, 1)
    torch.testing.assert_close({n: v.reshape(expected[n].shape) for n, v in conv.items()}, expected)


def test_keeps_the_dtype_of_the_parameters():
    params = {name: value.to(torch.bfloat16) for name, value in parameters().items()}
    changed = transform(params, [(norm_pair(), scale(HIDDEN).float())])
    assert {value.dtype for value in changed.values()} == {torch.bfloat16}


def test_expand_is_one_outside_the_slice():
    side = Side(module="m", axis="out", power=-1, rows=(1, 3))
    expected = torch.tensor([1.0, 0.5, 0.25, 1.0])
    torch.testing.assert_close(expand(side, torch.tensor([2.0, 4.0]), 4), expected)


def test_wrong_sizes_and_names_are_errors():
    params = parameters()
    with pytest.raises(ValueError, match=r"norm->qkv: a scale of shape \(8,\).* got \(7,\)"):
        transform(params, [(norm_pair(), scale(7))])
    with pytest.raises(
        ValueError, match=r"m: one multiplier for each of rows 0 to 5 of 5 .* got 4"
    ):
        expand(Side(module="m", axis="out", power=1), scale(4), 5)
    with pytest.raises(ValueError, match="rows 3 to 7 of 5"):
        expand(Side(module="m", axis="out", power=1, rows=(3, 7)), scale(4), 5)
    del params["qkv.weight"]
    with pytest.raises(ValueError, match=r"qkv\.weight is required"):
        transform(params, [(norm_pair(), scale(HIDDEN))])


@pytest.mark.parametrize("gain_offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_readers_make_up_for_what_a_gain_lost_when_it_was_stored(dtype, gain_offset):
    """``g' s' = g`` of the gain that is stored, and ``s'`` is ``s`` up to that rounding."""
    params = {name: value.to(dtype).float() for name, value in parameters().items()}
    pair, given = norm_pair(gain_offset), scale(HIDDEN)
    (found,) = stored_scales(params, [(pair, given)], dict.fromkeys(params, dtype))
    gain = (params["norm.weight"] + gain_offset).double()

    def lost(own):
        stored = transform(params, [(pair, own)])["norm.weight"].to(dtype).float()
        return (((stored + gain_offset).double() * own - gain) / gain).abs().max()

    bits = torch.finfo(dtype).eps
    assert lost(found) <= 1e-12 < 0.05 * bits <= lost(given)
    assert ((found - given) / given).abs().max() <= 0.5 * bits * (
        1 + 2 * gain_offset * given / gain.abs()
    ).max()
    values = stored_scales(params, [(value_pair(), scale(8))], dict.fromkeys(params, dtype))
    assert torch.equal(values[0], scale(8))  # no norm, nothing to make up for
