"""The adaptor to aimet_torch: what it reads is what AIMET computes with, what it writes stays."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from aimet_ext.core.affine import fake_quantize
from aimet_ext.sim.protocol import adapt, moved_ranges
from aimet_ext.specs import LPBQ, Blockwise, PerChannel, PerTensor, QSpec

aimet_torch = pytest.importorskip("aimet_torch")
from aimet_ext.sim.torch.setup import weight_quantizer_for  # noqa: E402

OUT, IN = 24, 32
GRANULARITIES = [PerTensor(), PerChannel(), Blockwise(8), LPBQ(8, 4)]
LAYER, NORM = "linear", "norm"


class ByHand(nn.Module):
    """A module that knows nothing of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(IN, OUT)
        self.norm = nn.LayerNorm(OUT)
        self.last = nn.Linear(OUT, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.linear(x)))


def inputs() -> torch.Tensor:
    return torch.randn(5, IN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def sim():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sim = aimet_torch.QuantizationSimModel(
            ByHand().eval(), inputs(), default_param_bw=4, config_file="htp_v79"
        )
    sim.compute_encodings(lambda model: model(inputs()))
    return sim


def specs():
    for granularity in GRANULARITIES:
        for bits in (2, 3, 4, 8):
            for symmetric in (True, False):
                if symmetric or not isinstance(granularity, LPBQ):
                    yield QSpec(bitwidth=bits, symmetric=symmetric, granularity=granularity)


def spec_id(spec: QSpec) -> str:
    return f"{type(spec.granularity).__name__}-{spec.bitwidth}-{spec.symmetric}"


def quantized_layer(spec: QSpec, dtype: torch.dtype, parameters: str, shift: float = 0.0):
    """One AIMET layer with a spec, in either of AIMET's parametrisations."""
    torch.manual_seed(0)
    layer = aimet_torch.nn.QuantizedLinear(IN, OUT).to(dtype)
    quantizer = weight_quantizer_for(spec, layer.weight)
    quantizer.zero_point_shift = shift
    if parameters == "scale_offset":
        quantizer._reparametrize_to_scale_offset()
    layer.param_quantizers["weight"] = quantizer
    return layer


def view(layer):
    from aimet_ext.sim.torch.quantizers import TorchWeightQuantizer

    return TorchWeightQuantizer("layer", layer)


@pytest.mark.parametrize("spec", list(specs()), ids=spec_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameters", ["min_max", "scale_offset"])
class TestEveryGrid:
    def test_what_aimet_computes_is_fake_quantize_on_the_grid_read_back(
        self, spec, dtype, parameters
    ):
        for shift in (0.0, 0.5) if spec.bitwidth == 2 and spec.symmetric else (0.0,):
            layer = quantized_layer(spec, dtype, parameters, shift)
            quantizer = view(layer)
            quantizer.calibrate()
            with torch.no_grad():
                aimet = layer.param_quantizers["weight"](layer.weight).as_subclass(torch.Tensor)
            assert quantizer.layout.zero_point_shift == quantizer.grid().zero_point_shift == shift
            assert torch.equal(fake_quantize(layer.weight, quantizer.grid()), aimet)
            assert quantizer.spec() == spec

    def test_a_scale_written_is_read_back(self, spec, dtype, parameters):
        quantizer = view(quantized_layer(spec, dtype, parameters))
        with pytest.raises(ValueError, match=r"layer: a weight quantizer with a range"):
            quantizer.grid()
        generator = torch.Generator().manual_seed(2)
        scale = torch.rand(quantizer.shape, generator=generator) + 0.01
        offset = None
        if not spec.symmetric:
            offset = -torch.randint(
                0, quantizer.layout.qmax + 1, quantizer.shape, generator=generator
            )
        quantizer.set_scale(scale, offset)
        grid = quantizer.grid()
        if quantizer.layout.scale_bits is None:
            torch.testing.assert_close(grid.scale, scale, rtol=2e-7, atol=0)
            if parameters == "scale_offset":
                assert torch.equal(grid.scale, scale)
            # A second time there is nothing left to change.
            quantizer.set_scale(grid.scale, grid.offset)
            torch.testing.assert_close(quantizer.grid().scale, grid.scale, rtol=2e-7, atol=0)
        else:
            ratio = grid.scale / (scale.amax(1, keepdim=True) / 2**quantizer.layout.scale_bits)
            torch.testing.assert_close(ratio, ratio.round().clamp(1, 16), rtol=1e-5, atol=0)
        if offset is not None:
            assert torch.equal(grid.offset, offset.float())


def test_a_range_outlives_calibration_once_frozen(sim):
    quantizer = adapt(sim).weight_quantizer(LAYER)
    low, high = torch.full((OUT, 1), -0.08), torch.full((OUT, 1), 0.07)
    quantizer.set_range(low, high)
    quantizer.freeze()
    assert quantizer.frozen
    before = quantizer.grid().scale
    sim.compute_encodings(lambda model: model(inputs()))
    assert torch.equal(quantizer.grid().scale, before)
    torch.testing.assert_close(before, torch.full((OUT, 1), 0.01))
    quantizer.freeze(False)
    sim.compute_encodings(lambda model: model(inputs()))
    assert not torch.equal(quantizer.grid().scale, before)


def test_a_range_that_is_not_finite_is_refused(sim):
    quantizer = adapt(sim).weight_quantizer(LAYER)
    with pytest.raises(ValueError, match=r"linear: a finite range is required"):
        quantizer.set_range(torch.tensor(-1.0), torch.tensor(torch.nan))


def test_layers_without_weight_quantizer_are_named(sim):
    adaptor = adapt(sim)
    assert set(adaptor.weight_quantizers()) == {LAYER, NORM, "last"}
    sim.model.last.param_quantizers["weight"] = None
    assert adaptor.weight_quantizer("last") is None
    assert set(adaptor.weight_quantizers()) == {LAYER, NORM}
    with pytest.raises(ValueError, match=r"has none: last;"):
        adaptor.weight_quantizers([LAYER, "last"])
    with pytest.raises(ValueError, match=r"module of sim.model is required, got 'other'"):
        adaptor.weight_quantizer("other")


def test_float_quantizers_are_refused_by_name(sim):
    sim.model.last.param_quantizers["weight"] = (
        aimet_torch.quantization.float.FloatQuantizeDequantize(dtype=torch.float16)
    )
    with pytest.raises(TypeError, match="last: an integer weight quantizer is required"):
        adapt(sim).weight_quantizer("last")


class TestDisabledQuantizers:
    def test_model_is_float_inside_and_restored_after(self, sim):
        torch.manual_seed(0)
        float_model = ByHand().eval()
        quantized = sim.model(inputs())
        with adapt(sim).disabled_quantizers():
            torch.testing.assert_close(sim.model(inputs()), float_model(inputs()))
        assert torch.equal(sim.model(inputs()), quantized)

    def test_weights_and_activations_apart_and_one_module_alone(self, sim):
        quantizers = dict(sim.named_quantizers())
        with adapt(sim).disabled_quantizers(LAYER, activations=False):
            left = dict(sim.named_quantizers())
            assert quantizers.keys() - left.keys() == {"linear.param_quantizers.weight"}
        with adapt(sim).disabled_quantizers(weights=False):
            assert all("param_quantizers" in name for name, _ in sim.named_quantizers())
        assert dict(sim.named_quantizers()) == quantizers

    def test_an_exception_restores_too(self, sim):
        before = dict(sim.named_quantizers())
        with pytest.raises(RuntimeError, match="stop"), adapt(sim).disabled_quantizers():
            raise RuntimeError("stop")
        assert dict(sim.named_quantizers()) == before


class TestLiveActivations:
    def test_are_those_of_a_calibration_on_the_same_tensor(self, sim):
        adaptor, quantizer = adapt(sim), sim.model.linear.input_quantizers[0]
        tensor = 3 * inputs() + 1
        with torch.no_grad(), adaptor.live_activations(LAYER):
            live = quantizer(tensor)
        with torch.no_grad():
            assert not torch.equal(quantizer(tensor), live)
            with quantizer.compute_encodings():
                quantizer(tensor)
            assert torch.equal(quantizer(tensor), live)

    def test_ranges_of_the_quantizers_do_not_matter_and_stay(self, sim):
        adaptor = adapt(sim)
        with adaptor.live_activations(""):
            live = sim.model(inputs())
        adaptor.reset_encodings(adaptor.activation_quantizers())
        with adaptor.live_activations(""):
            assert torch.equal(sim.model(inputs()), live)
            assert not torch.equal(sim.model(100 * inputs()), 100 * live)
        assert not any(q.is_initialized() for q in adaptor.activation_quantizers().values())

    def test_gradients_pass(self, sim):
        x = inputs().requires_grad_()
        with adapt(sim).live_activations(""):
            sim.model(x).sum().backward()
        assert x.grad.abs().sum() > 0


class TestSnapshot:
    def test_everything_comes_back(self, sim):
        adaptor = adapt(sim)
        adaptor.weight_quantizer("last").freeze()
        adaptor.reset_encodings(["norm.output_quantizers.0"])
        objects = dict(sim.model.named_parameters())
        state = copy.deepcopy(sim.model.state_dict())
        tensors, meta = adaptor.snapshot("")

        with torch.no_grad():
            for parameter in sim.model.parameters():
                parameter.add_(1)
        adaptor.weight_quantizer("last").freeze(False)
        adaptor.weight_quantizer(LAYER).freeze()
        adaptor.reset_encodings(["linear.param_quantizers.weight"])
        adaptor.restore("", tensors, meta)

        assert {name: id(p) for name, p in sim.model.named_parameters()} == {
            name: id(p) for name, p in objects.items()
        }
        torch.testing.assert_close(dict(sim.model.state_dict()), dict(state), rtol=0, atol=0)
        assert adaptor.weight_quantizer("last").frozen
        assert not adaptor.weight_quantizer(LAYER).frozen
        assert adaptor.weight_quantizer(LAYER).initialized
        assert not sim.model.norm.output_quantizers[0].is_initialized()

    def test_of_one_module_names_are_relative_and_meta_is_json(self, sim):
        import json

        tensors, meta = adapt(sim).snapshot(LAYER)
        assert {"weight", "bias", "param_quantizers.weight.min"} <= tensors.keys()
        assert json.loads(json.dumps(meta)) == meta

    def test_float_parameters_leave_quantizers_out(self, sim):
        names = adapt(sim).float_parameters("").keys()
        assert names == dict(ByHand().named_parameters()).keys()


class TestStaleRanges:
    def test_only_what_a_transform_moved_is_named(self, sim):
        adaptor = adapt(sim)
        quantized = sim.model(inputs())
        before = adaptor.tensor_ranges("", lambda: sim.model(inputs()))
        assert before["linear.input_quantizers.0"] == (
            float(inputs().min()),
            float(inputs().max()),
        )
        assert "norm.param_quantizers.weight" in before
        assert "linear.param_quantizers.weight" not in before
        assert torch.equal(sim.model(inputs()), quantized)

        with torch.no_grad():  # halve the norm's output, double what reads it: same function
            sim.model.norm.weight.mul_(0.5)
            sim.model.norm.bias.mul_(0.5)
            sim.model.last.weight.mul_(2)
        after = adaptor.tensor_ranges("", lambda: sim.model(inputs()))
        stale = moved_ranges(before, after)
        assert "norm.param_quantizers.weight" in stale and "norm.output_quantizers.0" in stale
        assert "linear.input_quantizers.0" not in stale
        assert "last.output_quantizers.0" not in stale

        sim.model.norm.output_quantizers[0].allow_overwrite(False)
        adaptor.reset_encodings(stale)
        assert not sim.model.norm.output_quantizers[0].is_initialized()
        sim.compute_encodings(lambda model: model(inputs()))
        assert sim.model.norm.output_quantizers[0].is_initialized()

    def test_a_run_that_fails_leaves_the_quantizers(self, sim):
        quantized = sim.model(inputs())
        with pytest.raises(ZeroDivisionError):
            adapt(sim).tensor_ranges("", lambda: 1 / 0)
        assert torch.equal(sim.model(inputs()), quantized)


def test_state_is_preserved(sim):
    sim.model.norm.train()
    sim.model.linear.weight.requires_grad_(False)
    flags = [p.requires_grad for p in sim.model.parameters()]

    def change() -> None:
        sim.model.eval().requires_grad_(False)
        sim.model.linear.weight.requires_grad_(True)
        sim.model.linear.weight.grad = torch.ones(OUT, IN)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), adapt(sim).preserved_state():
        change()
    assert sim.model.norm.training and not sim.model.linear.training
    assert [p.requires_grad for p in sim.model.parameters()] == flags
    assert sim.model.linear.weight.grad is None


def test_ledger_and_settings_follow_a_deep_copy(sim):
    adaptor = adapt(sim)
    assert adaptor.ledger is None and adaptor.settings is None
    adaptor.ledger, adaptor.settings = ["transform"], {"weights": None}
    copied = adapt(copy.deepcopy(sim))
    adaptor.ledger.append("another")
    assert copied.ledger == ["transform"] and copied.settings == {"weights": None}


def test_something_else_than_a_sim_is_named():
    with pytest.raises(TypeError, match=r"QuantizationSimModel of .*, got torch.nn.*Linear"):
        adapt(nn.Linear(1, 1))
