"""Blockwise grids on a sim that exists: those asked for, where asked for, all or nothing."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aimet_ext
from aimet_ext.core.affine import fake_quantize
from aimet_ext.files.ledger import Ledger
from aimet_ext.grids import blockwise as grids
from aimet_ext.grids import torch_layers
from aimet_ext.grids.blockwise import set_blockwise, set_lpbq
from aimet_ext.grids.create import arguments_from_settings, create_sim
from aimet_ext.sim.protocol import adapt
from aimet_ext.sim.torch.state import LayerParameter, quantizers_to_tensors
from aimet_ext.specs import LPBQ, Blockwise, PerChannel, PerTensor, QSpec

aimet_torch = pytest.importorskip("aimet_torch")
config_utils = pytest.importorskip("aimet_torch.quantsim.config_utils")
affine = pytest.importorskip("aimet_torch.quantization.affine")

IDS = torch.arange(32).reshape(2, 16) * 3 % 128
X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
BLOCK = "model.model.layers.0."
UP, DOWN, Q = BLOCK + "mlp.up_proj", BLOCK + "mlp.down_proj", BLOCK + "self_attn.q_proj"
HEAD, EMBED = "model.lm_head", "model.model.embed_tokens"
LPBQ16 = QSpec(granularity=LPBQ(16))


class Net(nn.Module):
    """Convolutions, plain and grouped and 1x1, a norm, linear layers, one weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, groups=2)
        self.depthwise = nn.Conv2d(16, 16, 1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = self.point(self.depthwise(torch.relu(self.grouped(x)))).mean((2, 3))
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def cnn() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # AIMET's own, once in a process
        sim = aimet_torch.QuantizationSimModel(net, X, default_param_bw=8)
    sim.compute_encodings(lambda module: module(X))
    return sim


@pytest.fixture(scope="module")
def llm(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """A sim of a language model with all ranges set, as ``create_sim`` makes it."""

    def build(family: str = "llama", settings: Any = None, **changes: Any) -> Any:
        sim = create_sim(tiny_model(family, **changes), IDS, **(settings or {}))
        sim.compute_encodings(lambda module: module(IDS))
        return sim

    return build


def spec_of(sim: Any, name: str) -> QSpec | None:
    quantizer = adapt(sim).weight_quantizer(name)
    return None if quantizer is None else quantizer.spec()


def specs_of(sim: Any) -> dict[str, QSpec]:
    every = adapt(sim).weight_quantizers()
    return {name: q.spec() for name, q in every.items() if q.weight.dim() > 1}


class State:
    """All that a sim holds, to be compared: values bit by bit, and which objects they are."""

    def __init__(self, sim: Any) -> None:
        adaptor = adapt(sim)
        self.floats = {name: value.clone() for name, value in adaptor.float_state().items()}
        tensors, self.described = quantizers_to_tensors(sim)
        self.tensors = {name: value.clone() for name, value in tensors.items()}
        modules = dict(sim.model.named_modules(remove_duplicate=False))
        self.objects = {name: id(module) for name, module in modules.items()}
        self.objects |= {name: id(value) for name, value in sim.model.named_parameters()}
        self.widths = {
            name: (m.in_features, m.out_features)
            for name, m in modules.items()
            if isinstance(m, nn.Linear)
        }
        self.settings = copy.deepcopy(adaptor.settings)
        config = getattr(sim.model, "config", None)
        self.config = None if config is None else config.to_dict()

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, State)
        plain = ("described", "objects", "widths", "settings", "config")
        return all(getattr(self, key) == getattr(other, key) for key in plain) and all(
            one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
            for one, two in ((self.floats, other.floats), (self.tensors, other.tensors))
        )


def refused(sim: Any, match: str, error: type[Exception] = ValueError, **arguments: Any) -> None:
    """The call is refused with this message and nothing is changed."""
    before = State(sim)
    with pytest.raises(error, match=match):
        set_lpbq(sim, **{"block_size": 16, **arguments})
    assert State(sim) == before


class TestTheGrid:
    @pytest.mark.parametrize("layer", ["conv", "grouped", "point", "head"])
    @pytest.mark.parametrize("kind", ["lpbq", "symmetric", "asymmetric"])
    @pytest.mark.parametrize("bitwidth", [2, 4])
    def test_it_is_aimets_own_with_the_ranges_of_compute_encodings(self, layer, kind, bitwidth):
        """Class, ranges and output are those of AIMET's set_*_for_weights, bit by bit."""
        sim, theirs = cnn(), cnn()
        modules = [getattr(theirs.model, layer)]
        if kind == "lpbq":
            report = set_lpbq(sim, 8, bitwidth=bitwidth, scale_bits=3, layers=layer)
            config_utils.set_grouped_blockwise_quantization_for_weights(
                theirs, modules, bitwidth, True, bitwidth + 3, 8, -1
            )
            expected = QSpec(bitwidth=bitwidth, granularity=LPBQ(8, 3))
        else:
            symmetric = kind == "symmetric"
            report = set_blockwise(sim, 8, bitwidth=bitwidth, symmetric=symmetric, layers=layer)
            config_utils.set_blockwise_quantization_for_weights(
                theirs, modules, bitwidth, symmetric, 8
            )
            expected = QSpec(bitwidth=bitwidth, symmetric=symmetric, granularity=Blockwise(8))
        assert report.specs == {layer: expected} and spec_of(sim, layer) == expected
        ours = adapt(sim).weight_quantizer(layer)
        assert ours.initialized and not ours.frozen
        modules[0].compute_param_encodings()
        assert type(ours.quantizer) is type(modules[0].param_quantizers["weight"])
        with torch.no_grad():
            assert torch.equal(sim.model(X), theirs.model(X))
            quantized = ours.quantizer(ours.weight).as_subclass(Tensor)
            assert torch.equal(fake_quantize(ours.weight, ours.grid()), quantized)

    def test_later_calibration_leaves_it(self):
        """AIMET writes some ranges anew where there is a bias; their steps are the same."""
        sim = cnn()
        set_lpbq(sim, 8, modules_to_exclude="depthwise")
        before = {name: w.grid() for name, w in adapt(sim).weight_quantizers().items()}
        sim.compute_encodings(lambda module: module(X))
        for name, weight in adapt(sim).weight_quantizers().items():
            torch.testing.assert_close(weight.grid().scale, before[name].scale)
            assert torch.equal(weight.grid().offset, before[name].offset)
        assert len(before) == 7

    def test_activation_ranges_and_other_quantizers_stay(self):
        sim = cnn()
        bias = affine.QuantizeDequantize((), 8, True)
        bias.set_range(torch.tensor(-7.0), torch.tensor(7.0))
        sim.model.head.param_quantizers["bias"] = bias
        tensors, _ = quantizers_to_tensors(sim)
        kept = {key: value.clone() for key, value in tensors.items() if "head.param" not in key}
        set_lpbq(sim, 8, layers="head")
        tensors, _ = quantizers_to_tensors(sim)
        assert all(torch.equal(tensors[key], value) for key, value in kept.items())
        assert sim.model.head.param_quantizers["bias"] is bias
        assert bias.max.detach().item() == 7

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_ranges_are_float32_whatever_the_weight(self, tiny_llama, dtype):
        sim = create_sim(tiny_llama.to(dtype), IDS, activations=None)
        set_lpbq(sim, 16)
        quantizer = sim.model.get_submodule(Q).param_quantizers["weight"]
        assert quantizer.max.dtype == torch.float32
        assert sim.model(IDS).dtype == dtype and sim.model(IDS).isfinite().all()

    def test_a_replaced_quantizer_may_be_of_another_class(self):
        from aimet_torch.quantization.float import FloatQuantizeDequantize

        sim = cnn()
        sim.model.head.param_quantizers["weight"] = FloatQuantizeDequantize(5, 10)
        set_lpbq(sim, 8, layers="head")
        assert spec_of(sim, "head").granularity == LPBQ(8)

    def test_a_training_step_and_a_deep_copy(self):
        sim = cnn()
        set_lpbq(sim, 8, modules_to_exclude="depthwise")
        copied = copy.deepcopy(sim)
        assert torch.equal(copied.model(X), sim.model(X))
        sim.model(X).square().mean().backward()
        assert sim.model.point.param_quantizers["weight"].max.grad.abs().sum() > 0
        set_blockwise(copied, 4, modules_to_exclude="depthwise")
        assert spec_of(copied, "conv").granularity == Blockwise(4)


class TestWhichLayers:
    """Every way to name layers; those not named stay what they are."""

    LINEARS = ("first", "second", "head")

    @pytest.mark.parametrize(
        ("layers", "expected"),
        [
            ("head", {"head"}),
            ("*oint", {"point"}),
            (["conv", "head"], {"conv", "head"}),
            (nn.Linear, {*LINEARS}),
            ([nn.Linear, "conv"], {*LINEARS, "conv"}),
            (lambda module: getattr(module, "kernel_size", 0) == (3, 3), {"conv", "grouped"}),
            ((layer for layer in ("conv", "point")), {"conv", "point"}),
        ],
        ids=["name", "pattern", "names", "type", "mixed", "condition", "generator"],
    )
    def test_forms(self, layers, expected):
        sim = cnn()
        before = specs_of(sim)
        report = set_lpbq(sim, 8, layers=layers)
        after = specs_of(sim)
        assert set(report.specs) == expected
        assert {name for name in after if after[name] != before[name]} == expected
        assert set(report.untouched) == before.keys() - expected

    def test_module_objects_and_exclusion(self):
        sim = cnn()
        layers = [sim.model.head, sim.model.conv]
        assert set(set_lpbq(sim, 8, layers=layers).specs) == {"head", "conv"}
        assert set(set_lpbq(sim, 8, layers=sim.model.point).specs) == {"point"}
        exclude = [sim.model.first, "second", "depthwise", sim.model.conv]
        report = set_blockwise(sim, 8, modules_to_exclude=exclude)
        assert set(report.specs) == {"grouped", "point", "head"}

    def test_by_default_not_the_embedding_nor_the_output_layer(self, llm):
        sim = llm()
        report = set_lpbq(sim, 16)
        assert len(report.specs) == 14 and set(report.specs.values()) == {LPBQ16}
        assert set(report.untouched) == {EMBED, HEAD}
        assert spec_of(sim, HEAD) == QSpec(bitwidth=8)
        assert spec_of(sim, EMBED) == QSpec(bitwidth=8, granularity=PerTensor())
        assert len(set_blockwise(sim, 16, layers="model.*").specs) == 14

    def test_named_they_are_meant(self, llm):
        sim = llm()
        assert set(set_lpbq(sim, 16, layers="lm_head").specs) == {HEAD}
        assert set(set_lpbq(sim, 32, layers="*.embed_tokens").specs) == {EMBED}
        assert spec_of(sim, EMBED).granularity == LPBQ(32)
        assert HEAD in set_lpbq(sim, 16, layers=[nn.Linear]).specs  # as AIMET understands it
        assert spec_of(sim, Q) == LPBQ16
        assert sim.model(IDS).isfinite().all()

    def test_names_of_the_checkpoint_and_containers_to_exclude(self, llm):
        sim = llm()
        report = set_lpbq(sim, 16, layers="model.layers.*.mlp.*", modules_to_exclude=BLOCK[:-1])
        assert set(report.specs) == {
            f"model.model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
        }
        report = set_lpbq(sim, 16, modules_to_exclude=["model.layers.1", "*.mlp"])
        assert set(report.specs) == {f"{BLOCK}self_attn.{name}_proj" for name in "qkvo"}

    def test_float_layers_are_passed_over_by_patterns(self):
        sim = cnn()
        sim.model.conv.param_quantizers["weight"] = None
        report = set_lpbq(sim, 8, layers="*n*", modules_to_exclude="depthwise")
        assert "conv" not in report.specs and spec_of(sim, "conv") is None
        for layers in ("conv", sim.model.conv):
            refused(
                sim, r"conv is named in layers and its weight is float.*overrides", layers=layers
            )

    def test_bad_selections(self):
        sim, other = cnn(), cnn()
        refused(sim, r"layers='\*\.mlp' must fit .* it fits none; names look like", layers="*.mlp")
        refused(sim, r"layers must hold modules of sim\.model", layers=other.model.head)
        refused(sim, r"type Embedding must hold for a module", layers=nn.Embedding)
        refused(sim, r"condition must hold for a module", layers=lambda module: False)
        refused(sim, r"norm: .*dimension 1.*got QuantizedBatchNorm2d", layers=sim.model.norm)
        sim.model.norm.param_quantizers["weight"] = affine.QuantizeDequantize((), 8, True)
        refused(sim, r"norm: .*got QuantizedBatchNorm2d", layers=lambda module: True)
        refused(sim, r"layers must be patterns or names.*got int", TypeError, layers=3)
        refused(sim, r"layers must be patterns or names.*got int", TypeError, layers=[int])
        refused(sim, r"at least one layer must remain", layers=[])
        refused(sim, r"at least one layer must remain", layers="head", modules_to_exclude=["head"])
        for bad in ("heads", ["conv", "heads"]):
            refused(
                sim, r"modules_to_exclude must name.*not found: 'heads'", modules_to_exclude=bad
            )
        refused(sim, "not found: a QuantizedLinear", modules_to_exclude=[other.model.head])
        refused(sim, "must hold names or modules, got int", TypeError, modules_to_exclude=[1])

    def test_a_pattern_for_the_output_layer_alone_says_how_to_name_it(self, llm):
        refused(llm(), "only others: model.lm_head.*must be named in full", layers="*lm_h*")


class TestOverrides:
    def test_first_match_wins_for_any_layer(self, llm):
        sim = llm()
        overrides = {
            "*.layers.0.mlp.down_proj": QSpec(bitwidth=8),
            "model.layers.*.mlp.*": QSpec(bitwidth=3, granularity=Blockwise(32)),
            "*.layers.1.self_attn.q_proj": None,
            "lm_head": QSpec(granularity=PerTensor()),
        }
        report = set_lpbq(sim, 16, layers="*_proj", overrides=overrides)
        assert spec_of(sim, DOWN) == QSpec(bitwidth=8)
        assert spec_of(sim, UP) == QSpec(bitwidth=3, granularity=Blockwise(32))
        assert spec_of(sim, "model.model.layers.1.self_attn.q_proj") is None
        assert spec_of(sim, HEAD) == QSpec(granularity=PerTensor())
        assert spec_of(sim, Q) == LPBQ16
        assert report.untouched == (EMBED,) and len(report.specs) == 15
        assert sim.model(IDS).isfinite().all()

    def test_they_quantize_a_float_layer_and_reach_beyond_layers(self):
        sim = cnn()
        sim.model.conv.param_quantizers["weight"] = None
        report = set_lpbq(sim, 8, layers="head", overrides={"conv": QSpec(granularity=LPBQ(4))})
        assert set(report.specs) == {"head", "conv"}
        assert spec_of(sim, "conv") == QSpec(granularity=LPBQ(4))
        report = set_lpbq(sim, 8, layers=[], overrides={"conv": None})
        assert report.specs == {"conv": None} and spec_of(sim, "conv") is None

    def test_bad_ones(self):
        sim = cnn()
        refused(
            sim, r"must fit a layer .* '\*\.experts\.\*' fits none", overrides={"*.experts.*": None}
        )
        refused(sim, "must map patterns to QSpec or None", TypeError, overrides={"head": "int4"})
        refused(sim, "norm.* fits none", overrides={"norm": None})

    def test_the_callers_mapping_is_left_alone(self):
        overrides = {"head": None}
        exclude = ["depthwise"]
        set_lpbq(cnn(), 8, overrides=overrides, modules_to_exclude=exclude)
        assert overrides == {"head": None} and exclude == ["depthwise"]


class TestTiedWeights:
    def test_they_share_one_quantizer(self, llm):
        sim = llm(tie_word_embeddings=True)
        report = set_lpbq(sim, 16, layers="lm_head")
        assert set(report.specs) == {HEAD, EMBED}
        embed, head = sim.model.get_submodule(EMBED), sim.model.get_submodule(HEAD)
        assert embed.weight is head.weight
        assert embed.param_quantizers["weight"] is head.param_quantizers["weight"]
        set_lpbq(sim, 16, layers=[], overrides={"lm_head": None})
        assert spec_of(sim, HEAD) is spec_of(sim, EMBED) is None

    def test_also_in_a_sim_that_gave_each_its_own(self):
        sim = cnn()
        first, second = sim.model.first.param_quantizers, sim.model.second.param_quantizers
        assert first["weight"] is not second["weight"]
        assert set(set_lpbq(sim, 8, layers="second").specs) == {"first", "second"}
        assert first["weight"] is second["weight"]

    def test_two_specs_are_refused(self):
        sim = cnn()
        share = "share one weight and need the same spec"
        refused(sim, f"{share}, got", layers="first", overrides={"second": None})
        refused(sim, f"{share}, modules_to_exclude", layers="first", modules_to_exclude=["second"])
        sim.model.second.param_quantizers["weight"] = None
        refused(sim, f"{share}, and that of second is float", layers="first")
        set_lpbq(sim, 8, layers="first", overrides={"second": QSpec(granularity=LPBQ(8))})
        assert spec_of(sim, "second") == QSpec(granularity=LPBQ(8))


class TestIndivisibleWidths:
    def test_error_names_every_layer(self):
        refused(
            cnn(),
            r"conv \(width 8, block size 16\), grouped \(width 8 in each of 2 groups, block size 16"
            r"\), depthwise \(width 1 in each of 16 groups, block size 16\); choose another, or",
        )

    @pytest.mark.parametrize("method", [set_lpbq, set_blockwise])
    def test_per_channel_is_reported(self, method):
        sim = cnn()
        report = method(sim, 16, on_indivisible="per_channel")
        assert set(report.per_channel_instead) == {"conv", "grouped", "depthwise"}
        for name in report.per_channel_instead:
            assert spec_of(sim, name) == QSpec(granularity=PerChannel())
        assert spec_of(sim, "point").block_size == 16
        assert sim.model(X).isfinite().all()

    def test_convolutions_cannot_be_padded(self):
        refused(
            cnn(),
            r"needs decoder blocks .* for conv, grouped, depthwise, but",
            on_indivisible="pad",
        )

    def test_nor_can_attention(self, llm):
        refused(llm(), r"read something else: .*k_proj", block_size=48, on_indivisible="pad")

    @pytest.mark.parametrize(
        ("family", "layers"),
        [
            ("llama", "*"),
            ("llama", "*.layers.0.mlp.down_proj"),
            ("qwen2", "*.mlp.down_proj"),
            ("phi3", "*.mlp.down_proj"),
        ],
    )
    def test_padding_in_place_is_exact(self, llm, family, layers):
        """Float and quantized outputs stay, all ranges that were calibrated stay."""
        sim = llm(family, intermediate_size=100)
        with torch.no_grad(), adapt(sim).disabled_quantizers():
            floats = sim.model(IDS)
        # The same grid without padding: per channel for what is padded, so that the rest shows.
        same = {"*.mlp.down_proj": QSpec(granularity=PerChannel())}
        before, _ = quantizers_to_tensors(sim)
        before = {key: value.clone() for key, value in before.items()}
        report = set_lpbq(sim, 32, layers=layers, on_indivisible="pad")
        assert report.padded == {f"model.model.layers.{i}": 128 for i in range(2)}
        assert sim.model.get_submodule(DOWN).in_features == 128
        assert sim.model.get_submodule(DOWN).weight.shape == (64, 128)
        assert sim.model.config.intermediate_size == 128
        assert spec_of(sim, DOWN).granularity == LPBQ(32)
        with torch.no_grad(), adapt(sim).disabled_quantizers():
            torch.testing.assert_close(sim.model(IDS), floats)
        after, _ = quantizers_to_tensors(sim)
        activations = [key for key in after if ".param_quantizers." not in key]
        assert activations and all(torch.equal(after[key], before[key]) for key in activations)
        if layers != "*":
            set_blockwise(sim, 32, layers=[], overrides=same)
            expected = llm(family, intermediate_size=100)
            torch.testing.assert_close(sim.model(IDS), expected.model(IDS), rtol=0, atol=2e-4)

    def test_old_cells_of_quantizers_that_grow_keep_their_ranges(self, llm):
        spec = QSpec(bitwidth=4, granularity=Blockwise(25))
        sim = llm(intermediate_size=100, settings={"overrides": {"*.1.mlp.down_proj": spec}})
        other = "model.model.layers.1.mlp.down_proj"
        with torch.no_grad():  # as if trained: not the ranges of plain calibration
            for name in (UP, other):
                for bound in ("min", "max"):
                    getattr(sim.model.get_submodule(name).param_quantizers["weight"], bound).mul_(
                        0.7
                    )
        old = {name: adapt(sim).weight_quantizer(name).grid() for name in (UP, other)}
        set_lpbq(
            sim,
            20,
            layers=DOWN,
            overrides={DOWN: QSpec(granularity=LPBQ(40), on_indivisible="pad")},
        )
        new = {name: adapt(sim).weight_quantizer(name).grid() for name in (UP, other)}
        assert sim.model.get_submodule(other).in_features == 200  # both block sizes divide it
        assert new[UP].shape == (200, 1) and torch.equal(new[UP].scale[:100], old[UP].scale)
        assert new[other].shape == (64, 8) and torch.equal(
            new[other].scale[:, :4], old[other].scale
        )
        assert sim.model(IDS).isfinite().all()
        assert spec_of(sim, other) == spec

    def test_what_was_decided_is_not_padded(self, llm):
        settings = {"block_size": 32, "layers": "*.0.mlp.down_proj", "on_indivisible": "pad"}
        sim = llm(intermediate_size=100)
        adapt(sim).weight_quantizer("model.model.layers.1.mlp.up_proj").freeze()
        refused(sim, r"layers\.1\.mlp\.up_proj: an earlier technique decided", **settings)
        sim = llm(intermediate_size=100)
        adapt(sim).ledger = Ledger("ef" * 32)
        adapt(sim).ledger.log_run("omniquant", [UP])
        refused(sim, r"layers\.0\.mlp\.up_proj: an earlier technique decided", **settings)

    def test_a_quantizer_that_cannot_grow_is_named(self, llm):
        settings = {"block_size": 32, "layers": "*.0.mlp.down_proj", "on_indivisible": "pad"}
        sim = llm(intermediate_size=100)
        up = sim.model.get_submodule(UP)
        up.param_quantizers["weight"] = affine.QuantizeDequantize(
            (50, 1), 8, True, block_size=(2, 64)
        )
        refused(sim, r"mlp\.up_proj: a quantizer of the weight that can grow", **settings)
        sim = llm(intermediate_size=100)
        up = sim.model.get_submodule(UP)
        up.output_quantizers[0] = affine.QuantizeDequantize((100,), 8, False)
        refused(sim, r"up_proj\.output_quantizers\.0: beside an MLP .* per tensor", **settings)
        sim = llm(intermediate_size=100)
        layers = sim.model.model.model.layers
        layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
        refused(sim, r"up_proj: to be padded a layer must not share", **settings)


class TestWhatIsRefused:
    def test_frozen_quantizers_by_name(self):
        sim = cnn()
        adapt(sim).weight_quantizer("point").freeze()
        arguments = {"block_size": 8, "modules_to_exclude": ["depthwise"]}
        refused(sim, r"^point: .*froze its range.*modules_to_exclude", **arguments)
        refused(sim, r"^point: ", **arguments, overrides={"point": None})
        assert "point" not in set_lpbq(sim, 8, modules_to_exclude=["depthwise", "point"]).specs

    def test_rounded_weights_by_name(self):
        sim = cnn()
        ledger = Ledger("ef" * 32)
        ledger.log_run("omniquant", ["conv"])
        ledger.log_run("gptq", ["point"], rounds=True)
        adapt(sim).ledger = ledger
        refused(sim, r"^point: .*gptq already rounded", block_size=8, layers=["point", "conv"])
        set_lpbq(sim, 8, layers="conv")
        assert [run.technique for run in adapt(sim).ledger.runs] == ["omniquant", "gptq"]

    def test_weights_that_are_not_finite(self):
        sim = cnn()
        with torch.no_grad():
            sim.model.point.weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"^point: a finite weight is required"):
            set_lpbq(sim, 8, layers="point")

    @pytest.mark.parametrize(
        "bad",
        [
            {"block_size": 1},
            {"block_size": (1, 16)},
            {"bitwidth": 1},
            {"bitwidth": 9},
            {"overrides": {"conv": QSpec(bitwidth=17)}},
            {"scale_bits": 0},
            {"on_indivisible": "ignore"},
        ],
        ids=str,
    )
    def test_settings_out_of_range(self, bad):
        refused(cnn(), next(iter(bad)), **bad)

    def test_other_objects(self):
        with pytest.raises(TypeError, match="sim must be a QuantizationSimModel"):
            set_lpbq(Net())


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("calibrated_weight_quantizer", RuntimeError),
        ("put", KeyboardInterrupt),
        ("_updated", RuntimeError),
    ],
)
@pytest.mark.parametrize("width", [128, 100])
def test_a_change_that_fails_leaves_nothing_behind(llm, monkeypatch, width, function, error):
    sim = llm(intermediate_size=width)
    before = State(sim)
    homes = {"_updated": grids, "put": LayerParameter}
    home = homes.get(function, torch_layers)
    original, calls = getattr(home, function), []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == (1 if function == "_updated" else 2):
            raise error("in the middle")
        return original(*args)

    monkeypatch.setattr(home, function, failing)
    with pytest.raises(error, match="in the middle"):
        set_lpbq(sim, 16, layers="*.down_proj", on_indivisible="pad")
    assert State(sim) == before
    monkeypatch.undo()
    set_lpbq(sim, 16, layers="*.down_proj", on_indivisible="pad")
    assert State(sim) != before


@pytest.mark.parametrize(
    ("family", "changes", "arguments"),
    [
        ("llama", {}, {"layers": ["*", "lm_head"], "overrides": {"*.k_proj": None}}),
        ("qwen2", {"tie_word_embeddings": True}, {"layers": "lm_head", "scale_bits": 3}),
        ("llama", {"intermediate_size": 100}, {"on_indivisible": "per_channel"}),
        ("qwen2", {"intermediate_size": 100}, {"on_indivisible": "pad"}),
        (
            "llama",
            {"intermediate_size": 100},
            {"layers": "*.0.*.down_proj", "on_indivisible": "pad"},
        ),
    ],
    ids=["overrides", "tied", "per_channel", "padded", "one padded"],
)
class TestSettings:
    def test_they_build_the_same_sim(self, llm, tiny_model, family, changes, arguments):
        settings = {"overrides": {"*.o_proj": QSpec(bitwidth=8)}}
        sim = llm(family, settings=settings, **changes)
        before = copy.deepcopy(sim.aimet_ext_settings)
        set_lpbq(sim, 16, **arguments)
        plain = json.loads(json.dumps(sim.aimet_ext_settings))
        assert plain == sim.aimet_ext_settings != before
        model = tiny_model(family, **changes)
        again = create_sim(model, IDS, **arguments_from_settings(plain))
        assert again.aimet_ext_settings == sim.aimet_ext_settings
        assert specs_of(again) == specs_of(sim)
        places = [dict(each.named_quantizers()).keys() for each in (again, sim)]
        assert places[0] == places[1]

    def test_an_export_comes_back_bit_by_bit(self, llm, tmp_path, family, changes, arguments):
        pytest.importorskip("onnx")
        sim = llm(family, **changes)
        set_lpbq(sim, 16, **arguments)
        aimet_ext.export(sim, tmp_path / "out", "m", IDS)
        loaded = aimet_ext.load(tmp_path / "out")
        assert torch.equal(loaded.model(IDS), sim.model(IDS))
        tensors, described = quantizers_to_tensors(sim)
        loaded_tensors, loaded_described = quantizers_to_tensors(loaded)
        assert described == loaded_described
        assert all(torch.equal(tensors[name], loaded_tensors[name]) for name in tensors)
        assert adapt(loaded).settings == adapt(sim).settings


@pytest.mark.parametrize("method", [set_lpbq, set_blockwise])
def test_a_convolutional_network_is_exported_and_loaded(tmp_path, method):
    pytest.importorskip("onnx")
    sim, other = cnn(), cnn()
    method(sim, 8, on_indivisible="per_channel")
    assert adapt(sim).settings is None
    aimet_ext.export(sim, tmp_path / "out", "net", X)
    aimet_ext.load(tmp_path / "out", sim=other)
    assert torch.equal(other.model(X), sim.model(X))
    assert specs_of(other) == specs_of(sim)


class TestTheReport:
    def test_the_table(self, llm):
        sim = llm(intermediate_size=100)
        report = set_lpbq(
            sim, 32, on_indivisible="per_channel", overrides={"*.0.self_attn.q_proj": None}
        )
        lines = str(report).splitlines()
        assert lines[0].split() == ["layers", "weights"]
        rows = {tuple(line.split()[:2]): line for line in lines[1:-1]}
        assert rows["model.model.layers.*.mlp.down_proj", "2"].endswith("int4 PerChannel() instead")
        assert rows["model.model.layers.*.mlp.up_proj", "2"].endswith(
            "int4 LPBQ(block_size=32, scale_bits=4)"
        )
        queries = [line for line in lines if "q_proj" in line]
        assert len(queries) == 2 and any(line.endswith(" float") for line in queries)
        assert lines[-1] == "2 other quantized layers left as they are"

    def test_padding_is_in_it(self, llm):
        report = set_blockwise(llm(intermediate_size=100), 32, on_indivisible="pad")
        assert "2 MLPs padded with zeros to an inner width of 128" in str(report)
        assert "uint" not in str(report)
