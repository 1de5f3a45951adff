"""aimet_onnx's weight quantizers: what is read is what AIMET computes with, what is set stays."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
aimet_onnx = pytest.importorskip("aimet_onnx")
from aimet_onnx.common.defs import QuantScheme  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402

from aimet_ext.core.affine import Grid, dequantize, fake_quantize, quantize  # noqa: E402
from aimet_ext.sim.onnx.quantizers import (  # noqa: E402
    OnnxWeightQuantizer,
    quantizer_state,
    restore_quantizer,
)
from aimet_ext.sim.protocol import adapt  # noqa: E402
from aimet_ext.specs import LPBQ, Blockwise, PerChannel, PerTensor, QSpec  # noqa: E402

OUT, IN = 24, 32
GRANULARITIES = [PerTensor(), PerChannel(), Blockwise(8), LPBQ(8, 4)]
KINDS = ["matmul", "conv"]


def model(kind: str = "matmul", dtype: str = "float32") -> onnx.ModelProto:
    """One layer ``layer``; a MatMul's weight is stored ``[in, out]``, the others' ``[out, in]``."""
    random = np.random.default_rng(0)
    shape = {"matmul": (IN, OUT), "gemm": (OUT, IN), "conv": (OUT, IN, 3, 3)}[kind]
    weight = random.standard_normal(shape).astype(dtype)
    weight.flat[7] = 3.0  # rows differ
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    op_type, attributes = {
        "matmul": ("MatMul", {}),
        "gemm": ("Gemm", {"transB": 1}),
        "conv": ("Conv", {}),
    }[kind]
    x = [1, IN, 3, 3] if kind == "conv" else ["n", IN]
    y = [1, OUT, 1, 1] if kind == "conv" else ["n", OUT]
    graph = helper.make_graph(
        [helper.make_node(op_type, ["x", "w"], ["y"], "layer", **attributes)],
        "one",
        [helper.make_tensor_value_info("x", element, x)],
        [helper.make_tensor_value_info("y", element, y)],
        [numpy_helper.from_array(weight, "w")],
    )
    found = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    found.ir_version = 10
    return found


def simulation(kind: str = "matmul", dtype: str = "float32"):
    return aimet_onnx.QuantizationSimModel(model(kind, dtype), config_file="htp_v79")


def with_spec(sim, spec: QSpec, shift: float = 0.0) -> OnnxWeightQuantizer:
    """The layer's quantizer, given a spec."""
    own = {
        PerTensor: lambda g: aimet_onnx.defs.PerTensor(),
        PerChannel: lambda g: aimet_onnx.defs.PerChannel(),
        Blockwise: lambda g: aimet_onnx.defs.Blockwise(g.block_size),
        LPBQ: lambda g: aimet_onnx.defs.LPBQ(g.block_size, g.scale_bits),
    }[type(spec.granularity)](spec.granularity)
    quantizer = sim.qc_quantize_op_dict["w"]
    quantizer.set_qspec(
        aimet_onnx.QSpec(
            dtype=aimet_onnx.qtype.int(spec.bitwidth),
            granularity=own,
            symmetric=spec.symmetric,
            shift_zero_point=bool(shift),
        )
    )
    found = adapt(sim).weight_quantizer("layer")
    assert isinstance(found, OnnxWeightQuantizer)
    return found


SPECS = [
    QSpec(bitwidth=bits, symmetric=symmetric, granularity=granularity)
    for granularity in GRANULARITIES
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    if symmetric or not isinstance(granularity, LPBQ)
]


def by_aimet(quantizer: OnnxWeightQuantizer, weight: torch.Tensor) -> torch.Tensor:
    """What AIMET's C++ makes of a weight."""
    stored = weight.transpose(0, 1) if quantizer.layer.transposed else weight
    found = torch.from_numpy(quantizer.quantizer.quantize_dequantize(stored.contiguous().numpy()))
    return found.transpose(0, 1) if quantizer.layer.transposed else found


def hard_cases(quantizer: OnnxWeightQuantizer) -> torch.Tensor:
    """The weight with much of it halfway between two values, next to that, or off the grid."""
    grid = quantizer.grid()
    weight = quantizer.weight
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-600, 600, weight.shape, generator=generator).to(torch.float32) / 2
    ties = dequantize(steps, Grid(grid.scale, grid.offset, -600, 600)).to(weight.dtype)
    every = torch.stack([weight, ties, torch.nextafter(ties, weight * 0)])
    choice = torch.randint(0, 3, weight.shape, generator=generator)
    return every.gather(0, choice[None])[0]


# ------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_grid_rounds_as_aimet_does_bit_for_bit(kind, spec) -> None:
    """Halves too, which the C++ code takes up and not to even."""
    quantizer = with_spec(simulation(kind), spec)
    quantizer.calibrate()
    for weight in (quantizer.weight, hard_cases(quantizer)):
        ours = fake_quantize(weight, quantizer.grid())
        assert torch.equal(ours, by_aimet(quantizer, weight))


def test_rounding_to_even_would_be_seen() -> None:
    quantizer = with_spec(simulation(), QSpec(bitwidth=4))
    quantizer.calibrate()
    grid = quantizer.grid()
    even = Grid(grid.scale, grid.offset, grid.qmin, grid.qmax)
    weight = hard_cases(quantizer)
    assert not torch.equal(fake_quantize(weight, even), by_aimet(quantizer, weight))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_float16_weight_is_rounded_as_aimet_does(spec) -> None:
    quantizer = with_spec(simulation("matmul", "float16"), spec)
    quantizer.calibrate()
    for weight in (quantizer.weight, hard_cases(quantizer)):
        ours = fake_quantize(weight, quantizer.grid())
        assert ours.dtype is torch.float16
        assert torch.equal(ours, by_aimet(quantizer, weight))


def test_values_half_a_step_off_the_integers() -> None:
    quantizer = with_spec(simulation(), QSpec(bitwidth=2), shift=0.5)
    quantizer.calibrate()
    grid = quantizer.grid()
    assert (grid.zero_point_shift, grid.qmin, grid.qmax) == (0.5, -2, 1)
    assert torch.equal(grid.offset, torch.zeros_like(grid.offset))
    weight = quantizer.weight
    assert torch.equal(fake_quantize(weight, grid), by_aimet(quantizer, weight))
    quantizer.set_scale(grid.scale)
    assert torch.equal(quantizer.grid().scale, grid.scale)
    assert torch.equal(fake_quantize(weight, quantizer.grid()), by_aimet(quantizer, weight))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_calibration_is_that_of_the_simulation(kind, spec) -> None:
    sim = simulation(kind)
    quantizer = with_spec(sim, spec)
    quantizer.calibrate()
    ours = quantizer.grid()
    sim._compute_param_encodings()
    aimets = quantizer.grid()
    assert torch.equal(ours.scale, aimets.scale) and torch.equal(ours.offset, aimets.offset)


@pytest.mark.parametrize("kind", [*KINDS, "gemm"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_shapes_are_those_of_the_weight_output_channels_first(kind, granularity) -> None:
    quantizer = with_spec(simulation(kind), QSpec(bitwidth=4, granularity=granularity))
    tail = (1, 1) if kind == "conv" else ()
    kernel = (3, 3) if kind == "conv" else ()
    blocks = {PerTensor: (1, 1), PerChannel: (OUT, 1)}.get(type(granularity), (OUT, IN // 8))
    assert quantizer.weight.shape == (OUT, IN, *kernel)
    assert quantizer.shape == (*blocks, *tail)
    assert quantizer.granularity == granularity
    assert quantizer.spec() == QSpec(bitwidth=4, granularity=granularity)
    blockwise = isinstance(granularity, Blockwise | LPBQ)
    assert quantizer.layout.block_size == ((1, 8, *kernel) if blockwise else None)
    lpbq = isinstance(granularity, LPBQ)
    assert quantizer.layout.block_grouping == ((1, -1) if lpbq else None)
    assert quantizer.layout.scale_bits == (4 if lpbq else None)


def test_integers_of_symmetric_and_free_grids() -> None:
    sim = simulation()
    quantizer = with_spec(sim, QSpec(bitwidth=4))
    assert (quantizer.layout.qmin, quantizer.layout.qmax, quantizer.bitwidth) == (-8, 7, 4)
    quantizer.calibrate()
    assert not quantizer.grid().offset.any()
    quantizer = with_spec(sim, QSpec(bitwidth=3, symmetric=False))
    assert (quantizer.layout.qmin, quantizer.layout.qmax, quantizer.bitwidth) == (0, 7, 3)
    quantizer = with_spec(sim, QSpec(bitwidth=4))
    quantizer.quantizer.use_strict_symmetric = True
    assert (quantizer.layout.qmin, quantizer.layout.qmax, quantizer.bitwidth) == (-7, 7, 4)
    quantizer.calibrate()
    weight = quantizer.weight
    assert not quantizer.grid().offset.any()
    assert torch.equal(fake_quantize(weight, quantizer.grid()), by_aimet(quantizer, weight))


# ------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_scale_that_is_written_is_read_back(kind, spec) -> None:
    """The very same one; for LPBQ the one on integers, which stays when it is written again."""
    quantizer = with_spec(simulation(kind), spec)
    quantizer.calibrate()
    grid = quantizer.grid()
    random = torch.rand(grid.scale.shape, generator=torch.Generator().manual_seed(0))
    offset = None if spec.symmetric else grid.offset
    quantizer.set_scale(grid.scale * (0.5 + random), offset)
    first = quantizer.grid()
    if not isinstance(spec.granularity, LPBQ):
        assert torch.equal(first.scale, grid.scale * (0.5 + random))
    assert torch.equal(first.offset, grid.offset)
    quantizer.set_scale(first.scale, None if spec.symmetric else first.offset)
    second = quantizer.grid()
    assert torch.equal(second.scale, first.scale) and torch.equal(second.offset, first.offset)
    weight = quantizer.weight
    assert torch.equal(fake_quantize(weight, second), by_aimet(quantizer, weight))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_range_that_is_written_holds(spec) -> None:
    quantizer = with_spec(simulation(), spec)
    low, high = -torch.ones(quantizer.shape), 2 * torch.ones(quantizer.shape)
    quantizer.set_range(low, high)
    grid = quantizer.grid()
    torch.testing.assert_close(grid.scale, torch.full(grid.shape, 3 / (grid.qmax - grid.qmin)))
    quantizer.set_range(low[:1, :1], high[:1, :1])  # expands
    assert torch.equal(quantizer.grid().scale, grid.scale)
    with pytest.raises(ValueError, match="layer: a finite range is required"):
        quantizer.set_range(low, high * torch.inf)
    with pytest.raises(ValueError, match="layer: a finite scale is required"):
        quantizer.set_scale(high * torch.nan)


@pytest.mark.parametrize(("kind", "dtype"), [("gemm", "float32"), ("matmul", "float16")])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_values_on_the_grid_stay_when_aimet_rounds_them(kind, dtype, spec) -> None:
    quantizer = with_spec(simulation(kind, dtype), spec)
    quantizer.calibrate()
    scale = quantizer.grid().scale * 0.77
    quantizer.set_scale(scale, None if spec.symmetric else quantizer.grid().offset)
    grid = quantizer.grid()
    values = dequantize(quantize(quantizer.weight, grid), grid).to(quantizer.weight.dtype)
    quantizer.set_weight(values)
    assert torch.equal(quantizer.weight, values)
    assert torch.equal(by_aimet(quantizer, values), values)


def test_raw_scales_of_lpbq_are_known_while_they_are_those_of_the_range() -> None:
    quantizer = with_spec(simulation(), QSpec(bitwidth=4, granularity=LPBQ(8, 4)))
    quantizer.calibrate()
    raw, grid = quantizer.free_grid(), quantizer.grid()
    peak = quantizer.weight.view(OUT, IN // 8, 8).abs().amax(-1)
    assert ((raw.scale * 8 >= peak * 0.999) & (raw.scale * 7 <= peak * 1.001)).all()
    assert not torch.equal(raw.scale, grid.scale)
    quantizer.set_scale(raw.scale * 0.9)
    assert torch.equal(quantizer.free_grid().scale, raw.scale * 0.9)
    quantizer.quantizer.load_encodings(quantizer.quantizer.get_encodings()[::-1])
    assert torch.equal(quantizer.free_grid().scale, quantizer.grid().scale)
    plain = with_spec(simulation(), QSpec(bitwidth=4))
    plain.calibrate()
    assert torch.equal(plain.free_grid().scale, plain.grid().scale)


def test_a_frozen_range_may_be_written_by_us_and_not_by_calibration() -> None:
    sim = simulation()
    quantizer = with_spec(sim, QSpec(bitwidth=4))
    assert not quantizer.initialized
    with pytest.raises(ValueError, match="layer: a weight quantizer with a range is required"):
        quantizer.grid()
    quantizer.calibrate()
    quantizer.freeze()
    assert quantizer.frozen
    quantizer.set_scale(quantizer.grid().scale / 2)
    grid = quantizer.grid()
    quantizer.calibrate()
    sim.compute_encodings([{"x": np.ones((2, IN), np.float32)}])
    assert torch.equal(quantizer.grid().scale, grid.scale) and quantizer.frozen
    quantizer.freeze(False)
    quantizer.calibrate()
    torch.testing.assert_close(quantizer.grid().scale, grid.scale * 2)


def test_calibration_works_where_the_quantizer_is_off_and_by_any_scheme() -> None:
    sim = aimet_onnx.QuantizationSimModel(
        model(), quant_scheme=QuantScheme.post_training_tf_enhanced, config_file="htp_v79"
    )
    quantizer = with_spec(sim, QSpec(bitwidth=4))
    with adapt(sim).disabled_quantizers():
        quantizer.calibrate()
        assert not quantizer.quantizer.enabled
    ours = quantizer.grid().scale
    sim._compute_param_encodings()
    assert torch.equal(quantizer.grid().scale, ours)


# ------------------------------------------------------------------------------ the whole state


@pytest.mark.parametrize("spec", SPECS[::5], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_state_goes_through_json_and_comes_back(spec, frozen) -> None:
    sim = simulation()
    quantizer = with_spec(sim, spec)
    quantizer.calibrate()
    quantizer.set_scale(quantizer.grid().scale * 0.7)
    quantizer.freeze(frozen)
    grid, raw = quantizer.grid(), quantizer.free_grid()
    tensors, meta = quantizer_state(quantizer.quantizer)
    meta = json.loads(json.dumps(meta))
    quantizer.freeze(False)
    other = with_spec(sim, QSpec(bitwidth=8, symmetric=False, granularity=PerTensor()))
    other.calibrate()
    other.quantizer.enabled = False
    restore_quantizer(quantizer.quantizer, tensors, meta)
    assert quantizer.spec() == spec and quantizer.frozen is frozen
    assert torch.equal(quantizer.grid().scale, grid.scale)
    assert torch.equal(quantizer.grid().offset, grid.offset)
    assert torch.equal(quantizer.free_grid().scale, raw.scale)
    weight = quantizer.weight
    assert torch.equal(fake_quantize(weight, grid), by_aimet(quantizer, weight))
    assert quantizer_state(quantizer.quantizer)[1] == meta


def test_a_quantizer_without_a_range_comes_back_without() -> None:
    quantizer = with_spec(simulation(), QSpec(bitwidth=4))
    state = quantizer_state(quantizer.quantizer)
    quantizer.calibrate()
    quantizer.freeze()
    restore_quantizer(quantizer.quantizer, *state)
    assert not quantizer.initialized and not quantizer.frozen


def test_float_weights_have_no_weight_quantizer() -> None:
    sim = simulation()
    quantizer = sim.qc_quantize_op_dict["w"]
    quantizer.set_precision(aimet_onnx.qtype.float(5, 10))
    assert adapt(sim).weight_quantizer("layer") is None
